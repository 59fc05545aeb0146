// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Statistics of a device, counted as long as its process lives, across front-ends and starts of a queue; and its present state, for
//! those who ask.
//!
//! Each queue has its own counters in its own cache lines, and only the thread of the queue writes them. So counting takes neither a lock
//! nor an atomic read-modify-write operation, and readers do not disturb it. The clock is read once per batch: see `Recorder`.

mod events;
mod numbers;
mod prometheus;
mod recorder;
mod status;
mod summary;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

pub(crate) use events::{Event, Events};
pub(crate) use numbers::QueueNumbers;
pub use recorder::Outcome;
pub(crate) use recorder::{Recorder, Taken};
pub(crate) use status::{FrontEnd, QueueStatus, RingFormat};

/// Number of requests of the largest batch that has its own bucket.
pub(crate) const LARGEST_BATCH: u16 = 64;
/// Buckets for the size of a batch: 1, 2, 4 and so on, and one for larger ones.
const BATCH_BUCKETS: usize = LARGEST_BATCH.ilog2() as usize + 2;
/// Buckets for the duration of a request: 1, 2, 4 and so on microseconds, up to 8.4 s, and one for longer ones.
const TIME_BUCKETS: usize = 25;

/// A number that only increases. One thread writes it.
#[derive(Debug, Default)]
struct Counter(AtomicU64);

impl Counter {
    #[inline]
    fn add(&self, count: u64) {
        let sum = self.get().wrapping_add(count);
        self.0.store(sum, Ordering::Relaxed);
    }

    #[inline]
    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Counts values up to 1, 2, 4 and so on; the last of `N` buckets counts all larger ones.
#[derive(Debug)]
struct Histogram<const N: usize>([Counter; N]);

impl<const N: usize> Default for Histogram<N> {
    fn default() -> Self {
        Self(std::array::from_fn(|_| Counter::default()))
    }
}

impl<const N: usize> Histogram<N> {
    #[inline]
    fn add(&self, value: u64, count: u64) {
        // The smallest power of two that the value does not exceed.
        let bits = u64::BITS - value.saturating_sub(1).leading_zeros();
        let place = (bits as usize).min(N - 1);
        if let Some(bucket) = self.0.get(place) {
            bucket.add(count);
        }
    }

    /// Returns the bound of each bucket (`None` for the last one), and how many values do not exceed it.
    fn cumulative(&self) -> impl Iterator<Item = (Option<u64>, u64)> {
        let mut sum = 0;
        self.0.iter().enumerate().map(move |(power, bucket)| {
            sum += bucket.get();
            ((power + 1 < N).then_some(1 << power), sum)
        })
    }

    fn count(&self) -> u64 {
        self.0.iter().map(Counter::get).sum()
    }
}

/// Counters of one type of requests.
#[derive(Debug, Default)]
struct RequestStatistics {
    bytes: Counter,
    errors: Counter,
    /// Sum of their durations.
    nanoseconds: Counter,
    /// Their durations in microseconds.
    times: Histogram<TIME_BUCKETS>,
}

impl RequestStatistics {
    /// Counts `count` requests of this duration.
    #[inline]
    fn took(&self, nanoseconds: u64, count: u64) {
        self.nanoseconds.add(nanoseconds.saturating_mul(count));
        self.times.add(nanoseconds.div_ceil(1000), count);
    }
}

/// Counters of one queue. Aligned to two cache lines, because processors fetch lines in pairs.
#[derive(Debug)]
#[repr(align(128))]
struct QueueStatistics {
    kicks: Counter,
    calls: Counter,
    suppressed_calls: Counter,
    unkicked_batches: Counter,
    taken: Counter,
    batches: Histogram<BATCH_BUCKETS>,
    /// Counters of requests, by the index of their type.
    requests: Box<[RequestStatistics]>,
}

impl QueueStatistics {
    fn new(types: usize) -> Self {
        Self {
            kicks: Counter::default(),
            calls: Counter::default(),
            suppressed_calls: Counter::default(),
            unkicked_batches: Counter::default(),
            taken: Counter::default(),
            batches: Histogram::default(),
            requests: (0..types).map(|_| RequestStatistics::default()).collect(),
        }
    }
}

/// The statistics of a device.
#[derive(Debug)]
pub struct Statistics {
    device: &'static str,
    /// Names of the request types.
    types: &'static [&'static str],
    front_ends: AtomicU64,
    /// Queues that were started at least once.
    queues: Mutex<BTreeMap<u16, Arc<QueueStatistics>>>,
    /// The state of the connection.
    front_end: Mutex<Option<FrontEnd>>,
    /// Set if events are collected.
    events: OnceLock<Events>,
}

