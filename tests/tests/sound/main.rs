// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `vhost-device-sound` as a driver sees it: queries, the life of a stream, its samples and its time.

#![cfg(test)]

mod capture;
mod controls;
mod hostile;
mod info;
mod lifecycle;
mod options;
mod playback;
mod pulse;
mod server;
mod state;
mod stop;
mod timing;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;
use vhost::vhost_user::message::FrontendReq;
use vhost_device_tests::front_end::{Buffer, FrontEnd, Options, Queue};
use vhost_device_tests::guest::Qmp;
use vhost_device_tests::process::{PATIENCE, Program, command, option};

/// How long to watch for something that must not happen.
const QUIET: Duration = Duration::from_millis(60);

// Queues.
const CONTROL: usize = 0;
const EVENT: usize = 1;
const TX: usize = 2;
const RX: usize = 3;
/// Size of each queue, as with QEMU.
const QUEUE_SIZE: u16 = 64;

// Control requests.
const JACK_INFO: u32 = 1;
const JACK_REMAP: u32 = 2;
const PCM_INFO: u32 = 0x100;
const SET_PARAMS: u32 = 0x101;
const PREPARE: u32 = 0x102;
const RELEASE: u32 = 0x103;
const START: u32 = 0x104;
const STOP: u32 = 0x105;
const CHMAP_INFO: u32 = 0x200;
const CTL_INFO: u32 = 0x300;
const CTL_ENUM_ITEMS: u32 = 0x301;
const CTL_READ: u32 = 0x302;
const CTL_WRITE: u32 = 0x303;
const CTL_TLV_READ: u32 = 0x304;
const CTL_TLV_WRITE: u32 = 0x305;
const CTL_TLV_COMMAND: u32 = 0x306;

// Status.
const OK: u32 = 0x8000;
const BAD_MSG: u32 = 0x8001;
const NOT_SUPP: u32 = 0x8002;
const IO_ERR: u32 = 0x8003;

// Events.
const JACK_CONNECTED: u32 = 0x1000;
const JACK_DISCONNECTED: u32 = 0x1001;
const XRUN: u32 = 0x1101;
const CTL_NOTIFY: u32 = 0x1200;

/// Feature of the parameters: events of underruns and overruns.
const EVT_XRUNS: u32 = 1 << 4;

/// Formats: number, name, bytes of a sample.
const FORMATS: [(u8, &str, u32); 8] = [
    (3, "s8", 1),
    (4, "u8", 1),
    (5, "s16", 2),
    (11, "s24-3", 3),
    (15, "s24", 4),
    (17, "s32", 4),
    (19, "float", 4),
    (20, "float64", 8),
];
/// Rates: number, Hz.
const RATES: [(u8, u32); 12] = [
    (1, 8000),
    (2, 11_025),
    (3, 16_000),
    (4, 22_050),
    (5, 32_000),
    (6, 44_100),
    (7, 48_000),
    (8, 64_000),
    (9, 88_200),
    (10, 96_000),
    (11, 176_400),
    (12, 192_000),
];

/// Parameters of a stream.
#[derive(Clone, Copy, Debug)]
struct Params {
    buffer: u32,
    period: u32,
    features: u32,
    channels: u8,
    format: u8,
    rate: u8,
}

impl Params {
    /// S16, two channels, 48 kHz: periods of 10 ms, four of them in a buffer.
    const USUAL: Self = Self {
        buffer: 7680,
        period: 1920,
        features: EVT_XRUNS,
        channels: 2,
        format: 5,
        rate: 7,
    };

    /// The length of a period of [`Params::USUAL`].
    const PERIOD: Duration = Duration::from_millis(10);

    fn request(&self, stream: u32) -> Vec<u8> {
        let numbers = [SET_PARAMS, stream, self.buffer, self.period, self.features];
        let mut bytes = words(&numbers);
        bytes.extend([self.channels, self.format, self.rate, 0]);
        bytes
    }
}

/// A running device.
struct Device {
    program: Program,
    socket: PathBuf,
    directory: TempDir,
}

