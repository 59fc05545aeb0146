// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The benchmark of the console device, beside rust-vmm's back-end.
//!
//! Ours is measured at port 1, which loses nothing, and rust-vmm's at its only port, which is reached by TCP. That one uses the same buffer
//! again for each byte that a client sends, so its ring is destroyed by more than one byte at a time: it has no rows of that direction.
//!
//! - [`load`]: the driver; [`client`]: the client of the port;
//! - [`limit`]: the upper limit;
//! - [`report`]: the table and the JSON file.

pub mod client;
pub mod limit;
pub mod load;
pub mod report;

use std::io;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use clap::Args;
use serde::Serialize;

use super::running::Running;
use super::summary::duration;
use super::{AnyError, BenchError, CommonOptions, WARM_UP, at, until_interrupted};
use crate::front_end::{FrontEnd, Options as FrontEndOptions};
use crate::process::{self, ProcessError, option};
use client::Client;
use load::{Driver, Measured, Schedule};
use report::{Report, Sample};

/// Name of our own back-end, the one that ratios are of, and of rust-vmm's.
pub const PROGRAM: &str = "vhost-device-console";
/// The version of rust-vmm's.
pub const PEER_VERSION: &str = "0.1.0";

/// What the benchmark of the console device measures, and how long.
#[derive(Debug, Clone, Args)]
pub struct ConsoleOptions {
    /// What all benchmarks have.
    #[command(flatten)]
    pub common: CommonOptions,
    /// Only rows whose name contains one of these words, e.g. "socket" or "keys"
    #[arg(long, value_name = "WORD,...", value_delimiter = ',')]
    pub rows: Vec<String>,
    /// rust-vmm's back-end; without it, only ours is measured
    #[arg(long, value_name = "FILE")]
    pub peer: Option<PathBuf>,
}

/// What is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Peer {
    /// Our own back-end.
    Ours,
    /// rust-vmm's.
    RustVmm,
    /// Only the calls that move the bytes.
    Limit,
}

impl Peer {
    /// All, in the order in which they take turns.
    const ALL: [Peer; 3] = [Peer::Ours, Peer::RustVmm, Peer::Limit];

    fn name(self) -> &'static str {
        match self {
            Peer::Ours => "ours",
            Peer::RustVmm => "rust-vmm",
            Peer::Limit => "limit",
        }
    }

    fn has(self, row: &Row, options: &ConsoleOptions) -> bool {
        match self {
            Peer::Ours => true,
            Peer::RustVmm => options.peer.is_some() && !row.terminal && row.load != Load::Receive,
            Peer::Limit => row.load != Load::Keys,
        }
    }
}

/// A kind of load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Load {
    /// The guest writes.
    Transmit,
    /// The client writes.
    Receive,
    /// One key after the other, which the guest echoes.
    Keys,
}

/// A row of the table.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    /// Name for `--rows` and the JSON file.
    pub name: &'static str,
    /// Name for people.
    pub title: &'static str,
    load: Load,
    /// The port is a terminal, not a socket.
    terminal: bool,
    /// Bytes of a buffer of the guest.
    size: u32,
}

const fn row(
    name: &'static str,
    title: &'static str,
    load: Load,
    terminal: bool,
    size: u32,
) -> Row {
    Row {
        name,
        title,
        load,
        terminal,
        size,
    }
}

/// All rows.
pub const ROWS: [Row; 7] = [
    row(
        "transmit-socket-4k",
        "guest to socket, buffers of 4 KiB",
        Load::Transmit,
        false,
        4 << 10,
    ),
    row(
        "transmit-socket-64k",
        "guest to socket, buffers of 64 KiB",
        Load::Transmit,
        false,
        64 << 10,
    ),
    row(
        "receive-socket-4k",
        "socket to guest, buffers of 4 KiB",
        Load::Receive,
        false,
        4 << 10,
    ),
    row(
        "transmit-terminal-4k",
        "guest to terminal, buffers of 4 KiB",
        Load::Transmit,
        true,
        4 << 10,
    ),
    row(
        "receive-terminal-4k",
        "terminal to guest, buffers of 4 KiB",
        Load::Receive,
        true,
        4 << 10,
    ),
    row("keys-socket", "key and echo, socket", Load::Keys, false, 1),
    row(
        "keys-terminal",
        "key and echo, terminal",
        Load::Keys,
        true,
        1,
    ),
];

