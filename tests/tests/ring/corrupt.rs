// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Malicious drivers. Such a driver loses its request, or the ring that it has corrupted; nobody else notices.
//!
//! Where the attacks of a driver are tested:
//! - invalid indices, heads, chains and indirect tables, buffers outside guest memory, empty buffers, or too many: here;
//! - the same at random, endlessly, and in truncated memory: `persistent`; while the device reads it, and faster than it
//!   answers: `race`;
//! - overlapping memory, rings that overlap each other or their own buffers: `aliasing`;
//! - memory that its front-end removes meanwhile: `memory_changes`; a front-end that is killed: `killed`.
//!
//! Well-formed chains that are invalid for the device get the device's own error: `errors` and `framing` of the suite
//! `block`, `requests` of `rng`, `hostile` and `status` of `uml_input`, and `commands`, `framing`, `backing`, `bounds`, `cursor`,
//! `scanouts`, `virgl::refused` and `fuzz` of `gpu`.

use std::time::{Duration, Instant};

use vhost::VhostBackend;
use vhost::vhost_user::message::FrontendReq;
use vhost_device_tests::front_end::connection::payload;
use vhost_device_tests::front_end::descriptor::{Descriptor, INDIRECT, NEXT, WRITE};
use vhost_device_tests::front_end::{Buffer, FrontEnd, GuestMemory, Queue};
use vhost_device_tests::target::{Claim, Request, Running, Target, assert_works, claims};

use crate::{Mode, PATIENCE, QUIET, USUAL, modes};

pub const SIZE: u16 = 16;

/// An address far from any guest memory.
pub const HOLE: u64 = 0x8000_0000;

/// What a driver can change: its ring, guest memory, and two buffers of a valid request.
struct Driver<'a> {
    queue: &'a mut Queue,
    memory: &'a GuestMemory,
    readable: Buffer,
    writable: Buffer,
}

impl Driver<'_> {
    /// Writes the descriptors of the valid request, the last one with additional `flags` and `next`.
    fn chain(&mut self, flags: u16, next: u16) {
        let Driver {
            readable, writable, ..
        } = *self;
        self.descriptor(0, readable, NEXT, 1);
        self.descriptor(1, writable, flags, next);
    }

    fn descriptor(&mut self, index: u16, buffer: Buffer, flags: u16, next: u16) {
        self.queue
            .split()
            .set_descriptor(index, descriptor(buffer, flags, next));
    }

    /// Makes descriptor 0 point to an indirect table that holds `table`, of `length` bytes.
    fn indirect(&mut self, table: &[Descriptor], length: u32, flags: u16) {
        let bytes: Vec<u8> = table
            .iter()
            .flat_map(|descriptor| descriptor.to_bytes())
            .collect();
        let address = self.memory.allocate(bytes.len().max(16) as u64, 16);
        self.memory.write(address, &bytes);
        self.table_at(address, length, flags);
    }

    /// Makes descriptor 0 point to an indirect table of `length` bytes at any address.
    fn table_at(&mut self, address: u64, length: u32, flags: u16) {
        let table = Descriptor {
            address,
            length,
            flags: INDIRECT | flags,
            next: 1,
        };
        self.queue.split().set_descriptor(0, table);
    }

    /// Returns the valid request as an indirect table.
    fn table(&self) -> [Descriptor; 2] {
        [
            descriptor(self.readable, NEXT, 1),
            descriptor(self.writable, 0, 0),
        ]
    }
}

pub fn descriptor(buffer: Buffer, flags: u16, next: u16) -> Descriptor {
    let write = if buffer.writable { WRITE } else { 0 };
    Descriptor {
        address: buffer.address,
        length: buffer.length,
        flags: write | flags,
        next,
    }
}

