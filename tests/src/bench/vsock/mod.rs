// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The benchmark of the socket device, beside rust-vmm's back-end, without a guest.
//!
//! - [`driver`]: the guest's side; [`host`]: the programs of the host; [`load`]: what they do with each other;
//! - [`report`]: the table, with targets, and the JSON file.

pub mod driver;
pub mod host;
pub mod load;
pub mod report;

use std::hint::black_box;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use clap::Args;
use serde::Serialize;

use super::running::Running;
use super::summary::duration;
use super::{AnyError, BenchError, CommonOptions, WARM_UP, at, until_interrupted};
use crate::front_end::device::RING_PACKED;
use crate::front_end::{FrontEnd, Options as FrontEndOptions};
use crate::process::{self, ProcessError, option};
use driver::{Driver, Framing};
use host::{CHUNK, Host};
use load::{Load, Measured, Meter};
use report::{Report, Sample};

/// Name of our own back-end, and of rust-vmm's.
pub const PROGRAM: &str = "vhost-device-vsock";
/// The published version of rust-vmm's back-end.
pub const PEER_VERSION: &str = "0.3.0";
/// The port of the host that the guest connects to.
const PORT: u32 = 1234;
/// Bytes that the copy of memory reads from: more than caches keep for one processor.
const POOL: usize = 16 << 20;

/// What the benchmark of the socket device measures, and how long.
#[derive(Debug, Clone, Args)]
pub struct VsockOptions {
    /// What all benchmarks have.
    #[command(flatten)]
    pub common: CommonOptions,
    /// Only rows whose name contains one of these words, e.g. "to-host" or "connect,round-trip"
    #[arg(long, value_name = "WORD,...", value_delimiter = ',')]
    pub rows: Vec<String>,
    /// Only these back-ends: ours, ours-packed, rust-vmm, and "alone" for unix sockets without a back-end
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    pub among: Vec<String>,
    /// rust-vmm's back-end; `cargo xtask bench` builds it if this is not given
    #[arg(long, value_name = "FILE")]
    pub peer: Option<PathBuf>,
}

/// What is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Peer {
    /// Our own back-end.
    Ours,
    /// Our own with packed rings.
    OursPacked,
    /// rust-vmm's.
    RustVmm,
    /// Unix sockets, without a back-end.
    Alone,
}

impl Peer {
    /// All, in the order in which they take turns.
    const ALL: [Peer; 4] = [Peer::Ours, Peer::OursPacked, Peer::RustVmm, Peer::Alone];

    fn name(self) -> &'static str {
        match self {
            Peer::Ours => "ours",
            Peer::OursPacked => "ours-packed",
            Peer::RustVmm => "rust-vmm",
            Peer::Alone => "alone",
        }
    }

    fn command(self, place: &Place) -> Result<Command, ProcessError> {
        let (mut command, socket) = match self {
            Peer::RustVmm => (Command::new(&place.rust_vmm), "socket"),
            _ => (Command::new(process::binary(PROGRAM)?), "socket-path"),
        };
        command
            .arg(option(socket, &place.socket))
            .arg(option("uds-path", &place.uds))
            .arg(format!("--guest-cid={}", driver::GUEST));
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
    /// The least ratio of our rate to rust-vmm's, or 0.
    pub target: f64,
}

const fn row(name: &'static str, title: &'static str, load: Load, target: f64) -> Row {
    Row {
        name,
        title,
        load,
        target,
    }
}

/// All rows.
pub const ROWS: [Row; 7] = [
    row(
        "connect",
        "connect, greet and close, 16 at a time",
        Load::Connect,
        2.0,
    ),
    row("round-trip", "round trip of 64 bytes", Load::RoundTrip, 1.0),
    row(
        "to-host-4k",
        "to the host, packets of 4 KiB",
        Load::ToHost(4 << 10, Framing::Whole),
        0.0,
    ),
    row(
        "to-host-16k",
        "to the host, packets of 16 KiB",
        Load::ToHost(16 << 10, Framing::Whole),
        3.0,
    ),
    row(
        "to-host-64k",
        "to the host, packets of 64 KiB",
        Load::ToHost(64 << 10, Framing::Whole),
        3.0,
    ),
    row(
        "to-host-64k-pages",
        "to the host, packets of 64 KiB in pages, as of Linux",
        Load::ToHost(64 << 10, Framing::Pages),
        3.0,
    ),
    row(
        "to-guest",
        "to the guest, into buffers of 4 KiB",
        Load::ToGuest,
        3.0,
    ),
];

/// Files of the back-ends.
struct Place {
    rust_vmm: PathBuf,
    socket: PathBuf,
    uds: PathBuf,
    service: PathBuf,
}

