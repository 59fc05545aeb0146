// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The state of a device, which it saves to a pipe and loads from one (protocol feature DEVICE_STATE).

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::pipe::{PipeFlags, pipe_with};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{
    FrontendReq, VhostTransferStateDirection as Direction, VhostTransferStatePhase as Phase,
};

use super::connection::RawConnection;
use super::device::FrontEnd;
use super::error::Result;

/// Directions of SET_DEVICE_STATE_FD.
pub const SAVE: u32 = 0;
/// See [`SAVE`].
pub const LOAD: u32 = 1;
/// The answer to SET_DEVICE_STATE_FD for a transfer that has begun: no file is returned.
pub const BEGUN: u64 = 0x100;

/// Bytes of a state before the device's part.
pub const HEADER_SIZE: usize = 44;

/// Creates a pipe. Returns its read end and its write end.
pub fn pipe() -> (OwnedFd, OwnedFd) {
    pipe_with(PipeFlags::CLOEXEC).expect("a pipe")
}

impl FrontEnd {
    /// Saves the state of the device, whose queues are stopped.
    pub fn save_state(&self) -> Result<Vec<u8>> {
        let (ours, theirs) = pipe();
        self.call()
            .set_device_state_fd(Direction::SAVE, Phase::STOPPED, theirs)?;
        let mut state = Vec::new();
        File::from(ours).read_to_end(&mut state)?;
        self.check_state()?;
        Ok(state)
    }

    /// Loads a state into the device, whose queues are stopped.
    pub fn load_state(&self, state: &[u8]) -> Result<()> {
        let (theirs, ours) = pipe();
        self.call()
            .set_device_state_fd(Direction::LOAD, Phase::STOPPED, theirs)?;
        // The device may not read a state that it refuses to its end.
        let _ = File::from(ours).write_all(state);
        self.check_state()
    }

    fn check_state(&self) -> Result<()> {
        Ok(VhostUserFrontend::check_device_state(&*self.call())?)
    }
}

impl RawConnection {
    /// Sends SET_DEVICE_STATE_FD. Returns the answer.
    pub fn set_device_state(&self, direction: u32, phase: u32, file: BorrowedFd) -> Result<u64> {
        let payload = [direction, phase].map(u32::to_ne_bytes).concat();
        let reply = self.ask(FrontendReq::SET_DEVICE_STATE_FD, &payload, &[file])?;
        assert!(reply.fds.is_empty(), "{reply:?}");
        Ok(reply.u64())
    }

    /// Sends CHECK_DEVICE_STATE. Returns the answer: 0 for a successful transfer.
    pub fn check_device_state(&self) -> Result<u64> {
        let reply = self.ask(FrontendReq::CHECK_DEVICE_STATE, &[], &[])?;
        Ok(reply.u64())
    }

    /// Loads `state` into the device. Returns whether it was accepted.
    pub fn loads(&self, state: &[u8]) -> bool {
        let (theirs, ours) = pipe();
        let answer = self.set_device_state(LOAD, 0, theirs.as_fd());
        assert_eq!(answer.expect("an answer"), BEGUN);
        drop(theirs);
        let _ = File::from(ours).write_all(state);
        self.check_device_state().expect("an outcome") == 0
    }

    /// Saves the state of the device.
    pub fn saved(&self) -> Vec<u8> {
        let (ours, theirs) = pipe();
        let answer = self.set_device_state(SAVE, 0, theirs.as_fd());
        assert_eq!(answer.expect("an answer"), BEGUN);
        drop(theirs);
        let mut state = Vec::new();
        let read = File::from(ours).read_to_end(&mut state);
        read.expect("the end of a state");
        assert_eq!(self.check_device_state().expect("an outcome"), 0);
        state
    }
}

/// Creates a state of this device type and version, with its header.
pub fn sealed(device: &str, version: u32, part: &[u8]) -> Vec<u8> {
    let mut state = b"vhdstate".to_vec();
    state.extend(1u32.to_le_bytes());
    state.extend(device.as_bytes());
    state.resize(28, 0);
    state.extend(version.to_le_bytes());
    state.extend((part.len() as u64).to_le_bytes());
    let mut checksum = crc32fast::Hasher::new();
    checksum.update(&state);
    checksum.update(part);
    state.extend(checksum.finalize().to_le_bytes());
    state.extend(part);
    state
}
