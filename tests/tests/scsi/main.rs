// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The SCSI host as a driver sees it (VIRTIO 1.3, section 5.6): addresses, framing, data, task management, events, and what the control
//! socket changes. The commands themselves are tested where they are implemented, and in a guest.
//!
//! The tests run with each I/O engine that this host allows.

#![cfg(test)]

mod addresses;
mod config;
mod crash;
mod data;
mod framing;
mod hand_over;
mod hot_plug;
mod limits;
mod management;
mod passthrough;
mod state;
mod stress;
mod suspend;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;
use vhost_device_storage::engine::slow::SLOW_DISK;
use vhost_device_tests::front_end::scsi::{
    CONTROL_QUEUE, ControlDriver, EVENT_QUEUE, EventDriver, REQUEST_QUEUE, ScsiDriver, address,
};
use vhost_device_tests::front_end::{FrontEnd, Options};
use vhost_device_tests::process::{Program, binary, command, option};
use vhost_device_tests::skip::skip;
use vhost_device_tests::target::{Block, Target};

/// Time limit for operations that normally finish at once; generous, for busy machines.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long to wait for what must not happen.
const SHORT: Duration = Duration::from_millis(50);
/// Size of an image.
const SIZE: usize = 1 << 20;
/// Its blocks.
const BLOCKS: u64 = SIZE as u64 / 512;
/// Maximum data of a request.
const LARGEST: u32 = 1 << 20;
/// The first disk.
const FIRST: [u8; 8] = [1, 0, 0x40, 0, 0, 0, 0, 0];

/// Calls `test` with the option for each engine that this host allows.
fn for_each_engine(test: impl Fn(&str)) {
    for engine in ["io_uring", "threads"] {
        let block = Block { io_engine: engine };
        match block.is_possible() {
            true => test(&format!("--io-engine={engine}")),
            false => skip(&format!("this host cannot run {engine}")),
        }
    }
}

/// A running device and the directory with its files.
struct Device {
    program: Program,
    directory: TempDir,
}

impl Device {
    /// Starts a device whose disks have these contents and keys; each is the first unit of a target unless the keys say otherwise.
    fn start(disks: &[(&[u8], &str)], arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let mut all: Vec<String> = arguments.iter().map(|word| (*word).to_owned()).collect();
        for (number, (contents, keys)) in disks.iter().enumerate() {
            let image = directory.path().join(format!("image{number}"));
            fs::write(&image, contents).unwrap();
            all.push(format!("--disk=file={}{keys}", image.display()));
        }
        fs::write(directory.path().join("delay"), "0").unwrap();
        let program = serve(directory.path(), &all);
        Self { program, directory }
    }

    /// Starts a device with one empty disk.
    fn with_one(arguments: &[&str]) -> Self {
        Self::start(&[(&[0; SIZE], "")], arguments)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn contents(&self, disk: usize) -> Vec<u8> {
        fs::read(self.path(&format!("image{disk}"))).unwrap()
    }

    /// Makes each operation that begins from now on so many milliseconds late.
    fn set_delay(&self, milliseconds: u32) {
        fs::write(self.path("delay"), milliseconds.to_string()).unwrap();
    }

    fn connect(&self) -> FrontEnd {
        FrontEnd::connect(&self.path("socket"), &Options::default()).unwrap()
    }

    /// Executes a command on the control socket.
    fn execute(&self, name: &str, arguments: Value) -> Result<Value, String> {
        let mut stream = BufReader::new(UnixStream::connect(self.path("control")).unwrap());
        stream.get_ref().set_read_timeout(Some(PATIENCE)).unwrap();
        let mut line = String::new();
        stream.read_line(&mut line).unwrap();
        let request = json!({"execute": name, "arguments": arguments});
        writeln!(stream.get_mut(), "{request}").unwrap();
        line.clear();
        stream.read_line(&mut line).unwrap();
        let answer: Value = serde_json::from_str(&line).unwrap();
        match answer.get("error") {
            None => Ok(answer["return"].clone()),
            Some(error) => Err(error["desc"].as_str().unwrap().to_owned()),
        }
    }

    /// Runs vhost-device-ctl, which can pass files. Returns its output.
    fn ctl(&self, words: &[&str]) -> Result<String, String> {
        let output = Command::new(binary("vhost-device-ctl").unwrap())
            .args(words.iter().filter(|word| word.starts_with("--")))
            .arg(self.path("control"))
            .args(words.iter().filter(|word| !word.starts_with("--")))
            .output()
            .unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        match output.status.success() {
            true => Ok(text(output.stdout)),
            false => Err(text(output.stderr)),
        }
    }
}

/// Starts the program with its sockets in `directory`.
fn serve(directory: &Path, arguments: &[String]) -> Program {
    let socket = directory.join("socket");
    let mut command = command("vhost-device-scsi").unwrap();
    command
        .env_remove("RUST_LOG")
        .env(SLOW_DISK, directory.join("delay"))
        .arg(option("socket-path", &socket))
        .arg(option("control-socket", directory.join("control")))
        .args(arguments);
    Program::serve(&mut command, &socket).unwrap()
}

/// A device with a connection and all its queues, which are dropped in this order.
struct Host {
    driver: ScsiDriver,
    control: ControlDriver,
    events: EventDriver,
    front_end: FrontEnd,
    device: Device,
}

impl Host {
    fn new(device: Device) -> Self {
        let front_end = device.connect();
        let memory = front_end.memory().clone();
        let queue = |index| front_end.queue(index, 256).unwrap();
        let mut host = Self {
            control: ControlDriver::new(&memory, queue(CONTROL_QUEUE)),
            events: EventDriver::new(&memory, queue(EVENT_QUEUE)),
            driver: ScsiDriver::new(&memory, queue(REQUEST_QUEUE), LARGEST),
            front_end,
            device,
        };
        host.device.program.expect_anything();
        host
    }

    /// Connects to a device with one disk, whose unit attentions are gone.
    fn with_one(arguments: &[&str]) -> Self {
        let mut host = Self::new(Device::with_one(arguments));
        host.driver.clear_attentions(FIRST);
        host
    }
}

/// Returns bytes that depend on the seed, and have no regularity.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    fastrand::Rng::with_seed(seed).fill(&mut bytes);
    bytes
}

#[test]
fn the_first_disk_is_where_the_tests_expect_it() {
    assert_eq!(FIRST, address(0, 0));
}
