// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest memory as a migrating front-end copies it, using only the log of dirty pages: nothing may be missing at the destination.
//!
//! The device writes to one region, to pages that nobody else writes, except descriptors of packed rings; the tests record
//! the driver's writes themselves, as a VMM does for its guest.

#![cfg(test)]

mod hostile;
mod load;
mod requests;

use std::time::{Duration, Instant};

use vhost::VringConfigData;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_device_tests::front_end::device::{EVENT_IDX, INDIRECT_DESC};
use vhost_device_tests::front_end::dirty_log::{PAGE_SIZE, Pages, pages};
use vhost_device_tests::front_end::packed::{EVENT_SIZE, Position};
use vhost_device_tests::front_end::queue::Layout;
use vhost_device_tests::front_end::{
    Buffer, DirtyLog, FrontEnd, GuestMemory, Options, Queue, QueueOptions,
};
use vhost_device_tests::target::{Running, Target};
use virtio_bindings::virtio_ring::{VRING_PACKED_EVENT_FLAG_DESC, VRING_PACKED_EVENT_FLAG_ENABLE};

/// Time limit for operations that normally finish at once; generous, for busy machines.
const PATIENCE: Duration = Duration::from_secs(20);

/// Addresses of the driver's own memory, and of the memory that the device writes, and the size of each.
const LOW: u64 = 0;
const HIGH: u64 = 1 << 28;
const REGION_SIZE: usize = 2 << 20;
/// Guest address without memory, for logging used rings.
const ELSEWHERE: u64 = 1 << 29;
/// End of all addresses that have a bit in the log.
const END: u64 = ELSEWHERE + (1 << 20);

/// Descriptors of a ring. Its used ring has three pages: entries in the first two, avail_event in the last. The descriptors of a packed
/// ring have four.
const SIZE: u16 = 1024;
const USED_SIZE: u64 = 6 + 8 * SIZE as u64;
/// Start position of a packed ring: the first of few requests use its last page, and the others its first.
const PACKED_START: Position = Position {
    index: SIZE - 2,
    wrap: true,
};

/// Ring features.
#[derive(Clone, Copy, Debug)]
struct Mode {
    event_idx: bool,
    indirect: bool,
}

const MODES: [Mode; 4] = [
    Mode {
        event_idx: false,
        indirect: false,
    },
    Mode {
        event_idx: true,
        indirect: false,
    },
    Mode {
        event_idx: false,
        indirect: true,
    },
    USUAL,
];

const USUAL: Mode = Mode {
    event_idx: true,
    indirect: true,
};

/// A front-end with a running device, and its guest's memory.
struct Scene {
    front_end: FrontEnd,
    low: GuestMemory,
    high: GuestMemory,
    mode: Mode,
}

impl Scene {
    fn new(running: &Running, mode: Mode) -> Self {
        let defaults = Options::default();
        let without = |has: bool, bit: u64| if has { 0 } else { bit };
        let options = Options {
            features: defaults.features
                & !without(mode.event_idx, EVENT_IDX)
                & !without(mode.indirect, INDIRECT_DESC),
            memory: vec![(LOW, REGION_SIZE), (HIGH, REGION_SIZE)],
            protocol_features: if mode.indirect == mode.event_idx {
                defaults.protocol_features
            } else {
                // A block device moves data by buffers of its own then.
                defaults.protocol_features | VhostUserProtocolFeatures::GET_VRING_BASE_INFLIGHT
            },
            ..defaults
        };
        let front_end = running.connect_with(&options);
        let (low, high) = (
            front_end.memory().without(HIGH),
            front_end.memory().without(LOW),
        );
        Scene {
            front_end,
            low,
            high,
            mode,
        }
    }

    /// Enables logging of writes, in a new log.
    fn start_log(&self) -> DirtyLog {
        let log = new_log();
        self.front_end.set_log(&log).unwrap();
        self.front_end.log_writes(true).unwrap();
        log
    }

    /// Returns the number of queues that take requests, up to a limit.
    fn queues(&self, target: &dyn Target) -> usize {
        self.front_end
            .queue_count()
            .min(target.request_queues())
            .min(3)
    }

