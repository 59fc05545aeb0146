// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Events for the clients of the control socket, on their way to the control thread.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use rustix::event::{EventfdFlags, eventfd};

use super::Statistics;

/// Most events that wait for the control thread; the oldest are dropped.
const MOST_EVENTS: usize = 64;

/// Something that happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// A front-end is connected.
    FrontEndConnected,
    /// The front-end closed its connection, or the connection failed.
    FrontEndDisconnected,
    /// The program is about to exit.
    Shutdown,
}

impl Event {
    /// Returns the name of the event in the protocol.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::FrontEndConnected => "FRONT_END_CONNECTED",
            Self::FrontEndDisconnected => "FRONT_END_DISCONNECTED",
            Self::Shutdown => "SHUTDOWN",
        }
    }
}

/// Waiting events, and the eventfd that wakes the thread that takes them.
#[derive(Debug)]
pub(crate) struct Events {
    queue: Mutex<VecDeque<(SystemTime, Event)>>,
    wake: OwnedFd,
}

impl Events {
    /// Takes all events, each with its time.
    pub(crate) fn take(&self) -> VecDeque<(SystemTime, Event)> {
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *queue)
    }
}

/// Readable while there are events.
impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

impl Statistics {
    /// Starts to collect events.
    ///
    /// # Errors
    /// No file can be opened.
    pub(crate) fn collect_events(&self) -> std::io::Result<()> {
        let wake = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        let queue = Mutex::default();
        let _ = self.events.set(Events { queue, wake });
        Ok(())
    }

    /// Returns the events, if they are collected.
    pub(crate) fn events(&self) -> Option<&Events> {
        self.events.get()
    }

    /// Adds an event, if events are collected. Does not block.
    pub(crate) fn emit(&self, event: Event) {
        let Some(events) = self.events.get() else {
            return;
        };
        let mut queue = events.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if queue.len() >= MOST_EVENTS {
            queue.pop_front();
        }
        queue.push_back((SystemTime::now(), event));
        drop(queue);
        let _ = rustix::io::write(&events.wake, &1u64.to_ne_bytes());
    }
}
