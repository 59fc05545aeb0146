// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The transfer of the device state through a file of the front-end (SET_DEVICE_STATE_FD, CHECK_DEVICE_STATE).
//!
//! The session's thread moves the bytes while it waits for messages. It never waits for the other end of the file.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::event::{PollFd, PollFlags};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use thiserror::Error;
use vhost::vhost_user::message::VhostUserTransferDeviceState;

use super::vring::Vring;
use super::{Answer, Session, SessionError};
use crate::device::Device;
use crate::log_limit::{info_limited, warn_limited};
use crate::state::{self, Format, HEADER_SIZE, StateError};
use crate::wire::Message;

/// Directions of SET_DEVICE_STATE_FD.
const SAVE: u32 = 0;
const LOAD: u32 = 1;
/// The only phase of SET_DEVICE_STATE_FD: all rings are stopped.
const STOPPED: u32 = 0;
/// Reply to SET_DEVICE_STATE_FD: the lower bits are the error, and this bit says that no file comes with it.
const FAILED: u64 = 1;
const NO_FILE: u64 = 1 << 8;

/// Timeout without progress.
pub(super) const IDLE: Duration = Duration::from_secs(30);
/// The same once the front-end waits for the result, when it has nothing else to do.
pub(super) const IDLE_AT_CHECK: Duration = Duration::from_secs(5);
/// Timeout for the whole transfer.
const TOTAL: Duration = Duration::from_secs(300);

