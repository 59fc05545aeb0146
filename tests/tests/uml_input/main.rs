// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `vhost-device-input` on evdev nodes, which the tests make with uinput.
//!
//! `cargo xtask test` runs these in User-Mode Linux. A host with a `/dev/uinput` that this user can write to can run them directly:
//! `cargo test -p vhost-device-tests --test uml_input -- --ignored`.

#![cfg(test)]

mod config;
mod events;
mod grab;
mod guest;
mod hostile;
mod loss;
mod replug;
mod sandbox;
mod start;
mod state;
mod status;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vhost_device_tests::evdev::{Description, Device, Event, Guest, Node, Report};
use vhost_device_tests::front_end::{Buffer, FrontEnd, Options, Queue};
use vhost_device_tests::process::{self, PATIENCE, Program, option};

/// Polling interval.
const INTERVAL: Duration = Duration::from_millis(2);

/// Waits until `condition` holds.
#[track_caller]
fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        thread::sleep(INTERVAL);
    }
}

/// Creates a device. Returns it, its node, and the back-end on it.
fn start(description: &Description) -> (Device, Node, Input) {
    let device = Device::create(description).unwrap();
    let node = Node::open(device.node()).unwrap();
    let input = Input::start(&device);
    (device, node, input)
}

/// The back-end on a node.
struct Input {
    program: Program,
    socket: PathBuf,
    _directory: TempDir,
}

impl Input {
    /// Starts it on a device's node.
    fn start(device: &Device) -> Self {
        Self::start_with(device.node(), &[])
    }

    fn start_with(path: &Path, options: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        let mut command = process::command("vhost-device-input").unwrap();
        command
            .arg(option("evdev-path", path))
            .arg(option("socket-path", &socket))
            .args(options.iter().map(OsStr::new));
        let mut program = Program::serve(&mut command, &socket).unwrap();
        program.expect_no_leak().unwrap();
        Self {
            program,
            socket,
            _directory: directory,
        }
    }

    fn connect(&self) -> FrontEnd {
        FrontEnd::connect(&self.socket, &Options::default()).unwrap()
    }

    /// Returns how many lines of its log contain `text`.
    fn logged(&self, text: &str) -> usize {
        let log = self.program.stderr();
        log.lines().filter(|line| line.contains(text)).count()
    }

    /// Waits until it has lost its device for the `count`th time.
    #[track_caller]
    fn wait_gone(&self, count: usize) {
        wait_until("the back-end misses the device", || {
            self.logged("has disappeared") == count
        });
    }

    /// Panics if it wakes up often, or uses CPU time, while nothing happens.
    fn assert_idle(&self) {
        const TIME: Duration = Duration::from_secs(1);
        let (wakes, ticks) = self.activity();
        thread::sleep(TIME);
        let (wakes, ticks) = (self.activity().0 - wakes, self.activity().1 - ticks);
        assert!(wakes < 50, "{wakes} wake-ups in {TIME:?}");
        assert!(ticks < 20, "{ticks} ticks of processor time in {TIME:?}");
    }

    /// Returns how often all threads have slept, and the clock ticks of CPU time that they have used.
    fn activity(&self) -> (u64, u64) {
        let process = PathBuf::from(format!("/proc/{}", self.program.id()));
        let tasks = fs::read_dir(process.join("task")).unwrap();
        let wakes = tasks.map(|task| {
            let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
            let line = status
                .lines()
                .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
            line.unwrap().trim().parse::<u64>().unwrap()
        });
        let wakes = wakes.sum();
        let stat = fs::read_to_string(process.join("stat")).unwrap();
        let (_, fields) = stat.rsplit_once(')').unwrap();
        let times = fields.split_whitespace().skip(11).take(2);
        (wakes, times.map(|time| time.parse::<u64>().unwrap()).sum())
    }
}

/// A guest's driver.
struct Driver {
    front_end: FrontEnd,
    events: Queue,
    status: Queue,
    /// The buffer of each chain, by its head.
    buffers: BTreeMap<u16, u64>,
    /// Buffers that the device does not have.
    free: Vec<u64>,
    /// Whether the device gets a buffer back as soon as its event is read.
    is_quick: bool,
}

impl Driver {
    /// Connects a guest that takes events as they arrive.
    fn connect(input: &Input) -> Self {
        let mut driver = Self::with_queue(input, 64);
        driver.start_taking();
        driver
    }

