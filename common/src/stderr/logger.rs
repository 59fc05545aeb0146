// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which log lines are written: those that `RUST_LOG` chooses, or those of a level that was set later.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use env_filter::Filter;
use log::{LevelFilter, Log, Metadata, Record};

/// Environment variable with the level, or a level for each module.
const VARIABLE: &str = "RUST_LOG";
/// What applies without it.
const DEFAULT: &str = "info";
/// No level was set: `RUST_LOG` applies.
const UNSET: usize = usize::MAX;

static LOGGER: OnceLock<Logger> = OnceLock::new();
/// The level that was set, as a number.
static LEVEL: AtomicUsize = AtomicUsize::new(UNSET);

struct Logger {
    program: &'static str,
    filter: Filter,
}

impl Logger {
    /// The level that was set.
    fn level() -> Option<LevelFilter> {
        let level = LEVEL.load(Ordering::Relaxed);
        LevelFilter::iter().find(|other| *other as usize == level)
    }
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        match Self::level() {
            Some(level) => metadata.level() <= level,
            None => self.filter.enabled(metadata),
        }
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let level = record.level().as_str().to_ascii_lowercase();
            super::print(&format!("{}: {level}: {}", self.program, record.args()));
        }
    }

    fn flush(&self) {}
}

/// Starts to send log lines to stderr.
pub(super) fn install(program: &'static str) {
    let wanted = std::env::var(VARIABLE);
    let filter = env_filter::Builder::new()
        .parse(wanted.as_deref().unwrap_or(DEFAULT))
        .build();
    let logger = LOGGER.get_or_init(|| Logger { program, filter });
    if log::set_logger(logger).is_ok() {
        log::set_max_level(logger.filter.filter());
    }
}

/// Returns the log level. If `RUST_LOG` names several, it is the most verbose one.
pub fn level() -> LevelFilter {
    log::max_level()
}

/// Sets the level for all modules, whatever `RUST_LOG` says.
pub fn set_level(level: LevelFilter) {
    LEVEL.store(level as usize, Ordering::Relaxed);
    log::set_max_level(level);
}
