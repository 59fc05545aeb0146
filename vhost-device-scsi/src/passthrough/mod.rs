// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! SCSI devices of the host that a guest uses itself: it sends them its commands, as far as the filter allows.

mod filter;
mod limits;
#[allow(unsafe_code)]
mod sg_io;

use std::fs::File;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vhost_device_common::device::{Needs, StartError};
use vhost_device_common::warn_limited;

use crate::address::Address;
use crate::request::{Delivery, Reply};
use crate::tasks::{Task, Tasks};
use sg_io::Direction;

/// What the adapter of the host says about a command (`host_status`).
const NO_CONNECT: u16 = 0x01;
const BUS_BUSY: u16 = 0x02;
const BAD_TARGET: u16 = 0x04;
const ABORT: u16 = 0x05;
const RESET: u16 = 0x08;
const TRANSPORT_DISRUPTED: u16 = 0x0e;
const TARGET_FAILURE: u16 = 0x10;
const NEXUS_FAILURE: u16 = 0x11;
/// The status CHECK CONDITION.
const CHECK_CONDITION: u8 = 2;
/// Fixed sense data: ILLEGAL REQUEST, INVALID COMMAND OPERATION CODE.
const INVALID_OPCODE: [u8; 18] = [0x70, 0, 5, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x20, 0, 0, 0, 0, 0];

/// A SCSI device of the host.
pub struct PassThrough {
    pub address: Address,
    /// Its node.
    pub path: PathBuf,
    file: File,
    read_only: bool,
    /// The most bytes of one command, if the host says it.
    pub max_bytes: Option<u64>,
    pub tasks: Tasks,
}

impl PassThrough {
    /// Opens a device.
    ///
    /// # Errors
    /// One line that names the node, what is wrong with it, and what to do.
    pub fn open(path: &Path, address: Address, read_only: bool) -> Result<Self, StartError> {
        let fail = |what: String| StartError(format!("{}: {what}", path.display()));
        let kind = std::fs::metadata(path).map(|metadata| metadata.file_type());
        // Opening another kind of file may have side effects.
        if kind.is_ok_and(|kind| !kind.is_char_device() && !kind.is_block_device()) {
            return Err(fail(
                "no SCSI device; give /dev/sgN, or a disk or drive of the host".to_owned(),
            ));
        }
        let file = File::options()
            .read(true)
            .write(!read_only)
            // A drive without a medium can be opened too.
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(|error| {
                fail(format!(
                    "cannot open it: {error}; correct the path or its permissions, or add read-only"
                ))
            })?;
        if !sg_io::is_supported(&file) {
            return Err(fail(
                "does not take SCSI commands; give /dev/sgN, or a disk or drive of the host"
                    .to_owned(),
            ));
        }
        Ok(Self {
            address,
            path: path.to_owned(),
            max_bytes: sg_io::max_bytes(&file),
            file,
            read_only,
            tasks: Tasks::default(),
        })
    }

    /// Adds what commands need of the sandbox.
    pub fn add_needs(needs: &mut Needs) {
        needs.helper.get_or_insert_default().push(sg_io::call());
        // If no thread can be started, a queue's thread sends commands.
        needs.queue.push(sg_io::call());
    }
}

/// How a command ended.
pub struct Ended {
    pub delivery: Delivery,
    pub status: u8,
    pub sense: Vec<u8>,
}

impl Ended {
    /// Returns the end of a command that was not carried out.
    pub fn undelivered(delivery: Delivery) -> Self {
        Self {
            delivery,
            status: 0,
            sense: Vec::new(),
        }
    }
}

/// A request for a device of the host.
pub struct PassRequest {
    /// The queue that it came from.
    pub queue: u16,
    pub device: Arc<PassThrough>,
    pub task: Task,
    /// The field of the CDB.
    pub cdb: Box<[u8]>,
    pub reply: Reply,
    /// How the command ended.
    pub ended: Ended,
}

impl PassRequest {
    /// Has the device carry the command out, and waits for it.
    pub fn run(&mut self) {
        // It may have been aborted while it waited for a thread.
        if self.device.tasks.mark(self.task).is_none() {
            self.ended = self.execute();
        }
    }

    fn execute(&mut self) -> Ended {
        let device = &self.device;
        let Some(cdb) = filter::command(&self.cdb, device.read_only) else {
            return Ended {
                status: CHECK_CONDITION,
                sense: INVALID_OPCODE.to_vec(),
                ..Ended::undelivered(Delivery::Ok)
            };
        };
        let chain = &mut self.reply.chain;
        let (direction, length, data) = match chain.readable_len() {
            0 => (
                Direction::FromDevice,
                chain.writable_len(),
                chain.writable_iovecs(),
            ),
            length => (Direction::ToDevice, length, chain.readable_iovecs()),
        };
        let Ok(data) = data else {
            return Ended::undelivered(Delivery::Failure);
        };
        let sent = match device.max_bytes {
            Some(max_bytes) if direction == Direction::FromDevice && limits::is_asked(cdb) => {
                limits::inquire(&device.file, cdb, length, max_bytes)
                    .map(|(page, outcome)| (Some(page), outcome))
            }
            _ => sg_io::execute(&device.file, cdb, direction, data, length)
                .map(|outcome| (None, outcome)),
        };
        let (page, outcome) = match sent {
            Ok(sent) => sent,
            Err(error) => {
                let path = device.path.display();
                warn_limited(format_args!("{path}: a command failed: {error}"));
                return Ended::undelivered(Delivery::Failure);
            }
        };
        let moved = length.saturating_sub(outcome.residual);
        let skipped = match (direction, page) {
            (Direction::FromDevice, Some(page)) => chain.write(&page),
            (Direction::FromDevice, None) => chain.skip_writable(moved),
            (Direction::ToDevice, _) => chain.skip_readable(moved),
        };
        let delivery = match (skipped, outcome.host_status) {
            (Err(_), _) => Delivery::Failure,
            (_, 0) => Delivery::Ok,
            (_, NO_CONNECT | BAD_TARGET) => Delivery::BadTarget,
            (_, BUS_BUSY) => Delivery::Busy,
            (_, ABORT) => Delivery::Aborted,
            (_, RESET) => Delivery::Reset,
            (_, TRANSPORT_DISRUPTED) => Delivery::TransportFailure,
            (_, TARGET_FAILURE) => Delivery::TargetFailure,
            (_, NEXUS_FAILURE) => Delivery::NexusFailure,
            _ => Delivery::Failure,
        };
        Ended {
            delivery,
            status: outcome.status,
            sense: outcome.sense,
        }
    }
}
