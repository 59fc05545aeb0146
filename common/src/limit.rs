// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A limit on log lines that a guest can cause.

use std::fmt::Arguments;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

const LINES: u32 = 5;
const WINDOW: Duration = Duration::from_secs(1);

/// What was logged lately.
struct Window {
    start: Option<Instant>,
    lines: u32,
    suppressed: u64,
}

static RECENT: Mutex<Window> = Mutex::new(Window {
    start: None,
    lines: 0,
    suppressed: 0,
});

/// Logs at warn, unless the process logged some such lines in this second already. Lines left out are
/// counted, and the count is logged with the next one.
pub fn warn_limited(message: Arguments<'_>) {
    let mut recent = RECENT.lock().unwrap_or_else(PoisonError::into_inner);
    let now = Instant::now();
    let is_over = |start| now.duration_since(start) >= WINDOW;
    if recent.start.is_none_or(is_over) {
        if recent.suppressed > 0 {
            log::warn!(
                "{} lines like the last ones were left out",
                recent.suppressed
            );
        }
        *recent = Window {
            start: Some(now),
            lines: 0,
            suppressed: 0,
        };
    }
    if recent.lines < LINES {
        recent.lines += 1;
        log::warn!("{message}");
    } else {
        recent.suppressed += 1;
    }
}
