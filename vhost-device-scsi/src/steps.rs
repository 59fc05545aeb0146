// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The steps of a request between its stages.

use std::io;

use vhost_device_common::warn_limited;
use vhost_device_common::worker::Queue;
use vhost_device_storage::engine::IoRequest;

use crate::lun::{Action, Answer, Command, Response, Step};
use crate::procedure::{ChainData, TaskMedium};
use crate::request::{Delivery, Reply, Request, Stage};
use crate::shared::DRIVER;
use crate::unit::Unit;

/// Returns the answer to a command that could not be carried out.
pub fn undelivered() -> Answer {
    Answer {
        response: Response::Failure,
        ..Answer::good()
    }
}

/// Makes the command of a request whose header was read.
pub fn command<'a>(cdb: &'a [u8], reply: &Reply) -> Command<'a> {
    Command {
        cdb,
        nexus: DRIVER,
        data_out: reply.data_out,
        data_in: reply.data_in,
    }
}

/// Has the logical unit check a command.
pub fn check(unit: &Unit, cdb: &[u8], reply: &mut Reply) -> Stage {
    let command = command(cdb, reply);
    let mut data = ChainData(&mut reply.chain);
    match unit.logical.start(&command, &mut data, &unit.target) {
        Step::Done(answer) => Stage::Answered(answer),
        Step::Action(action) => Stage::Limited(action),
        Step::Procedure(procedure) => Stage::LimitedProcedure(procedure),
    }
}

/// Makes the answer of an action that has ended after it moved so many bytes.
pub fn finish(request: &Request, action: &Action, outcome: io::Result<()>, moved: u64) -> Stage {
    if let Err(error) = &outcome {
        warn_limited(format_args!(
            "{}: {} failed: {error}",
            request.unit.address,
            describe(action)
        ));
    }
    Stage::Answered(request.unit.logical.finish(action, outcome, moved))
}

/// Describes an action in a few words, however many ranges it has.
fn describe(action: &Action) -> String {
    match action {
        Action::Read { offset, length } => format!("read of {length} bytes at {offset}"),
        Action::Write { offset, length, .. } => format!("write of {length} bytes at {offset}"),
        Action::Flush => "flush".to_owned(),
        Action::Unmap(list) => {
            let first = list.first().map_or(0, |range| range.start);
            format!("unmap of {} ranges, the first one at {first}", list.len())
        }
        Action::Zero { range, .. } => {
            let length = range.end.saturating_sub(range.start);
            format!("write of {length} zeroes at {}", range.start)
        }
    }
}

/// Carries out the operation of a request in this thread.
pub fn execute(request: &Request) -> io::Result<u64> {
    request.unit.disk.execute(request.operation())
}

/// Returns the next stage after an operation has ended with `outcome`.
pub fn advance(request: &mut Request, outcome: io::Result<u64>) -> Stage {
    let Stage::Working(action, mut work) = request.take_stage() else {
        return Stage::None;
    };
    let chain = &mut request.reply.chain;
    match work.advance(chain, &request.unit.disk, outcome) {
        Ok(false) => Stage::Working(action, work),
        Ok(true) => finish(request, &action, Ok(()), work.bytes()),
        Err(error) => finish(request, &action, Err(error), work.bytes()),
    }
}

/// Runs the procedure of a request, in a thread that may block.
pub fn run_procedure(request: &mut Request) {
    let Stage::Procedure(procedure) = request.take_stage() else {
        return;
    };
    let medium = TaskMedium {
        unit: &request.unit,
        task: request.task,
    };
    let mut data = ChainData(&mut request.reply.chain);
    request.stage = Stage::Answered(procedure.run(&medium, &mut data));
}

pub fn reply_with(queue: &mut Queue, reply: Reply, delivery: Delivery, answer: &Answer) {
    let (chain, used, outcome) = reply.write(delivery, answer);
    queue.complete_with(chain, used, outcome);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_action_with_many_ranges_is_described_in_a_few_words() {
        let list = (1..=256).map(|number| number * 4096..number * 4096 + 512);
        let text = describe(&Action::Unmap(list.collect()));
        assert_eq!(text, "unmap of 256 ranges, the first one at 4096");
    }
}
