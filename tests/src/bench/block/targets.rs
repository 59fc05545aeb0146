// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Targets of the block device, each the best result of any back-end, and whether they were reached.
//!
//! Requests per second and CPU time are ratios to qemu-storage-daemon's default (aio=threads), taken round by round.

use std::fmt::{self, Display};

use super::ROWS;
use super::image::Place;
use super::load::Load;
use super::peer::Peer;
use super::report::Report;
use crate::bench::summary::median;

/// Requests a second, in the order of [`ROWS`].
const THROUGHPUT: [(Place, &[f64]); 3] = [
    (Place::Tmpfs, &[3.8, 3.6, 4.6, 3.6, 1.35, 1.4, 4.7]),
    (Place::Disk, &[1.9, 1.6, 1.1, 1.4, 1.2, 1.1]),
    (Place::PageCache, &[3.7, 3.0, 3.0, 3.0, 1.0, 1.0]),
];
/// The same at depth 1 where idle CPUs poll and no disk is involved.
const IDLE_POLL_THROUGHPUT: f64 = 3.5;
/// CPU time for a request at depth 32, on a tmpfs and with O_DIRECT.
const CPU: f64 = 0.24;
/// Idle CPU in percent of a core: zero, within the resolution of the clock.
const IDLE_PERCENT: f64 = 0.01;
/// Memory of its own under load, in bytes.
const MEMORY: f64 = 4.0 * MEBIBYTE;
/// Milliseconds from start to a socket that takes connections.
const READY_MS: f64 = 3.0;
/// Requests per second of the null device, relative to null-co, at depth 32.
const NO_OP: f64 = 2.1;
/// Requests per second on packed rings, relative to split ones, on a tmpfs at depth 32.
const PACKED: f64 = 1.0;

const MEBIBYTE: f64 = 1048576.0;

/// The target of a number.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Bound {
    /// At least this.
    AtLeast(f64),
    /// At most this.
    AtMost(f64),
}

impl Bound {
    fn number(self) -> f64 {
        match self {
            Bound::AtLeast(number) | Bound::AtMost(number) => number,
        }
    }
}

/// A result and its target.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Verdict {
    /// The result.
    pub value: f64,
    /// The target.
    pub bound: Bound,
}

impl Verdict {
    /// Returns whether it was reached.
    pub fn is_reached(self) -> bool {
        match self.bound {
            Bound::AtLeast(least) => self.value >= least,
            Bound::AtMost(most) => self.value <= most,
        }
    }

    /// Returns the verdict on several runs: on the median of what was measured.
    pub fn over(runs: &[Verdict]) -> Option<Verdict> {
        let of = |part: fn(&Verdict) -> f64| median(&runs.iter().map(part).collect::<Vec<_>>());
        let number = of(|run| run.bound.number());
        Some(Verdict {
            value: of(|run| run.value),
            bound: match runs.first()?.bound {
                Bound::AtLeast(_) => Bound::AtLeast(number),
                Bound::AtMost(_) => Bound::AtMost(number),
            },
        })
    }
}

impl Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let word = if self.is_reached() {
            "reached"
        } else {
            "MISSED"
        };
        let (value, bound) = (short(self.value), short(self.bound.number()));
        f.pad(&format!("{word} {value} of {bound}"))
    }
}

/// Returns a number as a table has it: three digits, or two behind the point.
pub fn short(number: f64) -> String {
    match number {
        100.0.. => format!("{number:.0}"),
        10.0.. => format!("{number:.1}"),
        _ => format!("{number:.2}"),
    }
}

/// Our requests a second.
pub fn throughput(report: &Report, place: Place, load: Load) -> Option<Verdict> {
    let ratio = to_threads(report, place, load, |sample| sample.iops)?;
    let least = if report.machine.idle_cpus_poll {
        let is_bound = load == ROWS[0] && matches!(place, Place::Tmpfs | Place::PageCache);
        is_bound.then_some(IDLE_POLL_THROUGHPUT)
    } else {
        let (_, targets) = THROUGHPUT.iter().find(|(at, _)| *at == place)?;
        let row = ROWS.iter().position(|row| *row == load)?;
        targets.get(row).copied()
    };
    Some(Verdict {
        value: ratio,
        bound: Bound::AtLeast(least?),
    })
}

