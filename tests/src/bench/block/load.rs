// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The driver that makes the load: a fixed number of requests in flight on each queue, one thread a queue.
//!
//! It works like an interrupt-driven guest: it takes used requests, adds as many again,
//! notifies once, and sleeps on the call eventfd when there is nothing to take. It treats all back-ends
//! alike and uses EVENT_IDX and indirect descriptors if they are offered.

use std::io;
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::bench::histogram::Histogram;
use crate::front_end::block::{HEADER_SIZE, IN, OK, OUT, SECTOR_SIZE, header};
use crate::front_end::{Buffer, FrontEnd, GuestMemory, Queue};

/// Descriptors of a ring: enough for depth 128 without indirect ones.
const QUEUE_SIZE: u16 = 512;
/// The same for depth 256.
const LARGE_QUEUE_SIZE: u16 = 1024;
/// Time limit of a request.
const LIMIT: Duration = Duration::from_secs(20);
/// Value of the status byte before the device writes it.
const NO_STATUS: u8 = 0xff;

/// A kind of load: a row of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Load {
    /// Write, else read.
    pub write: bool,
    /// At random places, else one after the other.
    pub random: bool,
    /// Bytes a request.
    pub block_size: u32,
    /// Requests in flight on each queue.
    pub depth: u16,
    /// Queues, and threads.
    pub queues: usize,
}

impl Load {
    /// 4 KiB at random places.
    pub const fn random(write: bool, depth: u16, queues: usize) -> Self {
        Load {
            write,
            random: true,
            block_size: 4096,
            depth,
            queues,
        }
    }

    /// 128 KiB after 128 KiB, 16 at a time.
    pub const fn sequential(write: bool) -> Self {
        Load {
            write,
            random: false,
            block_size: 128 << 10,
            depth: 16,
            queues: 1,
        }
    }

    /// Returns the name for `--rows` and the JSON file, e.g. `randread-4k-d32-q2`.
    pub fn name(&self) -> String {
        let order = if self.random { "rand" } else { "" };
        let kind = if self.write { "write" } else { "read" };
        let (size, depth) = (self.block_size >> 10, self.depth);
        match self.queues {
            1 => format!("{order}{kind}-{size}k-d{depth}"),
            queues => format!("{order}{kind}-{size}k-d{depth}-q{queues}"),
        }
    }

    /// Returns the name for people.
    pub fn title(&self) -> String {
        let order = if self.random { "random" } else { "sequential" };
        let kind = if self.write { "write" } else { "read" };
        let (size, depth) = (self.block_size >> 10, self.depth);
        match self.queues {
            1 => format!("{order} {kind} {size} KiB, depth {depth}"),
            queues => format!("{order} {kind} {size} KiB, {queues} queues of depth {depth}"),
        }
    }

    /// Descriptors of each ring.
    fn queue_size(&self) -> u16 {
        match self.depth {
            0..=128 => QUEUE_SIZE,
            _ => LARGE_QUEUE_SIZE,
        }
    }

    /// Returns guest memory that the load needs: data, requests and rings of all queues.
    pub fn memory(&self) -> Vec<(u64, usize)> {
        let data = (self.block_size as usize + 64) * usize::from(self.depth);
        vec![(0, self.queues * (data + (4 << 20)).next_multiple_of(4096))]
    }
}

/// The measuring window.
#[derive(Debug, Clone, Copy)]
pub struct Window {
    /// Completions before this are warm-up.
    pub start: Instant,
    /// At this time the load ends.
    pub end: Instant,
}

/// Counts of one or all threads in the window.
#[derive(Debug, Default)]
pub struct Measured {
    /// Latency of each completed request, from publishing the chain to taking it back.
    pub latency: Histogram,
    /// Kicks sent, warm-up included.
    pub kicks: u64,
    /// Calls noticed, warm-up included.
    pub calls: u64,
    /// Requests completed, warm-up included.
    pub requests: u64,
}

impl Measured {
    fn add(&mut self, other: &Measured) {
        self.latency.merge(&other.latency);
        self.kicks += other.kicks;
        self.calls += other.calls;
        self.requests += other.requests;
    }
}

