// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A limit on log lines that a guest can cause.

use std::time::{Duration, Instant};

/// Lets some log lines through per second and counts the others.
#[derive(Debug, Default)]
pub struct LogLimit {
    window: Option<Instant>,
    lines: u32,
    suppressed: u64,
}

impl LogLimit {
    const LINES: u32 = 5;
    const WINDOW: Duration = Duration::from_secs(1);

    /// Logs at warn, unless there were too many such lines in this second.
    pub fn warn(&mut self, message: std::fmt::Arguments<'_>) {
        let now = Instant::now();
        if self
            .window
            .is_none_or(|start| now.duration_since(start) >= Self::WINDOW)
        {
            if self.suppressed > 0 {
                log::warn!("{} more lines like the last ones", self.suppressed);
            }
            *self = Self {
                window: Some(now),
                ..Self::default()
            };
        }
        if self.lines < Self::LINES {
            self.lines += 1;
            log::warn!("{message}");
        } else {
            self.suppressed += 1;
        }
    }
}