/// Our CPU time for a request.
pub fn cpu(report: &Report, place: Place, load: Load) -> Option<Verdict> {
    let is_bound = load.depth == 32 && matches!(place, Place::Tmpfs | Place::Disk);
    if !is_bound || report.machine.idle_cpus_poll {
        return None;
    }
    Some(Verdict {
        value: to_threads(report, place, load, |sample| sample.cpu_seconds_per_million)?,
        bound: Bound::AtMost(CPU),
    })
}

/// Our 99th percentile of the latency, in microseconds, which is to be no worse than with the best setting of qemu-storage-daemon.
pub fn p99(report: &Report, place: Place, load: Load) -> Option<Verdict> {
    let of = |peer| {
        Some(
            report
                .cell(place, load, peer)?
                .median(|sample| sample.p99_us),
        )
    };
    let best = Peer::QSD
        .into_iter()
        .filter_map(of)
        .min_by(f64::total_cmp)?;
    Some(Verdict {
        value: of(Peer::Ours)?,
        bound: Bound::AtMost(best),
    })
}

fn to_threads(
    report: &Report,
    place: Place,
    load: Load,
    of: fn(&super::report::Sample) -> f64,
) -> Option<f64> {
    let theirs = report.cell(place, load, Peer::QsdThreads)?;
    let ours = report.cell(place, load, Peer::Ours)?;
    Some(ours.ratio(theirs, of).median)
}

/// What there is to say beside the rows: what it is about, and the unit.
pub type Other = (&'static str, &'static str, fn(&Report) -> Option<Verdict>);

/// All of that.
pub const OTHERS: [Other; 5] = [
    ("idle CPU before and after connecting", "%", |report| {
        let footprint = report.footprint_of(Peer::Ours)?;
        Some(Verdict {
            value: footprint
                .idle_before_percent
                .max(footprint.idle_after_percent),
            bound: Bound::AtMost(IDLE_PERCENT),
        })
    }),
    ("memory of its own under load", "MiB", |report| {
        Some(Verdict {
            value: report.own_memory(Peer::Ours)? as f64 / MEBIBYTE,
            bound: Bound::AtMost(MEMORY / MEBIBYTE),
        })
    }),
    ("socket ready after the start", "ms", |report| {
        Some(Verdict {
            value: report.footprint_of(Peer::Ours)?.ready_ms,
            bound: Bound::AtMost(READY_MS),
        })
    }),
    ("a no-op device to null-co, depth 32", "times", |report| {
        let at = |peer| report.cell(Place::Null, ROWS[1], peer);
        let ours = at(Peer::Ours)?;
        let theirs = Peer::QSD.into_iter().filter_map(at);
        let ratios = theirs.map(|cell| ours.ratio(cell, |sample| sample.iops).median);
        Some(Verdict {
            value: ratios.min_by(f64::total_cmp)?,
            bound: Bound::AtLeast(NO_OP),
        })
    }),
    (
        "packed rings to split ones, tmpfs, depth 32",
        "times",
        |report| {
            let at = |peer| report.cell(Place::Tmpfs, ROWS[1], peer);
            let (packed, split) = (at(Peer::OursPacked)?, at(Peer::Ours)?);
            Some(Verdict {
                value: packed.ratio(split, |sample| sample.iops).median,
                bound: Bound::AtLeast(PACKED),
            })
        },
    ),
];

/// Returns the rows that a report has, each once.
pub fn rows(report: &Report) -> Vec<(Place, Load)> {
    let mut rows: Vec<(Place, Load)> = Vec::new();
    for cell in &report.rows {
        if !rows.contains(&(cell.place, cell.load)) {
            rows.push((cell.place, cell.load));
        }
    }
    rows
}

/// What was to be reached, and whether it was.
pub struct Targets<'a>(pub &'a Report);

