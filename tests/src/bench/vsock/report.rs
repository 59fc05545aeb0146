// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Results, as a Markdown table with targets, and as JSON.

use std::fmt::{self, Display};
use std::time::Duration;

use serde::Serialize;

use super::load::{Load, Measured};
use super::{Peer, Row};
use crate::bench::summary::{Machine, Spread, date, median, spread};

/// The least share of the rate of a copy that a stream to the host in large packets reaches.
const COPY_TARGET: f64 = 0.6;
/// The largest share of rust-vmm's CPU time for a byte.
const CPU_TARGET: f64 = 0.5;
const MIB: f64 = (1 << 20) as f64;
const GIB: f64 = (1 << 30) as f64;

/// Returns the unit of the values of a load.
pub fn unit(load: Load) -> &'static str {
    match load {
        Load::Connect => "a second",
        Load::RoundTrip => "us (median)",
        Load::ToHost(..) | Load::ToGuest => "MiB/s",
    }
}

fn is_stream(load: Load) -> bool {
    matches!(load, Load::ToHost(..) | Load::ToGuest)
}

/// One measurement.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Sample {
    /// The value, in the unit of its load.
    pub value: f64,
    /// CPU time of the back-end: seconds for a GiB, or microseconds for a connection or a round trip.
    pub cpu: f64,
}

impl Sample {
    /// Returns the values of a measurement.
    pub fn new(load: Load, measured: &Measured) -> Self {
        let rate = measured.items as f64 / measured.time.as_secs_f64();
        // Without items, CPU time is for none.
        let cpu = measured.cpu.as_secs_f64() / measured.items.max(1) as f64;
        match load {
            Load::Connect => Sample {
                value: rate,
                cpu: cpu * 1e6,
            },
            Load::RoundTrip => Sample {
                value: measured.latency.percentile(50.0) / 1e3,
                cpu: cpu * 1e6,
            },
            Load::ToHost(..) | Load::ToGuest => Sample {
                value: rate / MIB,
                cpu: cpu * GIB,
            },
        }
    }
}

#[derive(Debug, Serialize)]
struct Cell {
    row: &'static str,
    peer: Peer,
    rounds: Vec<Sample>,
}

impl Cell {
    fn median(&self, of: impl Fn(&Sample) -> f64) -> f64 {
        median(&self.rounds.iter().map(of).collect::<Vec<_>>())
    }
}

/// All that was measured.
#[derive(Debug, Serialize)]
pub struct Report {
    date: String,
    machine: Machine,
    seconds: f64,
    /// Bytes a second that one thread copies.
    copy: Vec<f64>,
    #[serde(skip)]
    rows: Vec<Row>,
    cells: Vec<Cell>,
}

impl Report {
    /// Creates an empty report, on this machine, now.
    pub fn new(window: Duration) -> Self {
        Self {
            date: date(),
            machine: Machine::this(false),
            seconds: window.as_secs_f64(),
            copy: Vec::new(),
            rows: Vec::new(),
            cells: Vec::new(),
        }
    }

    /// Adds a measurement of how many bytes a second one thread copies.
    pub fn add_copy(&mut self, rate: f64) {
        self.copy.push(rate);
    }

    /// Adds a measurement.
    pub fn add(&mut self, row: &Row, peer: Peer, sample: Sample) {
        if !self.rows.iter().any(|other| other.name == row.name) {
            self.rows.push(*row);
        }
        let cell = self
            .cells
            .iter_mut()
            .find(|cell| (cell.row, cell.peer) == (row.name, peer));
        match cell {
            Some(cell) => cell.rounds.push(sample),
            None => self.cells.push(Cell {
                row: row.name,
                peer,
                rounds: vec![sample],
            }),
        }
    }

    /// Returns all numbers as JSON.
    pub fn json(&self) -> serde_json::Value {
        serde_json::to_value(self).expect("plain data")
    }

    fn cell(&self, row: &Row, peer: Peer) -> Option<&Cell> {
        self.cells
            .iter()
            .find(|cell| (cell.row, cell.peer) == (row.name, peer))
    }

    /// Our value by that of rust-vmm, round by round. `None` if rust-vmm's is 0.
    fn ratio(&self, row: &Row, of: fn(&Sample) -> f64) -> Option<Spread> {
        let ours = self.cell(row, Peer::Ours)?;
        let theirs = self.cell(row, Peer::RustVmm)?;
        if theirs.rounds.iter().any(|theirs| theirs.value == 0.0) {
            return None;
        }
        let rounds = ours.rounds.iter().zip(&theirs.rounds);
        let ratios: Vec<f64> = rounds.map(|(ours, theirs)| of(ours) / of(theirs)).collect();
        Some(spread(&ratios))
    }

    /// Our rate by that of a copy, for streams to the host in large packets.
    fn to_copy(&self, row: &Row) -> Option<f64> {
        match row.load {
            Load::ToHost(size, _) if size >= 64 << 10 => {
                let ours = self.cell(row, Peer::Ours)?.median(|sample| sample.value);
                Some(ours * MIB / median(&self.copy))
            }
            _ => None,
        }
    }
}

