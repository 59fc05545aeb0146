// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The benchmark of the block device, beside qemu-storage-daemon.
//!
//! - [`load`]: the driver, and the rows of the table;
//! - [`peer`]: the back-ends; [`file`](mod@file): the load without one;
//! - [`image`]: the disk images that they serve;
//! - [`report`]: the table and the JSON file;
//! - [`targets`]: targets, and whether they were reached; [`summary`]: several runs in one table;
//! - [`chart`]: throughput and latency against depth, drawn;
//! - [`verify`]: checks all data that is read, and measures nothing.

pub mod chart;
pub mod file;
pub mod image;
pub mod load;
pub mod peer;
pub mod report;
pub mod summary;
pub mod targets;
pub mod verify;

use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;

use super::running::Running;
use super::summary::{duration, median};
use super::{AnyError, BenchError, CommonOptions, WARM_UP, at, until_interrupted};
use crate::front_end::device::RING_PACKED;
use crate::front_end::{FrontEnd, Options as FrontEndOptions};
use image::{Image, Place, Places};
use load::{Driver, Load, Measured, Window};
use peer::Peer;
use report::{Footprint, Report, Sample};

/// How often each back-end is started for its start time.
const STARTS: usize = 5;
/// How long an idle back-end settles before its CPU time is measured, and how long that takes.
const IDLE: (Duration, Duration) = (Duration::from_millis(200), Duration::from_millis(500));

/// The rows of the table, and those measured on a disk, which limits throughput whatever the number of queues.
pub const ROWS: [Load; 7] = [
    Load::random(false, 1, 1),
    Load::random(false, 32, 1),
    Load::random(false, 128, 1),
    Load::random(true, 32, 1),
    Load::sequential(false),
    Load::sequential(true),
    Load::random(false, 32, 2),
];
const DISK_ROWS: usize = 6;
/// Without data, rows differ only in their depth.
const NULL_ROWS: usize = 3;

/// The depths of a sweep.
pub const DEPTHS: [u16; 9] = [1, 2, 4, 8, 16, 32, 64, 128, 256];

/// What the benchmark of the block device compares, and how long.
#[derive(Debug, Clone, Args)]
pub struct BlockOptions {
    /// What all benchmarks have.
    #[command(flatten)]
    pub common: CommonOptions,
    /// Only rows whose PLACE/NAME contains one of these words, e.g. "tmpfs/" or "d32,read-128k"; the places are tmpfs, disk
    /// (O_DIRECT), page-cache, and null (no I/O). With --verify, PLACE/ENGINE/RING
    #[arg(long, value_name = "WORD,...", value_delimiter = ',')]
    pub rows: Vec<String>,
    /// Only these back-ends: vhost-device-block, vhost-device-block-packed, qsd-threads, qsd-io_uring, qsd-io_uring-iothread;
    /// "qsd" stands for all of its settings, "file" for io_uring on the file itself, without a back-end
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    pub peers: Vec<String>,
    /// Directory on a disk for the images that are used with O_DIRECT and through the page cache (default: beside this program)
    #[arg(long, value_name = "DIR")]
    pub disk_dir: Option<PathBuf>,
    /// Directory on a tmpfs for the other image
    #[arg(long, value_name = "DIR", default_value = "/dev/shm")]
    pub tmpfs_dir: PathBuf,
    /// Keep idle CPUs polling (needs write access to /dev/cpu_dma_latency): in a virtual machine, where a
    /// halted CPU takes tens of microseconds to wake, this is closer to bare metal
    #[arg(long)]
    pub idle_poll: bool,
    /// Print the target of each row, and whether it was reached
    #[arg(long)]
    pub targets: bool,
    /// Random reads of 4 KiB at depths from 1 to 256 instead of the rows
    #[arg(long)]
    pub sweep: bool,
    /// Draw throughput and latency against depth
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
    /// Measure nothing; show the results that an earlier run wrote with --json
    #[arg(long, value_name = "FILE", conflicts_with_all = ["sweep", "json", "rounds", "seconds", "quick"])]
    pub from: Option<PathBuf>,
    /// Measure nothing; merge the results that several runs wrote with --json into one Markdown table
    #[arg(long, value_name = "FILE", num_args = 1.., conflicts_with_all = ["from", "sweep", "json", "svg", "targets"])]
    pub summarize: Vec<PathBuf>,
    /// Measure nothing; write patterns and check all data that is read, with each I/O engine and ring format; ends with status 1 at
    /// the first difference
    #[arg(long, conflicts_with_all = ["from", "summarize", "sweep", "json", "svg", "targets", "peers", "idle_poll"])]
    pub verify: bool,
}

