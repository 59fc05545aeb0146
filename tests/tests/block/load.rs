// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Many requests at once: on one queue, on all queues, while the device ends, and on lost connections.

use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use fastrand::Rng;
use vhost_device_tests::front_end::block::{
    Completion, FLUSH, IN, IOERR, OK, OUT, Prepared, Request, RequestArea, SECTOR_SIZE, UNSUPP,
    WRITE_ZEROES, segment,
};
use vhost_device_tests::front_end::descriptor::Buffer;
use vhost_device_tests::front_end::{FrontEnd, GuestMemory, Queue, QueueOptions};
use vhost_device_tests::process::{Program, Signal};

use crate::durability::WITHOUT_CACHING;
use crate::{Device, Disk, PATIENCE, Variant, assert_same, noise, ok};

/// Descriptors of a request: header, data, status.
const DESCRIPTORS: u16 = 3;

/// Time limit for ending after SIGTERM.
const END: Duration = Duration::from_secs(2);

/// Requests in flight at once.
pub struct Load {
    queue: Queue,
    memory: GuestMemory,
    areas: Vec<RequestArea>,
    /// Number and request of each chain, by its head.
    pending: Vec<Option<(usize, Prepared)>>,
}

impl Load {
    /// Creates a load of `depth` requests of `size` bytes on queue `index`.
    pub fn new(front_end: &FrontEnd, index: usize, depth: usize, size: u32) -> Self {
        let options = QueueOptions {
            indirect: DESCRIPTORS,
            ..front_end.queue_options((depth as u16).next_power_of_two())
        };
        let queue = front_end.queue_with(index, options).unwrap();
        let memory = front_end.memory().clone();
        Load {
            pending: vec![None; usize::from(options.size)],
            areas: (0..depth)
                .map(|_| RequestArea::new(&memory, size))
                .collect(),
            queue,
            memory,
        }
    }

    /// Adds request `number`, which uses the area of that number. It is not published.
    pub fn add(&mut self, number: usize, request: &Request) {
        let prepared = self.areas[number].prepare(&self.memory, request);
        let head = self.queue.add(&prepared.chain).unwrap();
        self.pending[usize::from(head)] = Some((number, prepared));
    }

    pub fn publish(&mut self) {
        self.queue.publish();
        self.queue.kick();
    }

    /// Returns its queue.
    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// Returns its queue, to wait on.
    pub fn queue_mut(&mut self) -> &mut Queue {
        &mut self.queue
    }

    /// Takes a used request.
    pub fn take(&mut self) -> Option<(usize, Completion)> {
        let used = self.queue.take_used()?;
        let (number, prepared) = self.pending[usize::from(used.head)].take().unwrap();
        Some((number, prepared.completion(&self.memory, used.length)))
    }

    /// Waits for the next used request.
    pub fn wait(&mut self) -> (usize, Completion) {
        loop {
            if let Some(taken) = self.take() {
                return taken;
            }
            assert!(self.queue.wait_used(PATIENCE), "requests are not answered");
        }
    }
}

pub fn write(sector: u64, data: &[u8]) -> Request<'_> {
    Request {
        kind: OUT,
        sector,
        data,
        ..Default::default()
    }
}

pub fn read(sector: u64, length: usize) -> Request<'static> {
    Request {
        kind: IN,
        sector,
        reply_length: length as u32,
        ..Default::default()
    }
}

/// Writes and reads repeatedly in its own part of the disk, with `depth` requests in flight.
pub fn write_and_verify(load: &mut Load, first: u64, seed: u64, rounds: usize) {
    const LENGTH: usize = 4096;
    let depth = load.areas.len();
    let mut random = Rng::with_seed(seed);
    let mut contents = vec![Vec::new(); depth];
    let mut left = vec![rounds; depth];
    let place = |number: usize| first + (number * LENGTH / SECTOR_SIZE) as u64;
    for (number, contents) in contents.iter_mut().enumerate() {
        *contents = noise(random.u64(..), LENGTH);
        load.add(number, &write(place(number), contents));
    }
    load.publish();
    let mut open = depth;
    while open > 0 {
        let (number, completion) = load.wait();
        let was_read = !completion.data.is_empty();
        let data = ok(completion);
        if !was_read {
            load.add(number, &read(place(number), LENGTH));
        } else {
            assert_same(&data, &contents[number], "what was written before");
            left[number] -= 1;
            if left[number] == 0 {
                open -= 1;
                continue;
            }
            contents[number] = noise(random.u64(..), LENGTH);
            load.add(number, &write(place(number), &contents[number]));
        }
        load.publish();
    }
}

