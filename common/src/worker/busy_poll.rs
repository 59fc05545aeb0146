// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Busy polling: how long a worker polls its rings before it sleeps.

use std::str::FromStr;
use std::time::{Duration, Instant};

/// Default cap on busy polling: about one sleep/wake cycle.
const LONGEST: Duration = Duration::from_micros(100);
/// How long to poll at first.
const FIRST: Duration = Duration::from_micros(50);
/// Polling for less than this is not worthwhile.
const SHORTEST: Duration = Duration::from_micros(10);
/// The largest value of the option, in microseconds.
const MOST_MICROSECONDS: u64 = 1_000_000;

/// How long a queue thread polls for more work before it sleeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Polling {
    /// As long as polling has paid recently, at most 100 us; not at all if work is less frequent.
    #[default]
    Auto,
    /// This long.
    For(Duration),
}

impl FromStr for Polling {
    type Err = String;

    /// Parses a number of microseconds, `auto` or `off`.
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "off" => Ok(Self::For(Duration::ZERO)),
            _ => text
                .parse()
                .ok()
                .filter(|microseconds| *microseconds <= MOST_MICROSECONDS)
                .map(|microseconds| Self::For(Duration::from_micros(microseconds)))
                .ok_or_else(|| {
                    format!("must be auto, off, or microseconds up to {MOST_MICROSECONDS}")
                }),
        }
    }
}

/// Decides whether to poll, from how soon work has followed work.
#[derive(Debug)]
pub(super) struct BusyPoll {
    polling: Polling,
    /// How long to poll.
    window: Duration,
    /// When the last work was done.
    last_work: Instant,
    /// When the thread last looked for work.
    last_poll: Instant,
    /// The clock when it was last read.
    now: Instant,
}

impl BusyPoll {
    pub fn new(polling: Polling) -> Self {
        let now = Instant::now();
        Self {
            polling,
            window: match polling {
                Polling::Auto => FIRST,
                Polling::For(time) => time,
            },
            last_work: now,
            last_poll: now,
            now,
        }
    }

    /// Records that the last look found work, which is now done.
    pub fn note_work(&mut self) {
        if self.polling == Polling::Auto {
            let gap = self.last_poll.saturating_duration_since(self.last_work);
            self.learn(gap);
        }
        self.last_work = self.update_clock();
    }

    /// Adjusts the window to work that came after a gap.
    fn learn(&mut self, gap: Duration) {
        if gap > LONGEST {
            self.window /= 2;
            if self.window < SHORTEST {
                self.window = Duration::ZERO;
            }
        } else if gap > self.window {
            self.window = (2 * gap).clamp(SHORTEST, LONGEST);
        }
    }

    /// Records that the thread looks for work now, after a sleep or without.
    pub fn note_poll(&mut self) {
        self.last_poll = self.update_clock();
    }

    /// Reads the clock.
    pub fn update_clock(&mut self) -> Instant {
        self.now = Instant::now();
        self.now
    }

    /// Returns the clock as it was last read.
    pub fn now(&self) -> Instant {
        self.now
    }

    /// Records a look for work. Returns whether to poll on rather than sleep.
    pub fn should_poll(&mut self) -> bool {
        if self.window == Duration::ZERO {
            return false;
        }
        self.note_poll();
        self.last_poll.saturating_duration_since(self.last_work) < self.window
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: Duration = Duration::from_micros(1);

    fn window_after(gaps: impl IntoIterator<Item = Duration>) -> Duration {
        let mut busy_poll = BusyPoll::new(Polling::Auto);
        for gap in gaps {
            busy_poll.last_poll = busy_poll.last_work + gap;
            busy_poll.note_work();
        }
        busy_poll.window
    }

    #[test]
    fn frequent_work_is_polled_for() {
        for gap in [1, 20, 49, 60, 99] {
            assert!(window_after([gap * US; 10]) > gap * US, "{gap}");
        }
    }

    #[test]
    fn infrequent_work_is_not_polled_for() {
        for gap in [101, 1000, 1_000_000] {
            assert_eq!(window_after([gap * US; 10]), Duration::ZERO, "{gap}");
        }
    }

    #[test]
    fn a_single_pause_changes_little_and_frequent_work_restores_polling_at_once() {
        let pause = [20 * US, 20 * US, 5000 * US];
        assert!(window_after(pause) > 20 * US);
        let mut gaps = vec![5000 * US; 10];
        gaps.push(30 * US);
        assert!(window_after(gaps) > 30 * US);
    }

    #[test]
    fn the_window_never_exceeds_its_cap() {
        for gap in 0..200 {
            assert!(window_after([gap * US; 3]) <= LONGEST);
        }
    }

    #[test]
    fn a_configured_window_stays() {
        let mut busy_poll = BusyPoll::new(Polling::For(30 * US));
        busy_poll.last_poll = busy_poll.last_work + 5000 * US;
        busy_poll.note_work();
        assert_eq!(busy_poll.window, 30 * US);
    }

    #[test]
    fn the_option_is_auto_off_or_microseconds() {
        assert_eq!("auto".parse(), Ok(Polling::Auto));
        assert_eq!("off".parse(), Ok(Polling::For(Duration::ZERO)));
        assert_eq!("0".parse(), Ok(Polling::For(Duration::ZERO)));
        assert_eq!("50".parse(), Ok(Polling::For(50 * US)));
        for wrong in ["", "-1", "1.5", "1000001", "on", "18446744073709551616"] {
            assert!(wrong.parse::<Polling>().is_err(), "{wrong}");
        }
    }
}
