// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Counters and losses, during a run and at its end.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::fault::Fault;

/// Number of faults that are shown with a loss.
const HISTORY: usize = 24;

/// Samples before this age of a process do not count: its allocator is still growing.
const WARM_UP: Duration = Duration::from_secs(60);

/// Permitted growth of an idle process in a run, in bytes, as fitted to the samples: caused by the allocator.
const GROWTH: f64 = (2 << 20) as f64;

/// How often all rings were started, in each format.
#[derive(Clone, Copy, Debug, Default)]
pub struct Starts {
    /// As split rings.
    pub split: u64,
    /// As packed rings.
    pub packed: u64,
}

/// Resources of a process without a connection.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// Since the process began.
    pub age: Duration,
    /// Open file descriptors.
    pub files: usize,
    /// Threads.
    pub threads: usize,
    /// Anonymous memory.
    pub bytes: u64,
}

/// Counters of one scenario.
#[derive(Debug)]
pub struct Tally {
    name: String,
    begin: Instant,
    requests: AtomicU64,
    bytes: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    starts: Starts,
    faults: BTreeMap<Fault, u64>,
    history: Vec<(Duration, Fault)>,
    /// Samples of the current process.
    samples: Vec<Sample>,
    lost: Vec<String>,
}

impl Tally {
    /// Creates counters with nothing counted.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            begin: Instant::now(),
            requests: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            state: Mutex::default(),
        }
    }

    /// Returns what the scenario is called.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a correctly answered request, and the bytes of data that were compared or written.
    pub fn answered(&self, bytes: u64) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Counts a fault that is about to be injected.
    pub fn fault(&self, fault: Fault) {
        let mut state = self.state();
        *state.faults.entry(fault).or_default() += 1;
        if state.history.len() == HISTORY {
            state.history.remove(0);
        }
        state.history.push((self.begin.elapsed(), fault));
    }

    /// Sets how often the rings have been started.
    pub fn started(&self, starts: Starts) {
        self.state().starts = starts;
    }

    /// Notes the start of another process.
    pub fn reborn(&self) {
        self.state().samples.clear();
    }

    /// Adds a sample of the idle process.
    pub fn sample(&self, sample: Sample) {
        self.state().samples.push(sample);
    }

    /// Counts a loss, and prints it with all that helps to reproduce it.
    pub fn lose(&self, what: String, log: &str) {
        let mut state = self.state();
        println!("LOST: {}: {what}", self.name);
        println!(
            "  {:.3} s after the start; the last faults:",
            self.begin.elapsed().as_secs_f64()
        );
        for (time, fault) in &state.history {
            println!("  {:10.3} s  {fault}", time.as_secs_f64());
        }
        if !log.is_empty() {
            println!("  The end of what the back-end wrote:\n{log}");
        }
        state.lost.push(what);
    }

    /// Fails if the memory of a long-lived process has grown.
    pub fn check_growth(&self) -> Result<(), String> {
        let growth = growth(&self.state().samples);
        match growth > GROWTH {
            true => Err(format!(
                "the process has grown by {:.0} KiB since it was {} s old",
                growth / 1024.0,
                WARM_UP.as_secs()
            )),
            false => Ok(()),
        }
    }
}

/// Returns the total growth of the samples, by linear regression.
fn growth(samples: &[Sample]) -> f64 {
    let points: Vec<(f64, f64)> = samples
        .iter()
        .filter(|sample| sample.age >= WARM_UP)
        .map(|sample| (sample.age.as_secs_f64(), sample.bytes as f64))
        .collect();
    let count = points.len() as f64;
    let (Some(first), Some(last)) = (points.first(), points.last()) else {
        return 0.0;
    };
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / count;
    let (time, bytes) = (mean(|point| point.0), mean(|point| point.1));
    let spread: f64 = points.iter().map(|point| (point.0 - time).powi(2)).sum();
    let slope: f64 = points
        .iter()
        .map(|point| (point.0 - time) * (point.1 - bytes))
        .sum::<f64>()
        / spread.max(f64::MIN_POSITIVE);
    slope * (last.0 - first.0)
}

/// Sums of all scenarios.
pub struct Report {
    seed: u64,
    begin: Instant,
    time: Duration,
    tallies: Vec<Arc<Tally>>,
    /// Time of the last progress line, and the number of requests until then.
    last: (Instant, u64),
}

impl Report {
    /// Starts the report of a run with `seed`.
    pub fn new(seed: u64, tallies: Vec<Arc<Tally>>) -> Self {
        Self {
            seed,
            begin: Instant::now(),
            time: Duration::ZERO,
            tallies,
            last: (Instant::now(), 0),
        }
    }

