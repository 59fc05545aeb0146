// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `vhost-device-rng` as a driver sees it: its bytes, their amount, and requests that must wait.

#![cfg(test)]

mod fips;
mod quota;
mod requests;
mod source;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vhost::vhost_user::message::FrontendReq;
use vhost_device_tests::front_end::{Buffer, FrontEnd, Options, Queue, QueueOptions};
use vhost_device_tests::process::{Program, command, option};

/// Time limit for operations that normally finish at once; generous, for busy machines.
const PATIENCE: Duration = Duration::from_secs(20);

/// How long to watch for something that must not happen.
const QUIET: Duration = Duration::from_millis(50);

/// Maximum bytes of a request.
const LARGEST: u32 = 64 << 10;

/// Byte that fills buffers before a request.
const UNTOUCHED: u8 = 0xdd;

/// A running device.
struct Device {
    program: Program,
    socket: PathBuf,
    directory: TempDir,
}

impl Device {
    /// Starts the device with these arguments.
    fn start(arguments: &[&str]) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), None, arguments)
    }

    /// Starts the device with a file of these bytes as its source.
    fn with_source(bytes: &[u8], arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let source = directory.path().join("source");
        fs::write(&source, bytes).unwrap();
        Self::start_in(directory, Some(&source), arguments)
    }

    fn start_in(directory: TempDir, source: Option<&Path>, arguments: &[&str]) -> Self {
        let socket = directory.path().join("socket");
        let mut command = command("vhost-device-rng").unwrap();
        command.env_remove("RUST_LOG").args(arguments);
        command.arg(option("socket-path", &socket));
        command.args(source.map(|source| option("rng-source", source)));
        let mut program = Program::serve(&mut command, &socket).unwrap();
        program.expect_no_leak().unwrap();
        Self {
            program,
            socket,
            directory,
        }
    }

    fn source(&self) -> PathBuf {
        self.directory.path().join("source")
    }

    fn connect(&self) -> Driver {
        Driver::new(FrontEnd::connect(&self.socket, &Options::default()).unwrap())
    }

    /// Returns how often the device reported that its source has no bytes.
    fn complaints(&self) -> usize {
        self.program
            .stderr()
            .matches("no bytes from the source")
            .count()
    }

    fn wait_for_complaint(&mut self, number: usize) {
        let deadline = Instant::now() + PATIENCE;
        while self.complaints() < number {
            assert!(Instant::now() < deadline, "complaint {number}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// A front-end with a started ring, and memory for one request at a time.
struct Driver {
    front_end: FrontEnd,
    queue: Queue,
    area: u64,
}

impl Driver {
    const AREA: u32 = 1 << 20;

    fn new(front_end: FrontEnd) -> Self {
        let options = front_end.queue_options(256);
        Self::with_queue(front_end, options)
    }

    fn with_queue(front_end: FrontEnd, options: QueueOptions) -> Self {
        let queue = front_end.queue_with(0, options).unwrap();
        let area = front_end.memory().allocate(Self::AREA.into(), 16);
        Driver {
            front_end,
            queue,
            area,
        }
    }

    /// Returns the first `length` bytes of the area, and resets them.
    fn buffer(&self, length: u32) -> Buffer {
        self.front_end
            .memory()
            .fill(self.area, length as usize, UNTOUCHED);
        Buffer::writable(self.area, length)
    }

    /// Sends a request, and waits until it is answered. Returns the number of bytes written.
    fn carry_out(&mut self, chain: &[Buffer]) -> u32 {
        let head = self.queue.submit(chain);
        assert!(
            self.queue.wait_used(PATIENCE),
            "a request was not answered: {chain:?}"
        );
        let used = self.queue.take_used().unwrap();
        assert_eq!(used.head, head);
        used.length
    }

    /// Returns the bytes for a request of `length`, which must all be in its first part.
    fn read(&mut self, length: u32) -> Vec<u8> {
        let buffer = self.buffer(length);
        let written = self.carry_out(&[buffer]);
        self.check(length, written)
    }

    /// Returns the `written` first bytes of the area; the rest must be untouched.
    fn check(&self, length: u32, written: u32) -> Vec<u8> {
        assert!(written <= length, "{written} bytes written to {length}");
        let mut bytes = self.front_end.memory().read_vec(self.area, length as usize);
        let rest = bytes.split_off(written as usize);
        assert!(
            rest.iter().all(|byte| *byte == UNTOUCHED),
            "bytes after the {written} of the used length are written"
        );
        bytes
    }

    /// Sends a request for `length` bytes, and does not wait.
    fn submit(&mut self, length: u32) {
        let buffer = self.buffer(length);
        self.queue.submit(&[buffer]);
    }

    /// Waits until that request is answered, and returns its bytes.
    fn answer(&mut self, length: u32) -> Vec<u8> {
        assert!(self.queue.wait_used(PATIENCE), "a request was not answered");
        let used = self.queue.take_used().unwrap();
        self.check(length, used.length)
    }

    /// Asserts that nothing is returned.
    fn assert_waits(&mut self) {
        assert!(!self.queue.wait_used(QUIET), "a request came back");
    }

    /// Asserts that the session answers.
    fn assert_alive(&self) {
        let raw = self.front_end.raw().unwrap();
        raw.ask(FrontendReq::GET_FEATURES, &[], &[]).unwrap();
    }
}

/// Returns bytes that depend on their position: a counter.
fn words(count: u32) -> Vec<u8> {
    (0..count).flat_map(u32::to_le_bytes).collect()
}

/// Compares without printing all the bytes.
fn assert_same(seen: &[u8], expected: &[u8]) {
    assert_eq!(seen.len(), expected.len(), "length");
    let differs = seen.iter().zip(expected).position(|(a, b)| a != b);
    assert_eq!(differs, None, "the first byte that differs");
}