fn all_queues_work_at_once(variant: Variant) {
    const QUEUES: usize = 16;
    const DEPTH: usize = 32;
    const SECTORS: u64 = 8 * DEPTH as u64;
    let device = variant.start(&vec![0; QUEUES * DEPTH * 4096], &["--num-queues=16"]);
    let front_end = device.connect();
    let loads: Vec<_> = (0..QUEUES)
        .map(|index| Load::new(&front_end, index, DEPTH, 4096))
        .collect();
    thread::scope(|scope| {
        for (index, mut load) in loads.into_iter().enumerate() {
            scope.spawn(move || {
                write_and_verify(&mut load, index as u64 * SECTORS, index as u64, 20);
            });
        }
    });
    // Each queue reads what another one wrote.
    let image = device.contents();
    front_end.stop(3).unwrap();
    let mut load = Load::new(&front_end, 3, 1, 1 << 20);
    load.add(0, &read(0, 1 << 20));
    load.publish();
    assert_same(&ok(load.wait().1), &image[..1 << 20], "data");
}

/// The selected engine is used, and no other one.
fn the_engine_that_was_asked_for_does_the_work(variant: Variant) {
    let device = start_empty(variant);
    let (_front_end, mut load) = send_writes(&device);
    for _ in 0..IN_FLIGHT {
        ok(load.wait().1);
    }
    let process = PathBuf::from(format!("/proc/{}", device.program.id()));
    let rings = fs::read_dir(process.join("fd"))
        .unwrap()
        .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok())
        .filter(|path| path.to_string_lossy().contains("[io_uring]"));
    let threads = fs::read_dir(process.join("task"))
        .unwrap()
        .filter_map(|entry| fs::read_to_string(entry.unwrap().path().join("comm")).ok())
        .filter(|name| name.trim() == "io");
    let (rings, threads) = (rings.count(), threads.count());
    match variant.engine {
        "io_uring" => assert!(rings > 0 && threads == 0, "{rings}, {threads}"),
        "threads" => assert!(rings == 0 && threads > 0, "{rings}, {threads}"),
        _ => assert_eq!(threads, 0),
    }
}

/// Another thread may execute some of the large ones, and overtake the others.
fn concurrent_requests_of_all_sizes_keep_their_own_data(variant: Variant) {
    const DEPTH: usize = 32;
    const LARGE: usize = 128 << 10;
    let mut image = noise(1, DEPTH * LARGE);
    let device = variant.start(&image, &[]);
    let front_end = device.connect();
    let mut load = Load::new(&front_end, 0, DEPTH, LARGE as u32);
    for round in 0..12 {
        let length = |number: usize| [LARGE, 4096][(number + round) / 3 % 2];
        let is_write = |number: usize| (number + round) % 4 == 3;
        for number in 0..DEPTH {
            let (start, length) = (number * LARGE, length(number));
            let sector = (start / SECTOR_SIZE) as u64;
            if is_write(number) {
                let data = noise((round * DEPTH + number) as u64, length);
                image[start..][..length].copy_from_slice(&data);
                load.add(number, &write(sector, &data));
            } else {
                load.add(number, &read(sector, length));
            }
        }
        load.publish();
        for _ in 0..DEPTH {
            let (number, completion) = load.wait();
            let data = ok(completion);
            if !is_write(number) {
                let expected = &image[number * LARGE..][..length(number)];
                assert_same(&data, expected, &format!("round {round}, request {number}"));
            }
        }
    }
    assert_same(&device.contents(), &image, "the image");
}

