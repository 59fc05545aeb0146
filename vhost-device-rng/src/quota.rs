// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How many bytes may be given in each period.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// What was given in a period that is not over: the state of the device, version 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spent {
    bytes: u64,
    /// When the period ends, from now.
    milliseconds_left: u64,
}

/// A number of bytes for each period. Periods follow each other without a gap.
pub struct Quota {
    max_bytes: u64,
    period: Duration,
    /// End of the present period.
    end: Instant,
    /// Bytes that may be given until then.
    left: u64,
}

impl Quota {
    /// `max_bytes` for each period of `period` milliseconds, from now on.
    pub fn new(max_bytes: u64, period: u32) -> Self {
        let period = Duration::from_millis(period.into());
        Self {
            max_bytes,
            period,
            end: Instant::now() + period,
            left: max_bytes,
        }
    }

    /// How many bytes may be given, or how long there will be none.
    pub fn left(&mut self, now: Instant) -> Result<u64, Duration> {
        if let Some(late) = now.checked_duration_since(self.end) {
            let into_period = late.as_nanos() % self.period.as_nanos().max(1);
            self.end = now + self.period - Duration::from_nanos(into_period as u64);
            self.left = self.max_bytes;
        }
        match self.left {
            0 => Err(self.end.saturating_duration_since(now)),
            left => Ok(left),
        }
    }

    /// `bytes` were given.
    pub fn spend(&mut self, bytes: u32) {
        self.left = self.left.saturating_sub(bytes.into());
    }

    /// What was given in the present period.
    pub fn spent(&mut self, now: Instant) -> Spent {
        let left = self.left(now).unwrap_or(0);
        let until = self.end.saturating_duration_since(now);
        Spent {
            bytes: self.max_bytes.saturating_sub(left),
            milliseconds_left: until.as_millis() as u64,
        }
    }

    /// Counts what was given elsewhere. No quota is larger for it, and no period ends earlier.
    pub fn count(&mut self, spent: Spent, now: Instant) {
        let left = self.left(now).unwrap_or(0);
        self.left = left.min(self.max_bytes.saturating_sub(spent.bytes));
        let until = Duration::from_millis(spent.milliseconds_left).min(self.period);
        self.end = self.end.max(now + until);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn spend_all(quota: &mut Quota, now: Instant) -> u64 {
        let left = quota.left(now).unwrap_or(0);
        quota.spend(left as u32);
        left
    }

    #[test]
    fn a_spent_quota_says_when_the_next_period_begins() {
        let mut quota = Quota::new(100, 50);
        let start = quota.end - 50 * MS;
        assert_eq!(quota.left(start), Ok(100));
        quota.spend(99);
        assert_eq!(quota.left(start + 10 * MS), Ok(1));
        quota.spend(1);
        assert_eq!(quota.left(start + 20 * MS), Err(30 * MS));
        assert_eq!(quota.left(start + 50 * MS), Ok(100));
    }

    #[test]
    fn what_was_not_spent_is_lost() {
        let mut quota = Quota::new(100, 50);
        let start = quota.end - 50 * MS;
        assert_eq!(spend_all(&mut quota, start + 1000 * MS), 100);
        assert_eq!(quota.left(start + 1049 * MS), Err(MS));
    }

    #[test]
    fn what_was_given_elsewhere_counts_until_its_period_ends() {
        let mut there = Quota::new(100, 50);
        let start = there.end - 50 * MS;
        there.left(start).unwrap();
        there.spend(70);
        let spent = there.spent(start + 10 * MS);
        let mut here = Quota::new(100, 50);
        here.end = start + 30 * MS;
        here.count(spent, start + 10 * MS);
        assert_eq!(here.left(start + 10 * MS), Ok(30));
        here.spend(30);
        assert_eq!(here.left(start + 49 * MS), Err(MS));
        assert_eq!(here.left(start + 50 * MS), Ok(100));
    }

    #[test]
    fn nothing_that_is_said_of_elsewhere_makes_a_quota_larger_or_lasts_longer_than_a_period() {
        let mut quota = Quota::new(100, 50);
        let start = quota.end - 50 * MS;
        quota.left(start).unwrap();
        quota.spend(90);
        let spent = |bytes, milliseconds_left| Spent {
            bytes,
            milliseconds_left,
        };
        quota.count(spent(0, 0), start + 10 * MS);
        assert_eq!(quota.left(start + 49 * MS), Ok(10));
        quota.count(spent(u64::MAX, u64::MAX), start + 49 * MS);
        assert_eq!(quota.left(start + 98 * MS), Err(MS));
        assert_eq!(quota.left(start + 99 * MS), Ok(100));
    }

    #[test]
    fn periods_do_not_drift_when_each_is_noticed_late() {
        let mut quota = Quota::new(100, 50);
        let start = quota.end - 50 * MS;
        let mut now = start;
        let mut sum = 0;
        for _ in 0..1000 {
            sum += spend_all(&mut quota, now);
            now += quota.left(now).unwrap_err() + 7 * MS;
        }
        assert_eq!(sum, 100_000);
        assert_eq!(now, start + 1000 * 50 * MS + 7 * MS);
    }
}
