// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What was done and what was lost, while it runs and at the end.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::fault::Fault;

/// Faults that are shown when something is lost.
const HISTORY: usize = 24;

/// Samples before this age of a process do not count: its allocator still takes what it needs.
const WARM_UP: Duration = Duration::from_secs(60);

/// A process without a connection may grow by as much in a run, in bytes, as fitted to the samples: what an allocator does.
const GROWTH: f64 = (2 << 20) as f64;

/// How often all rings were started, in each format.
#[derive(Clone, Copy, Debug, Default)]
pub struct Starts {
    /// As split rings.
    pub split: u64,
    /// As packed rings.
    pub packed: u64,
}

/// What a process held when nobody was connected.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// Since the process began.
    pub age: Duration,
    /// Open file descriptors.
    pub files: usize,
    /// Threads.
    pub threads: usize,
    /// Memory of its own.
    pub bytes: u64,
}

/// What is counted for one scenario.
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
    /// Of the process that lives now.
    samples: Vec<Sample>,
    lost: Vec<String>,
}

impl Tally {
    /// Nothing has been done.
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

    /// Counts a request that was answered rightly, and the bytes of data that were compared or written.
    pub fn answered(&self, bytes: u64) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// A fault is about to be injected.
    pub fn fault(&self, fault: Fault) {
        let mut state = self.state();
        *state.faults.entry(fault).or_default() += 1;
        if state.history.len() == HISTORY {
            state.history.remove(0);
        }
        state.history.push((self.begin.elapsed(), fault));
    }

    /// How often the rings were started by now.
    pub fn started(&self, starts: Starts) {
        self.state().starts = starts;
    }

    /// Another process begins.
    pub fn reborn(&self) {
        self.state().samples.clear();
    }

    /// The process has nothing to do.
    pub fn sample(&self, sample: Sample) {
        self.state().samples.push(sample);
    }

    /// Something was lost: prints it, with all that helps to see it again.
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

    /// Fails if the memory of a process that lived for long has grown.
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

/// Returns how much the samples grow in all, by the straight line that fits them best.
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

/// Of all scenarios.
pub struct Report {
    seed: u64,
    begin: Instant,
    time: Duration,
    tallies: Vec<Arc<Tally>>,
    /// When the last progress was printed, and how many requests there were by then.
    last: (Instant, u64),
}

impl Report {
    /// Creates a run with `seed` begins.
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

    /// Returns how much was lost.
    pub fn lost(&self) -> u64 {
        self.sum(|tally| tally.state().lost.len() as u64)
    }

    /// Prints how far the run is.
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

    /// The run is over.
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

    /// Samples, one a second, of a process that grows by `step` bytes each time.
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