impl Device {
    /// Starts the device with these arguments, in which `DIR` is its directory.
    fn start(arguments: &[&str]) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), arguments)
    }

    fn start_in(directory: TempDir, arguments: &[&str]) -> Self {
        let socket = directory.path().join("socket");
        let mut command = command("vhost-device-sound").unwrap();
        command.env_remove("RUST_LOG");
        let place = directory.path().to_str().unwrap();
        if !arguments.iter().any(|text| text.starts_with("--backend")) {
            command.arg("--backend=null");
        }
        command.args(arguments.iter().map(|text| text.replace("DIR", place)));
        command.arg(option("socket-path", &socket));
        command.arg(option("control-socket", directory.path().join("control")));
        let mut program = Program::serve(&mut command, &socket).unwrap();
        program.expect_no_leak().unwrap();
        Self {
            program,
            socket,
            directory,
        }
    }

    /// Starts the device with a file for playback, of bare samples unless its name ends with `.wav`.
    fn with_playback(name: &str, arguments: &[&str]) -> Self {
        let file = format!("--playback-file=DIR/{name}");
        let mut all = vec!["--backend=file", file.as_str()];
        all.extend(arguments);
        Self::start(&all)
    }

    /// Starts the device with these bytes in a file for capture.
    fn with_capture(name: &str, bytes: &[u8], arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join(name), bytes).unwrap();
        let file = format!("--capture-file=DIR/{name}");
        let mut all = vec!["--backend=file", file.as_str()];
        all.extend(arguments);
        Self::start_in(directory, &all)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap()
    }

    fn connect(&self) -> Driver {
        self.connect_with(&Options::default())
    }

    fn connect_with(&self, options: &Options) -> Driver {
        Driver::new(FrontEnd::connect(&self.socket, options).unwrap())
    }

    /// Sends a command to the control socket.
    fn control(&self, name: &str, arguments: Value) -> Result<Value, String> {
        let mut client = Qmp::connect(&self.path("control")).unwrap();
        client
            .execute(name, arguments)
            .map_err(|error| error.to_string())
    }

    /// Returns the state of a stream.
    fn stream(&self, stream: usize) -> Value {
        self.control("query-streams", json!({})).unwrap()[stream].clone()
    }
}

/// A front-end with all queues started.
struct Driver {
    front_end: FrontEnd,
    /// By their indices.
    queues: Vec<Queue>,
    /// The status and the buffers of requests, by queue and head.
    pending: HashMap<(usize, u16), Pending>,
    /// Reused memory.
    place: u64,
    next: u64,
}

/// A buffer that the device has.
#[derive(Clone, Debug)]
struct Pending {
    tag: u32,
    data: u64,
    length: u32,
    status: u64,
}

/// A buffer that came back.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Done {
    tag: u32,
    used: u32,
    status: u32,
    latency: u32,
    data: Vec<u8>,
}

impl Driver {
    const AREA: u64 = 16 << 20;

    fn new(front_end: FrontEnd) -> Self {
        let queues = (0..4).map(|index| front_end.queue(index, QUEUE_SIZE).unwrap());
        let queues = queues.collect();
        Self::with_queues(front_end, queues)
    }

    fn with_queues(front_end: FrontEnd, queues: Vec<Queue>) -> Self {
        let place = front_end.memory().allocate(Self::AREA, 4096);
        Self {
            front_end,
            queues,
            pending: HashMap::new(),
            place,
            next: 0,
        }
    }

    /// Returns memory, which is used again after a while.
    fn allocate(&mut self, size: u64) -> u64 {
        let size = size.next_multiple_of(64);
        if self.next + size > Self::AREA {
            self.next = 0;
        }
        let address = self.place + self.next;
        self.next += size;
        address
    }

    /// Sends a control request with room for `room` bytes of response. Returns the status and what follows.
    #[track_caller]
    fn request(&mut self, request: &[u8], room: u32) -> (u32, Vec<u8>) {
        let used = self.send(request, room);
        let limit = Instant::now();
        let written = self.answer(used, room);
        // The driver gives up after a second.
        assert!(limit.elapsed() < PATIENCE);
        let (status, rest) = written.split_at(4);
        (
            u32::from_le_bytes(status.try_into().unwrap()),
            rest.to_vec(),
        )
    }

