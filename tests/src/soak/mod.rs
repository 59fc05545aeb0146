// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Long runs: every device runs under load with verified results, while faults are injected one after the other. Nothing may be lost.
//!
//! Each `Scenario` has its own back-end process, and a thread that alternates load and `Fault`s until the time
//! is over. A [`Loss`] is any violation: a wrong byte, a request that is not answered, a process that ends, files or memory that grow.
//!
//! - [`scenario`]: what a device implements;
//! - [`drive`]: the thread that drives a scenario;
//! - [`fault`]: the faults, each named after the message or signal that causes it;
//! - [`link`](mod@link): a back-end and the connection to it; `inject`: the faults that are the same for each device;
//! - [`log`]: the log of dirty pages;
//! - [`back_end`]: the process, how it is ended and started again, and its resources when it is idle;
//! - [`block`], [`rng`], [`gpu`], [`input`]: the load of each device, and its model;
//! - [`report`]: counts, progress, and the summary.

pub mod back_end;
pub mod block;
pub mod drive;
pub mod fault;
pub mod gpu;
mod inject;
pub mod input;
pub mod link;
pub mod log;
mod loss;
pub mod report;
pub mod rng;
pub mod scenario;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::Args;
use thiserror::Error;
use vmm_sys_util::signal::register_signal_handler;

pub use loss::Loss;
use loss::set_patience;
use report::{Report, Tally};
use scenario::{Lives, Start};

/// Interval at which the progress is printed.
const INTERVAL: Duration = Duration::from_secs(5);

/// Duration and scenarios of a run.
#[derive(Debug, Clone, Args)]
pub struct SoakOptions {
    /// Minutes under load
    #[arg(long, value_name = "N", default_value_t = 5.0, value_parser = minutes)]
    pub minutes: f64,
    /// Seconds under load, instead of minutes
    #[arg(long, value_name = "N", conflicts_with = "minutes")]
    pub seconds: Option<u64>,
    /// Seed of all random numbers, to inject the same faults in the same order again [default: random]
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Seconds after which an unanswered request counts as lost
    #[arg(long, value_name = "N", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
    pub patience: u64,
    /// Run only scenarios whose name contains this; may be given more than once
    #[arg(long, value_name = "TEXT")]
    pub only: Vec<String>,
}

impl SoakOptions {
    /// Returns the time under load.
    pub fn duration(&self) -> Duration {
        let minutes = || Duration::from_secs_f64(60.0 * self.minutes);
        self.seconds.map_or_else(minutes, Duration::from_secs)
    }

    /// Returns the seed of all random numbers: a random one, if none is given.
    pub fn first_random_number(&self) -> u64 {
        self.seed.unwrap_or_else(|| fastrand::u64(..1_000_000))
    }

    fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|text| name.contains(text.as_str()))
    }

    /// Returns whether input is to be run.
    pub fn wants_input(&self) -> bool {
        input::names().any(|name| self.wants(&name))
    }

    /// Returns whether nothing else is to be run.
    pub fn wants_only_input(&self) -> bool {
        let mut texts = self.only.iter();
        !self.only.is_empty() && texts.all(|text| text.starts_with("input"))
    }

    /// Returns the same options as arguments of the program.
    pub fn arguments(&self) -> Vec<String> {
        let mut arguments = vec![
            format!("--seconds={}", self.duration().as_secs()),
            format!("--patience={}", self.patience),
        ];
        arguments.extend(self.seed.map(|seed| format!("--seed={seed}")));
        arguments.extend(self.only.iter().map(|text| format!("--only={text}")));
        arguments
    }
}

fn minutes(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(minutes) if (0.05..=100_000.0).contains(&minutes) => Ok(minutes),
        _ => Err("a number of minutes from 0.05 on".to_owned()),
    }
}

/// Why a run could not start.
#[derive(Debug, Error)]
pub enum SoakError {
    /// No scenario has this in its name.
    #[error("no scenario matches --only; there are: {0}")]
    Nothing(String),
    /// The operating system refused.
    #[error("{0}: {1}")]
    System(&'static str, #[source] std::io::Error),
}

/// SIGINT or SIGTERM ends the run early, and all back-ends with it.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn interrupt(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

/// Returns all scenarios by their names.
fn scenarios() -> Vec<(String, Start)> {
    let mut all = Vec::new();
    let three_d = gpu::has_three_d();
    let input = input::is_possible();
    for lives in [Lives::One, Lives::Many] {
        for variant in block::VARIANTS
            .into_iter()
            .filter(block::Variant::is_possible)
        {
            all.push(block::start(variant, lives));
        }
        all.push(rng::start(lives));
        if input {
            for (name, description) in input::DEVICES {
                all.push(input::start(name, description, lives));
            }
        }
        all.push(gpu::start(false, lives));
        if three_d {
            all.push(gpu::start(true, lives));
        }
    }
    all
}

/// Runs what `options` ask for, and prints the progress. Losses are in the report.
///
/// # Errors
/// Nothing was run.
pub fn run(options: &SoakOptions) -> Result<Report, SoakError> {
    for signal in [libc::SIGINT, libc::SIGTERM] {
        register_signal_handler(signal, interrupt)
            .map_err(|error| SoakError::System("handle signals", error.into()))?;
    }
    let all = scenarios();
    let names = || all.iter().map(|(name, _)| name.as_str());
    let is_wanted = |name: &str| options.wants(name);
    if !names().any(is_wanted) {
        return Err(SoakError::Nothing(names().collect::<Vec<_>>().join(", ")));
    }
    let seed = options.first_random_number();
    let duration = options.duration();
    set_patience(options.patience);
    println!("soak: {} s, --seed={seed}", duration.as_secs());
    let begin = Instant::now();
    let end = begin + duration;
    let running: Vec<_> = all
        .into_iter()
        .filter(|(name, _)| is_wanted(name))
        .map(|(name, start)| {
            let tally = Arc::new(Tally::new(&name));
            let theirs = tally.clone();
            let thread = std::thread::spawn(move || {
                let stop = || Instant::now() >= end || INTERRUPTED.load(Ordering::Relaxed);
                drive::drive(start, seed, &theirs, &stop);
            });
            (tally, thread)
        })
        .collect();
    let mut report = Report::new(
        seed,
        running.iter().map(|(tally, _)| tally.clone()).collect(),
    );
    let mut next = begin + INTERVAL;
    while running.iter().any(|(_, thread)| !thread.is_finished()) {
        std::thread::sleep(Duration::from_millis(20));
        if Instant::now() >= next {
            report.progress();
            next += INTERVAL;
        }
    }
    for (tally, thread) in running {
        if let Err(panic) = thread.join() {
            tally.lose(message(&panic), "");
        }
    }
    report.finish();
    Ok(report)
}

/// Returns the message of a panic.
fn message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("a panic").to_owned()
}
