// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `--iops` and `--bps`: what all queues together may do in a second, and which queue is next.
//!
//! A [`Bucket`] for requests and one for bytes fill with time. A request may start while neither is in debt, and is charged as a whole:
//! so a request of any size starts at some time, and those behind it wait until it is paid for.
//!
//! Queues that wait take turns by start-time fair queueing. A request takes as much virtual time as the limits need to allow it. It starts
//! when the request before it on the same queue ends, or now if the queue was idle, and the request with the earliest start goes first.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::options::DiskOptions;

/// The shortest time to wait: a queue is not checked more often, however much it may do in that time.
const SLICE: Duration = Duration::from_millis(1);
/// How much virtual time a queue may be ahead of one that waits. The other takes its turn within a slice; a queue that is alone for a slice
/// must be able to use all of it.
const LEAD: Duration = Duration::from_millis(4);
/// The others do not wait for a queue that is later than this: it has stopped, or its thread hangs in a request.
const GRACE: Duration = Duration::from_millis(50);
/// The smallest capacity of a bucket: a thread may be late by this much without losing anything.
const LEAST_BURST: Duration = Duration::from_millis(10);
/// The default capacity of a bucket.
const DEFAULT_BURST: Duration = Duration::from_millis(100);

/// A limit on an amount: requests, or bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// The amount in a second; not 0.
    pub rate: u64,
    /// The amount that may go at once after a pause.
    pub burst: Option<u64>,
}

impl Limit {
    /// Returns the time in which the limit allows `amount`.
    fn time(self, amount: u64) -> Duration {
        let nanoseconds = u128::from(amount) * 1_000_000_000;
        let nanoseconds = nanoseconds.div_ceil(u128::from(self.rate).max(1));
        u64::try_from(nanoseconds).map_or(Duration::MAX, Duration::from_nanos)
    }

    /// Returns the amount that may go at once, as the time in which the rate allows it.
    fn burst(self) -> Duration {
        self.burst
            .map_or(DEFAULT_BURST, |burst| self.time(burst))
            .max(LEAST_BURST)
    }
}

/// A token bucket. Times count from the same moment in the past.
#[derive(Debug)]
struct Bucket {
    limit: Limit,
    /// How long it takes to fill.
    capacity: Duration,
    /// When it is full if nothing more is charged.
    full_at: Duration,
}

impl Bucket {
    /// Creates a bucket for amounts that are multiples of `unit`.
    fn new(limit: Limit, unit: u64) -> Self {
        Self {
            limit,
            // A bucket that is just empty is not in debt.
            capacity: limit.burst().saturating_sub(limit.time(unit)),
            full_at: Duration::ZERO,
        }
    }

    /// Returns how long it stays in debt.
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

/// The next request of a queue, which may not have one.
#[derive(Clone, Copy, Debug)]
struct Waiting {
    /// Its start in virtual time.
    start: Duration,
    /// When its queue checks whether it may start.
    checks_at: Duration,
}

impl Waiting {
    fn is_late(&self, now: Duration) -> bool {
        self.checks_at.saturating_add(GRACE) < now
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
    /// The shares of the queues up to the last that had a request. All are examined for each request.
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

    /// Returns the buckets that a request is charged to, with the amounts.
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
                turn = turn.max(other.checks_at).max(now + SLICE);
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
                checks_at: now,
            });
            return Ok(());
        }
        let wait = wait.max(SLICE);
        let checks_at = now.saturating_add(wait);
        share.waiting = Some(Waiting { start, checks_at });
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
    /// Limits the requests and the bytes of so many queues. `None` without limits.
    pub fn new(requests: Option<Limit>, bytes: Option<Limit>, queues: u16) -> Option<Self> {
        requests.or(bytes)?;
        Some(Self {
            origin: Instant::now(),
            state: Mutex::new(State::new(requests, bytes, queues)),
        })
    }

    /// Limits a disk as its options say. `None` without limits.
    pub fn open(options: &DiskOptions, queues: u16) -> Option<Self> {
        let limit = |rate: Option<u64>, burst| rate.map(|rate| Limit { rate, burst });
        let requests = limit(options.iops, options.iops_burst);
        let bytes = limit(options.bps, options.bps_burst);
        Self::new(requests, bytes, queues)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a request of `queue` that moves `bytes` bytes, and charges it. The other queues let this one go first when it is its turn,
    /// until it leaves.
    ///
    /// # Errors
    /// It may not start yet: how long to wait before asking again.
    pub fn start(&self, queue: u16, bytes: u64) -> Result<(), Duration> {
        let now = self.origin.elapsed();
        self.state().start(queue.into(), bytes, now)
    }

    /// Notes that `queue` has no request that could start.
    pub fn leave(&self, queue: u16) {
        self.state().leave(queue.into());
    }
}

#[cfg(test)]
mod tests;
