// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A log-linear histogram of latencies: fixed size, no allocation per value, error under 1 %.

/// Each power of two is divided into this many buckets (as a power of two).
const PRECISION: u32 = 7;
/// Values from 2^36 ns (69 s) on fall into the last bucket.
const LARGEST: u32 = 36;
const BUCKETS: usize = ((LARGEST - PRECISION + 1) as usize) << PRECISION;

/// Counts of latencies in nanoseconds.
#[derive(Debug, Clone)]
pub struct Histogram {
    counts: Box<[u64]>,
    total: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Histogram {
            counts: vec![0; BUCKETS].into_boxed_slice(),
            total: 0,
        }
    }
}

impl Histogram {
    /// Counts one value.
    #[inline]
    pub fn record(&mut self, nanoseconds: u64) {
        self.counts[bucket(nanoseconds)] += 1;
        self.total += 1;
    }

    /// Adds all of another histogram's values.
    pub fn merge(&mut self, other: &Histogram) {
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count += more;
        }
        self.total += other.total;
    }

    /// Returns the number of values.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Returns the value, in nanoseconds, that `percent` of all values do not exceed; 0 without values.
    pub fn percentile(&self, percent: f64) -> f64 {
        let rank = ((self.total as f64 * percent / 100.0).ceil() as u64).max(1);
        let mut seen = 0;
        for (index, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return (lower_bound(index) + lower_bound(index + 1)) as f64 / 2.0;
            }
        }
        0.0
    }
}

/// Values below 2^PRECISION have a bucket each; above, the leading bits choose one.
#[inline]
fn bucket(value: u64) -> usize {
    let shift = (u64::BITS - value.leading_zeros()).saturating_sub(PRECISION + 1);
    let index = ((shift as usize) << PRECISION) + (value >> shift) as usize;
    index.min(BUCKETS - 1)
}

fn lower_bound(index: usize) -> u64 {
    let shift = (index >> PRECISION).saturating_sub(1);
    ((index - (shift << PRECISION)) as u64) << shift
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_value_lies_within_its_bucket_and_buckets_are_narrow() {
        for power in 0..LARGEST {
            for value in [
                1u64 << power,
                (1 << power) + 1,
                (2 << power) - 1,
                3 << power >> 1,
            ] {
                let (low, high) = (lower_bound(bucket(value)), lower_bound(bucket(value) + 1));
                assert!((low..high).contains(&value), "{value}: {low}..{high}");
                assert!(high - low == 1 || (high - low) as f64 <= value as f64 / 100.0);
            }
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn percentiles_of_known_values() {
        let mut low = Histogram::default();
        let mut high = Histogram::default();
        assert_eq!(low.percentile(50.0), 0.0);
        for value in 1..=500 {
            low.record(value * 1000);
            high.record((value + 500) * 1000);
        }
        low.merge(&high);
        assert_eq!(low.total(), 1000);
        for (percent, expected) in [(50.0, 500e3), (99.0, 990e3), (100.0, 1e6)] {
            let got = low.percentile(percent);
            assert!((got / expected - 1.0).abs() < 0.01, "{percent} %: {got}");
        }
    }
}
