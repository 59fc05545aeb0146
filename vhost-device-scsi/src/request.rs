// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A request of the driver (VIRTIO 1.3, 5.6.6.1) and its answer.
//!
//! Layout: lun 8 bytes, id u64, task_attr u8, prio u8, crn u8, the CDB and data that is readable; then sense_len u32, residual u32,
//! status_qualifier u16, status u8, response u8, sense data and data that is writable. The driver sets the sizes of the CDB and of the sense
//! data, and may spread all of it over descriptors as it likes.

use std::sync::Arc;

use vhost_device_common::chain::Chain;
use vhost_device_common::statistics::Outcome;
use vhost_device_storage::disk::{Disk, DiskError};
use vhost_device_storage::engine::{IoRequest, Label};
use vhost_device_storage::operation::Operation;
use vhost_device_storage::work::{Ranges, Work};
use virtio_bindings::virtio_scsi::{
    VIRTIO_SCSI_S_ABORTED, VIRTIO_SCSI_S_BAD_TARGET, VIRTIO_SCSI_S_BUSY, VIRTIO_SCSI_S_FAILURE,
    VIRTIO_SCSI_S_NEXUS_FAILURE, VIRTIO_SCSI_S_OK, VIRTIO_SCSI_S_OVERRUN, VIRTIO_SCSI_S_RESET,
    VIRTIO_SCSI_S_TARGET_FAILURE, VIRTIO_SCSI_S_TRANSPORT_FAILURE,
};

use crate::config::{CONTROL, MAX_CDB, MAX_SENSE, Sizes};
use crate::lun::{Action, Answer, LogicalUnit, Procedure, Response, Status};
use crate::tasks::{Mark, Task};
use crate::unit::Unit;

/// Bytes of a response before the sense data.
const RESPONSE: usize = 12;

/// The beginning of a request.
pub struct Header {
    pub lun: [u8; 8],
    pub tag: u64,
    cdb: [u8; MAX_CDB],
    cdb_size: usize,
}

/// Why a request has no command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// There is no place for a response.
    NoResponse,
    /// The response says that the request failed.
    Failed,
}

impl Header {
    /// Reads the header, and sets the place of the response aside.
    ///
    /// # Errors
    /// The request is too short, is not in guest memory, or moves data in both directions (VIRTIO_SCSI_F_INOUT is not offered).
    pub fn read(chain: &mut Chain, sizes: Sizes) -> Result<Self, Fault> {
        let response = RESPONSE as u64 + u64::from(sizes.sense);
        chain.split_head(response).map_err(|_| Fault::NoResponse)?;
        let failed = |_| Fault::Failed;
        chain.check().map_err(failed)?;
        let lun = chain.read_object::<u64>().map_err(failed)?.to_ne_bytes();
        let tag = u64::from_le(chain.read_object().map_err(failed)?);
        // The order of tasks is left to the device, and there is one initiator.
        let mut attributes = [0; 3];
        chain.read(&mut attributes).map_err(failed)?;
        let mut cdb = [0; MAX_CDB];
        let cdb_size = (sizes.cdb as usize).min(MAX_CDB);
        let bytes = cdb.get_mut(..cdb_size).unwrap_or_default();
        chain.read(bytes).map_err(failed)?;
        if chain.readable_len() > 0 && chain.writable_len() > 0 {
            return Err(Fault::Failed);
        }
        Ok(Self {
            lun,
            tag,
            cdb,
            cdb_size,
        })
    }

    /// Returns the CDB, which may be longer than the command.
    pub fn cdb(&self) -> &[u8] {
        self.cdb.get(..self.cdb_size).unwrap_or_default()
    }
}

/// The `response` of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Delivery {
    Ok = VIRTIO_SCSI_S_OK as u8,
    Overrun = VIRTIO_SCSI_S_OVERRUN as u8,
    Aborted = VIRTIO_SCSI_S_ABORTED as u8,
    BadTarget = VIRTIO_SCSI_S_BAD_TARGET as u8,
    Reset = VIRTIO_SCSI_S_RESET as u8,
    Busy = VIRTIO_SCSI_S_BUSY as u8,
    TransportFailure = VIRTIO_SCSI_S_TRANSPORT_FAILURE as u8,
    TargetFailure = VIRTIO_SCSI_S_TARGET_FAILURE as u8,
    NexusFailure = VIRTIO_SCSI_S_NEXUS_FAILURE as u8,
    Failure = VIRTIO_SCSI_S_FAILURE as u8,
}