    fn sum(&self, of: impl Fn(&Tally) -> u64) -> u64 {
        self.tallies.iter().map(|tally| of(tally)).sum()
    }

    fn requests(&self) -> u64 {
        self.sum(|tally| tally.requests.load(Ordering::Relaxed))
    }

    fn bytes(&self) -> u64 {
        self.sum(|tally| tally.bytes.load(Ordering::Relaxed))
    }

    /// Returns how often rings were started, in a format.
    pub fn starts(&self, format: fn(&Starts) -> u64) -> u64 {
        self.sum(|tally| format(&tally.state().starts))
    }

    fn faults(&self) -> u64 {
        self.sum(|tally| tally.state().faults.values().sum())
    }

    /// Returns the number of losses.
    pub fn lost(&self) -> u64 {
        self.sum(|tally| tally.state().lost.len() as u64)
    }

    /// Prints the progress of the run.
    pub fn progress(&mut self) {
        let (now, requests) = (Instant::now(), self.requests());
        let rate = (requests - self.last.1) as f64 / (now - self.last.0).as_secs_f64();
        self.last = (now, requests);
        println!(
            "[{:6.0} s] {requests} requests ({rate:.0}/s), {} MiB, {} faults, {} lost",
            self.begin.elapsed().as_secs_f64(),
            self.bytes() >> 20,
            self.faults(),
            self.lost()
        );
    }

    /// Ends the run.
    pub fn finish(&mut self) {
        self.time = self.begin.elapsed();
    }
}

impl fmt::Display for Report {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.time.as_secs_f64();
        writeln!(
            formatter,
            "\n{:30} {:>11} {:>9} {:>9} {:>6} {:>6} {:>7} {:>6}  files, threads, KiB when idle",
            "", "requests", "per s", "MiB", "split", "packed", "faults", "lost"
        )?;
        for tally in &self.tallies {
            let requests = tally.requests.load(Ordering::Relaxed);
            let bytes = tally.bytes.load(Ordering::Relaxed);
            let state = tally.state();
            write!(
                formatter,
                "{:30} {requests:11} {:9.0} {:9} {:6} {:6} {:7} {:6}",
                tally.name,
                requests as f64 / seconds,
                bytes >> 20,
                state.starts.split,
                state.starts.packed,
                state.faults.values().sum::<u64>(),
                state.lost.len()
            )?;
            if let (Some(first), Some(last)) = (state.samples.first(), state.samples.last()) {
                let line = |sample: &Sample| {
                    let kibibytes = sample.bytes >> 10;
                    format!("{}, {}, {kibibytes}", sample.files, sample.threads)
                };
                write!(formatter, "  {} → {}", line(first), line(last))?;
            }
            writeln!(formatter)?;
        }
        let mut faults = BTreeMap::<Fault, u64>::new();
        for tally in &self.tallies {
            for (fault, count) in &tally.state().faults {
                *faults.entry(*fault).or_default() += count;
            }
        }
        let (split, packed) = (self.starts(|of| of.split), self.starts(|of| of.packed));
        writeln!(
            formatter,
            "\nRings were started {split} times as split ones, {packed} times as packed ones."
        )?;
        writeln!(formatter, "\nFaults:")?;
        for (fault, count) in faults {
            writeln!(formatter, "  {fault:44} {count:8}")?;
        }
        writeln!(
            formatter,
            "\n{seconds:.0} s, seed {}: {} requests ({:.0}/s), {} MiB, {} faults, {} lost",
            self.seed,
            self.requests(),
            self.requests() as f64 / seconds,
            self.bytes() >> 20,
            self.faults(),
            self.lost()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Creates samples, one a second, of a process that grows by `step` bytes each time.
    fn samples(step: u64) -> Vec<Sample> {
        (0..1000)
            .map(|second| Sample {
                age: Duration::from_secs(second),
                files: 10,
                threads: 2,
                bytes: (1 << 20) + second * step + second % 7 * 4096,
            })
            .collect()
    }

    #[test]
    fn growth_is_told_from_noise() {
        assert!(growth(&samples(0)).abs() < 10_000.0);
        let grown = growth(&samples(4096));
        assert!((grown - 939.0 * 4096.0).abs() < 20_000.0, "{grown}");
        assert_eq!(growth(&[]), 0.0);
        assert_eq!(growth(&samples(0)[..1]), 0.0);
    }

    #[test]
    fn what_is_lost_is_counted() {
        let tally = Arc::new(Tally::new("name"));
        tally.answered(4096);
        tally.lose("a sector".into(), "");
        let mut report = Report::new(7, vec![tally]);
        report.finish();
        assert_eq!(report.lost(), 1);
        assert!(report.to_string().contains("1 lost"));
    }
}
