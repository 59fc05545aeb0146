// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The common parts of all reports: the machine, the date, medians.

use std::fmt::{self, Display};
use std::fs;
use std::process::Command;
use std::thread::available_parallelism;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The machine, and its load at the start.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Machine {
    cpu: String,
    cores: usize,
    kernel: String,
    load_average: String,
    /// Idle CPUs were kept polling.
    pub idle_cpus_poll: bool,
}

/// A number over the rounds.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Spread {
    /// Median.
    pub median: f64,
    /// Smallest.
    pub min: f64,
    /// Largest.
    pub max: f64,
}

impl Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{:.2} ({:.2}-{:.2})", self.median, self.min, self.max)
    }
}

impl Machine {
    /// Description without the load; of the kernel only the upstream version.
    pub fn name(&self) -> String {
        let polling = if self.idle_cpus_poll {
            ", idle CPUs poll"
        } else {
            ""
        };
        let kernel: Vec<&str> = self.kernel.split('.').take(2).collect();
        let kernel = kernel.join(".");
        format!("{}, {} CPUs, Linux {kernel}{polling}", self.cpu, self.cores)
    }

    /// Describes this machine.
    pub fn this(idle_cpus_poll: bool) -> Self {
        let line = |path: &str, prefix: &str| {
            let text = fs::read_to_string(path).unwrap_or_default();
            let line = text.lines().find_map(|line| line.strip_prefix(prefix));
            line.map(|rest| rest.trim_start_matches([' ', '\t', ':']).to_owned())
                .unwrap_or_default()
        };
        Machine {
            cpu: line("/proc/cpuinfo", "model name"),
            cores: available_parallelism().map_or(0, usize::from),
            kernel: line("/proc/sys/kernel/osrelease", ""),
            load_average: line("/proc/loadavg", ""),
            idle_cpus_poll,
        }
    }
}

impl Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(
            f,
            "{} ({}), load {}",
            self.name(),
            self.kernel,
            self.load_average
        )
    }
}

/// Returns the current date, for people.
pub fn date() -> String {
    let output = Command::new("date")
        .args(["-u", "+%Y-%m-%d %H:%M UTC"])
        .output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    text.unwrap_or_default()
}

/// Returns the median of numbers; the mean of the middle two of an even count, 0 without numbers.
pub fn median(numbers: &[f64]) -> f64 {
    spread(numbers).median
}

/// Returns the median, minimum and maximum of numbers.
pub fn spread(numbers: &[f64]) -> Spread {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (Some(&min), Some(&max)) = (sorted.first(), sorted.last()) else {
        return Spread {
            median: 0.0,
            min: 0.0,
            max: 0.0,
        };
    };
    let middle = sorted.len() / 2;
    let median = if sorted.len() % 2 == 1 {
        sorted[middle]
    } else {
        (sorted[middle - 1] + sorted[middle]) / 2.0
    };
    Spread { median, min, max }
}

/// Returns a duration for people.
pub fn duration(duration: Duration) -> String {
    match duration.as_secs() {
        seconds @ 0..60 => format!("{seconds} s"),
        seconds => format!("{} min {:02} s", seconds / 60, seconds % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[]), 0.0);
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0]), 2.5);
    }
}