    /// Creates a ring whose device-written parts are in the device's region. It is not started.
    fn ring<'a>(&self, target: &'a dyn Target) -> Ring<'a> {
        let size = u64::from(SIZE);
        let usual = self.front_end.queue_options(SIZE);
        let descriptors = if usual.packed { &self.high } else { &self.low };
        let layout = Layout {
            descriptors: descriptors.allocate(16 * size, PAGE_SIZE),
            avail: self.low.allocate(6 + 2 * size, PAGE_SIZE),
            used: self
                .high
                .allocate(USED_SIZE.next_multiple_of(PAGE_SIZE), PAGE_SIZE),
        };
        let options = QueueOptions {
            indirect: if self.mode.indirect { 4 } else { 0 },
            base: if usual.packed { PACKED_START.bits() } else { 0 },
            ..usual
        };
        let queue = Queue::at(self.front_end.memory(), options, layout);
        Ring {
            addresses: self.front_end.ring_addresses(&queue),
            queue,
            target,
            memory: self.front_end.memory().clone(),
            slots: Vec::new(),
            owner: vec![usize::MAX; SIZE.into()],
            idle: Vec::new(),
            sent: 0,
        }
    }
}

/// A ring, and requests that are sent on it repeatedly.
struct Ring<'a> {
    target: &'a dyn Target,
    memory: GuestMemory,
    queue: Queue,
    addresses: VringConfigData,
    slots: Vec<Slot>,
    /// For the head of a chain: the slot that it is in.
    owner: Vec<usize>,
    idle: Vec<usize>,
    sent: u32,
}

/// Room for a request.
struct Slot {
    readable: Buffer,
    /// All bytes but the last, in two pages; then the last byte, in its own page.
    writable: [Buffer; 2],
    expected: Vec<u8>,
}

impl Slot {
    fn new(scene: &Scene, target: &dyn Target) -> Self {
        let (readable, writable) = target.request_size();
        let base = scene.high.allocate(3 * PAGE_SIZE, PAGE_SIZE);
        Slot {
            readable: Buffer::readable(
                scene.low.allocate(readable as u64, 1),
                readable.try_into().unwrap(),
            ),
            writable: [
                Buffer::writable(base + PAGE_SIZE - 32, writable as u32 - 1),
                Buffer::writable(base + 2 * PAGE_SIZE + 77, 1),
            ],
            expected: Vec::new(),
        }
    }

    /// Returns the pages of what the device writes.
    fn pages(&self) -> Pages {
        let of = |buffer: &Buffer| pages(buffer.address, buffer.length.into());
        self.writable.iter().flat_map(of).collect()
    }
}

