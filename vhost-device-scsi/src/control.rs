// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The control queue: task management functions and asynchronous notifications (VIRTIO 1.3, 5.6.6.2).
//!
//! A function first lets the threads take what is in the rings, then marks the tasks that it concerns, waits until they have ended, and is
//! answered when their answers are visible to the driver.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vhost_device_common::chain::{Chain, ChainError};
use vhost_device_common::statistics::Outcome;
use vhost_device_common::worker::Queue;
use virtio_bindings::virtio_scsi::{
    VIRTIO_SCSI_S_BAD_TARGET, VIRTIO_SCSI_S_FAILURE, VIRTIO_SCSI_S_FUNCTION_REJECTED,
    VIRTIO_SCSI_S_FUNCTION_SUCCEEDED, VIRTIO_SCSI_S_INCORRECT_LUN, VIRTIO_SCSI_S_OK,
    VIRTIO_SCSI_T_AN_QUERY, VIRTIO_SCSI_T_AN_SUBSCRIBE, VIRTIO_SCSI_T_TMF,
    VIRTIO_SCSI_T_TMF_ABORT_TASK, VIRTIO_SCSI_T_TMF_ABORT_TASK_SET,
    VIRTIO_SCSI_T_TMF_CLEAR_TASK_SET, VIRTIO_SCSI_T_TMF_I_T_NEXUS_RESET,
    VIRTIO_SCSI_T_TMF_LOGICAL_UNIT_RESET, VIRTIO_SCSI_T_TMF_QUERY_TASK,
    VIRTIO_SCSI_T_TMF_QUERY_TASK_SET,
};

use crate::address::{Address, Addressed};
use crate::passthrough::PassThrough;
use crate::request::TASK_MANAGEMENT;
use crate::shared::{DRIVER, Shared};
use crate::tasks::{Mark, Tasks};
use crate::unit::Unit;

/// How long a function waits for the threads to take what is in the rings: some may be full of requests that have to wait.
const SWEEP: Duration = Duration::from_millis(20);
/// How long it waits for the threads to make their answers visible. They do so at once, unless the front-end has just stopped their queues.
const PUBLISH: Duration = Duration::from_secs(1);
/// How often it looks whether they have.
const INTERVAL: Duration = Duration::from_millis(1);
/// Bytes of the answer to a notification request: event_actual u32, response u8.
const NOTIFICATION: usize = 5;
/// Most bytes that are written as the answer to an unknown request.
const UNKNOWN: usize = 64;

const COMPLETE: u8 = VIRTIO_SCSI_S_OK as u8;
const SUCCEEDED: u8 = VIRTIO_SCSI_S_FUNCTION_SUCCEEDED as u8;
const REJECTED: u8 = VIRTIO_SCSI_S_FUNCTION_REJECTED as u8;
const FAILURE: u8 = VIRTIO_SCSI_S_FAILURE as u8;
const BAD_TARGET: u8 = VIRTIO_SCSI_S_BAD_TARGET as u8;
const INCORRECT_LUN: u8 = VIRTIO_SCSI_S_INCORRECT_LUN as u8;

/// What a function does with the tasks that it concerns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Abort,
    ResetUnit,
    ResetNexus,
    Query,
}

/// A logical unit, or a device of the host in its place.
enum Subject {
    Unit(Arc<Unit>),
    Device(Arc<PassThrough>),
}

impl Subject {
    fn address(&self) -> Address {
        match self {
            Self::Unit(unit) => unit.address,
            Self::Device(device) => device.address,
        }
    }

    fn tasks(&self) -> &Tasks {
        match self {
            Self::Unit(unit) => &unit.tasks,
            Self::Device(device) => &device.tasks,
        }
    }

    /// Returns what a target has.
    fn of(target: u8, shared: &Shared) -> Vec<Self> {
        let units = shared.table.target(target).into_iter().map(Self::Unit);
        let devices = shared.devices.iter();
        let devices = devices.filter(|device| device.address.target == target);
        units.chain(devices.cloned().map(Self::Device)).collect()
    }
}

