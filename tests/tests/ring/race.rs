// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Drivers that do not wait: they change what the device is reading, make the same requests available repeatedly, and never read the
//! used ring.

use std::env;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;
use vhost_device_tests::front_end::descriptor::{Descriptor, INDIRECT, NEXT, WRITE};
use vhost_device_tests::front_end::packed::{AVAILABLE, USED};
use vhost_device_tests::front_end::queue::Layout;
use vhost_device_tests::front_end::{Buffer, GuestMemory};
use vhost_device_tests::target::{Request, Running, Target};

use crate::corrupt::{SIZE, Scene, descriptor};
use crate::persistent::random_descriptor;
use crate::{Going, Mode, PATIENCE, USUAL, usual};

/// Environment variable with the seed of the fuzzer, which a failed run prints.
const SEED: &str = "VHOST_DEVICE_TEST_SEED";

/// How long the fuzzer races with a device, in each format.
const TIME: Duration = Duration::from_millis(1000);

/// The opponent of the device: a thread that writes all over a ring, and over its requests.
struct Scribbler<'a> {
    random: Rng,
    memory: &'a GuestMemory,
    ring: Layout,
    packed: bool,
    /// Valid requests, whose bytes are changed too.
    requests: &'a [[Buffer; 2]],
    /// Memory that the device may write to, with indirect tables.
    area: u64,
}

impl Scribbler<'_> {
    /// Returns a descriptor that is mostly a part of a request.
    fn descriptor(&mut self, size: u16) -> Descriptor {
        let random = &mut self.random;
        match random.u8(0..16) {
            0 => random_descriptor(random, self.area),
            1 => Descriptor {
                address: self.area + 16 * random.u64(0..256),
                length: 16 * random.u32(0..=u32::from(size) + 1),
                flags: INDIRECT,
                next: 0,
            },
            _ => {
                let is_writable = random.bool();
                let buffer = random.choice(self.requests).unwrap()[usize::from(is_writable)];
                let cut = random.u32(0..8);
                Descriptor {
                    address: buffer.address,
                    length: match cut {
                        0 => random.u32(0..=buffer.length),
                        _ => buffer.length,
                    },
                    flags: if is_writable { WRITE } else { NEXT },
                    next: random.u16(0..size),
                }
            }
        }
    }

    /// Returns the same for a packed ring, or for a table of one, with flags of any round.
    fn packed_descriptor(&mut self, size: u16) -> [u8; 16] {
        let descriptor = self.descriptor(size);
        let round = [AVAILABLE, USED, AVAILABLE | USED, 0][self.random.usize(0..4)];
        // A packed ring has the fields in this order.
        let packed = Descriptor {
            flags: descriptor.next,
            next: descriptor.flags | round,
            ..descriptor
        };
        packed.to_bytes()
    }

    /// Changes a byte of a command that the device may be reading.
    fn scribble_on_a_command(&mut self) {
        let [readable, _] = *self.random.choice(self.requests).unwrap();
        let place = readable.address + self.random.u64(0..u64::from(readable.length));
        self.memory.write_u8(place, self.random.u8(..));
    }

    fn scribble_packed(&mut self) {
        let slot = u64::from(self.random.u16(0..SIZE));
        let Layout {
            descriptors,
            avail,
            used,
        } = self.ring;
        match self.random.u8(0..32) {
            0..18 => {
                let descriptor = self.packed_descriptor(SIZE);
                self.memory.write(descriptors + 16 * slot, &descriptor);
            }
            18..22 => {
                let descriptor = self.packed_descriptor(4);
                let place = self.area + 16 * self.random.u64(0..256);
                self.memory.write(place, &descriptor);
            }
            22..24 => self.scribble_on_a_command(),
            24..28 => {
                let place = descriptors + 16 * slot + self.random.u64(0..16);
                self.memory.write_u8(place, self.random.u8(..));
            }
            28..30 => {
                let place = avail + 2 * self.random.u64(0..2);
                self.memory.write_u16(place, self.random.u16(..));
            }
            _ => {
                let place = used + 2 * self.random.u64(0..2);
                self.memory.write_u16(place, self.random.u16(..));
            }
        }
    }

    fn scribble(&mut self) {
        if self.packed {
            return self.scribble_packed();
        }
        let slot = u64::from(self.random.u16(0..SIZE));
        let Layout {
            descriptors,
            avail,
            used,
        } = self.ring;
        match self.random.u8(0..32) {
            0..12 => {
                let descriptor = self.descriptor(SIZE).to_bytes();
                self.memory.write(descriptors + 16 * slot, &descriptor);
            }
            12..18 => {
                let descriptor = self.descriptor(4).to_bytes();
                let place = self.area + 16 * self.random.u64(0..256);
                self.memory.write(place, &descriptor);
            }
            18..24 => {
                let head = self.random.u16(0..SIZE);
                self.memory.write_u16(avail + 4 + 2 * slot, head);
            }
            24..26 => self.scribble_on_a_command(),
            26 => self.memory.write_u16(avail, self.random.u16(..)),
            27 => {
                let used_event = avail + 4 + 2 * u64::from(SIZE);
                self.memory.write_u16(used_event, self.random.u16(..));
            }
            28..30 => {
                let place = used + self.random.u64(0..4 + 8 * u64::from(SIZE));
                self.memory.write_u8(place, self.random.u8(..));
            }
            30 if self.random.u8(..) < 16 => {
                self.memory.write_u16(avail + 2, self.random.u16(..));
            }
            _ => {
                let index = self.memory.read_u16(avail + 2);
                let next = index.wrapping_add(self.random.u16(0..4));
                self.memory.write_u16(avail + 2, next);
            }
        }
    }
}

