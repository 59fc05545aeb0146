// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A limit on log lines that a guest or front-end can cause.

use std::fmt::Arguments;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use log::Level;

/// For errors of a guest, and for failures that it can repeat.
static WARN: Limit = Limit::new(5, Duration::from_secs(1));
/// For lines that an operator wants to see: a guest with 256 queues can start and stop all of them in one window.
static INFO: Limit = Limit::new(600, Duration::from_secs(120));

/// Logs at warn, unless the process has already logged five such lines in this second. Suppressed lines are counted, and the count is
/// logged before the next line.
pub fn warn_limited(message: Arguments<'_>) {
    WARN.log(Level::Warn, message);
}

/// Logs at info, unless the process has already logged 600 such lines in the last two minutes. Suppressed lines are counted, and the count
/// is logged before the next line.
pub fn info_limited(message: Arguments<'_>) {
    INFO.log(Level::Info, message);
}

/// At most so many lines in each window of time.
struct Limit {
    lines: u32,
    window: Duration,
    recent: Mutex<Recent>,
}

/// What was logged in the present window.
struct Recent {
    start: Option<Instant>,
    lines: u32,
    suppressed: u64,
}

impl Limit {
    const fn new(lines: u32, window: Duration) -> Self {
        let recent = Mutex::new(Recent {
            start: None,
            lines: 0,
            suppressed: 0,
        });
        Self {
            lines,
            window,
            recent,
        }
    }

    fn log(&self, level: Level, message: Arguments<'_>) {
        let Some(suppressed) = self.admit(Instant::now()) else {
            return;
        };
        if suppressed > 0 {
            log::log!(level, "{suppressed} lines like the last ones were left out");
        }
        log::log!(level, "{message}");
    }

    /// Returns how many lines were suppressed since the last one; `None` if another line must not be logged.
    fn admit(&self, now: Instant) -> Option<u64> {
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        let is_over = |start| now.duration_since(start) >= self.window;
        if recent.start.is_none_or(is_over) {
            recent.start = Some(now);
            recent.lines = 0;
        }
        if recent.lines < self.lines {
            recent.lines += 1;
            Some(std::mem::take(&mut recent.suppressed))
        } else {
            recent.suppressed += 1;
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_beyond_the_limit_are_left_out_and_counted() {
        let window = Duration::from_secs(1);
        let limit = Limit::new(2, window);
        let start = Instant::now();
        let admitted = [(); 5].map(|()| limit.admit(start));
        assert_eq!(admitted, [Some(0), Some(0), None, None, None]);
        let almost = start + window - Duration::from_nanos(1);
        assert_eq!(limit.admit(almost), None);
        let next = [(); 3].map(|()| limit.admit(start + window));
        assert_eq!(next, [Some(4), Some(0), None]);
    }
}
