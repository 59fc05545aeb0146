// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Rings as a driver sees them: requests in any form, notifications, start and stop, and malicious drivers.
//!
//! Nothing here depends on the device, so all tests run against several back-ends. Tests of properties that a target does not claim are
//! skipped, and the skips printed.

#![cfg(test)]

mod aliasing;
mod corrupt;
mod killed;
mod lifecycle;
mod memory_changes;
mod notifications;
mod packed_format;
mod persistent;
mod race;
mod requests;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use vhost_device_tests::front_end::device::{EVENT_IDX, INDIRECT_DESC, RING_PACKED};
use vhost_device_tests::front_end::{
    Buffer, FrontEnd, GuestMemory, Options, Queue, QueueOptions, packed,
};
use vhost_device_tests::target::{Claim, Request, Running, Target};

/// Time limit for operations that normally finish at once; generous, for busy machines.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long to watch for something that must not happen.
const QUIET: Duration = Duration::from_millis(50);

/// Default size of an indirect table in descriptors.
const INDIRECT: u16 = 4;

/// Ring features.
#[derive(Clone, Copy, Debug)]
struct Mode {
    packed: bool,
    event_idx: bool,
    indirect: bool,
}

/// The usual features, for tests that write invalid contents to a split ring. The module `packed_format` has the same for packed
/// rings.
const USUAL: Mode = Mode {
    packed: false,
    event_idx: true,
    indirect: true,
};

/// Returns all combinations of ring features that `target` supports.
fn modes(target: &dyn Target) -> impl Iterator<Item = Mode> {
    let formats = match target.claims(Claim::Packed) {
        true => &[false, true][..],
        false => &[false],
    };
    formats.iter().flat_map(|&packed| {
        (0..4).map(move |bits| Mode {
            packed,
            event_idx: bits & 1 != 0,
            indirect: bits & 2 != 0,
        })
    })
}

/// Returns the usual features, in each format that `target` supports.
fn usual(target: &dyn Target) -> impl Iterator<Item = Mode> {
    modes(target).filter(|mode| mode.event_idx && mode.indirect)
}

impl Mode {
    /// Returns the options of a front-end with such rings.
    fn front_end(self) -> Options {
        let without = |has: bool, bit: u64| if has { 0 } else { bit };
        let defaults = Options::default();
        let features = (defaults.features | RING_PACKED)
            & !without(self.packed, RING_PACKED)
            & !without(self.event_idx, EVENT_IDX)
            & !without(self.indirect, INDIRECT_DESC);
        Options {
            features,
            ..defaults
        }
    }

    fn connect(self, running: &Running) -> FrontEnd {
        // Shown when a test fails.
        println!("{self:?}");
        let front_end = FrontEnd::connect(&running.socket, &self.front_end()).unwrap();
        let has = |bit: u64| front_end.features() & bit != 0;
        assert_eq!(
            (has(RING_PACKED), has(EVENT_IDX), has(INDIRECT_DESC)),
            (self.packed, self.event_idx, self.indirect),
            "ring features"
        );
        front_end
    }

    /// Returns the options of a ring in which `base` descriptors, or entries, have been used.
    fn options(self, size: u16, base: u16) -> QueueOptions {
        let start = packed::Position::from_bits(1 << 15);
        let rounds = base / size;
        let place = packed::Position {
            index: base % size,
            wrap: start.wrap == rounds.is_multiple_of(2),
        };
        QueueOptions {
            size,
            packed: self.packed,
            event_idx: self.event_idx,
            indirect: if self.indirect { INDIRECT } else { 0 },
            base: if self.packed { place.bits() } else { base },
        }
    }

    /// Connects a front-end with ring 0 started, in which `base` descriptors, or entries, have been used.
    fn start(self, running: &Running, size: u16, base: u16) -> (FrontEnd, Queue) {
        let front_end = self.connect(running);
        let queue = self.queue(&front_end, size, base);
        (front_end, queue)
    }

    /// Creates ring 0, and starts it.
    fn queue(self, front_end: &FrontEnd, size: u16, base: u16) -> Queue {
        let queue = front_end.queue_with(0, self.options(size, base)).unwrap();
        // A back-end may call once when a ring starts.
        let _ = queue.call_fd().read();
        queue
    }
}

/// Requests that are sent repeatedly, so that some are always in flight.
struct Load<'a> {
    requests: Vec<Request<'a>>,
    /// The request of each chain, by its head.
    owner: Vec<usize>,
    idle: Vec<usize>,
    sent: u32,
}