/// Runs the benchmark of the console device. Progress goes to stderr; the report is the caller's to print.
pub fn run(options: &ConsoleOptions) -> Result<Report, BenchError> {
    let go_on = until_interrupted()?;
    let (rounds, window) = options.common.times();
    let schedule = Schedule {
        warm_up: WARM_UP,
        window,
    };
    let is_chosen = |row: &Row| {
        let words = &options.rows;
        words.is_empty() || words.iter().any(|word| row.name.contains(word))
    };
    let rows: Vec<Row> = ROWS.into_iter().filter(is_chosen).collect();
    if rows.is_empty() {
        return Err(BenchError::Nothing("row"));
    }
    let mut report = Report::new(window);
    let total = rounds as usize * rows.len();
    let started = Instant::now();
    let mut done = 0;
    for round in 1..=rounds {
        for row in &rows {
            let mut results = Vec::new();
            for peer in Peer::ALL {
                if !peer.has(row, options) {
                    continue;
                }
                go_on()?;
                let sample = match measure(peer, options, row, schedule) {
                    // It stops using buffers at times.
                    Err(error) if peer == Peer::RustVmm => {
                        eprintln!("{error}\nmeasuring it again");
                        measure(peer, options, row, schedule)?
                    }
                    measured => measured?,
                };
                results.push(format!("{} {sample}", peer.name()));
                report.add(row, peer, sample);
            }
            done += 1;
            let left = started.elapsed() * (total - done) as u32 / done as u32;
            eprintln!(
                "[{done}/{total}] round {round} of {rounds}, {}: {}; {} left",
                row.name,
                results.join(", "),
                duration(left),
            );
        }
    }
    Ok(report)
}

fn measure(
    peer: Peer,
    options: &ConsoleOptions,
    row: &Row,
    schedule: Schedule,
) -> Result<Sample, BenchError> {
    if peer == Peer::Limit {
        let measured = limit::run(row.load, row.terminal, row.size as usize, schedule);
        return Ok(measured.map_err(at(Path::new("the limit")))?.into());
    }
    let directory = tempfile::tempdir().map_err(at(Path::new("a temporary directory")))?;
    let directory = directory.path();
    let tcp = free_port().map_err(at(Path::new("a TCP port")))?;
    let mut running = match (peer, &options.peer) {
        (Peer::RustVmm, Some(program)) => {
            let mut command = Command::new(program);
            command
                .arg(option("socket-path", directory.join("socket")))
                .args(["--backend=network", &format!("--tcp-port={tcp}")]);
            // It appends the number of the guest.
            Running::start(&mut command, &directory.join("socket0"))?
        }
        _ => start_ours(row, directory)?,
    };
    let client = match (peer, row.terminal) {
        (Peer::RustVmm, _) => Client::tcp(tcp),
        (_, true) => Client::terminal(&directory.join("port")),
        (_, false) => Client::unix(&directory.join("port")),
    };
    let port = u32::from(peer == Peer::Ours);
    let sample = client
        .map_err(AnyError::from)
        .and_then(|client| run_load(&mut running, &client, port, row, schedule))
        .map_err(|cause| {
            BenchError::measurement(row.name.to_owned(), peer.name(), &running, &cause)
        })?;
    running.end()?;
    Ok(sample.into())
}

/// Starts our back-end with a console that nobody uses, and the port.
fn start_ours(row: &Row, directory: &Path) -> Result<Running, ProcessError> {
    let socket = directory.join("socket");
    let mut port = std::ffi::OsString::from(match row.terminal {
        true => "name=bench,pty=",
        false => "name=bench,unix=",
    });
    port.push(directory.join("port"));
    let mut console = std::ffi::OsString::from("unix=");
    console.push(directory.join("console"));
    let mut command = Command::new(process::binary(PROGRAM)?);
    command
        .arg(option("socket-path", &socket))
        .arg(option("port", console))
        .arg(option("port", port));
    Running::start(&mut command, &socket)
}

/// Returns a TCP port of this host that nobody uses now.
fn free_port() -> io::Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

fn run_load(
    running: &mut Running,
    client: &Client,
    port: u32,
    row: &Row,
    schedule: Schedule,
) -> Result<Measured, AnyError> {
    let front_end = FrontEnd::from_stream(running.take_stream(), &FrontEndOptions::default())?;
    let mut driver = Driver::new(front_end, port)?;
    let cpu_time = || running.cpu_time();
    match row.load {
        Load::Transmit => driver.transmit(client, row.size, schedule, cpu_time),
        Load::Receive => driver.receive_all(client, row.size, schedule, cpu_time),
        Load::Keys => driver.type_keys(client, schedule, cpu_time),
    }
}
