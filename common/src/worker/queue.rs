// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A started queue: its ring, and how its driver is called.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::chain::Chain;
use crate::log_limit::warn_limited;
use crate::memory::GuestMemory;
use crate::ring::{Ring, RingError};
use crate::statistics::{LARGEST_BATCH, Outcome, Recorder};

use super::call_file::CallFile;
use super::early_call::EarlyCall;

/// Maximum number of requests in a batch. After each batch the worker publishes and checks for commands of the session.
const BATCH: u16 = LARGEST_BATCH;
/// Polling interval of a queue whose driver cannot kick (SET_VRING_KICK without an eventfd).
const UNKICKED_INTERVAL: Duration = Duration::from_millis(1);

/// The rest of a stopped queue, which its next start needs.
#[derive(Debug)]
pub struct Stopped {
    /// Where its ring continues: see [`Ring::base`].
    pub base: u32,
    /// Requests held over, for [`Ring::resume`].
    pub suspended: Vec<Chain>,
}

/// A queue that a worker owns.
#[derive(Debug)]
pub struct Queue {
    index: u16,
    ring: Ring,
    /// The eventfd of kicks. Without it the worker polls the ring.
    pub(super) kick: Option<Arc<OwnedFd>>,
    call: Option<Arc<CallFile>>,
    error: Option<Arc<CallFile>>,
    /// SET_VRING_ENABLE: requests of a disabled queue stay in the ring, or are discarded.
    enabled: bool,
    /// [`QueueHandler::discards`](super::QueueHandler::discards).
    pub(super) discards: bool,
    /// The ring may have requests.
    pub(super) pending: bool,
    /// Number of requests that the handler may still take in this batch.
    budget: u16,
    /// Number of requests that it could take when the batch began.
    batch: u16,
    /// Time after which the handler is called again, even if nothing happens.
    pub(super) retry_after: Option<Duration>,
    /// The queue is stopping: it gives only requests that are taken again.
    stopping: bool,
    /// The queue is stopping, and the requests that it holds stay noted in flight.
    suspending: bool,
    /// The ring is corrupt. It stays unused until it is set up again.
    broken: bool,
    /// The ring is not in guest memory. It stays unused until it is.
    is_unmapped: bool,
    /// Requests were put back since the batch began.
    has_put_back: bool,
    /// Completed requests are not published yet.
    has_completed: bool,
    early_call: EarlyCall,
    recorder: Recorder,
}

impl Queue {
    /// Creates a queue without eventfds for kicks, calls and errors.
    pub fn new(index: u16, ring: Ring, enabled: bool) -> Self {
        Self::with_recorder(index, ring, enabled, Recorder::discarding())
    }

    /// Creates a queue whose statistics go to `recorder`.
    pub(crate) fn with_recorder(index: u16, ring: Ring, enabled: bool, recorder: Recorder) -> Self {
        Self {
            index,
            ring,
            kick: None,
            call: None,
            error: None,
            enabled,
            discards: false,
            pending: true,
            budget: 0,
            batch: 0,
            retry_after: None,
            stopping: false,
            suspending: false,
            broken: false,
            is_unmapped: false,
            has_put_back: false,
            has_completed: false,
            early_call: EarlyCall::default(),
            recorder,
        }
    }

    /// Returns the index of this queue in its device.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Returns whether [`Queue::take`] would return a request.
    pub fn has_available(&mut self) -> bool {
        if self.broken || self.budget == 0 {
            return false;
        }
        self.ring.has_available().unwrap_or_else(|error| {
            self.fail(&error);
            false
        })
    }

    /// Returns whether the queue is stopping. It then gives only requests that are taken again.
    pub fn is_stopping(&self) -> bool {
        self.stopping
    }

    /// Returns whether the queue is stopping and its requests can be given to [`Queue::suspend`].
    #[inline]
    pub fn is_suspending(&self) -> bool {
        self.suspending
    }

    /// Takes the next request, if there is one. A batch is limited, however many requests the driver makes available.
    pub fn take(&mut self) -> Option<Chain> {
        self.take_if(|_| true)
    }

