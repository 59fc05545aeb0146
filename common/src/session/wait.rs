// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the session does while it waits for the front-end: it moves the device state, and reads replies on the back-end channel.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use super::Session;
use super::transfer::{IDLE, IDLE_AT_CHECK};
use crate::device::Device;
use crate::wire::{Connection, MessageError};

impl<D: Device> Session<'_, D> {
    /// Moves the device state and reads replies until a message arrives. Returns at once if there is neither.
    pub(super) fn wait_for_message(
        &mut self,
        connection: &Connection<'_>,
    ) -> Result<(), MessageError> {
        while self.device_state.transfer().is_some() || self.channel.readable().is_some() {
            if self.wait(connection, PollFlags::IN, IDLE)? {
                break;
            }
        }
        Ok(())
    }

    /// Moves the device state until it is complete, unless the front-end disconnects.
    pub(super) fn finish_transfer(
        &mut self,
        connection: &Connection<'_>,
    ) -> Result<(), MessageError> {
        self.device_state.touch(Instant::now());
        while self.device_state.transfer().is_some() {
            if self.wait(connection, PollFlags::RDHUP, IDLE_AT_CHECK)? {
                break;
            }
        }
        self.end_transfer("the connection ends");
        Ok(())
    }

    /// Waits once, and handles what is ready. Returns whether one of `events` happened at the front-end's socket.
    fn wait(
        &mut self,
        connection: &Connection<'_>,
        events: PollFlags,
        idle: Duration,
    ) -> Result<bool, MessageError> {
        let channel = self.channel.readable();
        let transfer = self.device_state.transfer();
        let limit = match transfer.map(|transfer| transfer.time_left(Instant::now(), idle)) {
            Some(Err(error)) => {
                self.conclude(Err(error));
                return Ok(false);
            }
            Some(Ok(left)) => Some(left),
            None => None,
        };
        let mut files = Vec::from_iter(transfer.map(|transfer| transfer.poll_fd()));
        if let Some(channel) = &channel {
            files.push(PollFd::from_borrowed_fd(channel.as_fd(), PollFlags::IN));
        }
        let ready = connection.wait_beside(events, &files, limit)?;
        let mut files = ready.files.into_iter();
        if transfer.is_some() && files.next() == Some(true) {
            self.move_state();
        }
        if files.next() == Some(true) {
            self.channel.read();
        }
        Ok(ready.front_end)
    }
}