    /// Sends a control request. Returns the address of its response.
    fn send(&mut self, request: &[u8], room: u32) -> u64 {
        let (question, answer) = (
            self.allocate(request.len() as u64),
            self.allocate(room.into()),
        );
        let memory = self.front_end.memory();
        memory.write(question, request);
        memory.fill(answer, room as usize, 0xdd);
        self.queues[CONTROL].submit(&[
            Buffer::readable(question, request.len() as u32),
            Buffer::writable(answer, room),
        ]);
        answer
    }

    /// Waits for the response to the oldest control request.
    #[track_caller]
    fn answer(&mut self, address: u64, room: u32) -> Vec<u8> {
        let used = self.queues[CONTROL].take_used_within(PATIENCE);
        assert!(used.length <= room);
        let mut bytes = self.front_end.memory().read_vec(address, room as usize);
        let rest = bytes.split_off(used.length as usize);
        assert!(
            rest.iter().all(|byte| *byte == 0xdd),
            "bytes after the response"
        );
        assert!(bytes.len() >= 4, "a response has a status");
        bytes
    }

    /// Sends a request whose response is only a status, and returns that.
    #[track_caller]
    fn status(&mut self, request: &[u8]) -> u32 {
        let (status, rest) = self.request(request, 4);
        assert_eq!(rest, [0; 0]);
        status
    }

    /// Sends a command of a stream.
    #[track_caller]
    fn command(&mut self, code: u32, stream: u32) -> u32 {
        self.status(&words(&[code, stream]))
    }

    /// Sends commands of a stream, which must succeed.
    #[track_caller]
    fn commands(&mut self, codes: &[u32], stream: u32) {
        for code in codes {
            assert_eq!(self.command(*code, stream), OK, "{code:#x}");
        }
    }

    #[track_caller]
    fn set_params(&mut self, stream: u32, params: &Params) {
        assert_eq!(self.status(&params.request(stream)), OK, "{params:?}");
    }

    /// Sets parameters and prepares.
    #[track_caller]
    fn prepare(&mut self, stream: u32, params: &Params) {
        self.set_params(stream, params);
        self.commands(&[PREPARE], stream);
    }

    /// Queues a buffer with these bytes for an output stream.
    fn play(&mut self, stream: u32, bytes: &[u8], tag: u32) {
        self.play_later(stream, bytes, tag);
        self.publish(TX);
    }

    /// Shows the device the buffers that were added to a queue.
    fn publish(&mut self, queue: usize) {
        self.queues[queue].publish();
        self.queues[queue].kick();
    }

    /// Adds a buffer with these bytes for an output stream, which the device does not see yet.
    fn play_later(&mut self, stream: u32, bytes: &[u8], tag: u32) {
        let header = self.allocate(4);
        let data = self.allocate(bytes.len() as u64);
        let status = self.allocate(8);
        let memory = self.front_end.memory();
        memory.write_u32(header, stream);
        memory.write(data, bytes);
        memory.fill(status, 8, 0xdd);
        let mut chain = vec![Buffer::readable(header, 4)];
        if !bytes.is_empty() {
            chain.push(Buffer::readable(data, bytes.len() as u32));
        }
        chain.push(Buffer::writable(status, 8));
        let head = self.queues[TX]
            .add(&chain)
            .expect("enough free descriptors");
        let pending = Pending {
            tag,
            data,
            length: 0,
            status,
        };
        assert!(self.pending.insert((TX, head), pending).is_none());
    }

    /// Queues a buffer of `length` bytes for an input stream.
    fn record(&mut self, stream: u32, length: u32, tag: u32) {
        let header = self.allocate(4);
        let data = self.allocate(u64::from(length) + 8);
        let memory = self.front_end.memory();
        memory.write_u32(header, stream);
        memory.fill(data, length as usize + 8, 0xdd);
        let status = data + u64::from(length);
        let chain = [
            Buffer::readable(header, 4),
            Buffer::writable(data, length),
            Buffer::writable(status, 8),
        ];
        self.submit(
            RX,
            &chain,
            Pending {
                tag,
                data,
                length,
                status,
            },
        );
    }