    /// Takes the next request if there is one and `accepts` returns true. Otherwise it stays in the ring, and the next call reads it
    /// again: its contents may have changed by then.
    #[inline]
    pub fn take_if(&mut self, accepts: impl FnOnce(&mut Chain) -> bool) -> Option<Chain> {
        if self.broken || self.budget == 0 {
            return None;
        }
        let ring = &self.ring;
        if self.has_completed
            && self
                .early_call
                .should_call(|count| ring.has_more_than(count))
        {
            self.publish();
        }
        let mut taken = self.ring.take_if(accepts).unwrap_or_else(|error| {
            self.fail(&error);
            None
        });
        self.early_call
            .note_take(taken.is_some(), self.has_completed);
        if let Some(chain) = &mut taken {
            chain.taken = self.recorder.taken();
            self.budget -= 1;
        }
        taken
    }

    /// Calls the handler again after `time` at the latest, for requests that it leaves in the ring or holds until then. Of several times,
    /// the shortest counts.
    pub fn retry_after(&mut self, time: Duration) {
        self.retry_after = Some(self.retry_after.map_or(time, |earlier| earlier.min(time)));
        self.pending = true;
    }

    /// Completes a request, of which the device wrote `written` bytes. The worker publishes it at the end of the batch, or earlier.
    #[inline]
    pub fn complete(&mut self, chain: Chain, written: u32) {
        let outcome = Outcome {
            bytes: written.into(),
            ..Outcome::default()
        };
        self.complete_with(chain, written, outcome);
    }

    /// Completes a request and counts it as `outcome`, for devices with several types of requests.
    #[inline]
    pub fn complete_with(&mut self, chain: Chain, written: u32, outcome: Outcome) {
        self.recorder.completed(chain.taken, outcome);
        self.has_completed = true;
        self.ring.complete(chain, written);
    }

    /// Puts a request back untouched, for a device that cannot carry it out yet: [`Queue::take`] returns it again. Put several requests
    /// back in reverse order, the one taken last first. Any other one is taken again too, before all others, but counts as in flight
    /// when the queue stops.
    ///
    /// The device reads it from its beginning again, and must not rely on what it wrote.
    pub fn put_back(&mut self, chain: Chain) {
        self.ring.put_back(chain);
        self.has_put_back = true;
        // It counts as not taken, so that the worker waits for an event before it calls the handler again.
        self.budget = self.batch.min(self.budget.saturating_add(1));
        self.pending = true;
    }

    /// Holds a request over, in [`QueueHandler::drain`](super::QueueHandler::drain): the queue returns it again, before all others,
    /// after its next start. If the front-end keeps a file of requests in flight (vhost-user, "Inflight I/O tracking"), another
    /// process may start the queue; otherwise this connection must. A reset discards these requests.
    ///
    /// The request keeps the guest memory that it was taken from, even if the front-end shares other files before the next start. If
    /// the queue is not stopping, the request is put back instead.
    pub fn suspend(&mut self, chain: Chain) {
        match self.stopping || self.suspending {
            true => self.ring.suspend(chain),
            false => self.put_back(chain),
        }
    }

    /// Publishes completed requests now. The worker does so after each batch; this is for handlers that spend long on one.
    pub fn publish(&mut self) {
        let has_completed = std::mem::take(&mut self.has_completed);
        if self.ring.publish() {
            self.call();
        } else if has_completed {
            self.recorder.suppressed_call();
        }
    }

    fn call(&mut self) {
        if let Some(call) = &self.call {
            call.signal();
            self.recorder.called();
        }
    }

    /// Sets the eventfds for calls and errors, before the queue starts.
    pub(crate) fn with_files(
        mut self,
        call: Option<Arc<CallFile>>,
        error: Option<Arc<CallFile>>,
    ) -> Self {
        (self.call, self.error) = (call, error);
        self
    }