/// All made available with one store and one kick.
fn a_full_ring_of_1024_requests_is_carried_out(variant: Variant) {
    const DEPTH: usize = 1024;
    let image = noise(1, DEPTH * SECTOR_SIZE);
    let device = variant.start(&image, &[]);
    let front_end = device.connect();
    let mut load = Load::new(&front_end, 0, DEPTH, 512);
    for round in 0..3 {
        for number in 0..DEPTH {
            load.add(number, &read(number as u64, 512));
        }
        load.publish();
        for _ in 0..DEPTH {
            let (number, completion) = load.wait();
            let expected = &image[number * SECTOR_SIZE..][..SECTOR_SIZE];
            assert_same(&ok(completion), expected, &format!("round {round}"));
        }
    }
}

/// A large request takes two operations: the second one has priority over later requests of the queue.
fn large_requests_keep_their_place_when_the_engine_is_full(variant: Variant) {
    const LARGE: u32 = 3 << 20;
    const COUNT: usize = 250;
    const SMALL: usize = 700;
    let device = variant.start(&noise(1, LARGE as usize), &["--direct"]);
    let front_end = device.connect();
    let mut load = Load::new(&front_end, 0, COUNT + SMALL, 4096);
    // The large ones have their data in one piece of memory.
    let data = front_end.memory().allocate(u64::from(LARGE), 4096);
    for number in 0..COUNT + SMALL {
        let mut prepared = load.areas[number].prepare(&load.memory, &read(0, 4096));
        if number < COUNT {
            prepared.chain[1] = Buffer::writable(data, LARGE);
        }
        let head = load.queue.add(&prepared.chain).unwrap();
        load.pending[usize::from(head)] = Some((number, prepared));
    }
    load.publish();
    for _ in 0..COUNT + SMALL {
        let (number, completion) = load.wait();
        let length = if number < COUNT { LARGE } else { 4096 };
        assert_eq!(u32::from(completion.status), OK, "status");
        assert_eq!(completion.length, length + 1, "used length");
    }
    front_end.stop(0).unwrap();
}

/// Requests without I/O are answered while the engine is full, and none is lost.
fn good_and_bad_requests_of_all_kinds_share_a_full_ring(variant: Variant) {
    const DEPTH: usize = 1024;
    const LENGTH: usize = 4 * DEPTH * SECTOR_SIZE;
    let mut image = noise(2, LENGTH);
    let device = variant.start(&image, &[]);
    let front_end = device.connect();
    let mut load = Load::new(&front_end, 0, DEPTH, 2048);
    let data = noise(3, 4 * SECTOR_SIZE);
    let sector = |number: usize| 4 * number as u64;
    let range = |number: usize| number * 2048..(number + 1) * 2048;
    for number in 0..DEPTH {
        let zeroes = segment(sector(number), 4, 0);
        let request = match number % 7 {
            0 => read(sector(number), 2048),
            1 => write(sector(number), &data),
            2 => Request {
                kind: FLUSH,
                ..Default::default()
            },
            3 => read(u64::MAX, 512),
            4 => Request {
                kind: 99,
                ..Default::default()
            },
            5 => Request {
                kind: WRITE_ZEROES,
                data: &zeroes,
                ..Default::default()
            },
            _ => write(sector(number), &data[..100]),
        };
        load.add(number, &request);
    }
    load.publish();
    for _ in 0..DEPTH {
        let (number, completion) = load.wait();
        let (expected, length) = match number % 7 {
            0 => (OK, 2049),
            1 | 2 | 5 => (OK, 1),
            4 => (UNSUPP, 1),
            _ => (IOERR, 1),
        };
        assert_eq!(u32::from(completion.status), expected, "request {number}");
        assert_eq!(completion.length, length, "request {number}");
        match number % 7 {
            0 => assert_same(&completion.data, &image[range(number)], "data"),
            1 => image[range(number)].copy_from_slice(&data),
            5 => image[range(number)].fill(0),
            _ => (),
        }
    }
    assert_same(&device.contents(), &image, "the image on the host");
}

const IN_FLIGHT: usize = 128;
const IN_FLIGHT_LENGTH: usize = 64 << 10;

/// Returns the contents that request `number` writes.
fn contents(number: usize) -> Vec<u8> {
    noise(number as u64 + 1000, IN_FLIGHT_LENGTH)
}

/// Returns a device with an empty image.
fn start_empty(variant: Variant) -> Device {
    variant.start(&vec![0; IN_FLIGHT * IN_FLIGHT_LENGTH], &[])
}