/// What a driver does to its ring. Afterwards descriptor 0 is made available.
type Corruption = (&'static str, fn(&mut Driver));

const CHAINS: [Corruption; 5] = [
    ("a chain that continues outside the table", |driver| {
        driver.chain(NEXT, SIZE)
    }),
    ("a chain that continues far outside the table", |driver| {
        driver.chain(NEXT, 0xffff)
    }),
    ("a chain that ends in a loop", |driver| {
        driver.chain(NEXT, 1)
    }),
    ("a chain that is a loop", |driver| driver.chain(NEXT, 0)),
    ("a descriptor that follows itself", |driver| {
        driver.descriptor(0, driver.readable, NEXT, 0)
    }),
];

const TABLES: [Corruption; 8] = [
    ("an indirect table of no bytes", |driver| {
        driver.indirect(&driver.table(), 0, 0)
    }),
    ("an indirect table of half a descriptor", |driver| {
        driver.indirect(&driver.table(), 8, 0)
    }),
    (
        "an indirect table of one and a half descriptors",
        |driver| driver.indirect(&driver.table(), 24, 0),
    ),
    ("an indirect table and a next descriptor", |driver| {
        driver.chain(0, 0);
        driver.indirect(&driver.table(), 32, NEXT);
    }),
    ("a table in a table", |driver| {
        let address = driver.memory.allocate(16, 16);
        driver.memory.write(address, &driver.table()[1].to_bytes());
        let inner = Descriptor {
            address,
            length: 16,
            flags: INDIRECT,
            next: 0,
        };
        let table = [driver.table()[0], inner];
        driver.indirect(&table, 32, 0);
    }),
    (
        "an indirect chain that continues outside its table",
        |driver| {
            let mut table = driver.table();
            table[1].flags |= NEXT;
            table[1].next = 2;
            driver.indirect(&table, 32, 0);
        },
    ),
    (
        "an indirect chain that continues far outside its table",
        |driver| {
            let mut table = driver.table();
            table[0].next = 0xffff;
            driver.indirect(&table, 32, 0);
        },
    ),
    ("an indirect chain that is a loop", |driver| {
        let mut table = driver.table();
        table[1].flags |= NEXT;
        driver.indirect(&table, 32, 0);
    }),
];

/// A front-end with a ring 0 to corrupt, and a ring 1 that must not be affected, if the device has one.
pub struct Scene {
    pub front_end: FrontEnd,
    pub victim: Queue,
    pub bystander: Option<Queue>,
}

fn start(front_end: &FrontEnd, index: usize, queue: &Queue) {
    let start = queue.options().start();
    front_end.start(index, queue, start).unwrap();
    // A back-end may call once when a ring starts.
    let _ = queue.call_fd().read();
}

impl Scene {
    pub fn new(target: &dyn Target, running: &Running, mode: Mode) -> Self {
        let front_end = mode.connect(running);
        let memory = front_end.memory().clone();
        Self::with_rings_in(target, front_end, mode, &memory, &memory)
    }

    /// Creates a scene with ring 0 in `of_victim`, and ring 1 in `of_bystander`.
    pub fn with_rings_in(
        target: &dyn Target,
        front_end: FrontEnd,
        mode: Mode,
        of_victim: &GuestMemory,
        of_bystander: &GuestMemory,
    ) -> Self {
        let ring = |index, memory| {
            let queue = Queue::new(memory, mode.options(SIZE, 0));
            start(&front_end, index, &queue);
            queue
        };
        let has_two = front_end.queue_count().min(target.request_queues()) > 1;
        Scene {
            victim: ring(0, of_victim),
            bystander: has_two.then(|| ring(1, of_bystander)),
            front_end,
        }
    }

    /// Starts ring 0 at its initial position.
    pub fn start_victim(&self) {
        start(&self.front_end, 0, &self.victim);
    }

    /// Stops ring 0, and starts it for a new driver.
    pub fn restart(&mut self) {
        self.front_end.stop(0).unwrap();
        self.victim.reset();
        self.start_victim();
    }

    /// Lets `act` change ring 0.
    fn act(&mut self, target: &dyn Target, act: impl FnOnce(&mut Driver)) {
        let mut request = Request::new(target, self.front_end.memory());
        let [readable, writable] = request.write(9);
        act(&mut Driver {
            queue: &mut self.victim,
            memory: self.front_end.memory(),
            readable,
            writable,
        });
    }

    /// Asserts that the session and the other ring still work.
    pub fn assert_others_live(&mut self, target: &dyn Target, what: &str) {
        let features = self
            .front_end
            .raw()
            .unwrap()
            .ask(FrontendReq::GET_FEATURES, &[], &[]);
        assert!(features.is_ok(), "{what}: the session has ended");
        if let Some(bystander) = &mut self.bystander {
            assert_works(target, self.front_end.memory(), bystander);
        }
    }

    /// Asserts that ring 0 stops, and works again after a reset.
    pub fn assert_restarts(&mut self, target: &dyn Target, what: &str) {
        self.front_end
            .stop(0)
            .unwrap_or_else(|error| panic!("{what}: GET_VRING_BASE: {error}"));
        while self.victim.wait_error(Duration::ZERO) {}
        while self.victim.wait_call(Duration::ZERO) {}
        self.victim.reset();
        self.start_victim();
        assert_works(target, self.front_end.memory(), &mut self.victim);
        assert!(
            !self.victim.wait_error(Duration::ZERO),
            "{what}: ERR after the ring was started again"
        );
    }

    /// Asserts that ring 0 stops because of `what`: ERR is signalled, and nothing is returned.
    pub fn assert_broken(&mut self, target: &dyn Target, what: &str) {
        assert!(
            self.victim.wait_error(PATIENCE),
            "{what}: ERR is not signalled"
        );
        assert!(!self.victim.has_used(), "{what}: something came back");
        self.victim.kick_anyway();
        self.assert_others_live(target, what);
        assert!(
            !self.victim.has_used(),
            "{what}: something came back after ERR"
        );
        self.assert_restarts(target, what);
    }

    /// Asserts that the device has returned the one request, or ring 0 has stopped.
    fn assert_handled(&mut self, target: &dyn Target, what: &str) {
        let end = Instant::now() + PATIENCE;
        while self.victim.split().used_index() == 0
            && !self.victim.wait_error(Duration::from_millis(1))
        {
            assert!(
                Instant::now() < end,
                "{what}: neither ERR nor a used request"
            );
        }
        self.assert_others_live(target, what);
        self.assert_restarts(target, what);
    }
}

fn assert_all_break(target: &dyn Target, mode: Mode, corruptions: &[Corruption]) {
    if !claims(target, Claim::BrokenRing) {
        return;
    }
    let running = target.start();
    for (what, corrupt) in corruptions {
        let mut scene = Scene::new(target, &running, mode);
        scene.act(target, |driver| {
            corrupt(driver);
            driver.queue.publish_raw(0);
        });
        scene.assert_broken(target, what);
    }
}

fn a_chain_that_does_not_end_stops_its_ring(target: &dyn Target) {
    assert_all_break(target, USUAL, &CHAINS);
}

fn a_malformed_indirect_table_stops_its_ring(target: &dyn Target) {
    assert_all_break(target, USUAL, &TABLES);
}

fn an_indirect_table_that_was_not_agreed_on_stops_its_ring(target: &dyn Target) {
    let good: [Corruption; 1] = [("an indirect table", |driver| {
        driver.indirect(&driver.table(), 32, 0)
    })];
    let mode = Mode {
        packed: false,
        event_idx: true,
        indirect: false,
    };
    assert_all_break(target, mode, &good);
}

fn an_available_index_that_jumps_stops_its_ring(target: &dyn Target) {
    if !claims(target, Claim::BrokenRing) {
        return;
    }
    let running = target.start();
    for index in [SIZE + 1, 2 * SIZE, 0x7fff, 0x8000, 0xffff] {
        let mut scene = Scene::new(target, &running, USUAL);
        scene.act(target, |driver| {
            driver.chain(0, 0);
            driver.queue.split().set_avail_index(index);
            driver.queue.kick_anyway();
        });
        scene.assert_broken(target, &format!("available index {index}"));
    }
}

fn a_head_outside_the_table_stops_its_ring(target: &dyn Target) {
    if !claims(target, Claim::BrokenRing) {
        return;
    }
    let running = target.start();
    for head in [SIZE, SIZE + 1, 0x7fff, 0xffff] {
        let mut scene = Scene::new(target, &running, USUAL);
        scene.act(target, |driver| {
            driver.chain(0, 0);
            driver.queue.publish_raw(head);
        });
        scene.assert_broken(target, &format!("head {head}"));
    }
}

/// Requests before the corrupt one are valid: they are carried out, at the latest when the corruption is detected.
fn requests_before_a_corrupt_one_are_carried_out(target: &dyn Target) {
    const GOOD: u16 = 5;
    if !claims(target, Claim::BrokenRing) {
        return;
    }
    let running = target.start();
    let mut scene = Scene::new(target, &running, USUAL);
    let memory = scene.front_end.memory().clone();
    let mut requests: Vec<_> = (0..GOOD).map(|_| Request::new(target, &memory)).collect();
    for (tag, request) in requests.iter_mut().enumerate() {
        scene.victim.add(&request.write(tag as u32)).unwrap();
    }
    scene.victim.publish_raw(0xffff);
    assert!(scene.victim.wait_error(PATIENCE));
    assert!(
        scene.victim.wait_used_index(GOOD, PATIENCE),
        "{} of {GOOD} came back",
        scene.victim.split().used_index()
    );
    requests.iter().for_each(Request::assert_written);
    scene.assert_restarts(target, "a bad head after good ones");
}

/// Some devices return such a request, others stop the ring.
fn a_meaningless_chain_does_no_harm(target: &dyn Target) {
    if !claims(target, Claim::BrokenRing) {
        return;
    }
    let empty = |buffer: Buffer| Buffer {
        length: 0,
        ..buffer
    };
    let hole = |length| Buffer::writable(HOLE, length);
    let cases: [Corruption; 5] = [
        ("readable after writable", |driver| {
            let Driver {
                readable, writable, ..
            } = *driver;
            driver.descriptor(0, writable, NEXT, 1);
            driver.descriptor(1, readable, 0, 0);
        }),
        ("an indirect table outside guest memory", |driver| {
            driver.table_at(HOLE, 32, 0);
        }),
        (
            "an indirect table across the end of guest memory",
            |driver| {
                let end = driver.memory.regions()[0].size();
                driver.table_at(end - 16, 32, 0);
            },
        ),
        ("an indirect table at the end of all addresses", |driver| {
            driver.table_at(0u64.wrapping_sub(16), 32, 0);
        }),
        ("an indirect table of 4 GiB", |driver| {
            driver.indirect(&driver.table(), 0xffff_fff0, 0)
        }),
    ];
    let running = target.start();
    for (what, make) in cases {
        let mut scene = Scene::new(target, &running, USUAL);
        scene.act(target, |driver| {
            make(driver);
            driver.queue.publish_raw(0);
        });
        scene.assert_handled(target, what);
    }
    let running = target.start();
    type Make<'a> = &'a dyn Fn(Buffer, Buffer) -> Vec<Buffer>;
    let buffers: [(&str, Make); 9] = [
        ("nothing to write", &|readable, _| vec![readable]),
        ("nothing to read", &|_, writable| vec![writable]),
        ("no bytes to write", &|readable, writable| {
            vec![readable, empty(writable)]
        }),
        ("no bytes to read", &|readable, writable| {
            vec![empty(readable), writable]
        }),
        ("no bytes at all", &|readable, writable| {
            vec![empty(readable), empty(writable)]
        }),
        ("a last byte outside guest memory", &|readable, writable| {
            let mut chain = vec![readable];
            chain.extend(writable.split(&[writable.length - 1]));
            chain[2].address = HOLE;
            chain
        }),
        ("more bytes than 32 bits can count", &|readable, _| {
            vec![readable, hole(u32::MAX), hole(u32::MAX), hole(2)]
        }),
        ("one byte to read", &|readable, writable| {
            vec![
                Buffer {
                    length: 1,
                    ..readable
                },
                writable,
            ]
        }),
        ("one byte to write", &|readable, writable| {
            vec![
                readable,
                Buffer {
                    length: 1,
                    ..writable
                },
            ]
        }),
    ];
    for (what, make) in buffers {
        let mut scene = Scene::new(target, &running, USUAL);
        scene.act(target, |driver| {
            let chain = make(driver.readable, driver.writable);
            driver.queue.submit(&chain);
        });
        scene.assert_handled(target, what);
    }
}

/// Empty descriptors between those of a valid request.
fn empty_buffers_do_no_harm(target: &dyn Target) {
    if !claims(target, Claim::BrokenRing) {
        return;
    }
    let running = target.start();
    for place in 0..=2 {
        let mut scene = Scene::new(target, &running, USUAL);
        scene.act(target, |driver| {
            let mut chain = vec![driver.readable, driver.writable];
            let neighbour = chain[place.min(1)];
            chain.insert(
                place,
                Buffer {
                    length: 0,
                    ..neighbour
                },
            );
            driver.queue.submit(&chain);
        });
        scene.assert_handled(target, &format!("no bytes at place {place}"));
    }
}

/// Returns ranges that are not, or not completely, in guest memory: address and length.
fn bad_places(memory: &GuestMemory, length: u32) -> Vec<(&'static str, u64, u32)> {
    let end = memory.regions()[0].size();
    let high = &memory.regions()[1];
    vec![
        ("in a hole", HOLE, length),
        ("across the end of a region", end - 1, length),
        ("just after a region", end, length),
        (
            "across the start of a region",
            high.guest_address() - 1,
            length,
        ),
        (
            "across the end of all memory",
            high.guest_address() + high.size() - 1,
            length,
        ),
        ("far above all memory", 1 << 60, length),
        (
            "at the end of all addresses",
            0u64.wrapping_sub(u64::from(length)),
            length,
        ),
        ("across the end of all addresses", u64::MAX, length),
        ("larger than all memory", memory.allocate(16, 1), u32::MAX),
    ]
}

/// Only this request fails, and its ring continues.
fn a_buffer_outside_guest_memory_fails_only_its_request(target: &dyn Target) {
    if !claims(target, Claim::BadBuffer) {
        return;
    }
    let running = target.start();
    for mode in modes(target) {
        let (front_end, mut queue) = mode.start(&running, SIZE, 0);
        let memory = front_end.memory();
        let mut request = Request::new(target, memory);
        let (readable, writable) = (request.readable(), request.writable());
        let status = writable.address + u64::from(writable.length) - 1;
        let mut assert_fails = |chain: &[Buffer], what: &str| {
            request.write(3);
            queue.submit(chain);
            assert!(
                queue.wait_used(PATIENCE),
                "{what}: the request did not come back"
            );
            let used = queue.take_used().unwrap();
            let last = memory.read_u8(status);
            assert!(
                target.has_failed(used, last),
                "{mode:?}, {what}: {used:?}, last byte {last}"
            );
            assert_works(target, memory, &mut queue);
            assert!(
                !queue.wait_error(Duration::ZERO),
                "{what}: ERR is signalled"
            );
        };
        for (place, address, length) in bad_places(memory, writable.length - 1) {
            let bad = Buffer::writable(address, length);
            let chain = [readable, bad, Buffer::writable(status, 1)];
            assert_fails(&chain, &format!("a writable buffer {place}"));
        }
        for (place, address, length) in bad_places(memory, readable.length) {
            assert_fails(
                &[Buffer::readable(address, length), writable],
                &format!("a readable buffer {place}"),
            );
        }
    }
}

/// Some front-ends send the eventfd when they connect, and not again when they start a ring.
fn the_err_eventfd_outlives_stop_and_reset(target: &dyn Target) {
    if !claims(target, Claim::BrokenRing) {
        return;
    }
    let running = target.start();
    let mut scene = Scene::new(target, &running, USUAL);
    let raw = scene.front_end.raw().unwrap();
    type End<'a> = (&'a str, &'a dyn Fn());
    let ends: [End; 2] = [
        ("a stop", &|| {
            drop(
                raw.ask(
                    FrontendReq::GET_VRING_BASE,
                    &payload::vring_state(0, 0),
                    &[],
                )
                .unwrap(),
            )
        }),
        ("a reset", &|| {
            assert_eq!(
                raw.acknowledged(FrontendReq::RESET_DEVICE, &[], &[])
                    .unwrap(),
                0
            )
        }),
    ];
    for (what, end) in ends {
        end();
        scene.victim.reset();
        let front_end = &scene.front_end;
        front_end.call().set_vring_num(0, SIZE).unwrap();
        front_end.call().set_vring_base(0, 0).unwrap();
        front_end
            .call()
            .set_vring_addr(0, &front_end.ring_addresses(&scene.victim))
            .unwrap();
        front_end
            .call()
            .set_vring_call(0, scene.victim.call_fd())
            .unwrap();
        front_end
            .call()
            .set_vring_kick(0, scene.victim.kick_fd())
            .unwrap();
        front_end.enable(0, true).unwrap();
        scene.victim.publish_raw(0xffff);
        assert!(
            scene.victim.wait_error(PATIENCE),
            "after {what}: ERR is not signalled"
        );
    }
}

/// A ring without an ERR eventfd stops as well.
fn a_corrupt_ring_without_an_err_eventfd_does_no_harm(target: &dyn Target) {
    const NO_FD: u64 = 1 << 8;
    if !claims(target, Claim::BrokenRing) {
        return;
    }
    let running = target.start();
    let mut scene = Scene::new(target, &running, USUAL);
    let raw = scene.front_end.raw().unwrap();
    let payload = payload::u64(NO_FD);
    raw.done(FrontendReq::SET_VRING_ERR, &payload, &[]);
    scene.victim.publish_raw(0xffff);
    assert!(!scene.victim.wait_error(QUIET));
    scene.assert_others_live(target, "a bad head");
    scene.assert_restarts(target, "a bad head");
}

crate::for_each_target![
    a_chain_that_does_not_end_stops_its_ring,
    a_malformed_indirect_table_stops_its_ring,
    an_indirect_table_that_was_not_agreed_on_stops_its_ring,
    an_available_index_that_jumps_stops_its_ring,
    a_head_outside_the_table_stops_its_ring,
    requests_before_a_corrupt_one_are_carried_out,
    a_meaningless_chain_does_no_harm,
    empty_buffers_do_no_harm,
    a_buffer_outside_guest_memory_fails_only_its_request,
    the_err_eventfd_outlives_stop_and_reset,
    a_corrupt_ring_without_an_err_eventfd_does_no_harm,
];
