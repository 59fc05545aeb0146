// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What was measured, as a table for people and as JSON.

use std::fmt::{self, Display, Write};
use std::time::Duration;

use serde::Serialize;

use super::Row;
use super::image::Place;
use super::peer::{OURS, Peer};
use crate::bench::BenchError;
use crate::bench::summary::{Machine, Spread, date, median, spread};

/// One measurement.
#[derive(Debug, Clone, Serialize)]
pub struct Sample {
    /// Requests completed a second.
    pub iops: f64,
    /// Median latency in microseconds.
    pub p50_us: f64,
    /// 99th percentile of the latency in microseconds.
    pub p99_us: f64,
    /// 99.9th percentile of the latency in microseconds.
    pub p99_9_us: f64,
    /// CPU seconds of the back-end for a million requests.
    pub cpu_seconds_per_million: f64,
    /// Kicks sent for a request.
    pub kicks_per_request: f64,
    /// Calls noticed for a request.
    pub calls_per_request: f64,
    /// Most resident memory of the back-end, guest memory included.
    pub peak_resident_bytes: u64,
    /// Anonymous resident memory of the back-end under load.
    pub own_resident_bytes: u64,
}

/// What a back-end costs without load.
#[derive(Debug, Clone, Serialize)]
pub struct Footprint {
    /// Milliseconds from start to a socket that takes connections.
    pub ready_ms: f64,
    /// CPU use before the front-end says anything, in percent of a core.
    pub idle_before_percent: f64,
    /// CPU use with a ring started, in percent of a core.
    pub idle_after_percent: f64,
}

#[derive(Debug, Serialize)]
struct PeerReport {
    #[serde(skip)]
    peer: Peer,
    name: &'static str,
    version: String,
    #[serde(flatten)]
    footprint: Option<Footprint>,
}

#[derive(Debug, Serialize)]
struct Cell {
    place: Place,
    row: &'static str,
    #[serde(skip)]
    title: &'static str,
    block_size: u32,
    #[serde(skip)]
    peer: Peer,
    #[serde(rename = "peer")]
    name: &'static str,
    rounds: Vec<Sample>,
}

/// All that was measured.
#[derive(Debug, Serialize)]
pub struct Report {
    date: String,
    machine: Machine,
    seconds: f64,
    peers: Vec<PeerReport>,
    rows: Vec<Cell>,
}

impl Report {
    /// An empty report about `peers`, on this machine, now.
    pub fn new(peers: &[Peer], window: Duration, idle_cpus_poll: bool) -> Result<Self, BenchError> {
        let peers = peers.iter().map(|&peer| {
            Ok(PeerReport {
                peer,
                name: peer.name(),
                version: peer.version()?,
                footprint: None,
            })
        });
        Ok(Report {
            date: date(),
            machine: Machine::this(idle_cpus_poll),
            seconds: window.as_secs_f64(),
            peers: peers.collect::<Result<_, BenchError>>()?,
            rows: Vec::new(),
        })
    }

    /// Adds what `peer` costs without load.
    pub fn footprint(&mut self, peer: Peer, footprint: Footprint) {
        for report in &mut self.peers {
            if report.peer == peer {
                report.footprint = Some(footprint.clone());
            }
        }
    }

    /// Adds a measurement.
    pub fn add(&mut self, place: Place, row: &Row, peer: Peer, sample: Sample) {
        let cell = self
            .rows
            .iter_mut()
            .find(|cell| (cell.place, cell.row, cell.peer) == (place, row.name, peer));
        match cell {
            Some(cell) => cell.rounds.push(sample),
            None => self.rows.push(Cell {
                place,
                row: row.name,
                title: row.title,
                block_size: row.load.block_size,
                peer,
                name: peer.name(),
                rounds: vec![sample],
            }),
        }
    }

    /// All numbers, medians and ratios as JSON.
    pub fn json(&self) -> serde_json::Value {
        let mut json = serde_json::to_value(self).expect("plain data");
        for (value, cell) in json["rows"]
            .as_array_mut()
            .into_iter()
            .flatten()
            .zip(&self.rows)
        {
            value["median"] = serde_json::json!({
                "iops": cell.median(|sample| sample.iops),
                "p50_us": cell.median(|sample| sample.p50_us),
                "p99_us": cell.median(|sample| sample.p99_us),
                "p99_9_us": cell.median(|sample| sample.p99_9_us),
                "cpu_seconds_per_million": cell.median(|sample| sample.cpu_seconds_per_million),
                "kicks_per_request": cell.median(|sample| sample.kicks_per_request),
                "calls_per_request": cell.median(|sample| sample.calls_per_request),
            });
            if let Some(ratio) = self.ratio(cell) {
                value["ours_to_this"] = serde_json::json!(ratio);
            }
        }
        json
    }

