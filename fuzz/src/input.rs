// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The input device: queries of the guest in the config space, its buffers for events, and the events that it sends.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

use arbitrary::Arbitrary;
use vhost_device_common::device::Device;
use vhost_device_input::{Axis, Bitmap, Event, Identity, Ids, Source, State};

use crate::bench::{Bench, load, poller, queue, save};
use crate::driver::{Driver, Shape};
use crate::guest::Guest;
use crate::split::{Mistake, Start};

const EVENTS: u16 = 0;
const STATUS: u16 = 1;
/// The token of the timer after which the handler looks for a node that was removed.
const RETRY: u32 = 1;
const CONFIG_SIZE: usize = 136;
/// Event types that a guest can send.
const FROM_GUEST: [u16; 4] = [0x11, 0x12, 0x14, 0x15];
/// Event types with codes.
const KINDS: [u16; 9] = [1, 2, 3, 4, 5, 0x11, 0x12, 0x14, 0x15];
const ABS: u16 = 3;
/// Values of `select`. Most of them are valid.
const SELECTS: [u8; 8] = [0, 1, 2, 3, 0x10, 0x11, 0x12, 0x13];
/// The size of the answer about an axis, in bytes.
const AXIS_SIZE: u8 = 20;

/// A device and its guest.
#[derive(Arbitrary, Debug)]
pub struct Input {
    name: Vec<u8>,
    serial: Vec<u8>,
    ids: [u16; 4],
    properties: Vec<u8>,
    codes: Vec<(u8, Vec<u8>)>,
    axes: Vec<(u8, [i32; 5])>,
    /// A device state, valid or not.
    state: Option<Vec<u8>>,
    start: Start,
    steps: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    /// The guest selects an answer in the config space.
    Select(u8, u8),
    /// The front-end writes any part of the config space.
    WriteConfig(u16, Vec<u8>),
    /// The guest makes a buffer for an event available.
    Buffer(Room, Shape),
    /// The guest sends an event.
    Send(Sent, Shape),
    SendAny(Vec<u8>, Shape),
    Err(bool, Mistake),
    /// The host device sends events.
    Happen(Vec<Happened>),
    /// The host device sends arbitrary bytes.
    HappenAny(Vec<u8>),
    Unplug,
    Plug,
    /// Sets the state of the keys and axes that the host device reports.
    Hold(Vec<Happened>),
    Reset,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Room {
    Event,
    Any(u16),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
struct Sent {
    kind: u8,
    code: u8,
    value: i32,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Happened {
    Of(u8, u8, i32),
    Touch(u8, i8),
    Report,
    Dropped,
    Any(u16, u16, i32),
}

impl Happened {
    fn event(self) -> Event {
        match self {
            Self::Of(kind, code, value) => {
                Event::new(KINDS[usize::from(kind) % KINDS.len()], code.into(), value)
            }
            // The axes of touch points.
            Self::Touch(code, value) => Event::new(ABS, 0x2f + u16::from(code) % 16, value.into()),
            Self::Report => Event::REPORT,
            Self::Dropped => Event::new(0, 3, 0),
            Self::Any(kind, code, value) => Event::new(kind, code, value),
        }
    }
}

/// The node at the path of the host device.
#[derive(Default)]
struct Path {
    node: Option<UnixStream>,
    held: Vec<Happened>,
}

struct Fake(Arc<Mutex<Path>>);

impl Source for Fake {
    fn open(&mut self) -> Result<Option<OwnedFd>, String> {
        let mut path = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(path.node.take().map(OwnedFd::from))
    }

    fn state(&self, _node: BorrowedFd<'_>) -> io::Result<State> {
        let mut state = State::default();
        let path = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        path.held
            .iter()
            .for_each(|happened| state.apply(happened.event()));
        Ok(state)
    }
}

/// Creates a node. Returns the end of the device, and ours.
fn pair() -> (UnixStream, UnixStream) {
    let (node, ours) = UnixStream::pair().expect("a pair of sockets");
    for socket in [&node, &ours] {
        socket.set_nonblocking(true).expect("a socket");
    }
    (node, ours)
}

impl Input {
    /// Runs the input.
    ///
    /// # Panics
    /// Panics if the device violates the specification.
    pub fn run(self) {
        let identity = self.identity();
        let (node, mut ours) = pair();
        let path = Arc::new(Mutex::new(Path::default()));
        let fake = Fake(Arc::clone(&path));
        let device = vhost_device_input::Input::new(identity.clone(), fake, node.into());
        load(&device, self.state.as_deref());
        let (poller, watcher) = poller();
        let mut handler = device.handler(0, watcher).expect("a handler");
        let mut guest = Guest::new();
        let mut driver = Driver::new(2, self.start, &mut guest);
        let queues = [EVENTS, STATUS].map(|number| queue(number, &driver, &guest));
        let mut bench = Bench::new(&mut handler, poller, queues.into());
        let path = || path.lock().unwrap_or_else(PoisonError::into_inner);
        for step in self.steps {
            match step {
                Step::Select(select, subsel) => {
                    let select = SELECTS[usize::from(select) % SELECTS.len()];
                    let written = device.write_config(0, &[select, subsel]);
                    written.expect("the selection can be written");
                    check(&device.config(), &identity, select, subsel);
                }
                Step::WriteConfig(offset, data) => {
                    let before = device.config();
                    let offset = usize::from(offset);
                    let outcome = device.write_config(offset, &data);
                    assert_eq!(outcome.is_ok(), offset + data.len() <= CONFIG_SIZE);
                    let written = |place: usize| {
                        let written = data.get(place.checked_sub(offset)?);
                        written.filter(|_| outcome.is_ok()).copied()
                    };
                    let selection = [0, 1].map(|place| written(place).unwrap_or(before[place]));
                    check(&device.config(), &identity, selection[0], selection[1]);
                }
                Step::Buffer(room, shape) => {
                    let room = match room {
                        Room::Event => Event::GUEST_SIZE as u64,
                        Room::Any(room) => room.into(),
                    };
                    driver.submit(EVENTS, &mut guest, &[], room, &shape);
                    bench.kick(EVENTS);
                }
                Step::Send(Sent { kind, code, value }, shape) => {
                    let kind = FROM_GUEST[usize::from(kind) % 4];
                    let event = Event::new(kind, code.into(), value).to_guest();
                    driver.submit(STATUS, &mut guest, &event, 0, &shape);
                    bench.kick(STATUS);
                }
                Step::SendAny(bytes, shape) => {
                    driver.submit(STATUS, &mut guest, &bytes, 0, &shape);
                    bench.kick(STATUS);
                }
                Step::Err(queue, mistake) => {
                    driver.err(queue.into(), &mut guest, mistake);
                    bench.kick(queue.into());
                }
                Step::Happen(events) => {
                    let events = events.iter().map(|happened| happened.event().to_host());
                    let _ = ours.write(&events.collect::<Vec<_>>().concat());
                    bench.wait();
                    bench.kick(EVENTS);
                }
                Step::HappenAny(bytes) => {
                    let _ = ours.write(&bytes);
                    bench.wait();
                    bench.kick(EVENTS);
                }
                Step::Unplug => {
                    heard(&mut ours, &identity);
                    // The other end is closed.
                    ours = pair().1;
                    bench.wait();
                    bench.kick(EVENTS);
                }
                Step::Plug => {
                    let (node, other) = pair();
                    path().node = Some(node);
                    heard(&mut ours, &identity);
                    ours = other;
                    bench.wait();
                    // The timer expires.
                    bench.ready(RETRY);
                    bench.kick(EVENTS);
                }
                Step::Hold(held) => path().held = held,
                Step::Reset => {
                    device.reset();
                    check(&device.config(), &identity, 0, 0);
                }
            }
            // The device does not hold buffers.
            assert_eq!(bench.held(EVENTS) + bench.held(STATUS), 0);
            if driver.is_empty(&guest) {
                driver.settle();
            }
        }
        heard(&mut ours, &identity);
        bench.stop(EVENTS);
        bench.stop(STATUS);
        save(&device);
        driver.assert_untouched(&mut guest);
    }

    fn identity(&self) -> Identity {
        let [bus, vendor, product, version] = self.ids;
        let codes = self.codes.iter().map(|(kind, bits)| {
            let kind = KINDS[usize::from(*kind) % KINDS.len()];
            (kind, Bitmap::new(bits.clone()))
        });
        let axes = self.axes.iter().map(|(code, numbers)| {
            let [minimum, maximum, fuzz, flat, resolution] = *numbers;
            let axis = Axis {
                minimum,
                maximum,
                fuzz,
                flat,
                resolution,
            };
            (u16::from(*code), axis)
        });
        Identity {
            name: self.name.clone(),
            serial: self.serial.clone(),
            ids: Ids {
                bus,
                vendor,
                product,
                version,
            },
            properties: Bitmap::new(self.properties.clone()),
            codes: codes.collect::<BTreeMap<_, _>>(),
            axes: axes.collect::<BTreeMap<_, _>>(),
        }
    }
}

/// Checks the answer in the config space to a selection.
fn check(config: &[u8], identity: &Identity, select: u8, subsel: u8) {
    assert_eq!(config.len(), CONFIG_SIZE);
    assert_eq!(config[..2], [select, subsel]);
    let size = config[2];
    let (answer, rest) = config[8..].split_at(size.into());
    assert!(config[3..8].iter().chain(rest).all(|byte| *byte == 0));
    let codes = |kind: u16| identity.codes.get(&kind);
    match (select, subsel) {
        (1, 0) => assert!(identity.name.starts_with(answer)),
        (2, 0) => assert!(identity.serial.starts_with(answer)),
        (3, 0) => assert_eq!(size, 8),
        (0x10, 0) => assert_ne!(answer.last(), Some(&0).filter(|_| size < 128)),
        (0x11, kind) if codes(kind.into()).is_none() => assert_eq!(size, 0),
        (0x11, kind) => {
            for (number, byte) in (0u16..).zip(answer) {
                for bit in 0..8 {
                    let has = codes(kind.into()).is_some_and(|codes| codes.has(8 * number + bit));
                    assert_eq!(has, byte >> bit & 1 == 1);
                }
            }
        }
        (0x12, code) => {
            let has = identity.has(ABS, code.into());
            assert_eq!(size, if has { AXIS_SIZE } else { 0 });
        }
        _ => assert_eq!(size, 0),
    }
}

/// Checks the events that the host device received: each must be supported, and in its own report.
fn heard(node: &mut UnixStream, identity: &Identity) {
    let mut bytes = vec![0; 1 << 16];
    while let Ok(count) = node.read(&mut bytes)
        && count > 0
    {
        assert_eq!(count % (2 * Event::HOST_SIZE), 0, "an incomplete report");
        let events: Vec<_> = Event::from_host(&bytes[..count]).collect();
        for pair in events.chunks_exact(2) {
            assert!(FROM_GUEST.contains(&pair[0].kind), "{pair:?}");
            assert!(identity.accepts(pair[0]), "{pair:?}");
            assert!(pair[1].is_report(), "{pair:?}");
        }
    }
}