/// Runs the benchmark of the block device. Progress goes to stderr; the report is the caller's to print.
pub fn run(options: &BlockOptions) -> Result<Report, BenchError> {
    let go_on = until_interrupted()?;
    let (rounds, window) = options.common.times();
    let cells = chosen_cells(options)?;
    let among = |peer: &Peer| cells.iter().any(|(_, _, other)| other == peer);
    let peers: Vec<_> = Peer::ALL.into_iter().filter(among).collect();
    let _polling = options.idle_poll.then(image::poll_when_idle).transpose()?;
    let mut report = Report::new(&peers, window, options.idle_poll)?;
    let chosen: Vec<_> = cells.iter().map(|(place, _, _)| *place).collect();
    let places = Places::new(options, &chosen, &go_on)?;

    for &peer in &peers {
        if peer != Peer::File
            && let Some(image) = places.any()
        {
            eprintln!("{}: start, idle CPU, memory", peer.name());
            go_on()?;
            report.footprint(peer, footprint(peer, image)?);
        }
    }
    let total = rounds as usize * cells.len();
    let started = Instant::now();
    let mut done = 0;
    for round in 1..=rounds {
        for &(place, load, peer) in &cells {
            go_on()?;
            let sample = measure(peer, places.prepare(place)?, load, window)?;
            done += 1;
            let left = started.elapsed() * (total - done) as u32 / done as u32;
            eprintln!(
                "[{done}/{total}] round {round} of {rounds}, {}: {}, {}: {:.1} k IOPS; {} left",
                place.name(),
                load.title(),
                peer.name_at(place),
                sample.iops / 1000.0,
                duration(left),
            );
            report.add(place, load, peer, sample);
        }
    }
    Ok(report)
}

/// Returns what is measured, in this order: back-ends take turns within a row.
fn chosen_cells(options: &BlockOptions) -> Result<Vec<(Place, Load, Peer)>, BenchError> {
    let wanted_peer = |peer: Peer| {
        let matches =
            |name: &String| peer.name() == name || (name == "qsd" && Peer::QSD.contains(&peer));
        match options.peers.as_slice() {
            // Ring formats make no visible difference to a curve, and the file itself is no back-end.
            [] => !options.sweep || !matches!(peer, Peer::OursPacked | Peer::File),
            names => names.iter().any(matches),
        }
    };
    let mut cells = Vec::new();
    for place in Place::ALL {
        let loads: Vec<Load> = match (options.sweep, place) {
            (true, Place::Null) => Vec::new(),
            (true, _) => DEPTHS.map(|depth| Load::random(false, depth, 1)).into(),
            (false, Place::Tmpfs) => ROWS.into(),
            (false, Place::Disk | Place::PageCache) => ROWS[..DISK_ROWS].into(),
            (false, Place::Null) => ROWS[..NULL_ROWS].into(),
        };
        for load in loads {
            if !is_wanted(&options.rows, &format!("{}/{}", place.name(), load.name())) {
                continue;
            }
            let peers = Peer::ALL.into_iter().filter(|peer| peer.is_at(place));
            cells.extend(
                peers
                    .filter(|&peer| wanted_peer(peer))
                    .map(|peer| (place, load, peer)),
            );
        }
    }
    match cells.is_empty() {
        true => Err(BenchError::Nothing("row and back-end")),
        false => Ok(cells),
    }
}

/// Returns whether `--rows` asks for what has this name.
fn is_wanted(words: &[String], name: &str) -> bool {
    words.is_empty() || words.iter().any(|word| name.contains(word))
}

fn measure(peer: Peer, image: &Image, load: Load, window: Duration) -> Result<Sample, BenchError> {
    if peer == Peer::File {
        return measure_file(image, load, window);
    }
    let mut running = peer.start(image, &image.socket(), load.queues)?;
    let sample = run_load(peer, &mut running, load, window).map_err(|cause| {
        let what = format!("{}/{}", image.place.name(), load.name());
        BenchError::measurement(what, peer.name(), &running, &cause)
    })?;
    running.end()?;
    Ok(sample)
}

fn measure_file(image: &Image, load: Load, window: Duration) -> Result<Sample, BenchError> {
    let measured = file::run(image, load, times(window));
    measured
        .and_then(|(measured, cpu)| sample(&measured, window, cpu, [0; 2]))
        .map_err(at(&image.path))
}

