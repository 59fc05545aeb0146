// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The part of a device that works on the queues of one thread; the worker calls it.

use std::sync::Arc;

use super::poller::Poller;
use super::queue::{Queue, Queues};
use super::watcher::Readiness;
use crate::memory::GuestMemory;

/// Works on the queues of one thread. `Device::handler` makes it, and gives it a
/// [`Watcher`](super::Watcher) for the files that it waits for beside the queues.
///
/// A request may be completed at once or later, in any order. Calls that block go to a [`Pool`](super::Pool).
pub trait QueueHandler {
    /// Takes requests of `queue`, which are available. Those that it leaves, because it holds too many already or cannot answer yet,
    /// are offered again after the next call of [`QueueHandler::ready`], or when [`Queue::retry_after`] says.
    fn process(&mut self, queue: &mut Queue);

    /// Returns the poller that the thread waits with instead of epoll, if the handler has one of its own, such as io_uring.
    fn poller(&mut self) -> Option<&mut dyn Poller> {
        None
    }

    /// Handles a watched file, by its token, that is ready for `readiness`; or an event of the handler's own poller, which is always
    /// [`Readiness::READABLE`].
    fn ready(&mut self, _token: u32, _readiness: Readiness, _queues: &mut Queues) {}

    /// Reports that `queue` was enabled or disabled (SET_VRING_ENABLE), or starts in that state. No request can be taken from a disabled
    /// queue; those taken before can be completed.
    fn set_enabled(&mut self, _queue: &mut Queue, _enabled: bool) {}

    /// Returns whether the core discards requests on `queue` while it is disabled: it completes them with 0 bytes written. Network devices
    /// must do so with packets to transmit (vhost-user, "Ring states"). By default, requests stay in the ring until it is enabled.
    fn discards(&self, _queue: u16) -> bool {
        false
    }

    /// Follows a change of the guest memory table. A handler that keeps pointers to guest memory, other than those of requests,
    /// replaces them now.
    fn memory_changed(&mut self, _memory: &Arc<GuestMemory>) {}

    /// Has the requests that are held for `queue` completed soon: the queue is about to stop. A handler that waits for something
    /// that may never happen gives up here.
    fn drain(&mut self, _queue: &mut Queue) {}

    /// Suspends the requests of `queue`, which is about to stop: passes each request whose operation does not write guest memory any
    /// more to [`Queue::suspend`]. The worker waits for the others, which can be suspended when their operations end
    /// ([`Queue::is_suspending`]). By default all are completed.
    fn suspend(&mut self, queue: &mut Queue) {
        self.drain(queue);
    }

    /// Reports that the last queue of the thread was suspended. The thread runs until [`QueueHandler::is_idle`] returns true.
    fn suspended(&mut self) {}

    /// Returns whether the operations of all suspended requests have ended.
    fn is_idle(&self) -> bool {
        true
    }
}
