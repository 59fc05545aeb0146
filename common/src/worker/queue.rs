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

/// Requests that a handler may take before the worker publishes, and hears the session, again.
const BATCH: u16 = LARGEST_BATCH;
/// How often a queue is looked at whose driver cannot kick (SET_VRING_KICK without an eventfd).
const UNKICKED_INTERVAL: Duration = Duration::from_millis(1);

/// What is left of a queue that stopped.
#[derive(Debug)]
pub struct Stopped {
    /// Where its ring goes on: see [`Ring::base`].
    pub base: u32,
    /// Requests that were held over, for [`Ring::resume`].
    pub suspended: Vec<Chain>,
}

/// A queue that a worker owns.
#[derive(Debug)]
pub struct Queue {
    index: u16,
    ring: Ring,
    /// The driver kicks by this; without it the worker looks from time to time.
    pub(super) kick: Option<Arc<OwnedFd>>,
    call: Option<Arc<CallFile>>,
    error: Option<Arc<CallFile>>,
    /// SET_VRING_ENABLE: requests of a disabled queue stay where they are.
    enabled: bool,
    /// The ring is to be looked at.
    pub(super) pending: bool,
    /// Requests that the handler may still take in this batch.
    budget: u16,
    /// Requests that it could take when the batch began.
    batch: u16,
    /// What is left in the ring is to be offered again after this time, whatever happens until then.
    pub(super) look_again: Option<Duration>,
    /// It is about to stop, and takes nothing but what a device before this one had taken.
    stopping: bool,
    /// The ring is corrupt, and left alone until it is set up anew.
    broken: bool,
    /// The ring is not in guest memory, and left alone until it is there again.
    is_unmapped: bool,
    /// Requests were completed, and not yet published.
    has_completed: bool,
    early_call: EarlyCall,
    recorder: Recorder,
}

impl Queue {
    /// A queue that its driver does not kick and that calls nobody, as long as nothing else is said.
    pub fn new(index: u16, ring: Ring, enabled: bool) -> Self {
        Self::with_recorder(index, ring, enabled, Recorder::discarding())
    }

    /// The same, of which `recorder` counts what happens.
    pub(crate) fn with_recorder(index: u16, ring: Ring, enabled: bool, recorder: Recorder) -> Self {
        Self {
            index,
            ring,
            kick: None,
            call: None,
            error: None,
            enabled,
            pending: true,
            budget: 0,
            batch: 0,
            look_again: None,
            stopping: false,
            broken: false,
            is_unmapped: false,
            has_completed: false,
            early_call: EarlyCall::default(),
            recorder,
        }
    }

    /// Number of this queue among those of its device.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Whether [`Queue::take`] has a request to give: for handlers that take none that they cannot
    /// carry out yet.
    pub fn has_available(&mut self) -> bool {
        if self.broken || self.budget == 0 {
            return false;
        }
        self.ring.has_available().unwrap_or_else(|error| {
            self.fail(&error);
            false
        })
    }

    /// Whether it is about to stop: what it still gives, a device before this one had taken.
    pub fn is_stopping(&self) -> bool {
        self.stopping
    }

    /// Takes the next request, if there is one. After a number of them there is none for now, however
    /// many the driver makes available.
    pub fn take(&mut self) -> Option<Chain> {
        self.take_if(|_| true)
    }

    /// Takes the next request as [`Queue::take`] does, if `accepts` says so. Else it stays in the ring, and is read anew the next
    /// time: what `accepts` has seen of it may be something else then.
    #[inline]
    pub fn take_if(&mut self, accepts: impl FnOnce(&mut Chain) -> bool) -> Option<Chain> {
        if self.broken || self.budget == 0 {
            return None;
        }
        let ring = &self.ring;
        if self.has_completed && self.early_call.begins(|count| ring.has_more_than(count)) {
            self.publish();
        }
        let mut taken = self.ring.take_if(accepts).unwrap_or_else(|error| {
            self.fail(&error);
            None
        });
        self.early_call.took(taken.is_some(), self.has_completed);
        if let Some(chain) = &mut taken {
            chain.taken = self.recorder.taken();
            self.budget -= 1;
        }
        taken
    }