/// The driver writes everywhere while the device works, and its front-end stops and starts the ring meanwhile. The device must use
/// the descriptor that it has checked: it reads each one once.
fn a_ring_that_changes_while_it_is_read_does_no_harm(target: &dyn Target) {
    let seed = env::var(SEED).map_or_else(|_| fastrand::u64(..), |seed| seed.parse().unwrap());
    println!("{SEED}={seed}");
    let running = target.start();
    usual(target).for_each(|mode| race(target, &running, mode, seed));
}

fn race(target: &dyn Target, running: &Running, mode: Mode, seed: u64) {
    let mut scene = Scene::new(target, running, mode);
    let memory = scene.front_end.memory().clone();
    // The bystander, and its requests, are in the other region.
    let apart = memory.without(0);
    let mut requests: Vec<_> = (0..8).map(|_| Request::new(target, &apart)).collect();
    let buffers: Vec<_> = (0..8)
        .map(|tag| requests[tag as usize].write(tag))
        .collect();
    let area = apart.allocate(1 << 20, 4096);
    let ring = *scene.victim.layout();
    let going = AtomicBool::new(true);
    thread::scope(|scope| {
        for number in 0..2 {
            let mut scribbler = Scribbler {
                random: Rng::with_seed(seed.wrapping_add(number)),
                memory: &memory,
                ring,
                packed: mode.packed,
                requests: &buffers,
                area,
            };
            let going = &going;
            scope.spawn(move || {
                while going.load(Ordering::Relaxed) {
                    scribbler.scribble();
                }
            });
        }
        let guard = Going(&going);
        let mut random = Rng::with_seed(!seed);
        let end = Instant::now() + TIME;
        while Instant::now() < end {
            let until = Instant::now() + Duration::from_millis(random.u64(0..20));
            while Instant::now() < until {
                scene.victim.kick_anyway();
                thread::yield_now();
            }
            match random.u8(0..8) {
                0 => scene.front_end.send_memory_table().unwrap(),
                1 => {
                    let _ = scene.front_end.enable(0, random.bool());
                }
                2 => scene.assert_others_live(target, "a changing ring"),
                _ => {
                    let base = scene.front_end.stop(0).unwrap();
                    // Mostly it continues from there, which only a split ring with that index can do.
                    let goes_on = random.u8(..) < 200;
                    let mut place = || 1 << 15 & random.u32(..) | random.u32(0..u32::from(SIZE));
                    let base = match mode.packed {
                        _ if goes_on => base,
                        true => place() | place() << 16,
                        false => random.u16(..).into(),
                    };
                    if goes_on && !mode.packed {
                        scene.victim.split().set_avail_index(base as u16);
                    }
                    scene.front_end.start(0, &scene.victim, base).unwrap();
                }
            }
        }
        drop(guard);
    });
    scene.assert_others_live(target, "a changing ring");
    scene.assert_restarts(target, "a changing ring");
}

/// Drivers that make requests available as fast as they can, the same ones while the device has them, and never read the used
/// ring (CVE-2016-5403). At most as many as the ring's size are in flight at a time.
fn endless_submissions_are_bounded_by_the_ring(target: &dyn Target) {
    const ROUNDS: u16 = 2000;
    let running = target.start();
    let mut scene = Scene::new(target, &running, USUAL);
    let memory = scene.front_end.memory().clone();
    let [readable, writable] = Request::new(target, &memory).write(1);
    let ring = scene.victim.split();
    ring.set_descriptor(0, descriptor(readable, NEXT, 1));
    ring.set_descriptor(1, descriptor(writable, 0, 0));
    // All entries refer to the same request.
    (0..SIZE).for_each(|slot| scene.victim.split().set_avail_entry(slot, 0));
    let threads = running.program.resources().unwrap().threads;
    let mut bytes = 0;
    for round in 0..ROUNDS {
        // As far ahead of the device as permitted.
        let index = scene.victim.split().used_index().wrapping_add(SIZE);
        scene.victim.split().set_avail_index(index);
        scene.victim.kick_anyway();
        if round == ROUNDS / 4 {
            bytes = running.program.anonymous_bytes().unwrap();
        }
    }
    let index = scene.victim.split().avail_index();
    assert!(
        scene.victim.wait_used_index(index, PATIENCE),
        "requests are lost"
    );
    assert!(!scene.victim.wait_error(Duration::ZERO), "ERR");
    let grown = running.program.anonymous_growth(bytes).unwrap();
    assert!(grown < 1 << 20, "it takes {grown} bytes more");
    let now = running.program.resources().unwrap().threads;
    assert!(now <= threads + 16, "{threads} threads became {now}");
    // One more, and the ring is corrupt.
    scene
        .victim
        .split()
        .set_avail_index(index.wrapping_add(SIZE).wrapping_add(1));
    scene.victim.kick_anyway();
    assert!(scene.victim.wait_error(PATIENCE), "no ERR");
    scene.assert_others_live(target, "submissions without end");
    scene.assert_restarts(target, "submissions without end");
}

crate::for_each_target![
    Claim::BrokenRing =>
    a_ring_that_changes_while_it_is_read_does_no_harm,
    endless_submissions_are_bounded_by_the_ring,
];
