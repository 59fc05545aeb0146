// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How the thread of a queue counts.

use std::sync::Arc;
use std::time::Instant;

use super::QueueStatistics;

/// The result of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Its type: an index of [`Device::REQUESTS`](crate::device::Device::REQUESTS).
    pub request: usize,
    /// Bytes of data that were transferred for it.
    pub bytes: u64,
    /// It was completed with an error.
    pub failed: bool,
}

/// When a request was taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Taken(u64);

/// Counts what happens on one queue.
///
/// The thread sets the time where it reads the clock anyway: when it wakes up, and when a batch begins and ends. A request that is taken
/// and completed in one batch has the duration of the batch, because the driver is notified at its end. A request that is completed later
/// has the time until the wake-up that completes it.
#[derive(Debug)]
pub(crate) struct Recorder {
    statistics: Arc<QueueStatistics>,
    /// The instant from which nanoseconds are counted.
    origin: Instant,
    /// When the batch began, or the thread woke up.
    now: Taken,
    /// Requests that were taken and completed in the present batch, by type.
    at_once: Box<[u64]>,
    /// The driver has kicked since the last batch.
    was_kicked: bool,
}

impl Recorder {
    pub(super) fn new(statistics: Arc<QueueStatistics>) -> Self {
        Self {
            at_once: vec![0; statistics.requests.len()].into(),
            statistics,
            origin: Instant::now(),
            now: Taken::default(),
            was_kicked: false,
        }
    }

    /// Returns a recorder whose counters are not used.
    pub(crate) fn discarding() -> Self {
        Self::new(Arc::new(QueueStatistics::new(1)))
    }

    fn since_origin(&self, time: Instant) -> u64 {
        let time = time.saturating_duration_since(self.origin);
        u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
    }

    /// Sets the time: a batch begins, or the thread woke up.
    #[inline]
    pub(crate) fn set_time(&mut self, now: Instant) {
        self.now = Taken(self.since_origin(now));
    }

    /// Returns the time at which a request is taken now.
    #[inline]
    pub(crate) fn taken(&self) -> Taken {
        self.now
    }

    /// Counts a kick.
    pub(crate) fn kicked(&mut self) {
        self.was_kicked = true;
        self.statistics.kicks.add(1);
    }

    /// Counts a call.
    pub(crate) fn called(&self) {
        self.statistics.calls.add(1);
    }

    /// Counts a call that the driver did not want.
    pub(crate) fn suppressed_call(&self) {
        self.statistics.suppressed_calls.add(1);
    }

    /// Counts a completed request.
    #[inline]
    pub(crate) fn completed(&mut self, taken: Taken, outcome: Outcome) {
        let place = outcome.request;
        let (Some(request), Some(at_once)) = (
            self.statistics.requests.get(place),
            self.at_once.get_mut(place),
        ) else {
            return;
        };
        request.bytes.add(outcome.bytes);
        if outcome.failed {
            request.errors.add(1);
        }
        if taken == self.now {
            *at_once += 1;
        } else {
            request.took(self.now.0.saturating_sub(taken.0), 1);
        }
    }

    /// Counts a batch of `taken` requests that has ended.
    pub(crate) fn end_batch(&mut self, now: Instant, taken: u16) {
        let time = self.since_origin(now).saturating_sub(self.now.0);
        for (count, request) in self.at_once.iter_mut().zip(&self.statistics.requests) {
            if *count > 0 {
                request.took(time, *count);
                *count = 0;
            }
        }
        if taken > 0 {
            if !self.was_kicked {
                self.statistics.unkicked_batches.add(1);
            }
            self.statistics.batches.add(taken.into(), 1);
            self.statistics.taken.add(taken.into());
        }
        self.was_kicked = false;
    }
}
