// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The sound device: control requests in any order, and buffers of its streams. The states of the streams are modelled.

use arbitrary::Arbitrary;
use serde_json::Value;
use vhost_device_common::device::Device;
use vhost_device_common::ring::Ring;
use vhost_device_common::worker::Queue;
use vhost_device_sound::Sound;

use crate::bench::{Bench, load, open, poller, save};
use crate::driver::{Driver, Shape};
use crate::guest::{Guest, Piece};
use crate::split::{Mistake, Start};

const CONTROL: u16 = 0;
/// The queues of the device, of which one has the second ring.
const OTHERS: [u16; 3] = [2, 3, 1];
/// The rings.
const FIRST: u16 = 0;
const SECOND: u16 = 1;
/// Streams: outputs and inputs.
const STREAMS: u32 = 4;
/// The size of `struct virtio_snd_pcm_status`.
const STATUS_SIZE: u64 = 8;
/// The size of `struct virtio_snd_ctl_value`.
const VALUE_SIZE: usize = 512;

const OK: u64 = 0x8000;
const STATUSES: std::ops::RangeInclusive<u64> = OK..=0x8003;

/// Requests about items: jacks, streams, channel maps and control elements.
const QUERIES: [u32; 4] = [1, 0x100, 0x200, 0x300];
const SET_PARAMS: u32 = 0x101;
const PREPARE: u32 = 0x102;
const RELEASE: u32 = 0x103;
const START: u32 = 0x104;
const STOP: u32 = 0x105;
const COMMANDS: [u32; 4] = [PREPARE, START, STOP, RELEASE];
/// Requests about one control element: read, write, and the scale of a volume.
const ELEMENT: [u32; 3] = [0x302, 0x303, 0x304];
/// Linux's numbers of rates and formats.
const FORMAT: u8 = 5;
const RATE: u8 = 7;

/// A device and its guest.
#[derive(Arbitrary, Debug)]
pub struct Input {
    /// Which queue has the second ring.
    other: u8,
    accepts_elements: bool,
    /// A device state, valid or not.
    state: Option<Vec<u8>>,
    start: Start,
    steps: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    Query {
        kind: u8,
        first: u8,
        count: u8,
        size: u8,
        room: Option<u16>,
        shape: Shape,
    },
    Set {
        stream: u8,
        periods: u8,
        period: u8,
        channels: bool,
        shape: Shape,
    },
    SetAny(u8, [u8; 16], Shape),
    Command {
        stream: u8,
        command: u8,
        shape: Shape,
    },
    Element {
        kind: u8,
        number: u8,
        value: u8,
        shape: Shape,
    },
    Any(Vec<u8>, u16, Shape),
    /// A buffer of a stream, or one for an event.
    Buffer {
        stream: u8,
        length: u16,
        shape: Shape,
    },
    Err(bool, Mistake),
    /// Time passes: a file of the handler is ready, or another token.
    Tick(u8),
    SetControl(bool, u8),
    SetJack(u8, bool),
}

/// The state of a stream (VIRTIO 1.3, 5.14.6.6.1): the last command.
type State = Option<u32>;

/// Returns whether a stream can carry out a command.
fn is_possible(state: State, command: u32) -> bool {
    match command {
        SET_PARAMS => matches!(state, None | Some(SET_PARAMS | PREPARE | RELEASE)),
        PREPARE => matches!(state, Some(SET_PARAMS | PREPARE | RELEASE)),
        START => matches!(state, Some(PREPARE | STOP)),
        STOP => state == Some(START),
        // It can be repeated, for Linux.
        RELEASE => matches!(state, Some(PREPARE | STOP | RELEASE)),
        _ => false,
    }
}

/// A device, its guest, and what the guest knows.
struct Run<'a> {
    bench: Bench<'a, <Sound as Device>::Handler>,
    guest: Guest,
    driver: Driver,
    /// `None` after a request whose outcome is not known.
    streams: Option<[State; STREAMS as usize]>,
}