/// A function in progress.
struct Function {
    chain: Chain,
    kind: Kind,
    units: Vec<Subject>,
    /// The task; `None` for all of the units.
    tag: Option<u64>,
    stage: Stage,
}

enum Stage {
    /// The threads take what is in the rings.
    Sweep { number: u64, until: Instant },
    /// Tasks of each unit end.
    End(Vec<Vec<u64>>),
    /// The threads make answers visible.
    Publish { number: u64, until: Instant },
}

/// The functions in progress, in the order in which they came.
#[derive(Default)]
pub struct Functions(Vec<Function>);

impl Functions {
    /// Takes requests from the control queue.
    pub fn process(&mut self, queue: &mut Queue, shared: &Shared) {
        while let Some(mut chain) = queue.take() {
            match parse(&mut chain, shared) {
                Ok(Parsed::Answer(bytes)) => complete(queue, chain, &bytes),
                Ok(Parsed::Function(kind, units, tag)) => {
                    let number = shared.sweep.begin();
                    self.0.push(Function {
                        chain,
                        kind,
                        units,
                        tag,
                        stage: Stage::Sweep {
                            number,
                            until: Instant::now() + SWEEP,
                        },
                    });
                    shared.wake();
                }
                // There is nothing to answer.
                Err(_) => complete(queue, chain, &[]),
            }
        }
        self.advance(queue, shared);
    }

    /// Continues functions as far as possible, and answers those that are done.
    pub fn advance(&mut self, queue: &mut Queue, shared: &Shared) {
        let is_stopping = queue.is_stopping() || queue.is_suspending();
        let mut waits = false;
        let mut index = 0;
        while let Some(function) = self.0.get_mut(index) {
            match function.advance(is_stopping, shared) {
                Some(response) => {
                    let Function { chain, .. } = self.0.remove(index);
                    complete(queue, chain, &[response]);
                }
                None => {
                    waits |= !matches!(function.stage, Stage::End(_));
                    index += 1;
                }
            }
        }
        if waits {
            queue.retry_after(INTERVAL);
        }
    }

    /// Returns whether no function is in progress.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Function {
    /// Returns the response if the function is done. While the queue stops, nothing but the end of tasks is waited for.
    fn advance(&mut self, is_stopping: bool, shared: &Shared) -> Option<u8> {
        let is_over = |until: Instant| is_stopping || Instant::now() >= until;
        loop {
            match &self.stage {
                Stage::Sweep { number, until } => {
                    if !shared.sweep.has_emptied(*number) && !is_over(*until) {
                        return None;
                    }
                    if self.kind == Kind::Query {
                        let mut units = self.units.iter();
                        let found = units.any(|unit| unit.tasks().has(self.tag));
                        return Some(if found { SUCCEEDED } else { COMPLETE });
                    }
                    let mark = match self.kind {
                        Kind::Abort | Kind::Query => Mark::Aborted,
                        Kind::ResetUnit | Kind::ResetNexus => Mark::Reset,
                    };
                    let units = self.units.iter();
                    let numbers = units.map(|unit| unit.tasks().mark_all(mark, self.tag));
                    self.stage = Stage::End(numbers.collect());
                    // Those that wait for something end at once.
                    shared.wake();
                }
                Stage::End(numbers) => {
                    let mut all = self.units.iter().zip(numbers);
                    if all.any(|(unit, numbers)| unit.tasks().has_any(numbers)) {
                        return None;
                    }
                    self.finish(shared);
                    let number = shared.sweep.begin();
                    self.stage = Stage::Publish {
                        number,
                        until: Instant::now() + PUBLISH,
                    };
                    shared.wake();
                }
                Stage::Publish { number, until } => {
                    let is_done = shared.sweep.has_published(*number) || is_over(*until);
                    return is_done.then_some(COMPLETE);
                }
            }
        }
    }

