// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What works on the queues of one thread: the part of a device that the worker calls.

use std::io;
use std::sync::Arc;

use super::poller::Poller;
use super::queue::{Queue, Queues};
use crate::memory::GuestMemory;

/// Works on the queues of one thread.
///
/// A request may be completed at once or later, in any order.
pub trait QueueHandler {
    /// Requests are available on `queue`: takes what it can. What it leaves, because too much is held
    /// already or there is no answer yet, is offered again when something that the handler waits for
    /// became ready.
    fn process(&mut self, queue: &mut Queue);

    /// Has `poller` watch what the handler waits for beside requests, as `Token::Device`: files,
    /// eventfds, timerfds. They stay open for as long as the handler lives.
    ///
    /// # Errors
    /// The kernel cannot wait on one of them; the queue cannot start.
    fn watch(&mut self, _poller: &mut dyn Poller) -> io::Result<()> {
        Ok(())
    }

    /// What the thread waits with instead of epoll, for a handler that has a way of its own which sees
    /// its completions too. It is not asked to watch anything then.
    fn poller(&mut self) -> Option<&mut dyn Poller> {
        None
    }

    /// Something of this handler's is ready: what is watched as `Token::Device(token)`.
    fn ready(&mut self, _token: u32, _queues: &mut Queues) {}

    /// Reports that `queue` was enabled or disabled (SET_VRING_ENABLE), or starts in that state. No request can be taken from a disabled
    /// queue; those taken before can be completed.
    fn set_enabled(&mut self, _queue: &mut Queue, _enabled: bool) {}

    /// Returns whether the core discards requests on `queue` while it is disabled: it completes them with 0 bytes written. Network devices
    /// must do so with packets to transmit (vhost-user, "Ring states"). By default, requests stay in the ring until it is enabled.
    fn discards(&self, _queue: u16) -> bool {
        false
    }

    /// Another table of guest memory is in force. A handler that keeps pointers into the one before it, beside those of
    /// requests, replaces them now.
    fn memory_changed(&mut self, _memory: &Arc<GuestMemory>) {}

    /// `queue` is about to stop: whatever is held for it must be completed soon. A handler that waits
    /// for something that may never come gives up here.
    fn drain(&mut self, _queue: &mut Queue) {}

    /// Suspends the requests of `queue`, which is about to stop: gives each request to [`Queue::suspend`] for which nothing writes guest
    /// memory any more. The worker waits for the others; they can be suspended too when their operation ends
    /// ([`Queue::is_suspending`]). By default all are completed.
    fn suspend(&mut self, queue: &mut Queue) {
        self.drain(queue);
    }

    /// The last queue of the thread was suspended. The thread lives until [`QueueHandler::is_idle`].
    fn suspended(&mut self) {}

    /// Returns whether no operation of a suspended request is under way.
    fn is_idle(&self) -> bool {
        true
    }
}