    /// Calls the driver through a new eventfd. A call may have been lost: it went to the previous eventfd, or to none, or a previous
    /// device ended before it called.
    pub(super) fn call_initially(&self) {
        self.call.iter().for_each(|call| call.signal());
    }

    pub(super) fn set_call(&mut self, call: Option<Arc<CallFile>>) {
        self.call = call;
        self.call_initially();
    }

    /// Returns the eventfds for calls and errors.
    pub(super) fn files(&self) -> impl Iterator<Item = &Arc<CallFile>> {
        self.call.iter().chain(&self.error)
    }

    pub(super) fn set_error(&mut self, error: Option<Arc<CallFile>>) {
        self.error = error;
    }

    /// Replaces the memory table. A table without the ring pauses the queue, because front-ends remove memory for a moment. Requests
    /// that are completed meanwhile go to the ring's old memory.
    pub(super) fn set_memory(&mut self, memory: Arc<GuestMemory>) {
        let found = self.ring.set_memory(memory);
        let was_unmapped = std::mem::replace(&mut self.is_unmapped, found.is_err());
        match found {
            Ok(()) => self.pending |= was_unmapped,
            Err(error) => {
                self.end_takes();
                if !was_unmapped {
                    warn_limited(format_args!(
                        "queue {}: {error}; the queue pauses until the front-end shares this memory again",
                        self.index
                    ));
                }
            }
        }
    }

    /// Enables or disables the queue (SET_VRING_ENABLE). A disabled queue gives no requests.
    pub(super) fn set_enabled(&mut self, enabled: bool) {
        self.enabled = enabled;
        self.pending = true;
        if !enabled {
            self.end_takes();
        }
    }

    pub(super) fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// Returns the requests of a disabled queue to the driver, unprocessed. The handler can take none afterwards.
    pub(super) fn discard(&mut self) {
        while let Some(chain) = self.take() {
            self.complete(chain, 0);
        }
        self.batch = self.batch.saturating_sub(self.budget);
        self.budget = 0;
    }

    /// Lets the handler take nothing more. Returns whether the requests that it holds can stay noted in flight.
    pub(super) fn begin_suspend(&mut self) -> bool {
        self.suspending = self.ring.is_noted();
        if self.suspending {
            self.pending = false;
            self.end_takes();
        }
        self.suspending
    }

    /// Ends the batch: nothing more can be taken until the next one.
    fn end_takes(&mut self) {
        (self.budget, self.batch) = (0, 0);
    }

    pub(super) fn set_used_log(&mut self, address: Option<u64>) {
        self.ring.set_used_log(address);
    }

    /// Stops using a corrupt ring, and signals the front-end.
    fn fail(&mut self, error: &RingError) {
        self.broken = true;
        self.pending = false;
        warn_limited(format_args!(
            "queue {}: {error}; the queue stops until its driver sets it up again",
            self.index
        ));
        self.error.iter().for_each(|error| error.signal());
    }

    /// Returns whether to look for requests on this queue.
    pub(super) fn is_runnable(&self) -> bool {
        self.pending && (self.enabled || self.discards) && self.is_usable()
    }

    /// Returns whether the ring can be read: it is in guest memory, and not corrupt.
    pub fn is_usable(&self) -> bool {
        !self.broken && !self.is_unmapped
    }

    /// Begins a batch at time `now`, and asks the driver not to kick.
    pub fn begin_batch(&mut self, now: Instant) {
        self.budget = BATCH;
        self.batch = BATCH;
        self.has_put_back = false;
        self.recorder.set_time(now);
        self.ring.suppress_kicks();
    }

    /// Ends a batch whose completed requests are published.
    pub(super) fn end_batch(&mut self, now: Instant) {
        self.recorder.end_batch(now, self.batch - self.budget);
        self.batch = self.budget;
    }

    /// Notes the time at which the thread woke up: the handler may complete requests of earlier batches.
    pub(super) fn wake(&mut self, now: Instant) {
        self.recorder.set_time(now);
    }

    /// Notes a kick of the driver.
    pub(super) fn kicked(&mut self) {
        self.pending = true;
        self.recorder.kicked();
    }