impl Display for Targets<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Targets(report) = self;
        writeln!(
            f,
            "\n{:60} {:>23} {:>23} {:>23}",
            "Targets", "IOPS to qsd-threads", "CPU to qsd-threads", "p99 us, best of qsd"
        )?;
        for (place, load) in rows(report) {
            let judges = [throughput, cpu, p99];
            let verdicts = judges.map(|judge| judge(report, place, load));
            if place == Place::Null || verdicts.iter().all(Option::is_none) {
                continue;
            }
            let [throughput, cpu, p99] = verdicts
                .map(|verdict| verdict.map_or(String::new(), |verdict| verdict.to_string()));
            let title = format!("{}: {}", place.title(), load.title());
            let line = format!("  {title:58} {throughput:>23} {cpu:>23} {p99:>23}");
            writeln!(f, "{}", line.trim_end())?;
        }
        for (title, unit, judge) in OTHERS {
            if let Some(verdict) = judge(report) {
                writeln!(f, "  {title:58} {verdict:>23} {unit}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::bench::block::report::tests::sample;
    use crate::bench::block::report::{Footprint, Sample};

    fn report(idle_cpus_poll: bool) -> Report {
        let mut report = Report::new(&[], Duration::from_secs(1), idle_cpus_poll).unwrap();
        for (place, row, ours, theirs) in [
            (Place::Tmpfs, 0, 3600.0, 1000.0),
            (Place::Tmpfs, 1, 4000.0, 1000.0),
            (Place::Disk, 0, 1500.0, 1000.0),
        ] {
            report.add(place, ROWS[row], Peer::Ours, sample(ours));
            report.add(place, ROWS[row], Peer::QsdThreads, sample(theirs));
            report.add(place, ROWS[row], Peer::QsdIoUring, sample(2.0 * theirs));
        }
        report
    }

    #[test]
    fn each_row_is_held_to_its_target() {
        let text = Targets(&report(false)).to_string();
        let line = |start: &str| {
            let line = text.lines().find(|line| line.trim().starts_with(start));
            line.unwrap_or_default()
                .split_whitespace()
                .skip(start.split_whitespace().count())
                .collect::<Vec<_>>()
                .join(" ")
        };
        assert_eq!(
            line("tmpfs: random read 4 KiB, depth 1"),
            "MISSED 3.60 of 3.80 reached 556 of 1000"
        );
        assert_eq!(
            line("tmpfs: random read 4 KiB, depth 32"),
            "reached 4.00 of 3.60 MISSED 0.25 of 0.24 reached 500 of 1000"
        );
        assert_eq!(
            line("disk, O_DIRECT: random read 4 KiB, depth 1"),
            "MISSED 1.50 of 1.90 MISSED 1333 of 1000"
        );
    }

    #[test]
    fn where_idle_cpus_poll_only_depth_1_has_a_target_and_a_lower_one() {
        let report = report(true);
        let at = |place, row: usize| throughput(&report, place, ROWS[row]);
        assert!(at(Place::Tmpfs, 0).unwrap().is_reached());
        assert_eq!(at(Place::Tmpfs, 1), None);
        assert_eq!(at(Place::Disk, 0), None);
        assert_eq!(cpu(&report, Place::Tmpfs, ROWS[1]), None);
    }

    #[test]
    fn what_is_no_row_is_held_to_its_target_too() {
        let mut report = report(false);
        let of = |report: &Report, index: usize| (OTHERS[index].2)(report);
        assert!((0..OTHERS.len()).all(|index| of(&report, index).is_some() == (index == 1)));
        let json = serde_json::json!([{"name": "vhost-device-block", "version": "",
            "ready_ms": 2.5, "idle_before_percent": 0.0, "idle_after_percent": 0.5}]);
        let mut whole = report.json();
        whole["peers"] = json;
        report = serde_json::from_value(whole).unwrap();
        assert!(!of(&report, 0).unwrap().is_reached());
        assert!(of(&report, 2).unwrap().is_reached());
        let _: Option<&Footprint> = report.footprint_of(Peer::Ours);
        for (peer, iops) in [
            (Peer::Ours, 3000.0),
            (Peer::QsdThreads, 1000.0),
            (Peer::QsdIoUringIothread, 1500.0),
        ] {
            report.add(Place::Null, ROWS[1], peer, sample(iops));
        }
        // The better of the two settings of qemu-storage-daemon counts.
        assert_eq!(of(&report, 3).unwrap().value, 2.0);
        let packed: Sample = sample(4400.0);
        report.add(Place::Tmpfs, ROWS[1], Peer::OursPacked, packed);
        assert!(of(&report, 4).unwrap().is_reached());
    }

    #[test]
    fn several_runs_are_judged_by_their_median() {
        let run = |value| Verdict {
            value,
            bound: Bound::AtLeast(2.0),
        };
        assert!(
            Verdict::over(&[run(1.0), run(2.5), run(2.0)])
                .unwrap()
                .is_reached()
        );
        assert!(
            !Verdict::over(&[run(1.0), run(1.5), run(9.0)])
                .unwrap()
                .is_reached()
        );
        assert_eq!(Verdict::over(&[]), None);
    }
}