impl Statistics {
    /// Creates the statistics of a device of type `device`, whose requests have these `types`.
    pub fn new(device: &'static str, types: &'static [&'static str]) -> Self {
        Self {
            device,
            types,
            front_ends: AtomicU64::new(0),
            queues: Mutex::default(),
            front_end: Mutex::default(),
            events: OnceLock::new(),
        }
    }

    /// Counts a front-end that connected.
    pub(crate) fn count_front_end(&self) {
        self.front_ends.fetch_add(1, Ordering::Relaxed);
    }

    /// Returns how many front-ends have connected.
    pub(crate) fn front_ends(&self) -> u64 {
        self.front_ends.load(Ordering::Relaxed)
    }

    /// Returns the recorder for a thread that starts to serve a queue. It continues the counters of the previous thread.
    pub(crate) fn recorder(&self, queue: u16) -> Recorder {
        let new = || Arc::new(QueueStatistics::new(self.types.len()));
        Recorder::new(Arc::clone(self.queues().entry(queue).or_insert_with(new)))
    }

    fn queues(&self) -> MutexGuard<'_, BTreeMap<u16, Arc<QueueStatistics>>> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    const TYPES: &[&str] = &["read", "write"];

    fn statistics() -> Statistics {
        Statistics::new("block", TYPES)
    }

    fn outcome(request: usize, bytes: u64, failed: bool) -> Outcome {
        Outcome {
            request,
            bytes,
            failed,
        }
    }

    /// The value of a sample.
    #[track_caller]
    fn value(statistics: &Statistics, sample: &str) -> f64 {
        let page = statistics.prometheus();
        let mut lines = page.lines();
        let value = lines.find_map(|line| line.strip_prefix(sample)?.strip_prefix(' '));
        value
            .unwrap_or_else(|| panic!("no {sample} in\n{page}"))
            .parse()
            .unwrap()
    }

    #[test]
    fn a_bucket_has_the_values_up_to_its_bound() {
        let histogram = Histogram::<4>::default();
        let counts = |value| {
            histogram.add(value, 1);
            histogram
                .cumulative()
                .map(|(_, sum)| sum)
                .collect::<Vec<_>>()
        };
        assert_eq!(counts(0), [1, 1, 1, 1]);
        assert_eq!(counts(1), [2, 2, 2, 2]);
        assert_eq!(counts(2), [2, 3, 3, 3]);
        assert_eq!(counts(3), [2, 3, 4, 4]);
        assert_eq!(counts(4), [2, 3, 5, 5]);
        assert_eq!(counts(5), [2, 3, 5, 6]);
        assert_eq!(counts(u64::MAX), [2, 3, 5, 7]);
        let bounds: Vec<_> = histogram.cumulative().map(|(bound, _)| bound).collect();
        assert_eq!(bounds, [Some(1), Some(2), Some(4), None]);
        assert_eq!(histogram.count(), 7);
    }

    #[test]
    fn requests_take_as_long_as_their_batch_or_until_the_wake_up_that_completes_them() {
        let statistics = statistics();
        let mut recorder = statistics.recorder(3);
        let start = Instant::now();
        let at = |microseconds| start + Duration::from_micros(microseconds);
        recorder.kicked();
        recorder.set_time(at(10));
        let taken = recorder.taken();
        recorder.completed(taken, outcome(0, 512, false));
        recorder.completed(taken, outcome(0, 512, true));
        recorder.end_batch(at(18), 3);
        recorder.set_time(at(1034));
        recorder.completed(taken, outcome(1, 4096, false));
        recorder.set_time(at(2000));
        recorder.end_batch(at(2001), 0);
        let read = r#"device="block",queue="3",type="read""#;
        let write = r#"device="block",queue="3",type="write""#;
        let value = |sample: String| value(&statistics, &sample);
        let times = "vhost_device_request_duration_seconds";
        assert_eq!(value(format!("vhost_device_requests_total{{{read}}}")), 2.0);
        assert_eq!(
            value(format!("vhost_device_request_bytes_total{{{read}}}")),
            1024.0
        );
        assert_eq!(
            value(format!("vhost_device_request_errors_total{{{read}}}")),
            1.0
        );
        assert_eq!(
            value(format!("{times}_bucket{{{read},le=\"0.000004\"}}")),
            0.0
        );
        assert_eq!(
            value(format!("{times}_bucket{{{read},le=\"0.000008\"}}")),
            2.0
        );
        assert_eq!(value(format!("{times}_sum{{{read}}}")), 16e-6);
        assert_eq!(
            value(format!("{times}_bucket{{{write},le=\"0.000512\"}}")),
            0.0
        );
        assert_eq!(
            value(format!("{times}_bucket{{{write},le=\"0.001024\"}}")),
            1.0
        );
        assert_eq!(value(format!("{times}_bucket{{{write},le=\"+Inf\"}}")), 1.0);
        assert_eq!(value(format!("{times}_sum{{{write}}}")), 1024e-6);
        let queue = r#"device="block",queue="3""#;
        let batches = "vhost_device_batch_requests";
        assert_eq!(value(format!("{batches}_bucket{{{queue},le=\"2\"}}")), 0.0);
        assert_eq!(value(format!("{batches}_bucket{{{queue},le=\"4\"}}")), 1.0);
        assert_eq!(value(format!("{batches}_sum{{{queue}}}")), 3.0);
        assert_eq!(value(format!("{batches}_count{{{queue}}}")), 1.0);
        assert_eq!(value(format!("vhost_device_kicks_total{{{queue}}}")), 1.0);
        assert_eq!(
            value(format!("vhost_device_batches_unkicked_total{{{queue}}}")),
            0.0
        );
    }

    #[test]
    fn a_queue_that_starts_again_goes_on_counting() {
        let statistics = statistics();
        for _ in 0..3 {
            let mut recorder = statistics.recorder(0);
            recorder.set_time(Instant::now());
            recorder.completed(recorder.taken(), outcome(0, 1, false));
            recorder.end_batch(Instant::now(), 1);
        }
        let sample = r#"vhost_device_requests_total{device="block",queue="0",type="read"}"#;
        assert_eq!(value(&statistics, sample), 3.0);
        let sample = r#"vhost_device_batches_unkicked_total{device="block",queue="0"}"#;
        assert_eq!(value(&statistics, sample), 3.0);
    }

    #[test]
    fn a_type_that_there_is_not_is_not_counted() {
        let statistics = statistics();
        let mut recorder = statistics.recorder(0);
        recorder.completed(recorder.taken(), outcome(2, 1, true));
        assert!(!statistics.prometheus().contains(" 1\n"));
    }
}
