// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The whole device in a session with a front-end. One end of a socket pair serves as the node; the test writes events
//! to the other end.

mod dirty_log;

use std::collections::{BTreeMap, HashMap};
use std::io::{Read, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::Instant;

use vhost_device_common::session;
use vhost_device_common::statistics::Statistics;
use vhost_device_common::worker::Polling;
use vhost_device_tests::front_end::{Buffer, FrontEnd, Options, Queue as Ring, Used};

use super::*;
use crate::device::Input;
use crate::event::{
    EV_ABS, EV_FF, EV_KEY, EV_LED, EV_MSC, EV_REL, EV_REP, EV_SND, EV_SYN, FF_GAIN, SYN_DROPPED,
};
use crate::identity::Bitmap;
use crate::report::CAPACITY;
use crate::source::Source;

/// Size of the rings that QEMU creates for this device.
const RING: u16 = 4;
const LIMIT: Duration = Duration::from_secs(20);
const STATUS_QUEUE: usize = 1;
const RESET_DEVICE: u32 = 34;

const KEY_A: Event = Event::new(EV_KEY, 30, 1);
const KEY_A_UP: Event = Event::new(EV_KEY, 30, 0);
const KEY_B: Event = Event::new(EV_KEY, 48, 1);
const KEY_B_UP: Event = Event::new(EV_KEY, 48, 0);
const X: Event = Event::new(EV_REL, 0, 5);
const REPORT: Event = Event::REPORT;
const LOST: Event = Event::new(EV_SYN, SYN_DROPPED, 0);

/// The path of the node.
#[derive(Default)]
struct Path {
    node: Option<UnixStream>,
    /// The state that the next read of the device state returns.
    held: Vec<Event>,
    /// Events that occur right after the next read of the device state, the end to write them to, and the state after
    /// them.
    meanwhile: Option<(UnixStream, Vec<Event>, Vec<Event>)>,
    /// How often the device has tried to open the node.
    opens: usize,
}

struct Fake(Arc<Mutex<Path>>);

impl Source for Fake {
    fn open(&mut self) -> Result<Option<OwnedFd>, String> {
        let mut path = self.0.lock().unwrap();
        path.opens += 1;
        Ok(path.node.take().map(OwnedFd::from))
    }

    fn state(&self, _node: BorrowedFd<'_>) -> io::Result<State> {
        let mut state = State::default();
        let mut path = self.0.lock().unwrap();
        path.held.iter().for_each(|event| state.apply(*event));
        if let Some((mut device, events, held)) = path.meanwhile.take() {
            let bytes: Vec<_> = events.iter().flat_map(|event| event.to_host()).collect();
            device.write_all(&bytes)?;
            path.held = held;
        }
        Ok(state)
    }
}

/// The host: an input device that can be unplugged.
struct Host {
    path: Arc<Mutex<Path>>,
    device: Option<UnixStream>,
    input: Arc<Input>,
}

fn identity() -> Identity {
    let all = || Bitmap::new(vec![0xff; 16]);
    Identity {
        name: b"fake".to_vec(),
        codes: BTreeMap::from([EV_KEY, EV_REL, EV_ABS, EV_LED, EV_FF].map(|kind| (kind, all()))),
        ..Identity::default()
    }
}

/// Returns both ends of a node.
fn node() -> (UnixStream, UnixStream) {
    let (device, node) = UnixStream::pair().unwrap();
    node.set_nonblocking(true).unwrap();
    device.set_read_timeout(Some(LIMIT)).unwrap();
    (device, node)
}

impl Host {
    fn new() -> Self {
        Self::holding(&[])
    }

    fn holding(held: &[Event]) -> Self {
        let (device, node) = node();
        let path = Arc::new(Mutex::new(Path {
            held: held.to_vec(),
            ..Path::default()
        }));
        let input = Input::new(identity(), Fake(Arc::clone(&path)), node.into());
        Self {
            path,
            device: Some(device),
            input: Arc::new(input),
        }
    }

    fn hold(&self, held: &[Event]) {
        self.path.lock().unwrap().held = held.to_vec();
    }

    fn happen(&self, events: &[Event]) {
        let bytes = events.iter().flat_map(|event| event.to_host());
        let mut device = self.device.as_ref().unwrap();
        device.write_all(&bytes.collect::<Vec<_>>()).unwrap();
    }

    /// Returns the next event that the device has written to the node, in a report of its own.
    fn written(&self) -> Event {
        let mut bytes = [0; 2 * Event::HOST_SIZE];
        let mut device = self.device.as_ref().unwrap();
        device.read_exact(&mut bytes).unwrap();
        let mut events = Event::from_host(&bytes);
        let event = events.next().unwrap();
        assert_eq!(events.next(), Some(REPORT));
        event
    }

    fn unplug(&mut self) {
        self.device = None;
    }

    fn plug(&mut self) {
        let (device, node) = node();
        self.device = Some(device);
        self.path.lock().unwrap().node = Some(node);
    }

    /// Waits until the device has tried to open the node `times` more.
    fn wait_for_opens(&self, times: usize) {
        let opens = || self.path.lock().unwrap().opens;
        let enough = opens() + times;
        let deadline = Instant::now() + LIMIT;
        while opens() < enough {
            assert!(
                Instant::now() < deadline,
                "the device does not try to open the node"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Connects a front-end that has not started a queue.
    fn connect(&self) -> Guest {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (end, stop) = UnixStream::pair().unwrap();
        let input = Arc::clone(&self.input);
        let server = std::thread::spawn(move || {
            let _end = end;
            let (statistics, stop) = (Statistics::new("input", &["request"]), OwnedFd::from(stop));
            session::serve(&*input, &statistics, theirs, &stop, Polling::Auto).unwrap();
        });
        let front_end = FrontEnd::from_stream(ours, &Options::default()).unwrap();
        Guest {
            events: Ring::new(front_end.memory(), front_end.queue_options(RING)),
            buffers: HashMap::new(),
            front_end: Some(front_end),
            server: Some(server),
        }
    }

    /// Connects a guest whose driver has started the event queue without buffers.
    fn guest(&self) -> Guest {
        let guest = self.connect();
        guest.start();
        guest
    }
}

/// The guest.
struct Guest {
    front_end: Option<FrontEnd>,
    events: Ring,
    /// The buffer of each descriptor in use.
    buffers: HashMap<u16, Buffer>,
    server: Option<JoinHandle<()>>,
}

impl Guest {
    fn front_end(&self) -> &FrontEnd {
        self.front_end.as_ref().unwrap()
    }

    fn start(&self) {
        self.front_end().start(0, &self.events, 0).unwrap();
    }

    fn reset_device(&self) {
        let raw = self.front_end().raw().unwrap();
        assert_eq!(raw.acknowledged(RESET_DEVICE, &[], &[]).unwrap(), 0);
    }

    fn give_buffer(&mut self, buffer: Buffer) {
        let head = self.events.submit(&[buffer]);
        self.buffers.insert(head, buffer);
    }

    fn give(&mut self, buffers: u16) {
        for _ in 0..buffers {
            let address = self.front_end().memory().allocate(8, 8);
            self.give_buffer(Buffer::writable(address, 8));
        }
    }

    fn next_used(&mut self) -> Used {
        assert!(self.events.wait_used(LIMIT), "no event");
        self.events.take_used().unwrap()
    }

    /// Returns the next event. Its buffer is not made available again.
    fn take(&mut self) -> Event {
        let used = self.next_used();
        assert_eq!(used.length, 8);
        let buffer = self.buffers[&used.head];
        let bytes = self.front_end().memory().read_vec(buffer.address, 8);
        Event::from_guest(bytes.try_into().unwrap())
    }

    /// Returns the next `count` events. Each buffer is made available again.
    fn receive(&mut self, count: usize) -> Vec<Event> {
        (0..count).map(|_| self.receive_one()).collect()
    }

    fn receive_one(&mut self) -> Event {
        if self.events.free_descriptors() == RING {
            self.give(RING);
        }
        let event = self.take();
        self.give(1);
        event
    }

    /// Returns all events up to and including `last` and the end of its report.
    fn receive_until(&mut self, last: Event) -> Vec<Event> {
        let mut events = Vec::new();
        while !events.ends_with(&[last, REPORT]) {
            events.push(self.receive_one());
        }
        events
    }

    /// Sends one chain on the status queue, and waits until it is returned.
    fn send(&self, ring: &mut Ring, chain: &[Buffer]) {
        let head = ring.submit(chain);
        assert!(ring.wait_used(LIMIT), "the buffer was not returned");
        assert_eq!(ring.take_used(), Some(Used { head, length: 0 }));
    }

    fn send_event(&self, ring: &mut Ring, event: Event) {
        let memory = self.front_end().memory();
        let address = memory.allocate(8, 1);
        memory.write(address, &event.to_guest());
        self.send(ring, &[Buffer::readable(address, 8)]);
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.front_end = None;
        if let Some(server) = self.server.take() {
            let outcome = server.join();
            assert!(std::thread::panicking() || outcome.is_ok());
        }
    }
}

#[test]
fn a_report_larger_than_the_ring_continues_when_buffers_return() {
    let host = Host::new();
    let mut guest = host.guest();
    guest.give(RING);
    let mut report = [KEY_A, X, KEY_A_UP, X, KEY_B, X, KEY_B_UP, X, X].to_vec();
    report.push(REPORT);
    host.happen(&report);
    let first: Vec<_> = (0..RING).map(|_| guest.take()).collect();
    assert_eq!(first, report[..4]);
    assert!(!guest.events.has_used());
    assert_eq!(guest.receive(6), report[4..]);
}

#[test]
fn the_events_of_a_report_appear_together() {
    let host = Host::new();
    let mut guest = host.guest();
    guest.give(RING);
    for round in 1..=100 {
        host.happen(&[KEY_A, X]);
        host.happen(&[KEY_A_UP, REPORT]);
        assert!(guest.events.wait_used(LIMIT));
        assert_eq!(guest.events.split().used_index(), round * RING);
        assert_eq!(guest.receive(4), [KEY_A, X, KEY_A_UP, REPORT]);
    }
}

#[test]
fn reports_come_in_order_through_a_ring_of_any_size() {
    for size in [1, 2, 64, 1024] {
        let host = Host::new();
        let mut guest = host.connect();
        let front_end = guest.front_end();
        guest.events = front_end.queue(0, size).unwrap();
        guest.give(size);
        let events: Vec<_> = (0..500)
            .flat_map(|value| [Event::new(EV_REL, 1, value), REPORT])
            .collect();
        for report in events.chunks(100) {
            host.happen(report);
            for event in report {
                assert_eq!(guest.take(), *event);
                guest.give(1);
            }
        }
    }
}

#[test]
fn a_new_guest_gets_the_held_keys_and_no_earlier_events() {
    let host = Host::holding(&[KEY_B]);
    host.happen(&[KEY_A, REPORT, KEY_A_UP, REPORT, KEY_B, REPORT]);
    let mut guest = host.guest();
    assert_eq!(guest.receive(2), [KEY_B, REPORT]);
    host.happen(&[KEY_B_UP, REPORT]);
    assert_eq!(guest.receive(2), [KEY_B_UP, REPORT]);
}

#[test]
fn a_front_end_gets_no_events_of_the_previous_one() {
    let host = Host::new();
    let mut guest = host.guest();
    host.happen(&[KEY_A, REPORT]);
    assert_eq!(guest.receive(2), [KEY_A, REPORT]);
    host.happen(&[X, REPORT]);
    drop(guest);
    host.happen(&[KEY_A_UP, REPORT, X, REPORT, KEY_B, REPORT]);
    host.hold(&[KEY_B]);
    let mut guest = host.guest();
    assert_eq!(guest.receive(2), [KEY_B, REPORT]);
    host.happen(&[X, REPORT]);
    assert_eq!(guest.receive(2), [X, REPORT]);
}

#[test]
fn a_slow_guest_loses_whole_reports_and_no_key_sticks() {
    let host = Host::new();
    let mut guest = host.guest();
    guest.give(1);
    host.happen(&[KEY_A, X, REPORT]);
    assert_eq!(guest.take(), KEY_A);
    for _ in 0..CAPACITY {
        host.happen(&[X, X, REPORT]);
    }
    host.happen(&[KEY_A_UP, KEY_B, REPORT]);
    // The status queue is processed by the same thread, after it has read all of these events.
    host.happen(&[X, X, REPORT]);
    let mut status = guest.front_end().queue(STATUS_QUEUE, RING).unwrap();
    guest.send_event(&mut status, Event::new(EV_LED, 0, 1));
    assert_eq!(host.written(), Event::new(EV_LED, 0, 1));
    let events = guest.receive_until(KEY_B);
    let (rest, reports) = events.split_at(2);
    assert_eq!(rest, [X, REPORT], "the rest of the first report");
    let (state, reports) = {
        let (reports, state) = reports.split_at(reports.len() - 3);
        (state, reports)
    };
    assert_eq!(state, [KEY_A_UP, KEY_B, REPORT]);
    assert!(reports.len() < CAPACITY);
    assert!(reports.len() > CAPACITY / 2);
    assert!(reports.chunks(3).all(|report| report == [X, X, REPORT]));
    host.happen(&[KEY_B_UP, REPORT]);
    assert_eq!(guest.receive(2), [KEY_B_UP, REPORT]);
}

#[test]
fn the_guest_gets_the_state_after_the_kernel_dropped_events() {
    let host = Host::new();
    let mut guest = host.guest();
    host.happen(&[KEY_A, REPORT]);
    assert_eq!(guest.receive(2), [KEY_A, REPORT]);
    host.hold(&[KEY_B]);
    host.happen(&[X, LOST, X, REPORT]);
    assert_eq!(guest.receive(3), [KEY_A_UP, KEY_B, REPORT]);
    host.happen(&[X, REPORT]);
    assert_eq!(guest.receive(2), [X, REPORT]);
}

#[test]
fn events_during_a_read_of_the_state_are_not_repeated() {
    let host = Host::new();
    let mut guest = host.guest();
    host.happen(&[KEY_A, REPORT]);
    assert_eq!(guest.receive(2), [KEY_A, REPORT]);
    host.hold(&[KEY_A]);
    let device = host.device.as_ref().unwrap().try_clone().unwrap();
    let meanwhile = vec![KEY_B, REPORT, KEY_A_UP, KEY_B_UP, REPORT];
    host.path.lock().unwrap().meanwhile = Some((device, meanwhile, vec![]));
    host.happen(&[X, LOST, X, REPORT]);
    assert_eq!(guest.receive(2), [KEY_A_UP, REPORT]);
    host.happen(&[X, REPORT]);
    assert_eq!(guest.receive(2), [X, REPORT]);
}

#[test]
fn unusable_buffers_return_empty_and_lose_no_event() {
    let host = Host::new();
    let mut guest = host.guest();
    let address = guest.front_end().memory().allocate(16, 8);
    for buffer in [
        Buffer::writable(address, 7),
        Buffer::readable(address, 8),
        Buffer::writable(1 << 40, 8),
    ] {
        guest.give_buffer(buffer);
    }
    guest.give_buffer(Buffer::writable(address, 16));
    host.happen(&[KEY_A, REPORT]);
    for _ in 0..3 {
        assert_eq!(guest.next_used().length, 0);
    }
    assert_eq!(guest.take(), KEY_A);
    assert_eq!(guest.receive(1), [REPORT]);
}

#[test]
fn the_guest_can_set_only_leds_and_effects() {
    let host = Host::new();
    let guest = host.guest();
    let mut ring = guest.front_end().queue(STATUS_QUEUE, RING).unwrap();
    let led = Event::new(EV_LED, 2, 1);
    let gain = Event::new(EV_FF, FF_GAIN, 0xffff);
    let effect = Event::new(EV_FF, 3, 1);
    for event in [
        KEY_A,
        led,
        Event::new(EV_SND, 2, 1),
        Event::new(EV_REP, 0, 250),
        Event::new(EV_MSC, 5, 1),
        REPORT,
        gain,
        Event::new(u16::MAX, u16::MAX, i32::MIN),
        Event::new(EV_LED, u16::MAX, 1),
        effect,
    ] {
        guest.send_event(&mut ring, event);
    }
    for event in [led, gain, effect] {
        assert_eq!(host.written(), event);
    }
}

#[test]
fn malformed_buffers_of_the_status_queue_are_returned() {
    let host = Host::new();
    let guest = host.guest();
    let mut ring = guest.front_end().queue(STATUS_QUEUE, RING).unwrap();
    let address = guest.front_end().memory().allocate(64, 8);
    guest.front_end().memory().fill(address, 64, 0x11);
    for chain in [
        &[Buffer::readable(address, 7)][..],
        &[Buffer::writable(address, 8)],
        &[Buffer::readable(1 << 40, 8)],
        &[Buffer::readable(address, 4), Buffer::readable(1 << 40, 4)],
        &[Buffer::readable(address, 3), Buffer::writable(address, 8)],
    ] {
        guest.send(&mut ring, chain);
    }
    // Split into several descriptors, it is an event like any other.
    let led = Event::new(EV_LED, 1, 1);
    guest.front_end().memory().write(address, &led.to_guest());
    let pieces = Buffer::readable(address, 8).split(&[1, 4]);
    guest.send(&mut ring, &pieces);
    assert_eq!(host.written(), led);
}

#[test]
fn a_node_that_accepts_no_data_does_not_delay_the_guest() {
    let host = Host::new();
    let mut guest = host.guest();
    let mut ring = guest.front_end().queue(STATUS_QUEUE, RING).unwrap();
    // Far more than the socket holds while nobody reads.
    for _ in 0..2000 {
        guest.send_event(&mut ring, Event::new(EV_LED, 1, 1));
    }
    host.happen(&[KEY_A, REPORT]);
    assert_eq!(guest.receive(2), [KEY_A, REPORT]);
}

#[test]
fn an_unplugged_device_releases_its_keys_and_continues_when_it_returns() {
    let mut host = Host::new();
    let mut guest = host.guest();
    host.happen(&[KEY_A, REPORT]);
    assert_eq!(guest.receive(2), [KEY_A, REPORT]);
    for _ in 0..2 {
        host.unplug();
        assert_eq!(guest.receive(2), [KEY_A_UP, REPORT]);
        host.wait_for_opens(2);
        assert_eq!(guest.front_end().status().unwrap(), 0);
        let mut status = guest.front_end().queue(STATUS_QUEUE, RING).unwrap();
        guest.send_event(&mut status, Event::new(EV_LED, 1, 1));
        guest.front_end().stop(STATUS_QUEUE).unwrap();
        host.hold(&[KEY_A]);
        host.plug();
        assert_eq!(guest.receive(2), [KEY_A, REPORT]);
        host.happen(&[X, REPORT]);
        assert_eq!(guest.receive(2), [X, REPORT]);
    }
}

#[test]
fn a_device_unplugged_between_two_front_ends_returns_to_the_next() {
    let mut host = Host::new();
    drop(host.guest());
    host.unplug();
    let mut guest = host.guest();
    host.wait_for_opens(2);
    drop(guest);
    guest = host.guest();
    host.wait_for_opens(2);
    host.hold(&[KEY_A]);
    host.plug();
    assert_eq!(guest.receive(2), [KEY_A, REPORT]);
    host.happen(&[KEY_A_UP, REPORT]);
    assert_eq!(guest.receive(2), [KEY_A_UP, REPORT]);
}

#[test]
fn a_restarted_queue_sends_the_state_again() {
    let host = Host::new();
    let mut guest = host.guest();
    host.happen(&[KEY_A, KEY_B, REPORT]);
    assert_eq!(guest.receive(3), [KEY_A, KEY_B, REPORT]);
    let base = guest.front_end().stop(0).unwrap();
    host.happen(&[KEY_A_UP, X, REPORT]);
    let front_end = guest.front_end.take().unwrap();
    front_end.start(0, &guest.events, base).unwrap();
    guest.front_end = Some(front_end);
    let mut events = guest.receive(3);
    if events.starts_with(&[KEY_A]) {
        // The queue started before the device read the event.
        assert_eq!(events, [KEY_A, KEY_B, REPORT]);
        events = guest.receive(3);
        assert_eq!(events, [KEY_A_UP, X, REPORT]);
    } else {
        assert_eq!(events, [KEY_A_UP, KEY_B, REPORT]);
    }
}

#[test]
fn a_guest_that_resets_the_device_gets_the_state_again() {
    let host = Host::new();
    let mut guest = host.guest();
    host.happen(&[KEY_A, REPORT]);
    assert_eq!(guest.receive(2), [KEY_A, REPORT]);
    host.hold(&[KEY_B]);
    guest.reset_device();
    guest.events.reset();
    guest.start();
    assert_eq!(guest.receive(2), [KEY_B, REPORT]);
}

#[test]
fn the_config_space_follows_the_selection_however_it_is_written() {
    let host = Host::new();
    let guest = host.connect();
    let config = |offset, size| guest.front_end().config(offset, size).unwrap();
    assert_eq!(config(0, 136), [0; 136]);
    // QEMU writes the whole space for each byte that the guest writes.
    let mut space = config(0, 136);
    space[0] = 0x11;
    guest.front_end().set_config(0, &space).unwrap();
    space = config(0, 136);
    assert_eq!(space[..8], [0x11, 0, 0, 0, 0, 0, 0, 0]);
    space[1] = EV_KEY as u8;
    guest.front_end().set_config(0, &space).unwrap();
    assert_eq!(config(0, 3), [0x11, EV_KEY as u8, 16]);
    assert_eq!(config(8, 128)[..17], [&[0xff; 16][..], &[0]].concat());
    // Other front-ends write only the byte.
    guest.front_end().set_config(0, &[1]).unwrap();
    assert_eq!(config(2, 1), [0]);
    guest.front_end().set_config(1, &[0]).unwrap();
    assert_eq!(config(2, 1), [4]);
    assert_eq!(config(8, 5), *b"fake\0");
    guest.front_end().set_config(2, &[9; 134]).unwrap();
    assert_eq!(config(0, 3), [1, 0, 4]);
    assert!(guest.front_end().set_config(100, &[0; 37]).is_err());
    guest.reset_device();
    assert_eq!(config(0, 136), [0; 136]);
}
