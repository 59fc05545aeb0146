// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How many bytes may be given in each period.

use std::time::{Duration, Instant};

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
