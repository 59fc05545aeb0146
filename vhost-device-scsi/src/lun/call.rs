// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A command that is carried out, and the steps that it can return.

use std::sync::Arc;

use super::answer::{Answer, Failure, Response};
use super::cdb::Fields;
use super::medium::{Action, DataOut, Facts, Procedure, Target};
use super::sense::{Sense, code};
use super::{Command, LogicalUnit, Step};

/// A command that is carried out.
pub struct Call<'a> {
    pub unit: &'a Arc<LogicalUnit>,
    pub command: &'a Command<'a>,
    pub cdb: Fields<'a>,
    pub data: &'a mut dyn DataOut,
    pub target: &'a Arc<dyn Target>,
}

/// What a command comes to.
pub type Outcome = Result<Step, Failure>;

impl Call<'_> {
    pub fn facts(&self) -> &Facts {
        &self.unit.facts
    }

    /// Reads a parameter list of `length` bytes.
    ///
    /// # Errors
    /// It is longer than `most`, or than the data-out buffer, or cannot be read.
    pub fn parameters(&mut self, length: usize, most: usize) -> Result<Vec<u8>, Failure> {
        if length > most {
            return Err(Sense::illegal(code::PARAMETER_LIST_LENGTH).into());
        }
        self.has_data_out(length as u64)?;
        let mut list = vec![0; length];
        let failed = |_| Failure::Response(Response::Failure);
        self.data.read(&mut list).map_err(failed)?;
        Ok(list)
    }

    /// Checks that the data-out buffer has `length` bytes.
    pub fn has_data_out(&self, length: u64) -> Result<(), Failure> {
        match length > self.command.data_out {
            true => Err(Failure::Response(Response::Overrun)),
            false => Ok(()),
        }
    }

    /// Checks that the data-in buffer has room for `length` bytes.
    pub fn has_data_in(&self, length: u64) -> Result<(), Failure> {
        match length > self.command.data_in {
            true => Err(Failure::Response(Response::Overrun)),
            false => Ok(()),
        }
    }
}

/// Answers GOOD.
pub fn good() -> Outcome {
    Ok(Step::Done(Answer::good()))
}

/// Answers with data, cut to the allocation length.
pub fn reply(mut data: Vec<u8>, allocation: usize) -> Outcome {
    data.truncate(allocation);
    Ok(Step::Done(Answer::data(data)))
}

/// Goes on with an action.
pub fn action(action: Action) -> Outcome {
    Ok(Step::Action(action))
}

/// Goes on with a procedure.
pub fn procedure(procedure: Procedure) -> Outcome {
    Ok(Step::Procedure(procedure))
}