/// Data of one request for the device: header and status share a cache line, as in a guest.
#[repr(C, align(64))]
struct Slot {
    header: [u8; HEADER_SIZE as usize],
    status: u8,
}

/// One queue with all that its thread needs.
struct Lane {
    queue: Queue,
    slots: *mut Slot,
    chains: Vec<[Buffer; 3]>,
    /// Keeps `slots` mapped.
    _memory: GuestMemory,
}

// SAFETY: the slots lie in a shared mapping that `_memory` keeps; one thread at a time has the lane.
unsafe impl Send for Lane {}

/// A connection with started queues, ready to run a load.
pub struct Driver {
    /// Rings must not outlive the connection that they are used on.
    _front_end: FrontEnd,
    lanes: Vec<Lane>,
    load: Load,
    capacity: u64,
}

impl Driver {
    /// Starts the queues for `load` on a negotiated connection. All guest memory is touched here.
    pub fn new(front_end: FrontEnd, load: Load) -> crate::front_end::Result<Self> {
        let config = front_end.config(0, 8)?;
        let sectors = u64::from_le_bytes(
            config
                .try_into()
                .expect("config() returns what was asked for"),
        );
        let lanes = (0..load.queues)
            .map(|index| Lane::new(&front_end, index, &load))
            .collect::<Result<_, _>>()?;
        Ok(Driver {
            _front_end: front_end,
            lanes,
            load,
            capacity: sectors * SECTOR_SIZE as u64,
        })
    }

    /// Runs the load, calling `at_start` and `at_end` when the window opens and closes.
    pub fn run(
        &mut self,
        window: Window,
        at_start: impl FnOnce(),
        at_end: impl FnOnce(),
    ) -> io::Result<Measured> {
        let (load, blocks) = (self.load, self.capacity / u64::from(self.load.block_size));
        thread::scope(|scope| {
            let threads: Vec<_> = self
                .lanes
                .iter_mut()
                .zip(1..)
                .map(|(lane, seed)| scope.spawn(move || lane.run(&load, blocks, window, seed)))
                .collect();
            sleep_until(window.start);
            at_start();
            sleep_until(window.end);
            at_end();
            let mut all = Measured::default();
            for thread in threads {
                all.add(&thread.join().expect("the load does not panic")?);
            }
            Ok(all)
        })
    }
}

impl Lane {
    fn new(front_end: &FrontEnd, index: usize, load: &Load) -> crate::front_end::Result<Self> {
        let memory = front_end.memory().clone();
        let depth = u64::from(load.depth);
        let slot_size = size_of::<Slot>() as u64;
        let data_size = depth * u64::from(load.block_size);
        let slots = memory.allocate(depth * slot_size, 4096);
        let data = memory.allocate(data_size, 4096);
        memory.fill(slots, (depth * slot_size) as usize, 0);
        memory.fill(data, data_size as usize, 0xa5);
        let chains = (0..depth)
            .map(|slot| {
                let header = slots + slot * slot_size;
                let place = data + slot * u64::from(load.block_size);
                [
                    Buffer::readable(header, HEADER_SIZE),
                    Buffer {
                        address: place,
                        length: load.block_size,
                        writable: !load.write,
                    },
                    Buffer::writable(header + u64::from(HEADER_SIZE), 1),
                ]
            })
            .collect();
        Ok(Lane {
            queue: front_end.queue(index, load.queue_size())?,
            slots: memory.host_address(slots, depth * slot_size).cast(),
            chains,
            _memory: memory,
        })
    }