impl<'a> Load<'a> {
    /// Creates a load of at most `most` requests in flight at once.
    fn new(target: &'a dyn Target, memory: &'a GuestMemory, queue: &Queue, most: usize) -> Self {
        let requests: Vec<_> = (0..most).map(|_| Request::new(target, memory)).collect();
        let size = usize::from(queue.options().size);
        Load {
            idle: (0..requests.len()).collect(),
            requests,
            owner: vec![usize::MAX; size],
            sent: 0,
        }
    }

    /// Adds a request, if one is idle and the queue has room. It is not published.
    fn add(&mut self, queue: &mut Queue) -> bool {
        let Some(&index) = self.idle.last() else {
            return false;
        };
        let Some(head) = queue.add(&self.requests[index].write(self.sent)) else {
            return false;
        };
        self.owner[usize::from(head)] = index;
        self.idle.pop();
        self.sent += 1;
        true
    }

    /// Adds requests until none is idle or the queue is full, and publishes them with one store. It does not kick.
    fn fill(&mut self, queue: &mut Queue) {
        while self.add(queue) {}
        queue.publish();
    }

    /// Takes and checks the used requests. Returns their number.
    fn take(&mut self, queue: &mut Queue) -> u32 {
        let mut taken = 0;
        while let Some(used) = queue.take_used() {
            let index = self.owner[usize::from(used.head)];
            self.requests[index].assert_done(used);
            self.idle.push(index);
            taken += 1;
        }
        taken
    }

    /// Takes and checks all requests in flight.
    fn drain(&mut self, queue: &mut Queue) {
        while self.idle.len() < self.requests.len() {
            let missing = self.requests.len() - self.idle.len();
            assert!(
                queue.wait_used(PATIENCE),
                "{missing} requests were not answered"
            );
            self.take(queue);
        }
    }

    /// Runs `count` requests.
    fn run(&mut self, queue: &mut Queue, count: u32) {
        let end = self.sent + count;
        while self.sent < end {
            while self.sent < end && self.add(queue) {}
            queue.publish();
            queue.kick();
            assert!(queue.wait_used(PATIENCE), "no request was answered");
            self.take(queue);
        }
        self.drain(queue);
    }
}

/// Runs `count` requests one after the other, and polls the ring instead of waiting for calls.
fn poll_requests(request: &mut Request, queue: &mut Queue, count: u16) {
    for tag in 0..count {
        push(queue, &request.write(tag.into()));
        assert!(queue.poll_used(PATIENCE), "a request was not answered");
        request.assert_done(queue.take_used().unwrap());
    }
}

/// Returns the number of signals on the call eventfd since the last read.
fn calls(queue: &Queue) -> u64 {
    queue.call_fd().read().unwrap_or(0)
}

/// Asserts that nothing more is returned. The call for an earlier request may still arrive.
fn assert_quiet(queue: &Queue) {
    let end = Instant::now() + QUIET;
    while Instant::now() < end {
        assert!(!queue.has_used(), "a request came back");
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// Publishes `chain` and kicks in any case.
fn push(queue: &mut Queue, chain: &[Buffer]) {
    queue.add(chain).unwrap();
    queue.publish();
    queue.kick_anyway();
}

/// Keeps other threads running until it is dropped, also by a panic.
struct Going<'a>(&'a AtomicBool);

impl Drop for Going<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

/// Runs `work` repeatedly in another thread while `meanwhile` runs in this one.
fn while_repeating(mut work: impl FnMut() + Send, meanwhile: impl FnOnce()) {
    let going = AtomicBool::new(true);
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            while going.load(Ordering::Relaxed) {
                work();
            }
        });
        let guard = Going(&going);
        meanwhile();
        drop(guard);
        worker.join().unwrap();
    });
}

/// Turns each function that takes a [`Target`] into a test for each back-end.
macro_rules! for_each_target {
    ($($tests:tt)+) => {
        vhost_device_tests::tests_with!(block, Block { io_engine: "auto" }, $($tests)+);
        vhost_device_tests::tests_with!(block_with_io_uring, Block { io_engine: "io_uring" }, $($tests)+);
        vhost_device_tests::tests_with!(block_with_threads, Block { io_engine: "threads" }, $($tests)+);
        vhost_device_tests::tests_with!(console, Console, $($tests)+);
        vhost_device_tests::tests_with!(gpu, Gpu, $($tests)+);
        vhost_device_tests::tests_with!(reference, Reference, $($tests)+);
        vhost_device_tests::tests_with!(rng, Rng, $($tests)+);
        vhost_device_tests::tests_with!(scsi, Scsi, $($tests)+);
        vhost_device_tests::tests_with!(sound, Sound, $($tests)+);
    };
}
use for_each_target;