impl Input {
    /// Runs the input.
    ///
    /// # Panics
    /// Panics if the device violates the specification.
    pub fn run(self) {
        let arguments = [
            "--backend=file",
            "--file-clock=free",
            "--controls",
            "--streams=output,channels=1-8",
            "--streams=input",
            "--streams=output,formats=u8+float64",
            "--streams=input,rates=192000",
        ];
        let device: Sound = open(&arguments.map(str::to_owned)).expect("a device");
        load(&device, self.state.as_deref());
        // What was loaded is gone.
        device.new_driver();
        device.set_features(self.accepts_elements.into());
        let (poller, watcher) = poller();
        let mut handler = device.handler(0, watcher).expect("a handler");
        let mut guest = Guest::new();
        let driver = Driver::new(2, self.start, &mut guest);
        let other = OTHERS[usize::from(self.other) % OTHERS.len()];
        let queues = [(CONTROL, FIRST), (other, SECOND)].map(|(index, ring)| {
            let memory = guest.memory.clone();
            let ring = Ring::new(driver.setup(ring), memory, driver.base(), None, 0);
            Queue::new(index, ring.expect("the ring is in memory"), true)
        });
        let mut run = Run {
            bench: Bench::new(&mut handler, poller, queues.into()),
            guest,
            driver,
            streams: Some([None; STREAMS as usize]),
        };
        for step in self.steps {
            run.step(step, other, &device);
            if run.driver.is_empty(&run.guest) {
                run.driver.settle();
            }
        }
        run.bench.stop(other);
        run.bench.stop(CONTROL);
        save(&device);
        run.driver.assert_untouched(&mut run.guest);
    }
}

