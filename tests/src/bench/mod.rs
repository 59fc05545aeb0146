// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Benchmarks: our back-ends and others, side by side, by the same front-end.
//!
//! A measurement starts one back-end, connects, warms up, counts for a window of time and ends the back-end.
//! Back-ends take turns within a row and rows take turns within a round, so that other activity of
//! the machine affects all of them; the report has medians over the rounds, and ratios within a round.
//!
//! - [`block`], [`console`], [`gpu`], [`vsock`]: the benchmark of each device;
//! - [`running`]: a running back-end, and its consumption;
//! - [`histogram`]: latencies; [`summary`]: the common parts of all reports.

pub mod block;
pub mod console;
pub mod gpu;
pub mod histogram;
pub mod running;
pub mod summary;
pub mod vsock;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::Args;
use thiserror::Error;
use vmm_sys_util::signal::register_signal_handler;

use crate::process::ProcessError;
use running::Running;

/// Warm-up time of a load.
const WARM_UP: Duration = Duration::from_millis(150);

/// Duration of a benchmark, and where its results are written.
#[derive(Debug, Clone, Args)]
pub struct CommonOptions {
    /// Measurements of each row and back-end; the median counts
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pub rounds: u32,
    /// Seconds a measurement
    #[arg(long, value_name = "S", default_value_t = 1.0, value_parser = seconds)]
    pub seconds: f64,
    /// One round of 0.2 s, to check that everything works
    #[arg(long, conflicts_with_all = ["rounds", "seconds"])]
    pub quick: bool,
    /// Write all results to this file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

impl CommonOptions {
    /// Rounds, and the window of one measurement.
    fn times(&self) -> (u32, Duration) {
        match self.quick {
            true => (1, Duration::from_millis(200)),
            false => (self.rounds, Duration::from_secs_f64(self.seconds)),
        }
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.05..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err("a number of seconds from 0.05 to 3600".to_owned()),
    }
}

/// Why a benchmark ended early.
#[derive(Debug, Error)]
pub enum BenchError {
    /// The options select nothing to measure.
    #[error("no {0} matches")]
    Nothing(&'static str),
    /// SIGINT or SIGTERM.
    #[error("interrupted")]
    Interrupted,
    /// A back-end did not start or end.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// A measurement failed.
    #[error("{what}, {peer}: {cause}; it wrote to stderr:\n{stderr}")]
    Measurement {
        /// Place and name of the row, or "idle".
        what: String,
        /// Name of the back-end.
        peer: &'static str,
        /// What happened.
        cause: String,
        /// The stderr of the back-end.
        stderr: String,
    },
    /// A file could not be used.
    #[error("{}: {cause}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The error of the system.
        cause: io::Error,
    },
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> BenchError {
    move |cause| BenchError::File {
        path: path.to_owned(),
        cause,
    }
}

type AnyError = Box<dyn std::error::Error>;

impl BenchError {
    fn measurement(what: String, peer: &'static str, running: &Running, cause: &AnyError) -> Self {
        BenchError::Measurement {
            what,
            peer,
            cause: cause.to_string(),
            stderr: running.stderr(),
        }
    }
}

/// Returns a function that fails after SIGINT or SIGTERM.
fn until_interrupted() -> Result<impl Fn() -> Result<(), BenchError>, BenchError> {
    static INTERRUPTED: AtomicBool = AtomicBool::new(false);
    extern "C" fn interrupt(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        INTERRUPTED.store(true, Ordering::Relaxed);
    }
    for signal in [libc::SIGINT, libc::SIGTERM] {
        register_signal_handler(signal, interrupt)
            .map_err(|error| at(Path::new("signal handler"))(error.into()))?;
    }
    Ok(|| match INTERRUPTED.load(Ordering::Relaxed) {
        true => Err(BenchError::Interrupted),
        false => Ok(()),
    })
}
