// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The interface of a device for long runs.

use std::time::Instant;

use fastrand::Rng;

use super::fault::Fault;
use super::link::Link;
use super::loss::Loss;
use super::report::Tally;

/// Whether the process is ended and started again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lives {
    /// It lives as long as the run, so that its resources can be compared.
    One,
    /// It is killed again and again.
    Many,
}

impl Lives {
    /// Returns the faults for a device, including its own.
    pub(super) fn faults(self, own: &[Fault]) -> Vec<Fault> {
        let deadly = match self {
            Self::One => &[],
            Self::Many => Fault::DEADLY,
        };
        [Fault::COMMON, own, deadly].concat()
    }

    /// Returns the name of a scenario for a device.
    pub fn name(self, device: &str) -> String {
        match self {
            Self::One => device.to_owned(),
            Self::Many => format!("{device}, killed"),
        }
    }
}

/// Creates a scenario, given random numbers for its load.
pub type Start = Box<dyn FnOnce(Rng) -> Result<Box<dyn Scenario>, Loss> + Send>;

/// A device under load.
pub trait Scenario {
    /// Returns the back-end and the connection to it.
    fn link(&mut self) -> &mut Link;

    /// Returns whether its process is ended and started again.
    fn lives(&self) -> Lives;

    /// Returns the faults of this device only. A fault that is listed twice is injected twice as often.
    fn own_faults(&self) -> &'static [Fault] {
        &[]
    }

    /// Returns whether its state can be saved, whatever the guest does.
    fn can_be_saved(&self) -> bool {
        true
    }

    /// Runs load until then, and compares the results. Requests may stay in flight.
    fn load(&mut self, until: Instant, tally: &Tally) -> Result<(), Loss>;

    /// Takes all used requests, while rings are stopped or the process has ended.
    fn collect(&mut self, tally: &Tally) -> Result<(), Loss>;

    /// Forgets all requests in flight, because `fault` makes the driver start again.
    fn forget(&mut self, fault: Fault) -> Result<(), Loss>;

    /// Inspects what a process has left behind, before the next one is started.
    fn inspect(&mut self) -> Result<(), Loss> {
        Ok(())
    }

    /// Notes that the connection (or, if `is_new`, the process) is new, and its rings run. With `has_state`, it continues with the old state.
    fn connected(&mut self, is_new: bool, has_state: bool) -> Result<(), Loss> {
        let _ = (is_new, has_state);
        Ok(())
    }

    /// Injects a fault of this device only.
    fn inject(&mut self, fault: Fault, tally: &Tally) -> Result<(), Loss> {
        let _ = tally;
        Err(Loss(format!("{fault} is not for this device")))
    }

    /// Waits until nothing is in flight, and compares everything.
    fn settle(&mut self, tally: &Tally) -> Result<(), Loss>;
}