    fn run(&mut self, load: &Load, blocks: u64, window: Window, seed: u64) -> io::Result<Measured> {
        let mut places = Places::new(load, blocks, seed);
        let mut measured = Measured::default();
        let mut started = vec![Instant::now(); self.chains.len()];
        let mut slot_of_head = [0u16; LARGE_QUEUE_SIZE as usize];
        let (kicks, calls) = (self.queue.kicks(), self.queue.calls());
        for slot in 0..load.depth {
            let head = self.add(slot, load.write, places.next_sector());
            slot_of_head[usize::from(head)] = slot;
        }
        self.queue.publish();
        self.queue.kick();
        let mut in_flight = load.depth;
        let mut last = Instant::now();
        while in_flight > 0 {
            if !self.queue.wait_used(LIMIT) {
                return Err(io::Error::other(format!(
                    "a request took longer than {LIMIT:?}"
                )));
            }
            self.queue.disarm_interrupt();
            let now = Instant::now();
            if now - last >= LIMIT {
                return Err(io::Error::other(
                    "a request came back, and the device did not call",
                ));
            }
            last = now;
            let counts = window.start <= now && now < window.end;
            while let Some(used) = self.queue.take_used() {
                let slot = slot_of_head[usize::from(used.head)];
                self.check(slot, used.length, load)?;
                measured.requests += 1;
                let start = &mut started[usize::from(slot)];
                if counts {
                    measured.latency.record((now - *start).as_nanos() as u64);
                }
                if now >= window.end {
                    in_flight -= 1;
                    continue;
                }
                *start = now;
                let head = self.add(slot, load.write, places.next_sector());
                slot_of_head[usize::from(head)] = slot;
            }
            self.queue.publish();
            self.queue.kick();
        }
        measured.kicks = self.queue.kicks() - kicks;
        measured.calls = self.queue.calls() - calls;
        Ok(measured)
    }

    fn add(&mut self, slot: u16, write: bool, sector: u64) -> u16 {
        let request = Slot {
            header: header(if write { OUT } else { IN }, sector),
            status: NO_STATUS,
        };
        // SAFETY: there is a slot for each chain, in guest memory that is mapped here, and the device
        // does not hold this one.
        unsafe { self.slots.add(usize::from(slot)).write_volatile(request) };
        self.queue
            .add(&self.chains[usize::from(slot)])
            .expect("the ring has room for the depth")
    }

    fn check(&self, slot: u16, length: u32, load: &Load) -> io::Result<()> {
        // SAFETY: as in `add`.
        let status =
            unsafe { (&raw const (*self.slots.add(usize::from(slot))).status).read_volatile() };
        let expected = if load.write { 1 } else { load.block_size + 1 };
        if status == OK as u8 && length == expected {
            return Ok(());
        }
        Err(io::Error::other(format!(
            "a request ended with status {status} and used length {length} instead of {OK} and {expected}"
        )))
    }
}

/// The sectors to go to.
pub struct Places {
    random: bool,
    blocks: u64,
    sectors_per_block: u64,
    /// Next block, or state of the generator.
    state: u64,
}

impl Places {
    /// Among so many blocks of `load`.
    pub fn new(load: &Load, blocks: u64, seed: u64) -> Self {
        Places {
            random: load.random,
            blocks,
            sectors_per_block: u64::from(load.block_size) / SECTOR_SIZE as u64,
            state: if load.random { seed } else { 0 },
        }
    }

    /// Returns the first sector of the next block.
    #[inline]
    pub fn next_sector(&mut self) -> u64 {
        let block = if self.random {
            // SplitMix64, scaled to the number of blocks.
            self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut mixed = self.state;
            mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            mixed ^= mixed >> 31;
            ((u128::from(mixed) * u128::from(self.blocks)) >> 64) as u64
        } else {
            let block = self.state;
            self.state = (block + 1) % self.blocks;
            block
        };
        block * self.sectors_per_block
    }
}

fn sleep_until(instant: Instant) {
    thread::sleep(instant.saturating_duration_since(Instant::now()));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_stay_on_the_disk_and_cover_it() {
        for random in [false, true] {
            let load = Load {
                random,
                ..Load::random(false, 1, 1)
            };
            let mut places = Places::new(&load, 10, 1);
            let mut seen = [0; 10];
            for _ in 0..1000 {
                let sector = places.next_sector();
                assert_eq!(sector % 8, 0);
                seen[(sector / 8) as usize] += 1;
            }
            assert!(seen.iter().all(|&count| count > 50), "{seen:?}");
        }
    }
}