    fn submit(&mut self, queue: usize, chain: &[Buffer], pending: Pending) {
        let head = self.queues[queue].submit(chain);
        assert!(self.pending.insert((queue, head), pending).is_none());
    }

    /// Returns the next buffer that came back.
    fn take(&mut self, queue: usize) -> Option<Done> {
        let used = self.queues[queue].take_used()?;
        let pending = self.pending.remove(&(queue, used.head)).unwrap();
        let memory = self.front_end.memory();
        let recorded = match queue {
            TX => 0,
            _ => used.length.saturating_sub(8).min(pending.length),
        };
        Some(Done {
            tag: pending.tag,
            used: used.length,
            status: memory.read_u32(pending.status),
            latency: memory.read_u32(pending.status + 4),
            data: memory.read_vec(pending.data, recorded as usize),
        })
    }

    /// Waits for the next buffer of a queue.
    #[track_caller]
    fn wait(&mut self, queue: usize) -> Done {
        assert!(
            self.queues[queue].wait_used(PATIENCE),
            "no buffer came back"
        );
        self.take(queue).unwrap()
    }

    /// Asserts that no buffer of a queue comes back for a while.
    #[track_caller]
    fn assert_quiet(&mut self, queue: usize) {
        assert!(!self.queues[queue].wait_used(QUIET), "a buffer came back");
    }

    /// Gives the device buffers for events.
    fn listen(&mut self, count: usize) {
        for _ in 0..count {
            let place = self.allocate(8);
            let buffer = Buffer::writable(place, 8);
            self.submit(
                EVENT,
                &[buffer],
                Pending {
                    tag: 0,
                    data: place,
                    length: 8,
                    status: place,
                },
            );
        }
    }

    /// Returns the next event: its code and its data.
    fn take_event(&mut self) -> Option<(u32, u32)> {
        let done = self.take(EVENT)?;
        assert_eq!(done.used, 8);
        Some((done.status, done.latency))
    }

    /// Waits for the next event.
    #[track_caller]
    fn event(&mut self) -> (u32, u32) {
        assert!(self.queues[EVENT].wait_used(PATIENCE), "no event");
        self.take_event().unwrap()
    }

    /// Asserts that the session answers.
    fn assert_alive(&self) {
        let raw = self.front_end.raw().unwrap();
        raw.ask(FrontendReq::GET_FEATURES, &[], &[]).unwrap();
    }

    /// Stops all queues. Returns where they continue.
    fn stop_all(&self) -> Vec<u32> {
        let bases = (0..4).map(|index| self.front_end.stop(index).unwrap());
        bases.collect()
    }
}

/// Returns little-endian numbers.
fn words(numbers: &[u32]) -> Vec<u8> {
    numbers
        .iter()
        .flat_map(|number| number.to_le_bytes())
        .collect()
}

/// Returns number `index` of a response.
fn word(bytes: &[u8], index: usize) -> u32 {
    u32::from_le_bytes(bytes[4 * index..][..4].try_into().unwrap())
}

/// Returns noise, the same for the same seed.
fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; length];
    fastrand::Rng::with_seed(seed).fill(&mut bytes);
    bytes
}

/// Returns noise of whole samples that a format can have: S24 is sign-extended.
fn samples(format: u8, length: usize, seed: u64) -> Vec<u8> {
    let mut bytes = noise(length, seed);
    if format == 15 {
        for sample in bytes.chunks_exact_mut(4) {
            sample[3] = if sample[2] & 0x80 == 0 { 0 } else { 0xff };
        }
    }
    bytes
}

/// Compares without printing all the bytes.
#[track_caller]
fn assert_same(seen: &[u8], expected: &[u8]) {
    let differs = seen.iter().zip(expected).position(|(a, b)| a != b);
    assert_eq!(differs, None, "the first byte that differs");
    assert_eq!(seen.len(), expected.len(), "length");
}

/// Waits until a file has so many bytes.
#[track_caller]
fn wait_for_length(path: &Path, length: u64) {
    let deadline = Instant::now() + PATIENCE;
    while fs::metadata(path).unwrap().len() < length {
        assert!(
            Instant::now() < deadline,
            "{}",
            fs::metadata(path).unwrap().len()
        );
        std::thread::sleep(Duration::from_millis(2));
    }
}
