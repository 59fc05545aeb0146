// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Requests of the maximum size: the device answers the front-end at once meanwhile.

use std::time::{Duration, Instant};

use vhost::VhostBackend;
use vhost_device_tests::front_end::block::{
    BlockDriver, Framing, IN, OUT, Request, SECTOR_SIZE, UNMAP, WRITE_ZEROES, header, segment,
};
use vhost_device_tests::front_end::{Buffer, FrontEnd, Queue};

use crate::{Device, PATIENCE, Variant, assert_same, driver, noise, ok, skip};

/// Bytes of guest memory that all data descriptors of a large request point to.
const PIECE: u32 = 24 << 20;
/// Bytes of a large request.
const LARGE: u64 = 256 << 20;
/// How many of them are in flight at once.
const DEPTH: usize = 8;
/// Time limit for an answer on a busy machine, far less than the total time of the requests.
const SOON: Duration = Duration::from_millis(500);
/// Time limit for all the requests.
const LONG: Duration = Duration::from_secs(120);

/// The largest request that is carried out.
const MOST: u64 = 2 << 30;

/// Returns a device with a sparse image of this size. `None` if there is no room for its contents.
fn sparse(variant: Variant, size: u64) -> Option<Device> {
    let directory = variant.directory();
    let room = rustix::fs::statvfs(directory.path()).unwrap();
    if room.f_bavail * room.f_frsize < 2 * size {
        skip("there is no room for a large image");
        return None;
    }
    let image = std::fs::File::create(directory.path().join("image")).unwrap();
    image.set_len(size).unwrap();
    Some(variant.start_in(directory, &[], |_| {}))
}

/// Creates requests that move `length` bytes from and to the beginning of the disk, all with the same memory.
struct Large {
    header: u64,
    data: u64,
    status: u64,
}

impl Large {
    fn new(front_end: &FrontEnd) -> Self {
        let memory = front_end.memory();
        Self {
            header: memory.allocate(16, 16),
            data: memory.allocate(PIECE.into(), 4096),
            status: memory.allocate(1, 1),
        }
    }

    fn chain(&self, front_end: &FrontEnd, kind: u32, length: u64) -> Vec<Buffer> {
        front_end.memory().write(self.header, &header(kind, 0));
        front_end.memory().write_u8(self.status, 0xee);
        let mut chain = vec![Buffer::readable(self.header, 16)];
        let mut left = length;
        while left > 0 {
            let piece = left.min(PIECE.into()) as u32;
            chain.push(match kind {
                IN => Buffer::writable(self.data, piece),
                _ => Buffer::readable(self.data, piece),
            });
            left -= u64::from(piece);
        }
        chain.push(Buffer::writable(self.status, 1));
        chain
    }
}

/// Waits until `count` requests have been answered, and sends requests to the session all the time. Returns the longest time to an answer.
fn slowest_answer(front_end: &FrontEnd, queue: &mut Queue, mut count: usize) -> Duration {
    let end = Instant::now() + LONG;
    let mut slowest = Duration::ZERO;
    while count > 0 {
        assert!(Instant::now() < end, "{count} requests are not answered");
        let before = Instant::now();
        front_end.call().set_vring_call(0, queue.call_fd()).unwrap();
        slowest = slowest.max(before.elapsed());
        while queue.take_used().is_some() {
            count -= 1;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    slowest
}

fn large_reads_and_writes_do_not_delay_the_front_end(variant: Variant) {
    let Some(device) = sparse(variant, LARGE) else {
        return;
    };
    let front_end = device.connect();
    let mut queue = front_end.queue(0, 256).unwrap();
    let large = Large::new(&front_end);
    for kind in [OUT, IN] {
        let chain = large.chain(&front_end, kind, LARGE);
        for _ in 0..DEPTH {
            queue.add(&chain).unwrap();
        }
        queue.publish();
        queue.kick();
        let slowest = slowest_answer(&front_end, &mut queue, DEPTH);
        assert_eq!(front_end.memory().read_u8(large.status), 0, "status");
        assert!(slowest < SOON, "type {kind}: an answer took {slowest:?}");
    }
}

fn large_ranges_of_zeroes_do_not_delay_the_front_end(variant: Variant) {
    let Some(device) = sparse(variant, LARGE) else {
        return;
    };
    let front_end = device.connect();
    let mut driver = driver(&front_end);
    for flags in [0, UNMAP] {
        // All segments are the same range.
        let sectors = 64 << 11;
        let data = segment(0, sectors, flags).repeat(16);
        let prepared = driver.prepare(&Request {
            kind: WRITE_ZEROES,
            data: &data,
            framing: Framing::Separate,
            ..Request::default()
        });
        for _ in 0..DEPTH {
            driver.queue.add(&prepared.chain).unwrap();
        }
        driver.queue.publish();
        driver.queue.kick();
        let slowest = slowest_answer(&front_end, &mut driver.queue, DEPTH);
        assert_eq!(front_end.memory().read_u8(prepared.status), 0, "status");
        assert!(slowest < SOON, "flags {flags}: an answer took {slowest:?}");
    }
}

/// Such a request is executed in parts, which need not end at descriptor boundaries.
fn all_bytes_of_a_large_request_are_moved(variant: Variant) {
    const LENGTH: usize = 7 << 20;
    let device = variant.start(&vec![0; LENGTH], &[]);
    let front_end = device.connect();
    let queue = front_end.queue(0, 256).unwrap();
    let mut driver = BlockDriver::new(front_end.memory(), queue, LENGTH as u32);
    let pieces = [512, 3 << 20, 1024, 2 << 20, 4096];
    let data = noise(5, LENGTH);
    let write = Request {
        kind: OUT,
        data: &data,
        framing: Framing::Pieces {
            readable: &[&[16], &pieces[..]].concat(),
            writable: &[],
        },
        ..Request::default()
    };
    ok(driver.request(&write).unwrap());
    assert_same(&device.contents(), &data, "the image");
    let read = Request {
        kind: IN,
        reply_length: LENGTH as u32,
        framing: Framing::Pieces {
            readable: &[],
            writable: &pieces,
        },
        ..Request::default()
    };
    let seen = ok(driver.request(&read).unwrap());
    assert_same(&seen, &data, "what the driver reads");
}

/// Other devices do the same, and no driver sends such requests.
#[test]
fn requests_of_more_than_2_gib_fail() {
    let directory = Variant::THREADS.directory();
    let image = std::fs::File::create(directory.path().join("image")).unwrap();
    image.set_len(2 * MOST).unwrap();
    let device = Variant::THREADS.start_in(directory, &[], |_| {});
    let front_end = device.connect();
    let mut queue = front_end.queue(0, 256).unwrap();
    let large = Large::new(&front_end);
    for (kind, length, status) in [
        (IN, MOST + SECTOR_SIZE as u64, 1),
        (OUT, MOST + SECTOR_SIZE as u64, 1),
        (IN, MOST, 0),
    ] {
        queue.submit(&large.chain(&front_end, kind, length));
        assert!(queue.wait_used(2 * PATIENCE), "no answer");
        queue.take_used().unwrap();
        let seen = front_end.memory().read_u8(large.status);
        assert_eq!(seen, status, "status of {length} bytes, type {kind}");
    }
    assert_eq!(device.allocated(), 0, "something was written");
}

crate::for_each_variant!(
    all_bytes_of_a_large_request_are_moved,
    large_reads_and_writes_do_not_delay_the_front_end,
    large_ranges_of_zeroes_do_not_delay_the_front_end,
);
