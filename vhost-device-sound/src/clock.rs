// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The clock of a stream whose host has none: a period elapses at each multiple of its length since the start.

use std::time::{Duration, Instant};

const NANOSECONDS: u128 = 1_000_000_000;
/// Shortest time between two wake-ups. Shorter periods elapse several at a time.
const SHORTEST: Duration = Duration::from_millis(1);

/// Counts periods since an instant. It never drifts: each period ends at a time that is computed from the start.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    start: Instant,
    /// Frames a second.
    rate: u32,
    /// Frames of a period.
    period: u32,
    /// Periods that have elapsed and were counted.
    elapsed: u64,
    /// When they were counted last.
    last: Instant,
}

impl Clock {
    /// Starts a clock. Both numbers are greater than 0.
    pub fn new(start: Instant, rate: u32, period: u32) -> Self {
        Self {
            start,
            rate,
            period: period.max(1),
            elapsed: 0,
            last: start,
        }
    }

    /// Returns how many periods have elapsed since the last call.
    pub fn elapse(&mut self, now: Instant) -> u64 {
        let time = now.saturating_duration_since(self.start).as_nanos();
        let frames = time * u128::from(self.rate) / NANOSECONDS;
        let periods = (frames / u128::from(self.period)) as u64;
        let due = periods.saturating_sub(self.elapsed);
        self.elapsed += due;
        self.last = now;
        due
    }

    /// Returns when to call [`Clock::elapse`] again. That does not depend on how often this is asked.
    pub fn next(&self) -> Instant {
        let frames = u128::from(self.elapsed + 1) * u128::from(self.period);
        // Rounded up: the period has elapsed then.
        let time = (frames * NANOSECONDS).div_ceil(u128::from(self.rate.max(1)));
        let end = self.start + Duration::from_nanos(u64::try_from(time).unwrap_or(u64::MAX));
        match self.length() < SHORTEST {
            true => end.max(self.last + SHORTEST),
            false => end,
        }
    }

    /// Returns the length of a period.
    pub fn length(&self) -> Duration {
        let time = u128::from(self.period) * NANOSECONDS / u128::from(self.rate.max(1));
        Duration::from_nanos(time as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_hour_has_exactly_its_frames() {
        let hour = Duration::from_secs(3600);
        let rates = [8000, 11_025, 44_100, 48_000, 192_000];
        for rate in rates {
            for period in [rate / 100, 441, 1024] {
                let start = Instant::now();
                let mut clock = Clock::new(start, rate, period);
                let mut now = start;
                let mut frames = 0;
                let mut wakes = 0u32;
                while now <= start + hour {
                    frames += clock.elapse(now) * u64::from(period);
                    let next = clock.next();
                    assert!(next > now);
                    // A wake-up is always a little late, and sometimes by several periods.
                    wakes += 1;
                    let late = if wakes.is_multiple_of(100) {
                        100_000
                    } else {
                        50
                    };
                    now = next + Duration::from_micros(late);
                }
                frames += clock.elapse(start + hour) * u64::from(period);
                let exact = u64::from(rate) * 3600;
                assert!(
                    frames <= exact + u64::from(period),
                    "{rate} {period}: {frames}"
                );
                assert!(
                    frames + u64::from(period) > exact,
                    "{rate} {period}: {frames}"
                );
            }
        }
    }

    #[test]
    fn a_period_elapses_when_it_has_ended_and_not_before() {
        for (rate, period) in [(44_100, 441), (44_100, 1024), (48_000, 333), (8000, 8)] {
            let start = Instant::now();
            let mut clock = Clock::new(start, rate, period);
            for _ in 0..1000 {
                let next = clock.next();
                assert_eq!(
                    clock.elapse(next - Duration::from_nanos(2)),
                    0,
                    "{rate} {period}"
                );
                assert_eq!(clock.elapse(next), 1, "{rate} {period}");
            }
        }
    }

    #[test]
    fn short_periods_elapse_several_at_a_time() {
        let start = Instant::now();
        let mut clock = Clock::new(start, 48_000, 1);
        assert_eq!(clock.length(), Duration::from_nanos(20_833));
        let mut now = start;
        for _ in 0..100 {
            clock.elapse(now);
            now = clock.next();
        }
        assert!(now < start + Duration::from_millis(101));
        // Whoever asks meanwhile does not put it off.
        let next = clock.next();
        assert!(next <= now + SHORTEST);
        assert_eq!(clock.next(), next);
    }
}