    /// Our requests a second by those of the cell, round by round.
    fn ratio(&self, cell: &Cell) -> Option<Spread> {
        let ours = self.rows.iter().find(|other| {
            other.peer == Peer::VhostDeviceBlock
                && (other.place, other.row) == (cell.place, cell.row)
        })?;
        if cell.peer == Peer::VhostDeviceBlock {
            return None;
        }
        let rounds = ours.rounds.iter().zip(&cell.rounds);
        let ratios: Vec<f64> = rounds
            .map(|(ours, theirs)| ours.iops / theirs.iops)
            .collect();
        Some(spread(&ratios))
    }
}

impl Cell {
    fn median(&self, of: impl Fn(&Sample) -> f64) -> f64 {
        median(&self.rounds.iter().map(of).collect::<Vec<_>>())
    }
}

impl Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        writeln!(f, "{}; {}", self.machine, self.date)?;
        for peer in &self.peers {
            writeln!(f, "{}: {}", peer.name, peer.version)?;
        }
        let rounds = self.rows.first().map_or(0, |cell| cell.rounds.len());
        writeln!(
            f,
            "Medians over {rounds} round(s) of {} s a measurement. The ratio is {OURS}'s IOPS to that \
             line's, round by round: median (least-most).",
            self.seconds
        )?;
        let mut last = None;
        // In the order of the first round.
        for cell in &self.rows {
            if last != Some((cell.place, cell.row)) {
                last = Some((cell.place, cell.row));
                writeln!(f, "\n{}: {}", cell.place.name(), cell.title)?;
                writeln!(
                    f,
                    "  {:26} {:>9} {:>8} {:>9} {:>9} {:>9} {:>9}  ratio",
                    "", "k IOPS", "MiB/s", "p50 us", "p99 us", "p99.9 us", "CPU s/M"
                )?;
            }
            let iops = cell.median(|sample| sample.iops);
            let mut line = format!(
                "  {:26} {:>9.1} {:>8.0} {:>9.1} {:>9.1} {:>9.1} {:>9.2}",
                cell.name,
                iops / 1e3,
                iops * f64::from(cell.block_size) / f64::from(1 << 20),
                cell.median(|sample| sample.p50_us),
                cell.median(|sample| sample.p99_us),
                cell.median(|sample| sample.p99_9_us),
                cell.median(|sample| sample.cpu_seconds_per_million),
            );
            if let Some(ratio) = self.ratio(cell) {
                write!(line, "  {ratio}")?;
            }
            writeln!(f, "{line}")?;
        }
        self.fmt_footprints(f)
    }
}

impl Report {
    fn fmt_footprints(&self, f: &mut fmt::Formatter) -> fmt::Result {
        writeln!(
            f,
            "\nidle CPU before and after connecting, time to socket, most memory resident in any row"
        )?;
        writeln!(
            f,
            "  {:26} {:>9} {:>9} {:>9} {:>12} {:>12}",
            "", "before %", "after %", "ready ms", "peak MiB", "own MiB"
        )?;
        for peer in &self.peers {
            let Some(footprint) = &peer.footprint else {
                continue;
            };
            let samples = || {
                self.rows
                    .iter()
                    .filter(|cell| cell.peer == peer.peer)
                    .flat_map(|cell| &cell.rounds)
            };
            let mebibytes = |bytes: Option<u64>| bytes.unwrap_or(0) as f64 / f64::from(1 << 20);
            writeln!(
                f,
                "  {:26} {:>9.2} {:>9.2} {:>9.1} {:>12.1} {:>12.1}",
                peer.name,
                footprint.idle_before_percent,
                footprint.idle_after_percent,
                footprint.ready_ms,
                mebibytes(samples().map(|sample| sample.peak_resident_bytes).max()),
                mebibytes(samples().map(|sample| sample.own_resident_bytes).max()),
            )?;
        }
        writeln!(
            f,
            "peak: guest memory that the back-end touched included; own: its anonymous pages"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::block::ROWS;

    fn sample(iops: f64) -> Sample {
        Sample {
            iops,
            p50_us: 10.0,
            p99_us: 20.0,
            p99_9_us: 30.0,
            cpu_seconds_per_million: 3.0,
            kicks_per_request: 0.1,
            calls_per_request: 0.2,
            peak_resident_bytes: 2 << 20,
            own_resident_bytes: 1 << 20,
        }
    }

    #[test]
    fn the_ratio_is_taken_round_by_round() {
        let mut report = Report::new(&[], Duration::from_secs(1), false).unwrap();
        for (ours, theirs) in [(100.0, 50.0), (30.0, 10.0), (80.0, 80.0)] {
            report.add(Place::Tmpfs, &ROWS[1], Peer::VhostDeviceBlock, sample(ours));
            report.add(Place::Tmpfs, &ROWS[1], Peer::QsdThreads, sample(theirs));
        }
        let json = report.json();
        assert_eq!(json["rows"][0]["median"]["iops"], 80.0);
        assert_eq!(json["rows"][0]["ours_to_this"], serde_json::Value::Null);
        let ratio = &json["rows"][1]["ours_to_this"];
        assert_eq!(
            (&ratio["min"], &ratio["median"], &ratio["max"]),
            (&1.0.into(), &2.0.into(), &3.0.into())
        );
        assert!(report.to_string().contains("2.00 (1.00-3.00)"), "{report}");
    }
}