    /// Resets what the function resets.
    fn finish(&self, shared: &Shared) {
        for unit in &self.units {
            match (self.kind, unit) {
                (Kind::Abort | Kind::Query, _) => continue,
                (Kind::ResetUnit, Subject::Unit(unit)) => unit.logical.reset(),
                (Kind::ResetNexus, Subject::Unit(unit)) => unit.logical.nexus_lost(DRIVER),
                // Its commands have ended. The host does not let this program reset it.
                (_, Subject::Device(_)) => {}
            }
            unit.tasks().end_reset();
        }
        if self.kind == Kind::ResetUnit {
            log::debug!("{} logical units were reset", self.units.len());
        }
        shared.wake();
    }
}

/// A request of the control queue.
enum Parsed {
    /// It is answered at once.
    Answer(Vec<u8>),
    /// It is a function for tasks.
    Function(Kind, Vec<Subject>, Option<u64>),
}

fn parse(chain: &mut Chain, shared: &Shared) -> Result<Parsed, ChainError> {
    let answer = |response: u8| Ok(Parsed::Answer(vec![response]));
    chain.check()?;
    match u32::from_le(chain.read_object()?) {
        VIRTIO_SCSI_T_TMF => {}
        VIRTIO_SCSI_T_AN_QUERY | VIRTIO_SCSI_T_AN_SUBSCRIBE => {
            // No events of this kind exist: event_actual is 0.
            return Ok(Parsed::Answer(vec![0; NOTIFICATION]));
        }
        _ => {
            // The response is the last byte of all known requests.
            let length = chain.writable_len().clamp(1, UNKNOWN as u64) as usize;
            let mut bytes = vec![0; length];
            bytes
                .iter_mut()
                .last()
                .into_iter()
                .for_each(|last| *last = FAILURE);
            return Ok(Parsed::Answer(bytes));
        }
    }
    let subtype = u32::from_le(chain.read_object()?);
    let field = chain.read_object::<u64>()?.to_ne_bytes();
    let tag = u64::from_le(chain.read_object()?);
    let (kind, tag) = match subtype {
        VIRTIO_SCSI_T_TMF_ABORT_TASK => (Kind::Abort, Some(tag)),
        // There is one initiator, whose tasks are all that there are.
        VIRTIO_SCSI_T_TMF_ABORT_TASK_SET | VIRTIO_SCSI_T_TMF_CLEAR_TASK_SET => (Kind::Abort, None),
        VIRTIO_SCSI_T_TMF_I_T_NEXUS_RESET => (Kind::ResetNexus, None),
        VIRTIO_SCSI_T_TMF_LOGICAL_UNIT_RESET => (Kind::ResetUnit, None),
        VIRTIO_SCSI_T_TMF_QUERY_TASK => (Kind::Query, Some(tag)),
        VIRTIO_SCSI_T_TMF_QUERY_TASK_SET => (Kind::Query, None),
        // CLEAR ACA: there is no auto contingent allegiance.
        _ => return answer(REJECTED),
    };
    let addressed = Addressed::decode(field);
    let Some(target) = addressed.target() else {
        return answer(BAD_TARGET);
    };
    let units = Subject::of(target, shared);
    if units.is_empty() {
        return answer(BAD_TARGET);
    }
    if kind == Kind::ResetNexus {
        return Ok(Parsed::Function(kind, units, tag));
    }
    let Addressed::Unit(address) = addressed else {
        return answer(INCORRECT_LUN);
    };
    match units.into_iter().find(|unit| unit.address() == address) {
        Some(unit) => Ok(Parsed::Function(kind, vec![unit], tag)),
        None => answer(INCORRECT_LUN),
    }
}

fn complete(queue: &mut Queue, mut chain: Chain, bytes: &[u8]) {
    let room = usize::try_from(chain.writable_len()).unwrap_or(usize::MAX);
    let bytes = bytes.get(..room).unwrap_or(bytes);
    let used = chain.write(bytes).map_or(0, |()| bytes.len() as u32);
    let outcome = Outcome {
        request: TASK_MANAGEMENT,
        bytes: used.into(),
        failed: used == 0 || !matches!(bytes.last(), Some(&(COMPLETE | SUCCEEDED))),
    };
    queue.complete_with(chain, used, outcome);
}