    /// Begins to stop: no new requests are given.
    pub(super) fn begin_stop(&mut self) {
        self.stopping = true;
    }

    /// Begins a batch of requests that are taken again, and no others. Returns how many a previous device took: these are carried out
    /// before the queue stops, the others can wait for its next start.
    pub(super) fn begin_recovered(&mut self, now: Instant) -> usize {
        let (recovered, recorded) = match self.is_usable() {
            true => (self.ring.recovered(), self.ring.recorded()),
            false => (0, 0),
        };
        self.budget = recovered.min(BATCH.into()) as u16;
        self.batch = self.budget;
        self.recorder.set_time(now);
        recorded
    }

    /// Returns whether the handler took requests in this batch.
    pub(super) fn took(&self) -> bool {
        self.budget < self.batch
    }

    /// Asks the driver to kick. Returns whether there is nothing to do until it does, or until the handler can take more.
    pub(super) fn enable_kicks(&mut self) -> bool {
        let has_known = self.ring.has_known_available();
        // What was put back may need requests that the driver adds.
        if self.broken || has_known && !self.has_put_back {
            return true;
        }
        let has_more = self.ring.want_kick().unwrap_or_else(|error| {
            self.fail(&error);
            false
        });
        self.pending = !self.broken && (has_more || has_known || self.retry_after.is_some());
        !has_more
    }

    /// Returns the time after which to call the handler even if nothing becomes ready. A time that the handler asked for applies once.
    pub(super) fn next_retry(&mut self) -> Option<Duration> {
        let unkicked = self.kick.is_none().then_some(UNKICKED_INTERVAL);
        self.retry_after.take().into_iter().chain(unkicked).min()
    }

    pub(super) fn base(&self) -> u32 {
        self.ring.base()
    }

    /// Prepares the ring for its next start.
    pub(super) fn release(&mut self) -> Stopped {
        self.publish();
        let usable = self.is_usable();
        Stopped {
            base: self.ring.base(),
            suspended: self.ring.release(usable),
        }
    }

    /// Returns the number of requests that the device holds.
    pub fn held(&self) -> u16 {
        self.ring.held()
    }
}

/// The queues of one worker.
#[derive(Debug, Default)]
pub struct Queues(pub(super) Vec<Queue>);

impl Queues {
    /// Creates a set of queues with different indices, to drive a handler without a worker.
    pub fn new(queues: Vec<Queue>) -> Self {
        Self(queues)
    }

    /// Returns whether no queue is started.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the queue with this index, if it is started and belongs to this worker.
    #[inline]
    pub fn get_mut(&mut self, index: u16) -> Option<&mut Queue> {
        self.0.iter_mut().find(|queue| queue.index == index)
    }
}

#[cfg(test)]
mod tests {
    use vhost::vhost_user::message::VhostUserMemoryRegion;

    use super::*;
    use crate::ring::RingSetup;

    #[test]
    fn of_several_times_to_call_the_handler_again_the_shortest_counts() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x1_0000).unwrap();
        let info = VhostUserMemoryRegion::new(0, 0x1_0000, 0, 0);
        let memory = GuestMemory::default().with_region(&info, file.into());
        let setup = RingSetup {
            size: 16,
            available: 0x1000,
            used: 0x2000,
            ..RingSetup::default()
        };
        let ring = Ring::new(setup, Arc::new(memory.unwrap()), 0, None, 0);
        let mut queue = Queue::new(0, ring.unwrap(), true);
        // Otherwise the ring is polled.
        queue.kick = Some(Arc::new(tempfile::tempfile().unwrap().into()));
        for milliseconds in [30, 5, 20] {
            queue.retry_after(Duration::from_millis(milliseconds));
        }
        // It is called also if the ring is empty.
        assert!(queue.enable_kicks() && queue.is_runnable());
        assert_eq!(queue.next_retry(), Some(Duration::from_millis(5)));
        assert_eq!(queue.next_retry(), None, "it counts once");
    }
}