    /// Has the handler asked again after `time` at the latest, for requests that it leaves in the ring until then.
    pub fn look_again_in(&mut self, time: Duration) {
        self.look_again = Some(time);
        self.pending = true;
    }

    /// Gives a request back to the driver: the device wrote `written` bytes of it. The driver learns
    /// of the requests of a batch together, or of the last few after the others.
    #[inline]
    pub fn complete(&mut self, chain: Chain, written: u32) {
        let outcome = Outcome {
            bytes: written.into(),
            ..Outcome::default()
        };
        self.complete_with(chain, written, outcome);
    }

    /// The same, for devices with several types of requests, with what is to be counted of this one.
    #[inline]
    pub fn complete_with(&mut self, chain: Chain, written: u32, outcome: Outcome) {
        self.recorder.completed(chain.taken, outcome);
        self.has_completed = true;
        self.ring.complete(chain, written);
    }

    /// Gives a request back untouched, for a device that learns too late that it cannot carry it out yet: it stays in the ring, and
    /// [`Queue::take`] gives it again. Several go back in the reverse order in which they were taken, the last first. One that is not
    /// the last is given again too, before all others, but a front-end that stops the queue takes it for a request under way.
    ///
    /// What the device has read of it is to be read again; what it has written does not count.
    pub fn put_back(&mut self, chain: Chain) {
        self.ring.put_back(chain);
        // So that the worker does not ask again before something happens.
        self.budget = self.batch.min(self.budget.saturating_add(1));
        self.pending = true;
    }

    /// Holds a request over, at [`QueueHandler::drain`](super::QueueHandler::drain): the device lets go of it, and the queue gives it
    /// again, before all others, when it is started the next time. If the front-end keeps a file of requests in flight (vhost-user,
    /// "Inflight I/O tracking"), another process may start it; else the queue must go on in this one. A driver that begins anew
    /// has no such requests.
    pub fn suspend(&mut self, chain: Chain) {
        self.ring.suspend(chain);
    }

    /// Shows the driver now what was completed so far. The worker does so after each batch; this is
    /// for handlers that spend long on one.
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

    /// Takes the files that the front-end is told by, before the queue starts.
    pub(crate) fn with_files(
        mut self,
        call: Option<Arc<CallFile>>,
        error: Option<Arc<CallFile>>,
    ) -> Self {
        (self.call, self.error) = (call, error);
        self
    }

    /// Calls the driver by a file that is used for the first time, whether there is a reason or not: a call may have gone to the one
    /// before it, or to none, and another device may have ended before it called.
    pub(super) fn greet(&self) {
        self.call.iter().for_each(|call| call.signal());
    }

    pub(super) fn set_call(&mut self, call: Option<Arc<CallFile>>) {
        self.call = call;
        self.greet();
    }

    /// What the front-end is told by.
    pub(super) fn files(&self) -> impl Iterator<Item = &Arc<CallFile>> {
        self.call.iter().chain(&self.error)
    }

    pub(super) fn set_error(&mut self, error: Option<Arc<CallFile>>) {
        self.error = error;
    }

    /// Another table of guest memory is in force. One without the ring is a pause: front-ends take memory away for a moment, and what
    /// is completed meanwhile goes to where the ring was.
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

    /// SET_VRING_ENABLE. While a queue is disabled nothing can be taken from it, whenever its handler looks.
    pub(super) fn set_enabled(&mut self, enabled: bool) {
        self.enabled = enabled;
        self.pending = true;
        if !enabled {
            self.end_takes();
        }
    }

    /// Nothing more can be taken until another batch begins.
    fn end_takes(&mut self) {
        (self.budget, self.batch) = (0, 0);
    }

