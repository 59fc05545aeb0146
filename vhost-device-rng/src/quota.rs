// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The limit on bytes per period.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// The bytes spent in the current period: the device state, version 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spent {
    bytes: u64,
    /// Time until the period ends.
    milliseconds_left: u64,
}

/// A limit on bytes per period. Each period begins where the previous one ends.
pub struct Quota {
    max_bytes: u64,
    period: Duration,
    /// End of the current period.
    end: Instant,
    /// Bytes that remain until then.
    remaining: u64,
}

impl Quota {
    /// Creates a limit of `max_bytes` for each period of `period` milliseconds. The first period begins now.
    pub fn new(max_bytes: u64, period: u32) -> Self {
        let period = Duration::from_millis(period.into());
        Self {
            max_bytes,
            period,
            end: Instant::now() + period,
            remaining: max_bytes,
        }
    }

    /// Returns the bytes that remain, or the time until the next period if none remain.
    pub fn remaining(&mut self, now: Instant) -> Result<u64, Duration> {
        if let Some(late) = now.checked_duration_since(self.end) {
            let into_period = late.as_nanos() % self.period.as_nanos().max(1);
            self.end = now + self.period - Duration::from_nanos(into_period as u64);
            self.remaining = self.max_bytes;
        }
        match self.remaining {
            0 => Err(self.end.saturating_duration_since(now)),
            remaining => Ok(remaining),
        }
    }

    /// Spends `bytes` of the current period.
    pub fn spend(&mut self, bytes: u32) {
        self.remaining = self.remaining.saturating_sub(bytes.into());
    }

    /// Returns what was spent in the current period.
    pub fn spent(&mut self, now: Instant) -> Spent {
        let remaining = self.remaining(now).unwrap_or(0);
        let until = self.end.saturating_duration_since(now);
        Spent {
            bytes: self.max_bytes.saturating_sub(remaining),
            milliseconds_left: until.as_millis() as u64,
        }
    }

    /// Counts what another process spent. This never increases the quota or ends a period earlier.
    pub fn restore(&mut self, spent: Spent, now: Instant) {
        let remaining = self.remaining(now).unwrap_or(0);
        self.remaining = remaining.min(self.max_bytes.saturating_sub(spent.bytes));
        let until = Duration::from_millis(spent.milliseconds_left).min(self.period);
        self.end = self.end.max(now + until);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn spend_all(quota: &mut Quota, now: Instant) -> u64 {
        let remaining = quota.remaining(now).unwrap_or(0);
        quota.spend(remaining as u32);
        remaining
    }

    #[test]
    fn a_spent_quota_returns_the_time_until_the_next_period() {
        let mut quota = Quota::new(100, 50);
        let start = quota.end - 50 * MS;
        assert_eq!(quota.remaining(start), Ok(100));
        quota.spend(99);
        assert_eq!(quota.remaining(start + 10 * MS), Ok(1));
        quota.spend(1);
        assert_eq!(quota.remaining(start + 20 * MS), Err(30 * MS));
        assert_eq!(quota.remaining(start + 50 * MS), Ok(100));
    }

    #[test]
    fn unspent_bytes_are_lost() {
        let mut quota = Quota::new(100, 50);
        let start = quota.end - 50 * MS;
        assert_eq!(spend_all(&mut quota, start + 1000 * MS), 100);
        assert_eq!(quota.remaining(start + 1049 * MS), Err(MS));
    }

    #[test]
    fn bytes_spent_by_another_process_count_until_its_period_ends() {
        let mut there = Quota::new(100, 50);
        let start = there.end - 50 * MS;
        there.remaining(start).unwrap();
        there.spend(70);
        let spent = there.spent(start + 10 * MS);
        let mut here = Quota::new(100, 50);
        here.end = start + 30 * MS;
        here.restore(spent, start + 10 * MS);
        assert_eq!(here.remaining(start + 10 * MS), Ok(30));
        here.spend(30);
        assert_eq!(here.remaining(start + 49 * MS), Err(MS));
        assert_eq!(here.remaining(start + 50 * MS), Ok(100));
    }

    #[test]
    fn a_restored_quota_is_never_larger_or_longer_than_a_period() {
        let mut quota = Quota::new(100, 50);
        let start = quota.end - 50 * MS;
        quota.remaining(start).unwrap();
        quota.spend(90);
        let spent = |bytes, milliseconds_left| Spent {
            bytes,
            milliseconds_left,
        };
        quota.restore(spent(0, 0), start + 10 * MS);
        assert_eq!(quota.remaining(start + 49 * MS), Ok(10));
        quota.restore(spent(u64::MAX, u64::MAX), start + 49 * MS);
        assert_eq!(quota.remaining(start + 98 * MS), Err(MS));
        assert_eq!(quota.remaining(start + 99 * MS), Ok(100));
    }

    #[test]
    fn periods_do_not_drift_when_checked_late() {
        let mut quota = Quota::new(100, 50);
        let start = quota.end - 50 * MS;
        let mut now = start;
        let mut sum = 0;
        for _ in 0..1000 {
            sum += spend_all(&mut quota, now);
            now += quota.remaining(now).unwrap_err() + 7 * MS;
        }
        assert_eq!(sum, 100_000);
        assert_eq!(now, start + 1000 * 50 * MS + 7 * MS);
    }
}