impl Ring<'_> {
    /// Allocates slots for `count` requests.
    fn make_room(&mut self, scene: &Scene, count: usize) {
        for _ in 0..count {
            self.idle.push(self.slots.len());
            self.slots.push(Slot::new(scene, self.target));
        }
    }

    /// Starts the ring as ring 0.
    fn start(&self, front_end: &FrontEnd) {
        let start = self.queue.options().start();
        front_end.start(0, &self.queue, start).unwrap();
    }

    /// Adds a request, if there is room. The memory that the device writes holds none of the expected bytes yet.
    fn add(&mut self) -> bool {
        self.add_over(true).is_some()
    }

    /// Adds a request, if there is room. The memory that the device writes may hold an earlier answer. Returns the pages that the driver
    /// wrote in the device's region.
    fn add_over(&mut self, clears: bool) -> Option<Pages> {
        let index = self.idle.pop()?;
        let mut touched = self.next_descriptors();
        let slot = &mut self.slots[index];
        let (readable, expected) = self.target.request(self.sent);
        self.sent += 1;
        self.memory.write(slot.readable.address, &readable);
        if clears || slot.expected == expected {
            let nothing: Vec<u8> = expected.iter().map(|byte| !byte).collect();
            let (most, last) = nothing.split_at(nothing.len() - 1);
            self.memory.write(slot.writable[0].address, most);
            self.memory.write(slot.writable[1].address, last);
            touched.extend(slot.pages());
        }
        slot.expected = expected;
        let [most, last] = slot.writable;
        let head = self.queue.add(&[slot.readable, most, last]);
        self.owner[usize::from(head.expect("a ring with room for all slots"))] = index;
        Some(touched)
    }

    fn publish(&mut self) {
        self.queue.publish();
        self.queue.kick();
    }

    /// Takes and checks what the device has used. Returns their number.
    fn take(&mut self) -> u64 {
        let mut taken = 0;
        while let Some(used) = self.queue.take_used() {
            let index = self.owner[usize::from(used.head)];
            let slot = &self.slots[index];
            assert_eq!(used.length as usize, slot.expected.len(), "used length");
            let read =
                |buffer: &Buffer| self.memory.read_vec(buffer.address, buffer.length as usize);
            let written: Vec<u8> = slot.writable.iter().flat_map(read).collect();
            assert_eq!(written, slot.expected, "what the device wrote");
            self.idle.push(index);
            taken += 1;
        }
        taken
    }

    /// Waits until all requests are answered, and the device has asked for the next kick.
    fn finish(&mut self) {
        while self.idle.len() < self.slots.len() {
            assert!(self.queue.wait_used(PATIENCE), "requests are not answered");
            self.take();
        }
        let deadline = Instant::now() + PATIENCE;
        while !self.wants_kick() {
            assert!(
                Instant::now() < deadline,
                "the device does not ask for a kick"
            );
            std::thread::yield_now();
        }
    }

    /// Returns whether the device has asked for a kick for the next request.
    fn wants_kick(&self) -> bool {
        let QueueOptions {
            packed, event_idx, ..
        } = *self.queue.options();
        match (packed, event_idx) {
            (true, true) => {
                let next = self.queue.packed().next_available().bits();
                let (position, flags) = self.queue.packed().device_event();
                u32::from(flags) == VRING_PACKED_EVENT_FLAG_DESC && position == next
            }
            (true, false) => {
                let (_, flags) = self.queue.packed().device_event();
                u32::from(flags) == VRING_PACKED_EVENT_FLAG_ENABLE
            }
            (false, true) => self.queue.split().avail_event() == self.queue.split().avail_index(),
            (false, false) => self.queue.split().used_flags() == 0,
        }
    }

    /// Returns the pages of its own part of the ring, if that is at `place`, that the device changes for few requests: those of the used
    /// index, the first entries, and avail_event; in a packed ring that of its event suppression, which does not change without EVENT_IDX.
    fn device_area(&self, place: u64) -> Pages {
        let QueueOptions {
            packed, event_idx, ..
        } = *self.queue.options();
        match (packed, event_idx) {
            (true, true) => pages(place, EVENT_SIZE as u64),
            (true, false) => Pages::new(),
            (false, true) => &pages(place + 2, 2) | &pages(place + USED_SIZE - 2, 2),
            (false, false) => pages(place + 2, 2),
        }
    }

    /// Returns the pages of the descriptors that the device marks used for few requests, if the ring is packed.
    fn used_descriptors(&self) -> Pages {
        let Layout { descriptors, .. } = *self.queue.layout();
        match self.queue.options().packed {
            true => {
                &pages(descriptors + 16 * u64::from(PACKED_START.index), 16)
                    | &pages(descriptors, 16)
            }
            false => Pages::new(),
        }
    }

    /// Returns the pages in the device's region that the driver writes for the next chain.
    fn next_descriptors(&self) -> Pages {
        if !self.queue.options().packed {
            return Pages::new();
        }
        let Layout { descriptors, .. } = *self.queue.layout();
        let position = self.queue.packed().next_available();
        let places = (0..3).map(|count| position.after(count, SIZE).index);
        places
            .flat_map(|index| pages(descriptors + 16 * u64::from(index), 16))
            .collect()
    }

    /// Returns all pages of the device's part of the ring.
    fn used_pages(&self) -> Pages {
        pages(self.queue.layout().used, USED_SIZE)
    }
}

/// Turns each function that takes a [`Target`] into a test for each device.
macro_rules! for_each_device {
    ($($tests:tt)+) => {
        vhost_device_tests::tests_with!(block, Block { io_engine: "auto" }, $($tests)+);
        vhost_device_tests::tests_with!(block_io_uring, Block { io_engine: "io_uring" }, $($tests)+);
        vhost_device_tests::tests_with!(block_threads, Block { io_engine: "threads" }, $($tests)+);
        vhost_device_tests::tests_with!(console, Console, $($tests)+);
        vhost_device_tests::tests_with!(rng, Rng, $($tests)+);
        vhost_device_tests::tests_with!(scsi, Scsi, $($tests)+);
    };
}
use for_each_device;

/// Creates a log for all addresses of the tests.
fn new_log() -> DirtyLog {
    DirtyLog::new(END)
}