fn run_load(
    peer: Peer,
    running: &mut Running,
    load: Load,
    window: Duration,
) -> Result<Sample, AnyError> {
    let mut driver = Driver::new(connect(peer, running, load.memory())?, load)?;
    let (mut cpu_before, mut cpu_after) = (Ok(Duration::ZERO), Ok(Duration::ZERO));
    let measured = driver.run(
        times(window),
        || cpu_before = running.cpu_time(),
        || cpu_after = running.cpu_time(),
    )?;
    let cpu = cpu_after?.saturating_sub(cpu_before?);
    let memory = [running.peak_resident()?, running.own_resident()?];
    Ok(sample(&measured, window, cpu, memory)?)
}

fn times(window: Duration) -> Window {
    let start = Instant::now() + WARM_UP;
    Window {
        start,
        end: start + window,
    }
}

/// Results of the window: CPU time, and peak resident memory in total and anonymous.
fn sample(
    measured: &Measured,
    window: Duration,
    cpu: Duration,
    [peak_resident_bytes, own_resident_bytes]: [u64; 2],
) -> io::Result<Sample> {
    let counted = measured.latency.total();
    if counted == 0 {
        let what = "no request was completed in time: is the machine busy?";
        return Err(io::Error::other(what));
    }
    Ok(Sample {
        iops: counted as f64 / window.as_secs_f64(),
        p50_us: measured.latency.percentile(50.0) / 1e3,
        p99_us: measured.latency.percentile(99.0) / 1e3,
        p99_9_us: measured.latency.percentile(99.9) / 1e3,
        cpu_seconds_per_million: cpu.as_secs_f64() * 1e6 / counted as f64,
        kicks_per_request: measured.kicks as f64 / measured.requests as f64,
        calls_per_request: measured.calls as f64 / measured.requests as f64,
        peak_resident_bytes,
        own_resident_bytes,
    })
}

fn connect(
    peer: Peer,
    running: &mut Running,
    memory: Vec<(u64, usize)>,
) -> Result<FrontEnd, AnyError> {
    let defaults = FrontEndOptions::default();
    let packed = peer == Peer::OursPacked;
    let options = FrontEndOptions {
        memory,
        features: defaults.features & !RING_PACKED | if packed { RING_PACKED } else { 0 },
        ..defaults
    };
    let front_end = FrontEnd::from_stream(running.take_stream(), &options)?;
    if packed && front_end.features() & RING_PACKED == 0 {
        return Err("it offers no packed rings".into());
    }
    Ok(front_end)
}

/// Start time and idle CPU.
fn footprint(peer: Peer, image: &Image) -> Result<Footprint, BenchError> {
    let mut ready = Vec::new();
    for _ in 0..STARTS {
        let running = peer.start(image, &image.socket(), 1)?;
        ready.push(running.ready.as_secs_f64() * 1e3);
        running.end()?;
    }
    let mut running = peer.start(image, &image.socket(), 1)?;
    let (idle_before_percent, idle_after_percent) = idle(peer, &mut running).map_err(|cause| {
        BenchError::measurement("idle".to_owned(), peer.name(), &running, &cause)
    })?;
    running.end()?;
    Ok(Footprint {
        ready_ms: median(&ready),
        idle_before_percent,
        idle_after_percent,
    })
}

/// Returns CPU use before the first message, and with a ring that was used.
fn idle(peer: Peer, running: &mut Running) -> Result<(f64, f64), AnyError> {
    let before = idle_percent(running)?;
    let load = Load::random(false, 1, 1);
    let mut driver = Driver::new(connect(peer, running, load.memory())?, load)?;
    let start = Instant::now();
    let window = Window {
        start,
        end: start + WARM_UP,
    };
    driver.run(window, || (), || ())?;
    Ok((before, idle_percent(running)?))
}

fn idle_percent(running: &Running) -> io::Result<f64> {
    let (settle, count) = IDLE;
    std::thread::sleep(settle);
    let (before, start) = (running.cpu_time()?, Instant::now());
    std::thread::sleep(count);
    let used = running.cpu_time()?.saturating_sub(before);
    Ok(used.as_secs_f64() * 100.0 / start.elapsed().as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_known_by_their_names() {
        let names = ROWS.map(|load| load.name());
        assert_eq!(
            names.each_ref().map(String::as_str),
            [
                "randread-4k-d1",
                "randread-4k-d32",
                "randread-4k-d128",
                "randwrite-4k-d32",
                "read-128k-d16",
                "write-128k-d16",
                "randread-4k-d32-q2",
            ]
        );
        assert!(is_wanted(&[], "tmpfs/read-128k-d16"));
        assert!(is_wanted(&["d16".to_owned()], "tmpfs/read-128k-d16"));
        assert!(!is_wanted(&["disk/".to_owned()], "tmpfs/read-128k-d16"));
    }
}