impl Run<'_> {
    fn step(&mut self, step: Step, other: u16, device: &Sound) {
        match step {
            Step::Query {
                kind,
                first,
                count,
                size,
                room,
                shape,
            } => {
                let kind = QUERIES[usize::from(kind) % QUERIES.len()];
                let request = words(&[kind, first.into(), count.into(), size.into()]);
                let room = room.unwrap_or(4 + u16::from(count) * u16::from(size));
                self.ask(&request, room.into(), &shape);
            }
            Step::Set {
                stream,
                periods,
                period,
                channels,
                shape,
            } => {
                let stream = u32::from(stream) % STREAMS;
                let period = 16 * (1 + u32::from(period));
                let mut request = words(&[SET_PARAMS, stream, period * (1 + u32::from(periods))]);
                request.extend(words(&[period, 0]));
                request.extend([1 + u8::from(channels), FORMAT, RATE, 0]);
                let status = self.ask(&request, 4, &shape);
                self.follow(stream, SET_PARAMS, status);
            }
            Step::SetAny(stream, parameters, shape) => {
                let stream = u32::from(stream) % STREAMS;
                let mut request = words(&[SET_PARAMS, stream]);
                request.extend(parameters);
                let status = self.ask(&request, 4, &shape);
                self.follow(stream, SET_PARAMS, status);
            }
            Step::Command {
                stream,
                command,
                shape,
            } => {
                let stream = u32::from(stream) % STREAMS;
                let command = COMMANDS[usize::from(command) % COMMANDS.len()];
                let status = self.ask(&words(&[command, stream]), 4, &shape);
                self.follow(stream, command, status);
            }
            Step::Element {
                kind,
                number,
                value,
                shape,
            } => {
                let kind = ELEMENT[usize::from(kind) % ELEMENT.len()];
                let mut request = words(&[kind, number.into()]);
                let writes = kind == ELEMENT[1];
                if writes {
                    let mut values = vec![0; VALUE_SIZE];
                    values[0] = value;
                    request.extend(values);
                }
                let room = if writes { 4 } else { 4 + VALUE_SIZE as u64 };
                self.ask(&request, room, &shape);
            }
            Step::Any(request, room, shape) => {
                self.ask(&request, room.into(), &shape);
                self.streams = None;
            }
            Step::Buffer {
                stream,
                length,
                shape,
            } => self.give(other, stream.into(), length.into(), &shape),
            Step::Err(second, mistake) => {
                self.streams = None;
                self.driver.err(second.into(), &mut self.guest, mistake);
                self.bench.kick(if second { other } else { CONTROL });
            }
            Step::Tick(token) => {
                self.bench.ready(u32::from(token) % 4);
                self.bench.wait();
            }
            Step::SetControl(second, value) => {
                let name = ["Master Playback Volume", "Capture Volume"][usize::from(second)];
                let arguments = [("name", Value::from(name)), ("value", value.into())];
                let arguments = arguments.map(|(name, value)| (name.to_owned(), value));
                let _ = device.command("set-control", &arguments.into_iter().collect(), Vec::new());
                self.bench.wait();
            }
            Step::SetJack(id, connected) => {
                let arguments = [("id", Value::from(id)), ("connected", connected.into())];
                let arguments = arguments.map(|(name, value)| (name.to_owned(), value));
                let _ = device.command("set-jack", &arguments.into_iter().collect(), Vec::new());
                self.bench.wait();
            }
        }
        if !self.driver.is_honest() {
            self.streams = None;
        }
    }

    /// Sends a control request. Returns the status, if it was answered and is known.
    fn ask(&mut self, request: &[u8], room: u64, shape: &Shape) -> Option<u64> {
        self.driver.answers(FIRST, &self.guest);
        let pieces = self
            .driver
            .submit(FIRST, &mut self.guest, request, room, shape);
        self.bench.kick(CONTROL);
        self.bench.wait();
        let answers = self.driver.answers(FIRST, &self.guest).len();
        let is_known = shape.is_plain() && self.driver.is_honest() && self.driver.is_apart();
        if !is_known || answers == 0 {
            return None;
        }
        let status = status(&self.guest, &pieces)?;
        assert!(STATUSES.contains(&status), "status {status:#x}");
        Some(status)
    }

    /// Compares the outcome of a command with what the state allows.
    fn follow(&mut self, stream: u32, command: u32, status: Option<u64>) {
        let Some(states) = &mut self.streams else {
            return;
        };
        let Some(status) = status else {
            self.streams = None;
            return;
        };
        let state = &mut states[stream as usize];
        let possible = is_possible(*state, command);
        match status == OK {
            true => assert!(possible, "{command:#x} succeeds after {state:x?}"),
            // Parameters can be wrong.
            false => assert!(
                !possible || command == SET_PARAMS,
                "{command:#x} fails after {state:x?}: {status:#x}"
            ),
        }
        if status == OK {
            *state = Some(command);
        }
    }

    /// Makes a buffer available.
    fn give(&mut self, queue: u16, stream: u32, length: u64, shape: &Shape) {
        const EVENT_SIZE: u64 = 8;
        let samples = vec![0x55; length as usize];
        let header = words(&[stream % STREAMS]);
        let (readable, writable) = match queue {
            1 => (Vec::new(), EVENT_SIZE),
            2 => ([header, samples].concat(), STATUS_SIZE),
            _ => (header, length + STATUS_SIZE),
        };
        self.driver
            .submit(SECOND, &mut self.guest, &readable, writable, shape);
        self.bench.kick(queue);
        self.bench.wait();
    }
}

/// Reads the first word of an answer, if it is in one piece.
fn status(guest: &Guest, pieces: &[Piece]) -> Option<u64> {
    let first = pieces.first().filter(|piece| piece.length >= 4)?;
    let slice = guest.memory.slice(first.address, 4).ok()?;
    let mut bytes = [0; 4];
    slice.copy_to(&mut bytes);
    Some(u32::from_le_bytes(bytes).into())
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}
