// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `--iops` and `--bps`: what all queues together may do in a second, and whose turn it is.
//!
//! A [`Bucket`] for requests and one for bytes fill with time. A request may start while neither is in debt, and is charged whole:
//! so one of any size goes some time, and those behind it pay for it.
//!
//! Queues that wait take turns by start-time fair queueing. A request takes as much virtual time as the limits take to allow it. It starts
//! when the one before it on the same queue ends, or now if the queue was idle, and the one with the earliest start goes first.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The shortest time to wait: what bounds how often a queue is looked at, however much it may do in that time.
const SLICE: Duration = Duration::from_millis(1);
/// How much virtual time a queue may be ahead of one that waits, and comes for its turn within a slice. A queue that is alone for a slice is
/// not to leave any of it unused.
const LEAD: Duration = Duration::from_millis(4);
/// A queue that is so late for its turn is not waited for: it has stopped, or its thread hangs in a request.
const GRACE: Duration = Duration::from_millis(50);
/// The least that a bucket holds: a thread may be late by this and nothing is lost.
const LEAST_BURST: Duration = Duration::from_millis(10);
/// What a bucket holds if nothing else is said.
const DEFAULT_BURST: Duration = Duration::from_millis(100);

/// How much may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// In a second; not 0.
    pub rate: u64,
    /// At once, after nothing went for a while.
    pub burst: Option<u64>,
}

impl Limit {
    /// The time in which the limit allows `amount`.
    fn time(self, amount: u64) -> Duration {
        let nanoseconds = u128::from(amount) * 1_000_000_000;
        let nanoseconds = nanoseconds.div_ceil(u128::from(self.rate).max(1));
        u64::try_from(nanoseconds).map_or(Duration::MAX, Duration::from_nanos)
    }

    /// What may go at once, as the time in which it comes together again.
    fn burst(self) -> Duration {
        self.burst
            .map_or(DEFAULT_BURST, |burst| self.time(burst))
            .max(LEAST_BURST)
    }
}

/// A token bucket. Times are since a moment in the past.
#[derive(Debug)]
struct Bucket {
    limit: Limit,
    /// How long it takes to fill.
    capacity: Duration,
    /// When it is full if nothing more goes.
    full_at: Duration,
}

impl Bucket {
    /// What goes is a multiple of `unit`.
    fn new(limit: Limit, unit: u64) -> Self {
        Self {
            limit,
            // Something may go from a bucket that is just empty.
            capacity: limit.burst().saturating_sub(limit.time(unit)),
            full_at: Duration::ZERO,
        }
    }

    /// How long it is in debt.
    fn debt(&self, now: Duration) -> Duration {
        self.full_at
            .saturating_sub(self.capacity)
            .saturating_sub(now)
    }

    fn charge(&mut self, amount: u64, now: Duration) {
        let start = self.full_at.max(now);
        self.full_at = start.saturating_add(self.limit.time(amount));
    }
}

/// The next request of a queue that has one, as far as is known.
#[derive(Clone, Copy, Debug)]
struct Waiting {
    /// Its start in virtual time.
    start: Duration,
    /// When its queue looks whether it may start.
    looks_at: Duration,
}

impl Waiting {
    fn is_late(&self, now: Duration) -> bool {
        self.looks_at.saturating_add(GRACE) < now
    }
}

#[derive(Clone, Debug, Default)]
struct Share {
    /// When the last request of the queue ends in virtual time.
    end: Duration,
    waiting: Option<Waiting>,
}

#[derive(Debug)]
struct State {
    requests: Option<Bucket>,
    bytes: Option<Bucket>,
    /// The earliest start that a request may have.
    virtual_time: Duration,
    queues: usize,
    /// Those of the queues up to the last that had a request: all of them are looked at for each request.
    shares: Vec<Share>,
}

impl State {
    fn new(requests: Option<Limit>, bytes: Option<Limit>, queues: u16) -> Self {
        Self {
            requests: requests.map(|limit| Bucket::new(limit, 1)),
            bytes: bytes.map(|limit| Bucket::new(limit, 1)),
            virtual_time: Duration::ZERO,
            queues: queues.into(),
            shares: Vec::new(),
        }
    }

    /// The buckets that a request counts in, with what it counts there.
    fn buckets(&mut self, bytes: u64) -> impl Iterator<Item = (&mut Bucket, u64)> {
        let requests = self.requests.iter_mut().map(|bucket| (bucket, 1));
        let bytes = self.bytes.iter_mut().map(move |bucket| (bucket, bytes));
        requests.chain(bytes).filter(|(_, amount)| *amount > 0)
    }

    fn start(&mut self, queue: usize, bytes: u64, now: Duration) -> Result<(), Duration> {
        if queue >= self.shares.len() && queue < self.queues {
            self.shares.resize(queue + 1, Share::default());
        }
        let Some(share) = self.shares.get(queue) else {
            return Ok(());
        };
        let start = match share.waiting {
            Some(waiting) if !waiting.is_late(now) => waiting.start,
            _ => share.end.max(self.virtual_time),
        };
        let others = self.shares.iter().enumerate();
        let others = others.filter_map(|(number, share)| share.waiting.filter(|_| number != queue));
        let others = others.filter(|waiting| !waiting.is_late(now));
        let (mut earliest, mut turn) = (start, now);
        for other in others {
            earliest = earliest.min(other.start);
            if other.start.saturating_add(LEAD) < start {
                turn = turn.max(other.looks_at).max(now + SLICE);
            }
        }
        let debts = self.buckets(bytes).map(|(bucket, _)| bucket.debt(now));
        let debt = debts.max().unwrap_or_default();
        let wait = debt.max(turn.saturating_sub(now));
        let mut length = Duration::ZERO;
        if wait.is_zero() {
            self.virtual_time = self.virtual_time.max(earliest);
            for (bucket, amount) in self.buckets(bytes) {
                bucket.charge(amount, now);
                length = length.max(bucket.limit.time(amount));
            }
        }
        let Some(share) = self.shares.get_mut(queue) else {
            return Ok(());
        };
        if wait.is_zero() {
            share.end = start.saturating_add(length);
            share.waiting = Some(Waiting {
                start: share.end,
                looks_at: now,
            });
            return Ok(());
        }
        let wait = wait.max(SLICE);
        let looks_at = now.saturating_add(wait);
        share.waiting = Some(Waiting { start, looks_at });
        Err(wait)
    }

    fn leave(&mut self, queue: usize) {
        if let Some(share) = self.shares.get_mut(queue) {
            share.waiting = None;
        }
    }
}

/// The limits of a device.
#[derive(Debug)]
pub struct Throttle {
    origin: Instant,
    state: Mutex<State>,
}

impl Throttle {
    /// Limits for the requests, and for the bytes, of so many queues. `None` if there is no limit.
    pub fn new(requests: Option<Limit>, bytes: Option<Limit>, queues: u16) -> Option<Self> {
        requests.or(bytes)?;
        Some(Self {
            origin: Instant::now(),
            state: Mutex::new(State::new(requests, bytes, queues)),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a request of `queue` that moves so many bytes, which is charged, or says when to ask again. Others wait for the queue to do so,
    /// if it is its turn, until it leaves.
    pub fn start(&self, queue: u16, bytes: u64) -> Result<(), Duration> {
        let now = self.origin.elapsed();
        self.state().start(queue.into(), bytes, now)
    }

    /// `queue` has no request that could start.
    pub fn leave(&self, queue: u16) {
        self.state().leave(queue.into());
    }
}

#[cfg(test)]
mod tests;
