// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Several runs in one Markdown table: median, minimum and maximum of the runs.

use std::fmt::{self, Display};
use std::io;
use std::path::PathBuf;

use super::image::Place;
use super::load::Load;
use super::peer::Peer;
use super::report::{Report, Sample};
use super::targets::{self, OTHERS, Verdict, short};
use crate::bench::summary::{Spread, spread};
use crate::bench::{BenchError, at};

/// What several runs measured.
pub struct Summary(Vec<Report>);

impl Summary {
    /// Reads what the runs wrote with `--json`.
    ///
    /// # Errors
    /// A file cannot be read, or idle CPUs were kept polling in only some of the runs.
    pub fn read(files: &[PathBuf]) -> Result<Self, BenchError> {
        let mut reports: Vec<Report> = Vec::new();
        for file in files {
            let report = Report::read(file)?;
            let first = reports.first().unwrap_or(&report);
            if first.machine.idle_cpus_poll != report.machine.idle_cpus_poll {
                let what = "--idle-poll was given there and not for the first file, or the other way round";
                return Err(at(file)(io::Error::other(what)));
            }
            reports.push(report);
        }
        Ok(Summary(reports))
    }

    /// Returns a number of each run that has it.
    fn over(&self, of: impl Fn(&Report) -> Option<f64>) -> Option<Spread> {
        let numbers: Vec<f64> = self.0.iter().filter_map(of).collect();
        (!numbers.is_empty()).then(|| spread(&numbers))
    }

    fn verdict(&self, of: impl Fn(&Report) -> Option<Verdict>) -> Option<Verdict> {
        Verdict::over(&self.0.iter().filter_map(of).collect::<Vec<_>>())
    }

    fn rows(&self) -> Vec<(Place, Load)> {
        let mut rows = Vec::new();
        for row in self.0.iter().flat_map(targets::rows) {
            if !rows.contains(&row) {
                rows.push(row);
            }
        }
        rows
    }

    fn row(&self, place: Place, load: Load) -> String {
        let ours = |of: fn(&Sample) -> f64| {
            let number = |report: &Report| Some(report.cell(place, load, Peer::Ours)?.median(of));
            self.over(number)
        };
        let to = |peer: Peer, of: fn(&Sample) -> f64| {
            self.over(|report| {
                let cell = |peer| report.cell(place, load, peer);
                Some(cell(Peer::Ours)?.ratio(cell(peer)?, of).median)
            })
        };
        let target = match self.verdict(|report| targets::throughput(report, place, load)) {
            None => "-".to_owned(),
            Some(verdict) => wanted(verdict, ""),
        };
        let latencies: Vec<String> = [
            ours(|sample| sample.p50_us),
            ours(|sample| sample.p99_us),
            ours(|sample| sample.p99_9_us),
        ]
        .into_iter()
        .flatten()
        .map(|number| short(number.median))
        .collect();
        let best = match self.verdict(|report| targets::p99(report, place, load)) {
            None => "-".to_owned(),
            Some(verdict) => wanted(verdict, ""),
        };
        let cells = [
            format!("{}, {}", place.title(), load.title()),
            cell(ours(|sample| sample.iops / 1e3)),
            cell(to(Peer::QsdThreads, |sample| sample.iops)),
            target,
            cell(to(Peer::QsdIoUring, |sample| sample.iops)),
            cell(to(Peer::QsdIoUringIothread, |sample| sample.iops)),
            cell(to(Peer::File, |sample| sample.iops)),
            cell(ours(|sample| sample.cpu_seconds_per_million)),
            cell(to(Peer::QsdThreads, |sample| {
                sample.cpu_seconds_per_million
            })),
            latencies.join(" / "),
            best,
        ];
        format!("| {} |", cells.join(" | "))
    }
}

/// Median, least and most.
fn cell(number: Option<Spread>) -> String {
    match number {
        None => "-".to_owned(),
        Some(Spread { median, min, max }) if min == max => short(median),
        Some(Spread { median, min, max }) => {
            format!("{} ({}–{})", short(median), short(min), short(max))
        }
    }
}

/// The target, printed where it was missed.
fn wanted(verdict: Verdict, unit: &str) -> String {
    let (targets::Bound::AtLeast(number) | targets::Bound::AtMost(number)) = verdict.bound;
    match verdict.is_reached() {
        true => format!("{}{unit}", short(number)),
        false => format!("**{}**{unit}, missed", short(number)),
    }
}

impl Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Summary(reports) = self;
        let Some(first) = reports.first() else {
            return Ok(());
        };
        let dates: Vec<&str> = reports.iter().map(|report| report.date.as_str()).collect();
        writeln!(
            f,
            "{}; {} runs: {}. The median of the runs (least–most).\n",
            first.machine.name(),
            reports.len(),
            dates.join(", ")
        )?;
        writeln!(
            f,
            "| | thousand requests/s | to threads | target | to io_uring | to io_uring, iothread | to the file alone | CPU s per million | CPU to threads \
             | p50 / p99 / p99.9 us | best p99 of theirs |"
        )?;
        writeln!(f, "|---|{}", "---:|".repeat(10))?;
        for (place, load) in self.rows() {
            writeln!(f, "{}", self.row(place, load))?;
        }
        writeln!(f, "\n| | | target |\n|---|---:|---:|")?;
        for (title, unit, judge) in OTHERS {
            let number = self.over(|report| Some(judge(report)?.value));
            if let (Some(_), Some(verdict)) = (number, self.verdict(judge)) {
                writeln!(
                    f,
                    "| {title} | {} {unit} | {} |",
                    cell(number),
                    wanted(verdict, &format!(" {unit}"))
                )?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::bench::block::ROWS;
    use crate::bench::block::report::tests::sample;

    fn file(idle_cpus_poll: bool, ours: f64) -> tempfile::NamedTempFile {
        let mut report = Report::new(&[], Duration::from_secs(1), idle_cpus_poll).unwrap();
        for (peer, iops) in [(Peer::Ours, ours), (Peer::QsdThreads, 100e3)] {
            report.add(Place::Tmpfs, ROWS[1], peer, sample(iops));
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        serde_json::to_writer(&file, &report.json()).unwrap();
        file
    }

    #[test]
    fn runs_are_merged_into_a_table_with_the_spread() {
        let files = [350e3, 330e3, 400e3].map(|ours| file(false, ours));
        let paths = files.each_ref().map(|file| file.path().to_owned());
        let text = Summary::read(&paths).unwrap().to_string();
        let row = "| tmpfs, random read 4 KiB, depth 32 | 350 (330–400) | 3.50 (3.30–4.00) | **3.60**, missed | - | - | - \
                   | 0.86 (0.75–0.91) | 0.29 (0.25–0.30) | 2.86 / 5.71 / 8.57 | 20.0 |";
        assert!(text.contains(row), "{text}");
        assert!(text.contains("; 3 runs: "), "{text}");
    }

    #[test]
    fn runs_that_cannot_be_compared_are_refused() {
        let files = [file(false, 1e3), file(true, 1e3)];
        let paths = files.each_ref().map(|file| file.path().to_owned());
        assert!(Summary::read(&paths).is_err());
    }
}