/// Runs the benchmark of the socket device. Progress goes to stderr; the report is the caller's to print.
pub fn run(options: &VsockOptions) -> Result<Report, BenchError> {
    let go_on = until_interrupted()?;
    let (rounds, window) = options.common.times();
    let wanted = |words: &[String], is: &dyn Fn(&str) -> bool| {
        words.is_empty() || words.iter().any(|word| is(word))
    };
    let rows: Vec<Row> = ROWS
        .into_iter()
        .filter(|row| wanted(&options.rows, &|word| row.name.contains(word)))
        .collect();
    let peers: Vec<Peer> = Peer::ALL
        .into_iter()
        .filter(|peer| wanted(&options.among, &|word| peer.name() == word))
        .collect();
    if rows.is_empty() || peers.is_empty() {
        return Err(BenchError::Nothing("row and back-end"));
    }
    let rust_vmm = options.peer.clone().unwrap_or_default();
    if peers.contains(&Peer::RustVmm) && !rust_vmm.is_file() {
        let advice =
            "not there: name rust-vmm's back-end with --peer, or leave it out with --among";
        return Err(at(&rust_vmm)(io::Error::other(advice)));
    }
    let directory = tempfile::tempdir().map_err(at(Path::new("a temporary directory")))?;
    let file = |name: &str| directory.path().join(name);
    let place = Place {
        rust_vmm,
        socket: file("socket"),
        uds: file("guest"),
        service: file(&format!("guest_{PORT}")),
    };
    let mut report = Report::new(window);
    let total = rounds as usize * rows.len();
    let started = Instant::now();
    let mut done = 0;
    for round in 1..=rounds {
        report.add_copy(copy_rate(window / 4));
        for row in &rows {
            let mut values = Vec::new();
            for &peer in &peers {
                go_on()?;
                let sample = measure(peer, &place, row, window)?;
                values.push(format!("{} {:.4}", peer.name(), sample.value));
                report.add(row, peer, sample);
            }
            done += 1;
            let left = started.elapsed() * (total - done) as u32 / done as u32;
            eprintln!(
                "[{done}/{total}] round {round} of {rounds}, {}: {} {}; {} left",
                row.name,
                values.join(", "),
                report::unit(row.load),
                duration(left),
            );
        }
    }
    Ok(report)
}

/// Returns how many bytes a second one thread copies.
fn copy_rate(window: Duration) -> f64 {
    let pool = vec![1u8; POOL];
    let mut to = vec![0u8; CHUNK];
    let start = Instant::now();
    let mut copied = 0;
    while start.elapsed() < window {
        for from in pool.chunks_exact(CHUNK) {
            to.copy_from_slice(black_box(from));
            black_box(&mut to);
            copied += CHUNK;
        }
    }
    copied as f64 / start.elapsed().as_secs_f64()
}

fn measure(peer: Peer, place: &Place, row: &Row, window: Duration) -> Result<Sample, BenchError> {
    let host = Host::start(&place.service, row.load.service()).map_err(at(&place.service))?;
    if peer == Peer::Alone {
        let meter = Meter::new(WARM_UP, window, || Ok(Duration::ZERO));
        let measured = load::run_alone(row.load, &place.service, &host, meter);
        return Ok(Sample::new(
            row.load,
            &measured.map_err(at(&place.service))?,
        ));
    }
    let mut running = Running::start(&mut peer.command(place)?, &place.socket)?;
    let measured = run_load(peer, &mut running, row.load, &host, window).map_err(|cause| {
        BenchError::measurement(row.name.to_owned(), peer.name(), &running, &cause)
    })?;
    running.end()?;
    // rust-vmm's back-end leaves them.
    for path in [&place.socket, &place.uds] {
        let _ = std::fs::remove_file(path);
    }
    Ok(Sample::new(row.load, &measured))
}

fn run_load(
    peer: Peer,
    running: &mut Running,
    load: Load,
    host: &Host,
    window: Duration,
) -> Result<Measured, AnyError> {
    let defaults = FrontEndOptions::default();
    let packed = peer == Peer::OursPacked;
    let options = FrontEndOptions {
        memory: vec![(0, driver::memory_size())],
        features: defaults.features & !RING_PACKED | if packed { RING_PACKED } else { 0 },
        ..defaults
    };
    let front_end = FrontEnd::from_stream(running.take_stream(), &options)?;
    if packed && front_end.features() & RING_PACKED == 0 {
        return Err("it offers no packed rings".into());
    }
    let mut driver = Driver::new(front_end)?;
    let meter = Meter::new(WARM_UP, window, || running.cpu_time());
    Ok(load::run(load, &mut driver, PORT, host, meter)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_rows_differ() {
        let mut names = ROWS.map(|row| row.name);
        names.sort_unstable();
        assert!(names.windows(2).all(|pair| pair[0] != pair[1]));
    }
}
