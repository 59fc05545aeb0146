// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The benchmark of the block device, beside qemu-storage-daemon.
//!
//! - [`load`]: the driver;
//! - [`peer`]: the back-ends;
//! - [`image`]: the disk images that they serve;
//! - [`report`]: the table and the JSON file.

pub mod image;
pub mod load;
pub mod peer;
pub mod report;

use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;

use super::running::Running;
use super::summary::{duration, median};
use super::{AnyError, BenchError, CommonOptions, WARM_UP, until_interrupted};
use crate::front_end::{self, FrontEnd, Options as FrontEndOptions};
use image::{Place, Places};
use load::{Driver, Load, Window};
use peer::{Image, Peer};
use report::{Footprint, Report, Sample};

/// How often each back-end is started for its start time.
const STARTS: usize = 5;
/// How long an idle back-end is left alone before its CPU time is counted, and then counted.
const IDLE: (Duration, Duration) = (Duration::from_millis(200), Duration::from_millis(500));

/// What the benchmark of the block device compares, and how long.
#[derive(Debug, Clone, Args)]
pub struct BlockOptions {
    /// What all benchmarks have.
    #[command(flatten)]
    pub common: CommonOptions,
    /// Only rows whose PLACE/NAME contains one of these words, e.g. "tmpfs/" or "d32,read-128k"
    #[arg(long, value_name = "WORD,...", value_delimiter = ',')]
    pub rows: Vec<String>,
    /// Only these back-ends: vhost-device-block, qsd-threads, qsd-io_uring, qsd-io_uring-iothread;
    /// "qsd" stands for all of its settings
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

const fn row(name: &'static str, title: &'static str, load: Load) -> Row {
    Row { name, title, load }
}

const fn random(write: bool, depth: u16, queues: usize) -> Load {
    Load {
        write,
        random: true,
        block_size: 4096,
        depth,
        queues,
    }
}

const fn sequential(write: bool) -> Load {
    Load {
        write,
        random: false,
        block_size: 128 << 10,
        depth: 16,
        queues: 1,
    }
}

/// All rows of the block benchmark.
pub const ROWS: [Row; 7] = [
    row(
        "randread-4k-d1",
        "random read 4 KiB, depth 1",
        random(false, 1, 1),
    ),
    row(
        "randread-4k-d32",
        "random read 4 KiB, depth 32",
        random(false, 32, 1),
    ),
    row(
        "randread-4k-d128",
        "random read 4 KiB, depth 128",
        random(false, 128, 1),
    ),
    row(
        "randwrite-4k-d32",
        "random write 4 KiB, depth 32",
        random(true, 32, 1),
    ),
    row(
        "read-128k-d16",
        "sequential read 128 KiB, depth 16",
        sequential(false),
    ),
    row(
        "write-128k-d16",
        "sequential write 128 KiB, depth 16",
        sequential(true),
    ),
    row(
        "randread-4k-d32-q2",
        "random read 4 KiB, 2 queues of depth 32",
        random(false, 32, 2),
    ),
];

/// Runs the benchmark of the block device. Progress goes to stderr; the report is the caller's to print.
pub fn run(options: &BlockOptions) -> Result<Report, BenchError> {
    let go_on = until_interrupted()?;
    let (rounds, window) = options.common.times();
    let peers = chosen_peers(&options.peers)?;
    let cells = chosen_cells(&options.rows)?;
    let _polling = options.idle_poll.then(image::poll_when_idle).transpose()?;
    let mut report = Report::new(&peers, window, options.idle_poll)?;
    let places = Places::new(options, &cells, &go_on)?;

    for &peer in &peers {
        eprintln!("{}: start, idle CPU, memory", peer.name());
        go_on()?;
        report.footprint(peer, footprint(peer, places.any())?);
    }
    let total = rounds as usize * cells.len() * peers.len();
    let started = Instant::now();
    let mut done = 0;
    for round in 1..=rounds {
        for (place, row) in &cells {
            for &peer in &peers {
                go_on()?;
                let sample = measure(peer, *place, places.prepare(*place)?, row, window)?;
                done += 1;
                let left = started.elapsed() * (total - done) as u32 / done as u32;
                eprintln!(
                    "[{done}/{total}] round {round} of {rounds}, {}: {}, {}: {:.1} k IOPS; {} left",
                    place.name(),
                    row.title,
                    peer.name(),
                    sample.iops / 1000.0,
                    duration(left),
                );
                report.add(*place, row, peer, sample);
            }
        }
    }
    Ok(report)
}

fn chosen_peers(names: &[String]) -> Result<Vec<Peer>, BenchError> {
    let wanted = |peer: &Peer| {
        let matches = |name: &String| {
            peer.name() == name || (name == "qsd" && *peer != Peer::VhostDeviceBlock)
        };
        names.is_empty() || names.iter().any(matches)
    };
    let peers: Vec<_> = Peer::ALL.into_iter().filter(wanted).collect();
    match peers.is_empty() {
        true => Err(BenchError::Nothing("back-end")),
        false => Ok(peers),
    }
}

fn chosen_cells(words: &[String]) -> Result<Vec<(Place, Row)>, BenchError> {
    let all = Place::ALL
        .into_iter()
        .flat_map(|place| ROWS.map(|row| (place, row)))
        // The disk is the limit there, however many queues there are.
        .filter(|(place, row)| *place == Place::Tmpfs || row.load.queues == 1);
    let wanted = |(place, row): &(Place, Row)| {
        let name = format!("{}/{}", place.name(), row.name);
        words.is_empty() || words.iter().any(|word| name.contains(word))
    };
    let cells: Vec<_> = all.filter(wanted).collect();
    match cells.is_empty() {
        true => Err(BenchError::Nothing("row")),
        false => Ok(cells),
    }
}

fn measure(
    peer: Peer,
    place: Place,
    image: &Image,
    row: &Row,
    window: Duration,
) -> Result<Sample, BenchError> {
    let mut running = peer.start(image, &socket(image), row.load.queues)?;
    let sample = run_load(&mut running, row, window).map_err(|cause| {
        let what = format!("{}/{}", place.name(), row.name);
        BenchError::measurement(what, peer.name(), &running, &cause)
    })?;
    running.end()?;
    Ok(sample)
}

/// The socket that the peer of the moment serves `image` at.
fn socket(image: &Image) -> PathBuf {
    image.path.with_extension("sock")
}

fn run_load(running: &mut Running, row: &Row, window: Duration) -> Result<Sample, AnyError> {
    let mut driver = Driver::new(connect(running, &row.load)?, row.load)?;
    let start = Instant::now() + WARM_UP;
    let times = Window {
        start,
        end: start + window,
    };
    let (mut cpu_before, mut cpu_after) = (Ok(Duration::ZERO), Ok(Duration::ZERO));
    let measured = driver.run(
        times,
        || cpu_before = running.cpu_time(),
        || cpu_after = running.cpu_time(),
    )?;
    let cpu = cpu_after?.saturating_sub(cpu_before?);
    let counted = measured.latency.total();
    if counted == 0 {
        return Err("no request was completed".into());
    }
    Ok(Sample {
        iops: counted as f64 / window.as_secs_f64(),
        p50_us: measured.latency.percentile(50.0) / 1e3,
        p99_us: measured.latency.percentile(99.0) / 1e3,
        p99_9_us: measured.latency.percentile(99.9) / 1e3,
        cpu_seconds_per_million: cpu.as_secs_f64() * 1e6 / counted as f64,
        kicks_per_request: measured.kicks as f64 / measured.requests as f64,
        calls_per_request: measured.calls as f64 / measured.requests as f64,
        peak_resident_bytes: running.peak_resident()?,
        own_resident_bytes: running.own_resident()?,
    })
}

fn connect(running: &mut Running, load: &Load) -> front_end::Result<FrontEnd> {
    let options = FrontEndOptions {
        memory: vec![(0, load.memory_size())],
        ..Default::default()
    };
    FrontEnd::from_stream(running.take_stream(), &options)
}

/// Start time and idle CPU.
fn footprint(peer: Peer, image: &Image) -> Result<Footprint, BenchError> {
    let mut ready = Vec::new();
    for _ in 0..STARTS {
        let running = peer.start(image, &socket(image), 1)?;
        ready.push(running.ready.as_secs_f64() * 1e3);
        running.end()?;
    }
    let mut running = peer.start(image, &socket(image), 1)?;
    let (idle_before_percent, idle_after_percent) = idle(&mut running).map_err(|cause| {
        BenchError::measurement("idle".to_owned(), peer.name(), &running, &cause)
    })?;
    running.end()?;
    Ok(Footprint {
        ready_ms: median(&ready),
        idle_before_percent,
        idle_after_percent,
    })
}

/// CPU use before the first message, and with a ring that was used.
fn idle(running: &mut Running) -> Result<(f64, f64), AnyError> {
    let before = idle_percent(running)?;
    let load = random(false, 1, 1);
    let mut driver = Driver::new(connect(running, &load)?, load)?;
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
