// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How long a worker that has run out of work looks for more before it sleeps.

use std::str::FromStr;
use std::time::{Duration, Instant};

/// Most time that is spent looking in vain if nobody chose one. To sleep and be woken costs about as much.
const LONGEST: Duration = Duration::from_micros(100);
/// Time that is spent looking at first.
const FIRST: Duration = Duration::from_micros(50);
/// Less than this is not worth looking.
const SHORTEST: Duration = Duration::from_micros(10);
/// Most microseconds that can be asked for.
const MOST_MICROSECONDS: u64 = 1_000_000;

/// How long a queue's thread looks for more work, without sleeping, after there was some.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Polling {
    /// As long as has been worth it lately, 100 us at most: not at all if work comes more seldom than that.
    #[default]
    Auto,
    /// For this time.
    For(Duration),
}

impl FromStr for Polling {
    type Err = String;

    /// A number of microseconds, `auto`, or `off`.
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

/// When there was work, and how long it is worth looking for more.
#[derive(Debug)]
pub(super) struct BusyPoll {
    polling: Polling,
    /// How long to look.
    window: Duration,
    /// When all work was done for the last time.
    last_work: Instant,
    /// When the thread looked for work for the last time.
    last_look: Instant,
    /// When it looked at the clock for the last time.
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
            last_look: now,
            now,
        }
    }

    /// There was work at the last look, and now it is done.
    pub fn worked(&mut self) {
        if self.polling == Polling::Auto {
            let gap = self.last_look.saturating_duration_since(self.last_work);
            self.learn(gap);
        }
        self.last_work = self.tick();
    }

    /// Work came so long after there was none left.
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

    /// Notes that the thread looks now, having slept perhaps.
    pub fn look(&mut self) {
        self.last_look = self.tick();
    }

    /// Looks at the clock.
    pub fn tick(&mut self) -> Instant {
        self.now = Instant::now();
        self.now
    }

    /// The time when the clock was looked at for the last time.
    pub fn now(&self) -> Instant {
        self.now
    }

    /// Looks, and says whether to look again rather than sleep.
    pub fn looks_again(&mut self) -> bool {
        if self.window == Duration::ZERO {
            return false;
        }
        self.look();
        self.last_look.saturating_duration_since(self.last_work) < self.window
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: Duration = Duration::from_micros(1);

    fn window_after(gaps: impl IntoIterator<Item = Duration>) -> Duration {
        let mut busy_poll = BusyPoll::new(Polling::Auto);
        for gap in gaps {
            busy_poll.last_look = busy_poll.last_work + gap;
            busy_poll.worked();
        }
        busy_poll.window
    }

    #[test]
    fn work_that_comes_soon_is_waited_for_awake() {
        for gap in [1, 20, 49, 60, 99] {
            assert!(window_after([gap * US; 10]) > gap * US, "{gap}");
        }
    }

    #[test]
    fn work_that_comes_seldom_is_waited_for_asleep() {
        for gap in [101, 1000, 1_000_000] {
            assert_eq!(window_after([gap * US; 10]), Duration::ZERO, "{gap}");
        }
    }

    #[test]
    fn one_long_pause_changes_little_and_work_that_comes_soon_again_is_noticed_at_once() {
        let pause = [20 * US, 20 * US, 5000 * US];
        assert!(window_after(pause) > 20 * US);
        let mut gaps = vec![5000 * US; 10];
        gaps.push(30 * US);
        assert!(window_after(gaps) > 30 * US);
    }

    #[test]
    fn no_gap_makes_the_window_longer_than_the_longest() {
        for gap in 0..200 {
            assert!(window_after([gap * US; 3]) <= LONGEST);
        }
    }

    #[test]
    fn a_window_that_was_chosen_stays() {
        let mut busy_poll = BusyPoll::new(Polling::For(30 * US));
        busy_poll.last_look = busy_poll.last_work + 5000 * US;
        busy_poll.worked();
        assert_eq!(busy_poll.window, 30 * US);
    }

    #[test]
    fn what_a_person_says() {
        assert_eq!("auto".parse(), Ok(Polling::Auto));
        assert_eq!("off".parse(), Ok(Polling::For(Duration::ZERO)));
        assert_eq!("0".parse(), Ok(Polling::For(Duration::ZERO)));
        assert_eq!("50".parse(), Ok(Polling::For(50 * US)));
        for wrong in ["", "-1", "1.5", "1000001", "on", "18446744073709551616"] {
            assert!(wrong.parse::<Polling>().is_err(), "{wrong}");
        }
    }
}