impl From<Response> for Delivery {
    fn from(response: Response) -> Self {
        match response {
            Response::Ok => Self::Ok,
            Response::Overrun => Self::Overrun,
            Response::Failure => Self::Failure,
        }
    }
}

impl From<Mark> for Delivery {
    fn from(mark: Mark) -> Self {
        match mark {
            Mark::Aborted => Self::Aborted,
            Mark::Reset => Self::Reset,
        }
    }
}

/// A request whose answer is known, before it is written.
pub struct Reply {
    pub chain: Chain,
    /// The type of request, for statistics.
    pub kind: usize,
    /// Bytes of the data buffers before the command was carried out.
    pub data_out: u64,
    pub data_in: u64,
    /// Bytes of sense data in the response.
    pub sense_size: u32,
}

impl Reply {
    /// Creates a reply to a request whose header was read, or could not be.
    pub fn new(chain: Chain, kind: usize, sense_size: u32) -> Self {
        Self {
            data_out: chain.readable_len(),
            data_in: chain.writable_len(),
            chain,
            kind,
            sense_size,
        }
    }

    /// Writes the answer of a logical unit. Returns the request, the bytes that were written, and what statistics count.
    pub fn write(mut self, delivery: Delivery, answer: &Answer) -> (Chain, u32, Outcome) {
        let chain = &mut self.chain;
        let room = usize::try_from(chain.writable_len()).unwrap_or(usize::MAX);
        let data = answer.data.get(..room).unwrap_or(&answer.data);
        let delivery = match chain.write(data) {
            Ok(()) => delivery,
            Err(_) => Delivery::Failure,
        };
        self.write_response(delivery, answer.status as u8, &answer.sense)
    }

    /// Writes the response, after the data. Returns what [`Reply::write`] returns.
    pub fn write_response(
        mut self,
        delivery: Delivery,
        status: u8,
        sense: &[u8],
    ) -> (Chain, u32, Outcome) {
        let chain = &mut self.chain;
        let moved_in = self.data_in.saturating_sub(chain.writable_len());
        let moved_out = self.data_out.saturating_sub(chain.readable_len());
        let residual = match delivery {
            Delivery::Overrun => 0,
            _ => chain.writable_len().saturating_add(chain.readable_len()),
        };
        let residual = u32::try_from(residual).unwrap_or(u32::MAX);
        let sense_size = (self.sense_size as usize).min(MAX_SENSE);
        let sense = sense.get(..sense_size).unwrap_or(sense);
        let mut head = [0; RESPONSE + MAX_SENSE];
        let fields = (sense.len() as u32).to_le_bytes().into_iter();
        let fields = fields.chain(residual.to_le_bytes());
        // status_qualifier is 0.
        let fields = fields.chain([0, 0, status, delivery as u8]);
        let fields = fields.chain(sense.iter().copied());
        head.iter_mut()
            .zip(fields)
            .for_each(|(place, byte)| *place = byte);
        let head = head.get(..RESPONSE + sense_size).unwrap_or_default();
        let used = match chain.write_head(head) {
            Ok(()) => moved_in.saturating_add(head.len() as u64),
            Err(_) => 0,
        };
        let outcome = Outcome {
            request: self.kind,
            bytes: moved_in.saturating_add(moved_out),
            failed: delivery != Delivery::Ok || status != Status::Good as u8,
        };
        (self.chain, u32::try_from(used).unwrap_or(u32::MAX), outcome)
    }
}

/// What is next for a request.
pub enum Stage {
    /// Check the command. It waits for a reset of the logical unit, or until this program has the image.
    Check(Box<[u8]>),
    /// Carry an action out, when the limits of the disk allow it.
    Limited(Action),
    /// Carry an action out, when no other task excludes it.
    Ready(Action),
    /// The action is in progress.
    Working(Action, Work),
    /// Run a procedure, when the limits of the disk allow it.
    LimitedProcedure(Procedure),
    /// Run a procedure, when no other task disturbs it.
    Excluding(Procedure),
    /// Run a procedure.
    Procedure(Procedure),
    /// Answer.
    Answered(Answer),
    /// The stage was taken.
    None,
}

/// A request for a logical unit.
pub struct Request {
    /// The queue that it came from.
    pub queue: u16,
    pub unit: Arc<Unit>,
    pub task: Task,
    pub stage: Stage,
    pub reply: Reply,
    /// It was suspended while an operation was in flight.
    pub is_abandoned: bool,
}

impl Request {
    /// Creates a flush without a request to answer.
    pub fn flush(unit: &Arc<Unit>) -> Self {
        let task = unit.tasks.begin_unnamed();
        Self {
            queue: CONTROL,
            unit: Arc::clone(unit),
            task,
            stage: Stage::Working(Action::Flush, Work::flush()),
            reply: Reply::new(Chain::default(), 0, 0),
            is_abandoned: true,
        }
    }

