// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Results, as a Markdown table and as JSON.

use std::fmt::{self, Display};
use std::time::Duration;

use serde::Serialize;

use super::load::Measured;
use super::{PEER_VERSION, Peer, Row};
use crate::bench::summary::{Machine, Spread, date, median, spread};

const MIB: f64 = (1 << 20) as f64;
const GIB: f64 = (1 << 30) as f64;

/// One measurement.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Sample {
    /// Bytes, or keys, a second.
    pub rate: f64,
    /// Seconds of CPU time of the back-end for a byte, or a key.
    pub cpu: f64,
    /// Microseconds of a round trip that half of the keys do not exceed; 0 for other loads.
    pub p50_us: f64,
    /// The same of 99 % of the keys.
    pub p99_us: f64,
}

impl From<Measured> for Sample {
    fn from(measured: Measured) -> Self {
        let count = measured.bytes as f64;
        Self {
            rate: count / measured.time.as_secs_f64(),
            cpu: measured.cpu.as_secs_f64() / count,
            p50_us: measured.latencies.percentile(50.0) / 1e3,
            p99_us: measured.latencies.percentile(99.0) / 1e3,
        }
    }
}

impl Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self.p50_us {
            0.0 => write!(f, "{:.1} MiB/s", self.rate / MIB),
            p50 => write!(f, "{p50:.1} us"),
        }
    }
}

#[derive(Debug, Serialize)]
struct Cell {
    row: &'static str,
    #[serde(skip)]
    title: &'static str,
    peer: Peer,
    rounds: Vec<Sample>,
}

impl Cell {
    fn median(&self, of: impl Fn(&Sample) -> f64) -> f64 {
        median(&self.rounds.iter().map(of).collect::<Vec<_>>())
    }

    fn has_keys(&self) -> bool {
        self.rounds.iter().any(|sample| sample.p50_us > 0.0)
    }
}

/// All that was measured.
#[derive(Debug, Serialize)]
pub struct Report {
    date: String,
    machine: Machine,
    seconds: f64,
    rows: Vec<Cell>,
}

impl Report {
    /// Creates an empty report, on this machine, now.
    pub fn new(window: Duration) -> Self {
        Self {
            date: date(),
            machine: Machine::this(false),
            seconds: window.as_secs_f64(),
            rows: Vec::new(),
        }
    }

    /// Adds a measurement.
    pub fn add(&mut self, row: &Row, peer: Peer, sample: Sample) {
        let mut cells = self.rows.iter_mut();
        match cells.find(|cell| (cell.row, cell.peer) == (row.name, peer)) {
            Some(cell) => cell.rounds.push(sample),
            None => self.rows.push(Cell {
                row: row.name,
                title: row.title,
                peer,
                rounds: vec![sample],
            }),
        }
    }

    /// Returns all numbers as JSON.
    pub fn json(&self) -> serde_json::Value {
        serde_json::to_value(self).expect("plain data")
    }

    fn cell(&self, row: &str, peer: Peer) -> Option<&Cell> {
        let mut cells = self.rows.iter();
        cells.find(|cell| (cell.row, cell.peer) == (row, peer))
    }

    /// Returns ours by that of a peer, round by round.
    fn ratio(&self, ours: &Cell, peer: Peer, of: fn(&Sample) -> f64) -> Option<Spread> {
        let theirs = self.cell(ours.row, peer)?;
        let rounds = ours.rounds.iter().zip(&theirs.rounds);
        let ratios: Vec<f64> = rounds.map(|(ours, theirs)| of(ours) / of(theirs)).collect();
        Some(spread(&ratios))
    }