    pub(super) fn set_used_log(&mut self, address: Option<u64>) {
        self.ring.set_used_log(address);
    }

    /// The ring cannot be used any more: stops it and tells the front-end.
    fn fail(&mut self, error: &RingError) {
        self.broken = true;
        self.pending = false;
        warn_limited(format_args!(
            "queue {}: {error}; the queue stops until its driver sets it up again",
            self.index
        ));
        self.error.iter().for_each(|error| error.signal());
    }

    /// Whether the handler should look at this queue.
    pub(super) fn is_runnable(&self) -> bool {
        self.pending && self.enabled && self.is_usable()
    }

    /// Whether the ring can be looked at.
    fn is_usable(&self) -> bool {
        !self.broken && !self.is_unmapped
    }

    /// Lets the handler take requests: as many as there are in a batch, without being kicked for them. It is `now`.
    pub fn begin_batch(&mut self, now: Instant) {
        self.budget = BATCH;
        self.batch = BATCH;
        self.recorder.set_time(now);
        self.ring.suppress_kicks();
    }

    /// All that is completed of the batch is published.
    pub(super) fn end_batch(&mut self, now: Instant) {
        self.recorder.end_batch(now, self.batch - self.budget);
        self.batch = self.budget;
    }

    /// The thread woke up; the handler may complete requests that it took before.
    pub(super) fn wake(&mut self, now: Instant) {
        self.recorder.set_time(now);
    }

    /// The driver kicked.
    pub(super) fn kicked(&mut self) {
        self.pending = true;
        self.recorder.kicked();
    }

    /// Lets the handler take what a device before this one had taken, and no more. Returns how many requests that are.
    pub(super) fn begin_recovered(&mut self, now: Instant) -> usize {
        self.stopping = true;
        let recovered = match self.is_usable() {
            true => self.ring.recovered(),
            false => 0,
        };
        self.budget = recovered.min(BATCH.into()) as u16;
        self.batch = self.budget;
        self.recorder.set_time(now);
        recovered
    }

    /// Whether the handler took requests in this batch.
    pub(super) fn took(&self) -> bool {
        self.budget < self.batch
    }

    /// Asks the driver to kick. Returns whether there is nothing to do until it does, or until the
    /// handler has room again.
    pub(super) fn rest(&mut self) -> bool {
        if self.broken || self.ring.has_known_available() {
            return true;
        }
        self.pending = self.ring.want_kick().unwrap_or_else(|error| {
            self.fail(&error);
            false
        });
        !self.pending
    }

    /// When to look at this queue though nothing has become ready. What the handler asked for holds for one time.
    pub(super) fn next_look(&mut self) -> Option<Duration> {
        let unkicked = self.kick.is_none().then_some(UNKICKED_INTERVAL);
        self.look_again.take().into_iter().chain(unkicked).min()
    }

    pub(super) fn base(&self) -> u32 {
        self.ring.base()
    }

    /// Leaves the ring to the device that comes next.
    pub(super) fn release(&mut self) -> Stopped {
        self.publish();
        let usable = self.is_usable();
        Stopped {
            base: self.ring.base(),
            suspended: self.ring.release(usable),
        }
    }

    /// Requests that were taken and not yet completed.
    pub fn held(&self) -> u16 {
        self.ring.held()
    }
}

/// The queues that one worker owns.
#[derive(Debug, Default)]
pub struct Queues(pub(super) Vec<Queue>);

impl Queues {
    /// Queues of different numbers: for who drives a handler without a worker.
    pub fn new(queues: Vec<Queue>) -> Self {
        Self(queues)
    }

    /// The queue with this number, if it is started and belongs to this worker.
    #[inline]
    pub fn get_mut(&mut self, index: u16) -> Option<&mut Queue> {
        self.0.iter_mut().find(|queue| queue.index == index)
    }
}
