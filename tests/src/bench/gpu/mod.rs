// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The benchmark of the GPU device, beside QEMU's own back-end, in 2D.
//!
//! The result depends on whether the display, which reads each picture, shares a CPU with the back-end, so both cases are measured, and
//! all threads are pinned.
//!
//! - [`load`]: the driver; [`display`]: the display;
//! - [`limit`]: the upper limit;
//! - [`report`]: the table and the JSON file.

pub mod display;
pub mod limit;
pub mod load;
pub mod report;

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use clap::Args;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde::Serialize;

use super::running::Running;
use super::summary::duration;
use super::{AnyError, BenchError, CommonOptions, WARM_UP, at, until_interrupted};
use crate::front_end::{FrontEnd, Options as FrontEndOptions};
use crate::process::{self, ProcessError, option};
use display::Display;
use load::{Driver, Item, Load};
use report::{Report, Sample};

/// Name of our own back-end, the one that ratios are of.
const OURS: &str = "vhost-device-gpu";
/// Path of QEMU's back-end on Debian.
pub const QEMU: &str = "/usr/lib/qemu/vhost-user-gpu";

/// What the benchmark of the GPU device measures, and how long.
#[derive(Debug, Clone, Args)]
pub struct GpuOptions {
    /// What all benchmarks have.
    #[command(flatten)]
    pub common: CommonOptions,
    /// Only rows whose REGIME/NAME contains one of these words, e.g. "one-cpu/" or "frame,cursor"
    #[arg(long, value_name = "WORD,...", value_delimiter = ',')]
    pub rows: Vec<String>,
    /// QEMU's back-end
    #[arg(long, value_name = "FILE", default_value = QEMU)]
    pub qemu: PathBuf,
}

/// Which CPUs are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Regime {
    /// The back-end has one CPU, driver and display have another.
    TwoCpus,
    /// All share one CPU.
    OneCpu,
}

impl Regime {
    const ALL: [Regime; 2] = [Regime::TwoCpus, Regime::OneCpu];

    fn name(self) -> &'static str {
        match self {
            Regime::TwoCpus => "two-cpus",
            Regime::OneCpu => "one-cpu",
        }
    }

    fn title(self) -> &'static str {
        match self {
            Regime::TwoCpus => "two CPUs, one for the back-end",
            Regime::OneCpu => "one CPU for all",
        }
    }

    /// Returns the first CPUs that this process may use.
    fn cpus(self) -> io::Result<Cpus> {
        let allowed = sched_getaffinity(None)?;
        let mut numbers = (0..CpuSet::MAX_CPU).filter(|&cpu| allowed.is_set(cpu));
        let back_end = numbers.next().unwrap_or(0);
        let others = match self {
            Regime::OneCpu => back_end,
            Regime::TwoCpus => numbers.next().ok_or_else(|| {
                io::Error::other("there is only one CPU: choose rows with --rows=one-cpu")
            })?,
        };
        Ok(Cpus { back_end, others })
    }
}

/// Numbers of CPUs.
#[derive(Debug, Clone, Copy)]
pub struct Cpus {
    back_end: usize,
    /// Of the driver and the display.
    others: usize,
}

/// Keeps this thread, and what it starts from now on, on one CPU.
fn pin(cpu: usize) -> io::Result<()> {
    let mut cpus = CpuSet::new();
    cpus.set(cpu);
    Ok(sched_setaffinity(None, &cpus)?)
}

/// What is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Peer {
    /// Our own back-end.
    Ours,
    /// QEMU's.
    Qemu,
    /// A copy and a write.
    Limit,
}

impl Peer {
    /// All, in the order in which they take turns.
    const ALL: [Peer; 3] = [Peer::Ours, Peer::Qemu, Peer::Limit];

    fn name(self) -> &'static str {
        match self {
            Peer::Ours => OURS,
            Peer::Qemu => "qemu",
            Peer::Limit => "limit",
        }
    }

    fn command(self, options: &GpuOptions, socket: &Path) -> Result<Command, ProcessError> {
        if self == Peer::Ours {
            let mut command = Command::new(process::binary(OURS)?);
            command.arg(option("socket-path", socket));
            return Ok(command);
        }
        let mut command = Command::new(&options.qemu);
        command.arg("-s").arg(socket);
        Ok(command)
    }
}

/// A row of the table.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    /// Name for `--rows` and the JSON file.
    pub name: &'static str,
    /// Name for people.
    pub title: &'static str,
    /// What is done.
    pub load: Load,
}

const fn row(name: &'static str, title: &'static str, item: Item, depth: usize) -> Row {
    let picture = match item {
        Item::Show(3840, 2160) => (3840, 2160),
        _ => (1024, 768),
    };
    let load = Load {
        item,
        picture,
        depth,
    };
    Row { name, title, load }
}