/// Sends enough large writes to keep some in flight for a while. Each waits for the disk.
fn send_writes(device: &Device) -> (FrontEnd, Load) {
    let front_end = device.connect_without(WITHOUT_CACHING);
    let mut load = Load::new(&front_end, 0, IN_FLIGHT, IN_FLIGHT_LENGTH as u32);
    for number in 0..IN_FLIGHT {
        let sector = (number * IN_FLIGHT_LENGTH / SECTOR_SIZE) as u64;
        load.add(number, &write(sector, &contents(number)));
    }
    load.publish();
    (front_end, load)
}

/// Panics unless each write that was acknowledged is in the image. Returns how many were.
fn assert_acknowledged(device: &Device, load: &mut Load) -> usize {
    let image = device.contents();
    let mut acknowledged = 0;
    while let Some((number, completion)) = load.take() {
        ok(completion);
        let seen = &image[number * IN_FLIGHT_LENGTH..][..IN_FLIGHT_LENGTH];
        assert_same(seen, &contents(number), "what was acknowledged");
        acknowledged += 1;
    }
    acknowledged
}

fn the_program_ends_in_time_and_keeps_what_it_acknowledged(variant: Variant) {
    for signal in [Signal::TERM, Signal::INT] {
        let mut device = start_empty(variant);
        let (_front_end, mut load) = send_writes(&device);
        // Some are done, and others are in flight.
        assert!(load.queue.wait_used(PATIENCE));
        let status = device.program.end(signal, END).unwrap();
        assert_eq!(status.code(), Some(0), "{signal:?}");
        assert_ne!(assert_acknowledged(&device, &mut load), 0);
    }
}

/// Connections that end with requests in flight leave no resources behind, and the next one finds a working disk.
fn closed_connections_leave_no_resources_behind(variant: Variant) {
    let mut device = start_empty(variant);
    let before = device.program.resources().unwrap();
    for _ in 0..10 {
        let (front_end, mut load) = send_writes(&device);
        assert!(load.queue.wait_used(PATIENCE));
        drop(front_end);
        // The next connection is served after all requests of this one have completed.
        let mut disk = Disk::connect(device);
        assert_ne!(assert_acknowledged(&disk.device, &mut load), 0);
        assert!(!load.queue.has_used());
        let data = noise(7, 4096);
        ok(disk.driver.write(0, &data).unwrap());
        assert_eq!(ok(disk.driver.read(0, 4096).unwrap()), data);
        device = disk.disconnect();
        device.program.wait_for_resources(before).unwrap();
    }
}

/// The program is killed repeatedly while it writes, and each time started again at once.
fn a_killed_device_can_be_started_again_at_once(variant: Variant) {
    let directory = variant.directory();
    let image = directory.path().join("image");
    fs::write(&image, vec![0; IN_FLIGHT * IN_FLIGHT_LENGTH]).unwrap();
    let sockets = tempfile::tempdir().unwrap();
    let socket = sockets.path().join("socket");
    for _ in 0..10 {
        let mut device = Device {
            program: Program::spawn(&mut variant.command(&image, &socket, &[])).unwrap(),
            socket: socket.clone(),
            image: image.clone(),
            _directories: Vec::new(),
        };
        device.program.wait_for_listener(&socket).unwrap();
        let (_front_end, mut load) = send_writes(&device);
        assert!(load.queue.wait_used(PATIENCE));
        device.program.end(Signal::KILL, PATIENCE).unwrap();
        assert_ne!(assert_acknowledged(&device, &mut load), 0);
    }
}

crate::for_each_variant!(
    all_queues_work_at_once,
    the_engine_that_was_asked_for_does_the_work,
    concurrent_requests_of_all_sizes_keep_their_own_data,
    a_full_ring_of_1024_requests_is_carried_out,
    large_requests_keep_their_place_when_the_engine_is_full,
    good_and_bad_requests_of_all_kinds_share_a_full_ring,
    the_program_ends_in_time_and_keeps_what_it_acknowledged,
    closed_connections_leave_no_resources_behind,
    a_killed_device_can_be_started_again_at_once,
);
