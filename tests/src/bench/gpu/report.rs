// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Results, as a table for people and as JSON.

use std::fmt::{self, Display, Write};
use std::path::Path;
use std::time::Duration;

use serde::Serialize;

use super::load::Measured;
use super::{OURS, Peer, Regime, Row};
use crate::bench::summary::{Machine, Spread, date, median, spread};

/// One measurement.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Sample {
    /// Items completed a second.
    pub rate: f64,
    /// Microseconds of CPU time of the back-end for an item.
    pub cpu_us: f64,
}

impl From<Measured> for Sample {
    fn from(measured: Measured) -> Self {
        Self {
            rate: measured.items as f64 / measured.time.as_secs_f64(),
            cpu_us: measured.cpu.as_secs_f64() * 1e6 / measured.items as f64,
        }
    }
}

#[derive(Debug, Serialize)]
struct Cell {
    regime: Regime,
    row: &'static str,
    #[serde(skip)]
    title: &'static str,
    bytes: u64,
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
    qemu: String,
    rows: Vec<Cell>,
}

impl Report {
    /// Creates an empty report, on this machine, now.
    pub fn new(qemu: &Path, window: Duration) -> Self {
        Self {
            date: date(),
            machine: Machine::this(false),
            seconds: window.as_secs_f64(),
            qemu: qemu.display().to_string(),
            rows: Vec::new(),
        }
    }

    /// Adds a measurement.
    pub fn add(&mut self, regime: Regime, row: &Row, peer: Peer, sample: Sample) {
        let cell = self
            .rows
            .iter_mut()
            .find(|cell| (cell.regime, cell.row, cell.peer) == (regime, row.name, peer));
        match cell {
            Some(cell) => cell.rounds.push(sample),
            None => self.rows.push(Cell {
                regime,
                row: row.name,
                title: row.title,
                bytes: row.load.item_bytes(),
                peer,
                rounds: vec![sample],
            }),
        }
    }

    /// Returns all numbers, medians and ratios as JSON.
    pub fn json(&self) -> serde_json::Value {
        let mut json = serde_json::to_value(self).expect("plain data");
        let values = json["rows"].as_array_mut().into_iter().flatten();
        for (value, cell) in values.zip(&self.rows) {
            value["median"] = serde_json::json!({
                "rate": cell.median(|sample| sample.rate),
                "cpu_us": cell.median(|sample| sample.cpu_us),
            });
            if let Some((rate, cpu)) = self.ratios(cell) {
                value["ours_to_this"] = serde_json::json!({ "rate": rate, "cpu_us": cpu });
            }
        }
        json
    }

    /// Our rate and CPU time by those of the cell, round by round.
    fn ratios(&self, cell: &Cell) -> Option<(Spread, Spread)> {
        if cell.peer == Peer::Ours {
            return None;
        }
        let ours = self.rows.iter().find(|other| {
            (other.regime, other.row, other.peer) == (cell.regime, cell.row, Peer::Ours)
        })?;
        let ratio = |of: fn(&Sample) -> f64| {
            let rounds = ours.rounds.iter().zip(&cell.rounds);
            let ratios: Vec<f64> = rounds.map(|(ours, theirs)| of(ours) / of(theirs)).collect();
            spread(&ratios)
        };
        Some((ratio(|sample| sample.rate), ratio(|sample| sample.cpu_us)))
    }
}

impl Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        writeln!(f, "{}; {}", self.machine, self.date)?;
        writeln!(f, "qemu is {}", self.qemu)?;
        let rounds = self.rows.first().map_or(0, |cell| cell.rounds.len());
        writeln!(
            f,
            "Medians over {rounds} round(s) of {} s a measurement. The ratios are {OURS}'s rate, and its CPU time an \
             item, to that line's, round by round: median (least-most).",
            self.seconds
        )?;
        let mut last = None;
        // In the order of the first round.
        for cell in &self.rows {
            if last != Some((cell.regime, cell.row)) {
                last = Some((cell.regime, cell.row));
                writeln!(f, "\n{}: {}", cell.regime.title(), cell.title)?;
                writeln!(
                    f,
                    "  {:16} {:>10} {:>8} {:>9}  {:17}  CPU ratio",
                    "", "a second", "MiB/s", "CPU us", "ratio"
                )?;
            }
            let rate = cell.median(|sample| sample.rate);
            let mut line = format!(
                "  {:16} {:>10.0} {:>8.0} {:>9.2}",
                cell.peer.name(),
                rate,
                rate * cell.bytes as f64 / f64::from(1 << 20),
                cell.median(|sample| sample.cpu_us),
            );
            if let Some((rate, cpu)) = self.ratios(cell) {
                write!(line, "  {:17}  {cpu}", rate.to_string())?;
            }
            writeln!(f, "{line}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::gpu::ROWS;

    #[test]
    fn ratios_are_taken_round_by_round() {
        let mut report = Report::new(Path::new("qemu"), Duration::from_secs(1));
        for (ours, theirs) in [(100.0, 50.0), (30.0, 10.0), (80.0, 80.0)] {
            for (peer, rate) in [(Peer::Ours, ours), (Peer::Qemu, theirs)] {
                let sample = Sample {
                    rate,
                    cpu_us: 1e3 / rate,
                };
                report.add(Regime::OneCpu, &ROWS[0], peer, sample);
            }
        }
        let json = report.json();
        assert_eq!(json["rows"][0]["median"]["rate"], 80.0);
        assert_eq!(json["rows"][0]["ours_to_this"], serde_json::Value::Null);
        assert_eq!(json["rows"][1]["ours_to_this"]["rate"]["median"], 2.0);
        assert_eq!(json["rows"][1]["ours_to_this"]["cpu_us"]["max"], 1.0);
        let text = report.to_string();
        assert!(
            text.contains("2.00 (1.00-3.00)   0.50 (0.33-1.00)"),
            "{text}"
        );
    }
}