    /// Returns a line of the table.
    fn line(&self, ours: &Cell) -> String {
        let shown = |number: Option<f64>| match number {
            Some(number) if number < 10.0 => format!("{number:.2}"),
            Some(number) if number < 100.0 => format!("{number:.1}"),
            Some(number) => format!("{number:.0}"),
            None => "-".into(),
        };
        let ratio = |peer, of| shown(self.ratio(ours, peer, of).map(|spread| spread.median));
        let theirs = self.cell(ours.row, Peer::RustVmm);
        let of_theirs = |of: fn(&Sample) -> f64| theirs.map(|cell| cell.median(of));
        let cells = match ours.has_keys() {
            true => [
                format!(
                    "{} / {} us",
                    shown(Some(ours.median(|sample| sample.p50_us))),
                    shown(Some(ours.median(|sample| sample.p99_us)))
                ),
                match theirs {
                    Some(_) => format!(
                        "{} / {} us",
                        shown(of_theirs(|sample| sample.p50_us)),
                        shown(of_theirs(|sample| sample.p99_us))
                    ),
                    None => "-".into(),
                },
                ratio(Peer::RustVmm, |sample| sample.p50_us),
                "-".into(),
                format!("{} us", shown(Some(ours.median(|sample| sample.cpu * 1e6)))),
                match theirs {
                    Some(_) => format!("{} us", shown(of_theirs(|sample| sample.cpu * 1e6))),
                    None => "-".into(),
                },
            ],
            false => [
                format!(
                    "{} MiB/s",
                    shown(Some(ours.median(|sample| sample.rate / MIB)))
                ),
                match theirs {
                    Some(_) => format!("{} MiB/s", shown(of_theirs(|sample| sample.rate / MIB))),
                    None => "-".into(),
                },
                ratio(Peer::RustVmm, |sample| sample.rate),
                ratio(Peer::Limit, |sample| sample.rate),
                format!("{} s", shown(Some(ours.median(|sample| sample.cpu * GIB)))),
                match theirs {
                    Some(_) => format!("{} s", shown(of_theirs(|sample| sample.cpu * GIB))),
                    None => "-".into(),
                },
            ],
        };
        format!("| {} | {} |", ours.title, cells.join(" | "))
    }
}

impl Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        writeln!(f, "{}; {}", self.machine, self.date)?;
        let rounds = self.rows.first().map_or(0, |cell| cell.rounds.len());
        writeln!(
            f,
            "Medians over {rounds} round(s) of {} s a measurement. rust-vmm's back-end is version {PEER_VERSION}, by TCP. \
             The limit is a thread that writes or reads the same buffers. CPU time is for a GiB, or for a key.\n",
            self.seconds
        )?;
        writeln!(
            f,
            "| | ours | rust-vmm | ours to rust-vmm | ours to the limit | CPU, ours | CPU, rust-vmm |"
        )?;
        writeln!(f, "|---|---:|---:|---:|---:|---:|---:|")?;
        // In the order of the first round.
        for cell in self.rows.iter().filter(|cell| cell.peer == Peer::Ours) {
            writeln!(f, "{}", self.line(cell))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::console::ROWS;

    fn sample(rate: f64, p50_us: f64) -> Sample {
        Sample {
            rate,
            cpu: 1.0 / rate,
            p50_us,
            p99_us: 2.0 * p50_us,
        }
    }

    #[test]
    fn ratios_are_taken_round_by_round() {
        let mut report = Report::new(Duration::from_secs(1));
        for (ours, theirs) in [(100.0, 50.0), (30.0, 10.0), (80.0, 80.0)] {
            report.add(&ROWS[0], Peer::Ours, sample(ours * MIB, 0.0));
            report.add(&ROWS[0], Peer::RustVmm, sample(theirs * MIB, 0.0));
        }
        let line = report.line(&report.rows[0]);
        assert!(
            line.contains("| 80.0 MiB/s | 50.0 MiB/s | 2.00 | - |"),
            "{line}"
        );
    }

    #[test]
    fn keys_have_latencies() {
        let mut report = Report::new(Duration::from_secs(1));
        report.add(&ROWS[5], Peer::Ours, sample(1e4, 20.0));
        let line = report.line(&report.rows[0]);
        assert!(
            line.contains("| 20.0 / 40.0 us | - | - | - | 100 us | - |"),
            "{line}"
        );
    }
}