/// Why a transfer failed.
#[derive(Debug, Error)]
pub(super) enum TransferError {
    #[error("the file of the front-end cannot be used: {0}")]
    File(#[from] Errno),
    #[error(transparent)]
    State(#[from] StateError),
    #[error("cannot allocate {0} bytes")]
    Memory(usize),
    #[error("no progress for {} seconds", .0.as_secs())]
    Idle(Duration),
    #[error("not finished after {} seconds", TOTAL.as_secs())]
    TooSlow,
    #[error("{0}")]
    Ended(&'static str),
}

/// Direction of a transfer, with its bytes.
enum Way {
    Save {
        bytes: Vec<u8>,
        sent: usize,
    },
    Load {
        bytes: Vec<u8>,
        /// Total number of bytes, once the header has arrived.
        size: Option<usize>,
    },
}

/// A transfer in progress.
pub(super) struct Transfer {
    file: OwnedFd,
    way: Way,
    began: Instant,
    /// When the last byte moved.
    moved: Instant,
}

/// Progress of the last transfer.
#[derive(Default)]
enum Course {
    Running(Transfer),
    Done,
    /// It failed, or there has been none.
    #[default]
    Failed,
}

/// The last transfer of a connection.
#[derive(Default)]
pub struct DeviceState(Course);

impl DeviceState {
    /// Returns the transfer in progress.
    pub(super) fn transfer(&self) -> Option<&Transfer> {
        match &self.0 {
            Course::Running(transfer) => Some(transfer),
            _ => None,
        }
    }

    /// Restarts the timeout without progress.
    pub(super) fn touch(&mut self, now: Instant) {
        if let Course::Running(transfer) = &mut self.0 {
            transfer.moved = now;
        }
    }
}

impl Transfer {
    fn new(file: OwnedFd, way: Way) -> Result<Self, SessionError> {
        // This also affects the front-end if it keeps the same end of a socket or FIFO.
        fcntl_getfl(&file)
            .and_then(|flags| fcntl_setfl(&file, flags | OFlags::NONBLOCK))
            .map_err(|errno| SessionError::File(errno.into()))?;
        let now = Instant::now();
        Ok(Self {
            file,
            way,
            began: now,
            moved: now,
        })
    }

    pub(super) fn poll_fd(&self) -> PollFd<'_> {
        let flags = match self.way {
            Way::Save { .. } => PollFlags::OUT,
            Way::Load { .. } => PollFlags::IN,
        };
        PollFd::from_borrowed_fd(self.file.as_fd(), flags)
    }

    /// Returns the time until one of the timeouts ends the transfer.
    pub(super) fn time_left(
        &self,
        now: Instant,
        idle: Duration,
    ) -> Result<Duration, TransferError> {
        if now.duration_since(self.began) >= TOTAL {
            return Err(TransferError::TooSlow);
        }
        let total = TOTAL.saturating_sub(now.duration_since(self.began));
        match idle.saturating_sub(now.duration_since(self.moved)) {
            Duration::ZERO => Err(TransferError::Idle(idle)),
            left => Ok(left.min(total)),
        }
    }

    /// Moves as many bytes as possible now. Returns whether the transfer is complete.
    fn step(&mut self, format: Format, now: Instant) -> Result<bool, TransferError> {
        let moved = match &mut self.way {
            Way::Save { bytes, sent } => {
                let rest = bytes.get(*sent..).unwrap_or_default();
                rustix::io::write(&self.file, rest).and_then(|count| {
                    *sent = sent.saturating_add(count);
                    match count {
                        0 => Err(Errno::IO),
                        _ => Ok(*sent >= bytes.len()),
                    }
                })
            }
            Way::Load { bytes, size } => {
                // One byte more detects a state that is longer than its header says.
                let end = size.map_or(HEADER_SIZE, |size| size.saturating_add(1));
                let room = end.saturating_sub(bytes.len());
                bytes
                    .try_reserve_exact(room)
                    .map_err(|_| TransferError::Memory(room))?;
                rustix::io::read(&self.file, spare_capacity(bytes)).map(|count| count == 0)
            }
        };
        match moved {
            Ok(is_done) => {
                self.moved = now;
                if let Way::Load { bytes, size } = &mut self.way {
                    if size.is_none() && bytes.len() >= HEADER_SIZE {
                        *size = Some(state::size(format, bytes)?);
                    }
                    if size.is_some_and(|size| bytes.len() > size) {
                        return Err(StateError::TooLong.into());
                    }
                }
                Ok(is_done)
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl<D: Device> Session<'_, D> {
    fn format(&self) -> Format {
        Format {
            device: D::TYPE,
            version: D::STATE_VERSION,
            limit: self.device.max_state_size(),
        }
    }

    /// SET_DEVICE_STATE_FD: starts a transfer. The reply tells whether it started.
    pub(super) fn set_device_state(&mut self, message: Message) -> Answer {
        self.end_transfer("the front-end starts another transfer");
        self.device_state = DeviceState::default();
        let outcome = self.begin_transfer(message).inspect_err(|error| {
            warn_limited(format_args!("cannot transfer the device state: {error}"));
        });
        let reply = NO_FILE | outcome.map_or(FAILED, |()| 0);
        Answer::Reply(reply.to_ne_bytes().to_vec())
    }

    fn begin_transfer(&mut self, mut message: Message) -> Result<(), SessionError> {
        let wanted: VhostUserTransferDeviceState = message.object()?;
        let (direction, phase) = (wanted.direction, wanted.phase);
        if phase != STOPPED {
            return Err(message.malformed().into());
        }
        self.check_stopped()?;
        let file = message.file()?;
        let way = match direction {
            SAVE => Way::Save {
                bytes: state::with_header(self.format(), self.device.save()?),
                sent: 0,
            },
            LOAD => Way::Load {
                bytes: Vec::new(),
                size: None,
            },
            _ => return Err(message.malformed().into()),
        };
        self.device_state.0 = Course::Running(Transfer::new(file, way)?);
        Ok(())
    }

    /// Aborts the transfer in progress, and logs the reason.
    pub(super) fn end_transfer(&mut self, why: &'static str) {
        if matches!(self.device_state.0, Course::Running(_)) {
            self.conclude(Err(TransferError::Ended(why)));
        }
    }

    /// CHECK_DEVICE_STATE, after [`Session::finish_transfer`]: returns 0 if the last transfer succeeded.
    pub(super) fn check_device_state(&self) -> u64 {
        u64::from(!matches!(self.device_state.0, Course::Done))
    }

    /// Continues the transfer: its file is ready.
    pub(super) fn move_state(&mut self) {
        let format = self.format();
        let Course::Running(transfer) = &mut self.device_state.0 else {
            return;
        };
        match transfer.step(format, Instant::now()) {
            Ok(false) => {}
            Ok(true) => self.conclude(Ok(())),
            Err(error) => self.conclude(Err(error)),
        }
    }

    /// Ends the transfer: all bytes have moved, or it failed.
    pub(super) fn conclude(&mut self, moved: Result<(), TransferError>) {
        let Course::Running(Transfer { file, way, .. }) = std::mem::take(&mut self.device_state.0)
        else {
            return;
        };
        // The reader sees the end of the file.
        drop(file);
        let (what, bytes, outcome) = match way {
            Way::Save { bytes, .. } => ("saved", bytes, moved),
            Way::Load { bytes, .. } => {
                let outcome = moved.and_then(|()| Ok(self.load(&bytes)?));
                ("loaded", bytes, outcome)
            }
        };
        match outcome {
            Ok(()) => {
                info_limited(format_args!(
                    "the state of the device was {what}: {} bytes",
                    bytes.len()
                ));
                self.device_state.0 = Course::Done;
            }
            Err(error) => warn_limited(format_args!(
                "the state of the device was not {what}: {error}"
            )),
        }
    }

    fn load(&mut self, bytes: &[u8]) -> Result<(), StateError> {
        let (version, part) = state::without_header(self.format(), bytes)?;
        self.device.load(version, part)?;
        // The handlers and rings belong to the previous guest.
        self.stop_all();
        self.vrings.iter_mut().for_each(Vring::forget_stop);
        Ok(())
    }

    /// Checks that no ring runs.
    pub(super) fn check_stopped(&self) -> Result<(), SessionError> {
        match self.vrings.iter().position(|vring| vring.worker.is_some()) {
            Some(index) => Err(SessionError::Running(index as u16)),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transfer_ends_when_nothing_moves_or_when_it_takes_too_long() {
        let file = rustix::pipe::pipe().unwrap().0;
        let way = Way::Load {
            bytes: Vec::new(),
            size: None,
        };
        let mut transfer = Transfer::new(file, way).unwrap();
        let began = transfer.began;
        let second = Duration::from_secs(1);
        let left = |transfer: &Transfer, seconds, idle| {
            let left = transfer.time_left(began + second * seconds, idle);
            left.map_err(|error| error.to_string())
        };
        assert_eq!(left(&transfer, 29, IDLE), Ok(second));
        assert!(
            left(&transfer, 30, IDLE)
                .unwrap_err()
                .contains("30 seconds")
        );
        assert_eq!(left(&transfer, 4, IDLE_AT_CHECK), Ok(second));
        assert!(left(&transfer, 5, IDLE_AT_CHECK).is_err());
        transfer.moved = began + 290 * second;
        assert_eq!(left(&transfer, 295, IDLE), Ok(5 * second));
        assert!(
            left(&transfer, 300, IDLE)
                .unwrap_err()
                .contains("300 seconds")
        );
    }
}
