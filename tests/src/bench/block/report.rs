// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Results, as a table for people and as JSON.

use std::fmt::{self, Display, Write};
use std::fs::File;
use std::io::{self, BufReader};
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::image::Place;
use super::load::Load;
use super::peer::{OURS, Peer};
use crate::bench::summary::{Machine, Spread, date, median, spread};
use crate::bench::{BenchError, at};

/// One measurement.
#[derive(Debug, Clone, Serialize, Deserialize)]
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

/// Costs of an idle back-end.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Footprint {
    /// Milliseconds from start to a socket that takes connections.
    pub ready_ms: f64,
    /// CPU use before the front-end says anything, in percent of a core.
    pub idle_before_percent: f64,
    /// CPU use with a ring started, in percent of a core.
    pub idle_after_percent: f64,
}

/// A back-end, and its idle costs.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct PeerReport {
    name: Peer,
    version: String,
    #[serde(flatten)]
    footprint: Option<Footprint>,
}

/// Results of a back-end in a row.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Cell {
    /// Where.
    pub place: Place,
    /// The row.
    #[serde(flatten)]
    pub load: Load,
    /// The back-end.
    pub peer: Peer,
    rounds: Vec<Sample>,
}

/// All results.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// When, for people.
    pub date: String,
    /// Where.
    pub machine: Machine,
    seconds: f64,
    peers: Vec<PeerReport>,
    /// In the order in which they were measured.
    pub rows: Vec<Cell>,
}

