// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The host's input device, while it is plugged in and while it is not.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use vhost_device_common::device::Needs;
use vhost_device_common::warn_limited;

use crate::event::Event;
use crate::source::Source;
use crate::state::State;

/// Events that are read at once.
const READ_BATCH: usize = 64;

/// A node for as long as it is there, and the source for when it is not.
pub struct HostDevice {
    source: Box<dyn Source>,
    node: Option<OwnedFd>,
    /// Why the node could not be opened again the last time, and whether that was logged.
    last_error: Option<(String, bool)>,
}

impl HostDevice {
    pub fn new(source: impl Source + 'static, node: OwnedFd) -> Self {
        Self {
            source: Box::new(source),
            node: Some(node),
            last_error: None,
        }
    }

    /// The node, while it is there.
    pub fn node(&self) -> Option<BorrowedFd<'_>> {
        self.node.as_ref().map(AsFd::as_fd)
    }

    /// What the source does.
    pub fn needs(&self) -> Needs {
        self.source.needs()
    }

    /// Hands all events that there are to `handle`.
    ///
    /// # Errors
    /// The node is gone.
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

    /// How keys, switches, axes and touches are now.
    ///
    /// # Errors
    /// The node is gone.
    pub fn state(&self) -> io::Result<State> {
        let node = self.node().ok_or(Errno::NODEV)?;
        self.source.state(node)
    }

    /// Has the device carry out what the guest wants, if it is there and can. Others who read from it
    /// see a report of that.
    pub fn write(&self, event: Event) {
        let Some(node) = &self.node else {
            return;
        };
        let events = [event, Event::REPORT].map(Event::to_host);
        match rustix::io::write(node, events.as_flattened()) {
            Ok(_) => {}
            // It is open for reading only, which has been said.
            Err(Errno::BADF) => {}
            // Who reads from it will see that.
            Err(Errno::NODEV) => {}
            Err(errno) => warn_limited(format_args!("cannot write {event:?}: {errno}")),
        }
    }

    /// Lets go of a node that is gone.
    pub fn close(&mut self) {
        self.node = None;
    }

    /// Opens the node again if it is back. What is in the way is logged when it is no more a passing
    /// state of a node that just comes into being.
    pub fn reopen(&mut self) -> Option<BorrowedFd<'_>> {
        match self.source.open() {
            Ok(node) => {
                self.last_error = None;
                self.node = node;
            }
            Err(error) => {
                let is_same = |(last, _): &(String, bool)| *last == error;
                match self.last_error.take_if(|last| is_same(last)) {
                    Some((_, logged)) => {
                        if !logged {
                            log::warn!("{error}; waiting for the device");
                        }
                        self.last_error = Some((error, true));
                    }
                    None => self.last_error = Some((error, false)),
                }
            }
        }
        self.node()
    }
}