/// All rows.
pub const ROWS: [Row; 8] = [
    row(
        "frame-1024x768",
        "transfer and flush of 1024x768",
        Item::Show(1024, 768),
        1,
    ),
    row(
        "frame-3840x2160",
        "transfer and flush of 3840x2160",
        Item::Show(3840, 2160),
        1,
    ),
    row(
        "rectangle-64x64-d1",
        "transfer and flush of 64x64, depth 1",
        Item::Show(64, 64),
        1,
    ),
    row(
        "rectangle-64x64-d16",
        "transfer and flush of 64x64, depth 16",
        Item::Show(64, 64),
        16,
    ),
    row(
        "transfer-1024x768",
        "transfer of 1024x768",
        Item::Transfer(1024, 768),
        1,
    ),
    row(
        "cursor-d1",
        "move of the cursor, depth 1",
        Item::MoveCursor,
        1,
    ),
    row(
        "create-d1",
        "create and unref of 64x64, depth 1",
        Item::CreateUnref(64, 64),
        1,
    ),
    row(
        "create-d16",
        "create and unref of 64x64, depth 16",
        Item::CreateUnref(64, 64),
        16,
    ),
];

/// Runs the benchmark of the GPU device. Progress goes to stderr; the report is the caller's to print.
pub fn run(options: &GpuOptions) -> Result<Report, BenchError> {
    let go_on = until_interrupted()?;
    let (rounds, window) = options.common.times();
    let cells = chosen_cells(&options.rows)?;
    if !options.qemu.is_file() {
        let advice = "it is not there: install Debian's qemu-system-gui, or name it with --qemu";
        return Err(at(&options.qemu)(io::Error::other(advice)));
    }
    let directory = tempfile::tempdir().map_err(at(Path::new("a temporary directory")))?;
    let socket = directory.path().join("socket");
    let mut report = Report::new(&options.qemu, window);
    let total = rounds as usize * cells.len();
    let started = Instant::now();
    let mut done = 0;
    for round in 1..=rounds {
        for (regime, row, cpus) in &cells {
            let mut rates = Vec::new();
            for peer in Peer::ALL {
                if peer == Peer::Limit && !row.load.is_frame() {
                    continue;
                }
                go_on()?;
                let sample = measure(peer, options, &socket, row, *cpus, window)?;
                rates.push(format!("{} {:.0}/s", peer.name(), sample.rate));
                report.add(*regime, row, peer, sample);
            }
            done += 1;
            let left = started.elapsed() * (total - done) as u32 / done as u32;
            eprintln!(
                "[{done}/{total}] round {round} of {rounds}, {}/{}: {}; {} left",
                regime.name(),
                row.name,
                rates.join(", "),
                duration(left),
            );
        }
    }
    Ok(report)
}

fn chosen_cells(words: &[String]) -> Result<Vec<(Regime, Row, Cpus)>, BenchError> {
    let mut cells = Vec::new();
    for regime in Regime::ALL {
        for row in ROWS {
            let name = format!("{}/{}", regime.name(), row.name);
            if words.is_empty() || words.iter().any(|word| name.contains(word)) {
                let cpus = regime.cpus().map_err(at(Path::new("CPUs")))?;
                cells.push((regime, row, cpus));
            }
        }
    }
    match cells.is_empty() {
        true => Err(BenchError::Nothing("row")),
        false => Ok(cells),
    }
}

fn measure(
    peer: Peer,
    options: &GpuOptions,
    socket: &Path,
    row: &Row,
    cpus: Cpus,
    window: Duration,
) -> Result<Sample, BenchError> {
    if peer == Peer::Limit {
        let measured = limit::run(&row.load, cpus, WARM_UP, window);
        return Ok(measured.map_err(at(Path::new("the limit")))?.into());
    }
    pin(cpus.back_end).map_err(at(Path::new("CPUs")))?;
    let mut running = Running::start(&mut peer.command(options, socket)?, socket)?;
    let sample = run_load(&mut running, &row.load, cpus, window).map_err(|cause| {
        BenchError::measurement(row.name.to_owned(), peer.name(), &running, &cause)
    })?;
    running.end()?;
    // QEMU's back-end leaves it.
    let _ = std::fs::remove_file(socket);
    Ok(sample)
}

fn run_load(
    running: &mut Running,
    load: &Load,
    cpus: Cpus,
    window: Duration,
) -> Result<Sample, AnyError> {
    pin(cpus.others)?;
    let (display, socket) = Display::new(cpus.others)?;
    let options = FrontEndOptions {
        memory: vec![(0, load.memory_size())],
        ..Default::default()
    };
    let front_end = FrontEnd::from_stream(running.take_stream(), &options)?;
    let mut driver = Driver::new(front_end, *load, &socket)?;
    let measured = driver.run(WARM_UP, window, || running.cpu_time())?;
    display.wait_shown(driver.shown())?;
    Ok(measured.into())
}