    /// Connects a guest with an event queue of `size` that has not given the device any buffer.
    fn with_queue(input: &Input, size: u16) -> Self {
        Self::with_front_end(input.connect(), size)
    }

    /// Does the same on an existing connection.
    fn with_front_end(front_end: FrontEnd, size: u16) -> Self {
        let events = front_end.queue(0, size).unwrap();
        let status = front_end.queue(1, size).unwrap();
        let memory = front_end.memory();
        let free = (0..size)
            .map(|_| memory.allocate(Event::GUEST_SIZE as u64, 8))
            .collect();
        Self {
            front_end,
            events,
            status,
            buffers: BTreeMap::new(),
            free,
            is_quick: false,
        }
    }

    /// Gives the device all buffers, and from now on each one again at once after it was read.
    fn start_taking(&mut self) {
        self.is_quick = true;
        self.give_buffers();
    }

    fn give_buffers(&mut self) {
        for address in std::mem::take(&mut self.free) {
            // Unwritten bytes match no expected event.
            self.front_end.memory().fill(address, 8, 0xee);
            let buffer = Buffer::writable(address, Event::GUEST_SIZE as u32);
            let head = self.events.add(&[buffer]).unwrap();
            self.buffers.insert(head, address);
        }
        self.events.publish();
        self.events.kick();
    }

    /// Waits for the next event for a limited time.
    fn next(&mut self, within: Duration) -> Option<Event> {
        if !self.events.wait_used(within) {
            return None;
        }
        let used = self.events.take_used().unwrap();
        assert_eq!(used.length, Event::GUEST_SIZE as u32, "bytes of an event");
        let address = self.buffers.remove(&used.head).unwrap();
        let mut bytes = [0; Event::GUEST_SIZE];
        self.front_end.memory().read(address, &mut bytes);
        self.free.push(address);
        if self.is_quick {
            self.give_buffers();
        }
        Some(Event::from_guest(bytes))
    }

    /// Waits for the next report, and returns it without its end.
    #[track_caller]
    fn report(&mut self) -> Report {
        let mut report = Vec::new();
        loop {
            match self.next(PATIENCE) {
                Some(event) if event.is_report() => return report,
                Some(event) => report.push(event),
                None => panic!("no whole report within {PATIENCE:?}, only {report:?}"),
            }
        }
    }

    /// Waits for `count` reports.
    #[track_caller]
    fn reports(&mut self, count: usize) -> Vec<Report> {
        (0..count).map(|_| self.report()).collect()
    }

    /// Waits for reports up to the first for which `is_last` holds.
    #[track_caller]
    fn reports_until(&mut self, mut is_last: impl FnMut(&Report) -> bool) -> Vec<Report> {
        let mut reports = Vec::new();
        loop {
            let report = self.report();
            let end = is_last(&report);
            reports.push(report);
            if end {
                return reports;
            }
        }
    }

    /// Makes a report on `device`. Panics unless the guest receives it next.
    #[track_caller]
    fn assert_gets(&mut self, device: &Device, report: &Report) {
        device.report(report).unwrap();
        assert_eq!(self.report(), *report);
    }

    /// Sends chains to the status queue, and waits until the device has returned them all.
    #[track_caller]
    fn send_chains(&mut self, chains: &[Vec<Buffer>]) {
        for chain in chains {
            self.status.submit(chain);
            assert!(self.status.wait_used(PATIENCE), "{chain:?} is not returned");
            assert_eq!(self.status.take_used().unwrap().length, 0, "bytes written");
        }
    }

    /// Sends events to the device, and ends the report.
    #[track_caller]
    fn set_report(&mut self, events: &[(u16, u16, i32)]) {
        for &(kind, code, value) in events {
            self.set(Event::new(kind, code, value));
        }
        self.set(Event::REPORT);
    }

    /// Sends an event to the device.
    #[track_caller]
    fn set(&mut self, event: Event) {
        let memory = self.front_end.memory();
        let address = memory.allocate(Event::GUEST_SIZE as u64, 8);
        memory.write(address, &event.to_guest());
        let buffer = Buffer::readable(address, Event::GUEST_SIZE as u32);
        self.send_chains(&[vec![buffer]]);
    }
}