    /// Returns whether it is a flush without a request to answer.
    pub fn is_own_flush(&self) -> bool {
        self.queue == CONTROL
    }

    /// Takes the stage.
    pub fn take_stage(&mut self) -> Stage {
        std::mem::replace(&mut self.stage, Stage::None)
    }

    /// Makes the work of an action; `None` if there is nothing to do.
    ///
    /// # Errors
    /// The disk cannot do it.
    pub fn work(&mut self, action: &Action) -> Result<Option<Work>, DiskError> {
        let (chain, disk) = (&mut self.reply.chain, &self.unit.disk);
        let ranges = match action {
            Action::Read { offset, length } => {
                return Work::read(chain, *offset, *length, disk).map(Some);
            }
            Action::Write {
                offset,
                length,
                stable,
            } => return Work::write(chain, *offset, *length, *stable, disk).map(Some),
            Action::Flush => return Ok(Some(Work::flush())),
            Action::Unmap(list) => {
                let mut ranges = Ranges::discard();
                for range in list {
                    let length = range.end.saturating_sub(range.start);
                    ranges.push(disk, range.start, length, true)?;
                }
                ranges
            }
            Action::Zero {
                range,
                unmap,
                stable,
            } => {
                let mut ranges = Ranges::zero(*stable);
                let length = range.end.saturating_sub(range.start);
                ranges.push(disk, range.start, length, *unmap)?;
                ranges
            }
        };
        Ok((!ranges.is_empty()).then(|| Work::ranges(ranges)))
    }
}

/// Returns how many bytes an action moves between the disk and the guest; `None` if no limit counts it.
pub fn limited_bytes(action: &Action) -> Option<u64> {
    match action {
        Action::Read { length, .. } | Action::Write { length, .. } => Some(*length),
        Action::Unmap(_) | Action::Zero { .. } => Some(0),
        Action::Flush => None,
    }
}

/// Returns whether an action changes the medium.
pub fn changes(action: &Action) -> bool {
    !matches!(action, Action::Read { .. } | Action::Flush)
}

// SAFETY: operations refer to guest memory, which the chain keeps mapped, or to buffers of the work, which stays in the request. The chain
// is taken out only if the operation does not refer to guest memory. The request keeps the unit, which has the disk.
#[allow(unsafe_code)]
unsafe impl IoRequest for Request {
    fn operation(&self) -> Operation<'_> {
        match &self.stage {
            Stage::Working(_, work) => work.operation(&self.reply.chain),
            // Requests in another stage are not submitted.
            _ => Operation::Flush,
        }
    }

    fn disk(&self) -> Option<&Disk> {
        Some(&self.unit.disk)
    }

    fn label(&self) -> Label {
        Label {
            queue: self.queue,
            is_change: matches!(&self.stage, Stage::Working(_, work) if work.is_change()),
            is_abandoned: self.is_abandoned,
        }
    }

    fn abandon(&mut self) -> Option<Chain> {
        match &self.stage {
            Stage::Working(_, work) if !self.is_abandoned && !work.is_direct() => {
                self.is_abandoned = true;
                Some(std::mem::take(&mut self.reply.chain))
            }
            _ => None,
        }
    }

    fn restore(&mut self, chain: Chain) {
        self.reply.chain = chain;
        self.is_abandoned = false;
    }

    fn into_chain(self) -> Option<Chain> {
        if self.is_abandoned {
            return None;
        }
        self.unit.tasks.drop(self.task);
        Some(self.reply.chain)
    }
}

/// Number of the types of requests beside commands: they follow these in [`KINDS`].
const OTHERS: [&str; 2] = ["task_management", "event"];
/// The type of requests on the control queue.
pub const TASK_MANAGEMENT: usize = LogicalUnit::COMMANDS.len();
/// The type of requests on the event queue.
pub const EVENT: usize = TASK_MANAGEMENT + 1;
const COUNT: usize = TASK_MANAGEMENT + OTHERS.len();

/// The names of all types of requests, for statistics.
pub const KINDS: &[&str] = &names();

#[allow(clippy::indexing_slicing, reason = "evaluated by the compiler")]
const fn names() -> [&'static str; COUNT] {
    let mut names = [OTHERS[0]; COUNT];
    let mut index = 0;
    while index < TASK_MANAGEMENT {
        names[index] = LogicalUnit::COMMANDS[index];
        index += 1;
    }
    names[EVENT] = OTHERS[1];
    names
}