/// Writes a target, and whether it was reached.
fn target(sign: &str, bound: f64, is_reached: bool) -> String {
    match is_reached {
        true => format!("{sign} {bound:.2}"),
        false => format!("**{sign} {bound:.2}**, missed"),
    }
}

fn number(value: f64) -> String {
    match value {
        0.0 => "0".to_owned(),
        value if value < 10.0 => format!("{value:.2}"),
        value if value < 100.0 => format!("{value:.1}"),
        value => format!("{value:.0}"),
    }
}

impl Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        writeln!(f, "{}; {}", self.machine, self.date)?;
        let rounds = self.copy.len();
        writeln!(
            f,
            "Medians over {rounds} round(s) of {} s a measurement. The ratios are ours to rust-vmm's, round by round: median \
             (least-most). A copy of memory runs at {} MiB/s.\n",
            self.seconds,
            number(median(&self.copy) / MIB),
        )?;
        writeln!(
            f,
            "| | | ours | packed | rust-vmm | ratio | target | without a back-end | to a copy | target | CPU of ours | of rust-vmm | ratio | target |"
        )?;
        writeln!(
            f,
            "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
        )?;
        for row in &self.rows {
            let value = |peer| {
                self.cell(row, peer).map_or("-".to_owned(), |cell| {
                    number(cell.median(|sample| sample.value))
                })
            };
            let cpu = |peer| {
                let cell = self
                    .cell(row, peer)
                    .filter(|cell| cell.median(|sample| sample.value) > 0.0);
                cell.map_or("-".to_owned(), |cell| {
                    number(cell.median(|sample| sample.cpu))
                })
            };
            let dash = || "-".to_owned();
            let ratio = self.ratio(row, |sample| sample.value);
            let is_latency = row.load == Load::RoundTrip;
            let bound = ratio
                .filter(|_| row.target > 0.0)
                .map(|ratio| match is_latency {
                    true => target("≤", row.target, ratio.median <= row.target),
                    false => target("≥", row.target, ratio.median >= row.target),
                });
            let copy = self.to_copy(row);
            let cpu_ratio = self.ratio(row, |sample| sample.cpu);
            let cells = [
                row.title.to_owned(),
                unit(row.load).to_owned(),
                value(Peer::Ours),
                value(Peer::OursPacked),
                value(Peer::RustVmm),
                ratio.map_or_else(dash, |ratio| ratio.to_string()),
                bound.unwrap_or_else(dash),
                value(Peer::Alone),
                copy.map_or_else(dash, |ratio| format!("{ratio:.2}")),
                copy.map_or_else(dash, |ratio| target("≥", COPY_TARGET, ratio >= COPY_TARGET)),
                cpu(Peer::Ours),
                cpu(Peer::RustVmm),
                cpu_ratio.map_or_else(dash, |ratio| ratio.to_string()),
                cpu_ratio
                    .filter(|_| is_stream(row.load))
                    .map_or_else(dash, |ratio| {
                        target("≤", CPU_TARGET, ratio.median <= CPU_TARGET)
                    }),
            ];
            writeln!(f, "| {} |", cells.join(" | "))?;
        }
        writeln!(
            f,
            "\nCPU is that of the back-end: seconds a GiB, or microseconds a connection or round trip."
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::vsock::ROWS;

    fn report(values: &[(usize, Peer, f64, f64)]) -> String {
        let mut report = Report::new(Duration::from_secs(1));
        report.add_copy(10_000.0 * MIB);
        for &(row, peer, value, cpu) in values {
            report.add(&ROWS[row], peer, Sample { value, cpu });
        }
        report.to_string()
    }

    #[test]
    fn each_row_is_held_to_its_target() {
        let text = report(&[
            (0, Peer::Ours, 3000.0, 10.0),
            (0, Peer::RustVmm, 1000.0, 20.0),
            (1, Peer::Ours, 30.0, 1.0),
            (1, Peer::RustVmm, 20.0, 1.0),
            (4, Peer::Ours, 6500.0, 0.3),
            (4, Peer::RustVmm, 6500.0, 0.4),
        ]);
        let line = |title: &str| text.lines().find(|line| line.contains(title)).unwrap();
        assert!(
            line("connect,").contains("3.00 (3.00-3.00) | ≥ 2.00 |"),
            "{text}"
        );
        assert!(
            line("round trip").contains("1.50 (1.50-1.50) | **≤ 1.00**, missed |"),
            "{text}"
        );
        let stream = line("64 KiB");
        assert!(stream.contains("| 0.65 | ≥ 0.60 |"), "{text}");
        assert!(
            stream.contains("0.75 (0.75-0.75) | **≤ 0.50**, missed |"),
            "{text}"
        );
    }

    #[test]
    fn a_back_end_that_loses_everything_has_no_ratio() {
        let text = report(&[(5, Peer::Ours, 5000.0, 0.3), (5, Peer::RustVmm, 0.0, 0.0)]);
        assert!(text.contains("| 5000 | - | 0 | - | - |"), "{text}");
    }
}