impl Report {
    /// Creates an empty report about `peers`, on this machine, now.
    pub fn new(peers: &[Peer], window: Duration, idle_cpus_poll: bool) -> Result<Self, BenchError> {
        let peers = peers.iter().map(|&name| {
            Ok(PeerReport {
                name,
                version: name.version()?,
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

    /// Returns what an earlier run wrote.
    pub fn read(path: &Path) -> Result<Self, BenchError> {
        let file = File::open(path).map_err(at(path))?;
        serde_json::from_reader(BufReader::new(file)).map_err(|error| {
            let what = format!("not what this program writes with --json: {error}");
            at(path)(io::Error::new(io::ErrorKind::InvalidData, what))
        })
    }

    /// Adds what `peer` costs without load.
    pub fn footprint(&mut self, peer: Peer, footprint: Footprint) {
        for report in &mut self.peers {
            if report.name == peer {
                report.footprint = Some(footprint.clone());
            }
        }
    }

    /// Adds a measurement.
    pub fn add(&mut self, place: Place, load: Load, peer: Peer, sample: Sample) {
        let cell = self
            .rows
            .iter_mut()
            .find(|cell| (cell.place, cell.load, cell.peer) == (place, load, peer));
        match cell {
            Some(cell) => cell.rounds.push(sample),
            None => self.rows.push(Cell {
                place,
                load,
                peer,
                rounds: vec![sample],
            }),
        }
    }

    /// Returns all numbers, medians and ratios as JSON.
    pub fn json(&self) -> serde_json::Value {
        let mut json = serde_json::to_value(self).expect("plain data");
        for (value, cell) in json["rows"]
            .as_array_mut()
            .into_iter()
            .flatten()
            .zip(&self.rows)
        {
            value["row"] = cell.load.name().into();
            value["median"] = serde_json::json!({
                "iops": cell.median(|sample| sample.iops),
                "p50_us": cell.median(|sample| sample.p50_us),
                "p99_us": cell.median(|sample| sample.p99_us),
                "p99_9_us": cell.median(|sample| sample.p99_9_us),
                "cpu_seconds_per_million": cell.median(|sample| sample.cpu_seconds_per_million),
                "kicks_per_request": cell.median(|sample| sample.kicks_per_request),
                "calls_per_request": cell.median(|sample| sample.calls_per_request),
            });
            if let Some(ratio) = self.ours_to(cell) {
                value["ours_to_this"] = serde_json::json!(ratio);
            }
        }
        json
    }

    /// Returns what was measured of `peer` in a row.
    pub fn cell(&self, place: Place, load: Load, peer: Peer) -> Option<&Cell> {
        let wanted = (place, load, peer);
        let mut cells = self.rows.iter();
        cells.find(|cell| (cell.place, cell.load, cell.peer) == wanted)
    }

    /// Returns what `peer` costs without load.
    pub fn footprint_of(&self, peer: Peer) -> Option<&Footprint> {
        let mut peers = self.peers.iter();
        peers.find(|report| report.name == peer)?.footprint.as_ref()
    }

    /// Returns the most memory of its own that `peer` had under load, in bytes.
    pub fn own_memory(&self, peer: Peer) -> Option<u64> {
        self.most(peer, |sample| sample.own_resident_bytes)
    }

    fn most(&self, peer: Peer, of: impl Fn(&Sample) -> u64) -> Option<u64> {
        let cells = self.rows.iter();
        cells
            .filter(|cell| cell.peer == peer && cell.place != Place::Null)
            .flat_map(|cell| &cell.rounds)
            .map(of)
            .max()
    }

    /// Our requests a second by those of the cell.
    fn ours_to(&self, cell: &Cell) -> Option<Spread> {
        if cell.peer == Peer::Ours {
            return None;
        }
        let ours = self.cell(cell.place, cell.load, Peer::Ours)?;
        Some(ours.ratio(cell, |sample| sample.iops))
    }
}

impl Cell {
    /// Returns the median over the rounds.
    pub fn median(&self, of: impl Fn(&Sample) -> f64) -> f64 {
        median(&self.rounds.iter().map(of).collect::<Vec<_>>())
    }

    /// By how many times this is more than another, round by round.
    pub fn ratio(&self, other: &Cell, of: impl Fn(&Sample) -> f64) -> Spread {
        let rounds = self.rounds.iter().zip(&other.rounds);
        let ratios: Vec<f64> = rounds.map(|(this, that)| of(this) / of(that)).collect();
        spread(&ratios)
    }
}

impl Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        writeln!(f, "{}; {}", self.machine, self.date)?;
        for peer in &self.peers {
            writeln!(f, "{}: {}", peer.name.name(), peer.version)?;
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
            if last != Some((cell.place, cell.load)) {
                last = Some((cell.place, cell.load));
                writeln!(f, "\n{}: {}", cell.place.title(), cell.load.title())?;
                writeln!(
                    f,
                    "  {:26} {:>9} {:>8} {:>9} {:>9} {:>9} {:>9}  ratio",
                    "", "k IOPS", "MiB/s", "p50 us", "p99 us", "p99.9 us", "CPU s/M"
                )?;
            }
            let iops = cell.median(|sample| sample.iops);
            let mut line = format!(
                "  {:26} {:>9.1} {:>8.0} {:>9.1} {:>9.1} {:>9.1} {:>9.2}",
                cell.peer.name_at(cell.place),
                iops / 1e3,
                iops * f64::from(cell.load.block_size) / f64::from(1 << 20),
                cell.median(|sample| sample.p50_us),
                cell.median(|sample| sample.p99_us),
                cell.median(|sample| sample.p99_9_us),
                cell.median(|sample| sample.cpu_seconds_per_million),
            );
            if let Some(ratio) = self.ours_to(cell) {
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
            let mebibytes = |bytes: Option<u64>| bytes.unwrap_or(0) as f64 / f64::from(1 << 20);
            writeln!(
                f,
                "  {:26} {:>9.2} {:>9.2} {:>9.1} {:>12.1} {:>12.1}",
                peer.name.name(),
                footprint.idle_before_percent,
                footprint.idle_after_percent,
                footprint.ready_ms,
                mebibytes(self.most(peer.name, |sample| sample.peak_resident_bytes)),
                mebibytes(self.own_memory(peer.name)),
            )?;
        }
        writeln!(
            f,
            "peak: guest memory that the back-end touched included; own: its anonymous pages"
        )
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::bench::block::ROWS;

    pub fn sample(iops: f64) -> Sample {
        Sample {
            iops,
            p50_us: 1e6 / iops,
            p99_us: 2e6 / iops,
            p99_9_us: 3e6 / iops,
            cpu_seconds_per_million: 3e5 / iops,
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
            report.add(Place::Tmpfs, ROWS[1], Peer::Ours, sample(ours));
            report.add(Place::Tmpfs, ROWS[1], Peer::QsdThreads, sample(theirs));
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

    #[test]
    fn what_was_written_can_be_read() {
        let mut report = Report::new(&[], Duration::from_secs(1), true).unwrap();
        report.add(Place::PageCache, ROWS[6], Peer::OursPacked, sample(100.0));
        let file = tempfile::NamedTempFile::new().unwrap();
        serde_json::to_writer(&file, &report.json()).unwrap();
        let read = Report::read(file.path()).unwrap();
        assert_eq!(read.json(), report.json());
        std::fs::write(file.path(), "{}").unwrap();
        let error = Report::read(file.path()).unwrap_err().to_string();
        assert!(error.contains("not what this program writes"), "{error}");
    }
}
