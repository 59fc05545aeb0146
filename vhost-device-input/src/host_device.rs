// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The host's input device, whether it is plugged in or not.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use vhost_device_common::device::Needs;
use vhost_device_common::warn_limited;

use crate::event::Event;
use crate::source::Source;
use crate::state::State;

/// Events per read.
const READ_BATCH: usize = 64;

/// The node while it exists, and the source that reopens it.
pub struct HostDevice {
    source: Box<dyn Source>,
    node: Option<OwnedFd>,
    /// The last error of reopening the node, and whether it was logged.
    last_error: Option<(String, bool)>,
}

impl HostDevice {
    /// Creates the device from its open node. `source` reopens it.
    pub fn new(source: impl Source + 'static, node: OwnedFd) -> Self {
        Self {
            source: Box::new(source),
            node: Some(node),
            last_error: None,
        }
    }

    /// Returns the node if it exists.
    pub fn node(&self) -> Option<BorrowedFd<'_>> {
        self.node.as_ref().map(AsFd::as_fd)
    }

    /// Returns what the source needs from the sandbox.
    pub fn needs(&self) -> Needs {
        self.source.needs()
    }

    /// Calls `handle` with each pending event.
    ///
    /// # Errors
    /// The node has disappeared.
    pub fn read(&self, mut handle: impl FnMut(Event)) -> io::Result<()> {
        let node = self.node.as_ref().ok_or(Errno::NODEV)?;
        let mut buffer = [0; READ_BATCH * Event::HOST_SIZE];
        loop {
            match rustix::io::read(node, &mut buffer) {
                Ok(0) => return Err(Errno::NODEV.into()),
                Ok(length) => {
                    Event::from_host(buffer.get(..length).unwrap_or_default())
                        .for_each(&mut handle);
                }
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Returns the current state of keys, switches, axes and touches.
    ///
    /// # Errors
    /// The node has disappeared.
    pub fn state(&self) -> io::Result<State> {
        let node = self.node().ok_or(Errno::NODEV)?;
        self.source.state(node)
    }

    /// Sends an event to the device. Does nothing if the node has disappeared or is read-only. Other readers of the
    /// node see the event in a report of its own.
    pub fn write(&self, event: Event) {
        let Some(node) = &self.node else {
            return;
        };
        let events = [event, Event::REPORT].map(Event::to_host);
        match rustix::io::write(node, events.as_flattened()) {
            Ok(_) => {}
            // The node is read-only. This was logged at startup.
            Err(Errno::BADF) => {}
            // The next read notices this.
            Err(Errno::NODEV) => {}
            Err(errno) => warn_limited(format_args!("cannot write {event:?}: {errno}")),
        }
    }

    /// Closes a node that has disappeared.
    pub fn close(&mut self) {
        self.node = None;
    }

    /// Reopens the node if it is back. An error is logged only when it occurs twice in a row, because a node that is
    /// being created may refuse to be opened for a moment.
    pub fn reopen(&mut self) -> Option<BorrowedFd<'_>> {
        match self.source.open() {
            Ok(node) => {
                self.last_error = None;
                self.node = node;
            }
            Err(error) => {
                let same = self.last_error.take().filter(|(last, _)| *last == error);
                if let Some((_, false)) = same {
                    log::warn!("{error}; waiting for the device");
                }
                self.last_error = Some((error, same.is_some()));
            }
        }
        self.node()
    }
}
