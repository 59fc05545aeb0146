// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `--iops` and `--bps`: no more than they allow, not much less, and shared fairly by all queues.
//!
//! A busy machine can slow a device down, but not speed it up: the upper bounds are exact, and half of the limit is enough as a lower bound.

use std::thread;
use std::time::{Duration, Instant};

use vhost_device_tests::front_end::block::{
    Completion, FLUSH, GET_ID, ID_SIZE, IOERR, Request, SECTOR_SIZE,
};
use vhost_device_tests::front_end::device::RING_PACKED;
use vhost_device_tests::front_end::{FrontEnd, Options};
use vhost_device_tests::process::{Program, Signal};

use crate::load::{Load, read, write, write_and_verify};
use crate::{Device, PATIENCE, Variant, assert_failed, assert_same, driver, noise, ok};

const MEBIBYTE: usize = 1 << 20;

/// How long a device is watched.
const WATCHED: Duration = Duration::from_millis(1500);

/// How long to watch for something that must not happen.
const SHORT: Duration = Duration::from_millis(100);

/// Time limit for something that happens at once, on a busy machine.
const AT_ONCE: Duration = Duration::from_secs(2);

/// A limit so low that nothing more is allowed during a test, once it is reached.
const NEARLY_NOTHING: &str = "--bps=1K";

/// Keeps `depth` reads of `length` bytes in flight until `end`. Returns how many were answered.
fn flood(load: &mut Load, depth: usize, length: usize, end: Instant) -> u64 {
    let mut answered = 0;
    for number in 0..depth {
        load.add(number, &read(0, length));
    }
    load.publish();
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return answered;
        }
        load.queue_mut().wait_used(left);
        while let Some((number, completion)) = load.take() {
            ok(completion);
            answered += 1;
            load.add(number, &read(0, length));
        }
        load.publish();
    }
}

/// Returns a load of reads of this length on queue `index`.
fn reads(front_end: &FrontEnd, index: usize, depth: usize, length: usize) -> Load {
    Load::new(front_end, index, depth, length as u32)
}

/// Panics unless a limit of `rate` per second, and of `burst` at once, was kept and used. `amount` passed in at least `least` and at most
/// `most`.
#[track_caller]
fn assert_rate(amount: u64, rate: u64, burst: u64, most: Duration, least: Duration) {
    let allowed = |time: Duration| (rate as f64 * time.as_secs_f64()) as u64;
    assert!(
        amount <= burst + allowed(most),
        "{amount} within {most:?}: more than {rate} a second, and {burst}"
    );
    assert!(
        amount >= allowed(least) / 2,
        "{amount} within {least:?}: less than half of {rate} a second"
    );
}

/// Watches a flood of reads. Returns how many were answered, and how long that took with and without the start.
fn watch(device: &Device, depth: usize, length: usize) -> (u64, Duration, Duration) {
    let front_end = device.connect();
    let mut load = reads(&front_end, 0, depth, length);
    let start = Instant::now();
    let answered = flood(&mut load, depth, length, start + WATCHED);
    (answered, start.elapsed(), WATCHED)
}

fn no_more_requests_pass_than_iops_allows(variant: Variant) {
    let device = variant.start(&[7; MEBIBYTE], &["--iops=800", "--iops-burst=40"]);
    let (answered, most, least) = watch(&device, 32, 4096);
    assert_rate(answered, 800, 40, most, least);
}

fn no_more_bytes_pass_than_bps_allows(variant: Variant) {
    let device = variant.start(&[7; MEBIBYTE], &["--bps=8M", "--bps-burst=256K"]);
    let length = 64 << 10;
    let (answered, most, least) = watch(&device, 16, length);
    let (length, rate) = (length as u64, 8 << 20);
    // The last request is charged when it has started.
    assert_rate(answered * length, rate, (256 << 10) + length, most, least);
}

fn both_limits_hold_at_once(variant: Variant) {
    let arguments = [
        "--iops=400",
        "--bps=4M",
        "--iops-burst=10",
        "--bps-burst=64K",
    ];
    let device = variant.start(&[7; MEBIBYTE], &arguments);
    let (answered, most, least) = watch(&device, 16, 512);
    assert_rate(answered, 400, 10, most, least);
    let length = 128 << 10;
    let (answered, most, least) = watch(&device, 16, length);
    let length = length as u64;
    assert_rate(answered * length, 4 << 20, (64 << 10) + length, most, least);
}

/// Far more than a thread can do by polling for each request.
fn a_high_limit_is_reached(variant: Variant) {
    let device = variant.start(&[7; MEBIBYTE], &["--iops=5000", "--bps=1G"]);
    let (answered, most, least) = watch(&device, 64, 512);
    assert_rate(answered, 5000, 500, most, least);
}

fn writes_and_ranges_are_throttled_too(variant: Variant) {
    let device = variant.start(&[7; MEBIBYTE], &["--iops=10", "--iops-burst=1"]);
    let front_end = device.connect();
    let mut driver = driver(&front_end);
    let start = Instant::now();
    for _ in 0..4 {
        ok(driver.write(0, &[1; 512]).unwrap());
        ok(driver.discard(8, 8).unwrap());
        ok(driver.write_zeroes(16, 8, 0).unwrap());
    }
    // The first one went at once.
    assert!(start.elapsed() >= 11 * Duration::from_millis(100));
}

fn unused_quota_can_be_used_in_a_burst(variant: Variant) {
    const DEPTH: usize = 128;
    let device = variant.start(&[7; MEBIBYTE], &["--iops=20", "--iops-burst=100"]);
    let front_end = device.connect();
    let mut load = reads(&front_end, 0, DEPTH, 512);
    let start = Instant::now();
    (0..DEPTH).for_each(|number| load.add(number, &read(0, 512)));
    load.publish();
    (0..100).for_each(|_| drop(ok(load.wait().1)));
    assert!(start.elapsed() < AT_ONCE, "that is 5 s for 20 a second");
    (100..DEPTH).for_each(|_| drop(ok(load.wait().1)));
    assert!(start.elapsed() >= Duration::from_millis(50 * (DEPTH as u64 - 100)));
}

fn a_request_larger_than_the_burst_passes_and_delays_the_next_one(variant: Variant) {
    let device = variant.start(&[7; MEBIBYTE], &["--bps=1M", "--bps-burst=16K"]);
    let front_end = device.connect();
    let mut driver = driver(&front_end);
    let start = Instant::now();
    ok(driver.read(0, MEBIBYTE as u32).unwrap());
    ok(driver.read(0, 512).unwrap());
    let took = start.elapsed();
    // A second, but for the burst.
    assert!(took >= Duration::from_millis(980), "{took:?}");
    assert!(took < Duration::from_secs(1) + AT_ONCE, "{took:?}");
}

/// A device with a front-end whose next limited request waits for a long time, on queue 0.
fn exhausted(variant: Variant) -> (Device, FrontEnd) {
    let device = variant.start(&[7; MEBIBYTE], &[NEARLY_NOTHING]);
    let front_end = device.connect();
    ok(driver(&front_end).read(0, MEBIBYTE as u32).unwrap());
    front_end.stop(0).unwrap();
    (device, front_end)
}

fn flushes_and_get_id_do_not_wait(variant: Variant) {
    let (_device, front_end) = exhausted(variant);
    let mut driver = driver(&front_end);
    let start = Instant::now();
    for _ in 0..100 {
        ok(driver.flush().unwrap());
        ok(driver.get_id().unwrap());
    }
    assert!(start.elapsed() < 2 * AT_ONCE);
    // Nor do they affect the others.
    driver.set_timeout(SHORT);
    assert!(driver.read(0, 512).is_err());
}

fn a_refused_request_does_not_use_the_byte_limit(variant: Variant) {
    let device = variant.start(&[7; MEBIBYTE], &["--bps=1M", "--bps-burst=64K"]);
    let front_end = device.connect();
    let mut driver = driver(&front_end);
    let start = Instant::now();
    for _ in 0..50 {
        let refused = driver.read(1, MEBIBYTE as u32).unwrap();
        assert_failed(&refused, IOERR, "a read beyond the end");
    }
    ok(driver.read(0, 512).unwrap());
    assert!(start.elapsed() < 2 * AT_ONCE, "50 MiB would take 50 s");
}

/// Keeps these requests in flight on each queue: number and size. Returns the bytes of each queue.
fn compete(device: &Device, queues: &[(usize, usize)]) -> Vec<u64> {
    let front_end = device.connect();
    let loads: Vec<_> = queues
        .iter()
        .enumerate()
        .map(|(index, &(depth, length))| reads(&front_end, index, depth, length))
        .collect();
    let end = Instant::now() + 2 * WATCHED;
    thread::scope(|scope| {
        let threads: Vec<_> = loads
            .into_iter()
            .zip(queues)
            .map(|(mut load, &(depth, length))| {
                scope.spawn(move || flood(&mut load, depth, length, end) * length as u64)
            })
            .collect();
        let threads = threads.into_iter();
        threads.map(|thread| thread.join().unwrap()).collect()
    })
}

fn a_flood_of_large_requests_leaves_small_ones_their_share_of_bytes(variant: Variant) {
    let device = variant.start(&[7; MEBIBYTE], &["--bps=8M"]);
    let bytes = compete(&device, &[(4, MEBIBYTE), (256, 4096)]);
    assert!(bytes[1] >= bytes[0] / 4, "{bytes:?}");
    assert!(bytes[0] >= bytes[1] / 4, "{bytes:?}");
}

fn a_flood_on_one_queue_leaves_a_turn_to_single_requests(variant: Variant) {
    // With a byte limit it waits for one large request each time, which takes 1/16 s.
    let device = variant.start(&[7; MEBIBYTE], &["--bps=16M"]);
    let bytes = compete(&device, &[(4, MEBIBYTE), (1, 4096), (4, MEBIBYTE)]);
    let single = bytes[1] / 4096;
    assert!(single >= 16, "{bytes:?}");
    // With a request limit each queue has a turn after one request of each other queue.
    let device = variant.start(&[7; MEBIBYTE], &["--iops=100", "--iops-burst=5"]);
    let bytes = compete(&device, &[(4, MEBIBYTE), (1, 4096)]);
    let (large, single) = (bytes[0] / MEBIBYTE as u64, bytes[1] / 4096);
    assert!(single >= large / 3, "{large} and {single}");
}

fn waiting_takes_no_processor_time(variant: Variant) {
    for limit in ["--iops=3", "--iops=300"] {
        let device = variant.start(&[7; MEBIBYTE], &[limit]);
        let front_end = device.connect();
        let mut loads: Vec<_> = (0..4)
            .map(|index| reads(&front_end, index, 16, 512))
            .collect();
        for load in &mut loads {
            (0..16).for_each(|number| load.add(number, &read(0, 512)));
            load.publish();
        }
        // The burst is used up.
        loads.iter_mut().for_each(|load| drop(load.wait()));
        let before = device.program.processor_time().unwrap();
        let start = Instant::now();
        while start.elapsed() < WATCHED {
            loads[0].queue_mut().wait_used(SHORT);
            for load in &mut loads {
                while let Some((number, _)) = load.take() {
                    load.add(number, &read(0, 512));
                }
                load.publish();
            }
        }
        let used = device.program.processor_time().unwrap() - before;
        assert!(used <= WATCHED / 8, "{limit}: {used:?}");
    }
}

/// Starts a device in place of the ended one, with the same image and guest memory.
fn succeed(variant: Variant, device: &mut Device, before: &FrontEnd) -> FrontEnd {
    device.program.expect_anything();
    let status = device.program.end(Signal::TERM, AT_ONCE).unwrap();
    assert_eq!(status.code(), Some(0));
    let mut command = variant.command(&device.image, &device.socket, &[]);
    device.program = Program::spawn(&mut command).unwrap();
    device.program.wait_for_listener(&device.socket).unwrap();
    let (options, memory) = (options(before.features()), before.memory().clone());
    FrontEnd::connect_with_memory(&device.socket, &options, memory).unwrap()
}

/// Returns those of a front-end that accepts these features.
fn options(features: u64) -> Options {
    Options {
        features,
        ..Options::default()
    }
}

/// Stops a ring while 64 requests wait, and continues without limits in another process.
fn stop_and_go_on(variant: Variant, features: u64) {
    const DEPTH: usize = 64;
    let mut device = variant.start(&[7; MEBIBYTE], &["--iops=1"]);
    let front_end = device.connect_with(options(features));
    let mut load = Load::new(&front_end, 0, DEPTH, 512);
    let contents: Vec<_> = (0..DEPTH).map(|number| noise(number as u64, 512)).collect();
    for (number, contents) in contents.iter().enumerate() {
        load.add(number, &write(number as u64, contents));
    }
    load.publish();
    let mut left = [true; DEPTH];
    let mut note = |(number, completion): (usize, Completion)| {
        ok(completion);
        assert!(
            std::mem::replace(&mut left[number], false),
            "answered twice"
        );
        left.iter().any(|left| *left)
    };
    note(load.wait());
    let start = Instant::now();
    let base = front_end.stop(0).unwrap();
    let took = start.elapsed();
    assert!(took < Duration::from_millis(500), "{took:?}");
    while let Some(answer) = load.take() {
        assert!(note(answer), "nothing waited");
    }
    assert_eq!(base, load.queue().used_base(), "what waits is not taken");
    let front_end = succeed(variant, &mut device, &front_end);
    front_end.start(0, load.queue(), base).unwrap();
    while note(load.wait()) {}
    assert_eq!(front_end.stop(0).unwrap(), load.queue().used_base());
    let image = device.contents();
    assert_same(&image[..DEPTH * SECTOR_SIZE], &contents.concat(), "image");
}

fn a_ring_stops_at_once_and_what_waits_is_carried_out_by_the_next_process(variant: Variant) {
    stop_and_go_on(variant, Options::default().features);
    stop_and_go_on(variant, Options::default().features ^ RING_PACKED);
}

fn the_program_ends_at_once_and_other_messages_are_served_while_requests_wait(variant: Variant) {
    let (mut device, mut front_end) = exhausted(variant);
    let mut load = reads(&front_end, 0, 8, 4096);
    (0..8).for_each(|number| load.add(number, &read(0, 4096)));
    load.publish();
    front_end.config(0, 8).unwrap();
    front_end.add_region(1 << 40, MEBIBYTE).unwrap();
    front_end.remove_region(1 << 40).unwrap();
    front_end.send_memory_table().unwrap();
    assert!(!load.queue_mut().wait_used(SHORT));
    // A new connection does not reset the limit.
    drop(front_end);
    let front_end = device.connect();
    let mut driver = driver(&front_end);
    driver.set_timeout(SHORT);
    assert!(driver.read(0, 512).is_err());
    let status = device.program.end(Signal::TERM, AT_ONCE).unwrap();
    assert_eq!(status.code(), Some(0));
}

/// Requests of all kinds, some of which wait, on four queues of one device.
fn each_request_is_answered_once(variant: Variant) {
    const DEPTH: usize = 16;
    let image = vec![0; 4 * DEPTH * 4096];
    let device = variant.start(&image, &["--iops=2000", "--iops-burst=20", "--bps=16M"]);
    let front_end = device.connect();
    let loads: Vec<_> = (0..4)
        .map(|index| Load::new(&front_end, index, DEPTH, 4096))
        .collect();
    thread::scope(|scope| {
        for (index, mut load) in loads.into_iter().enumerate() {
            scope.spawn(move || {
                let first = index * DEPTH * 4096 / SECTOR_SIZE;
                write_and_verify(&mut load, first as u64, index as u64, 10);
                for number in 0..DEPTH {
                    let request = match number % 3 {
                        0 => read(first as u64, 512),
                        1 => Request {
                            kind: FLUSH,
                            ..Default::default()
                        },
                        _ => Request {
                            kind: GET_ID,
                            reply_length: ID_SIZE as u32,
                            ..Default::default()
                        },
                    };
                    load.add(number, &request);
                }
                load.publish();
                (0..DEPTH).for_each(|_| drop(ok(load.wait().1)));
                assert!(!load.queue().has_used());
            });
        }
    });
}

#[test]
fn a_burst_without_a_limit_and_invalid_limits_are_usage_errors() {
    let variant = Variant::THREADS;
    let directory = variant.directory();
    let image = directory.path().join("image");
    std::fs::write(&image, [0; 512]).unwrap();
    for (argument, what) in [
        ("--iops-burst=10", "--iops <N>"),
        ("--bps-burst=10", "--bps <SIZE>"),
        ("--iops=0", "--iops"),
        ("--bps=0", "--bps"),
        ("--bps=1T", "such as"),
    ] {
        let socket = directory.path().join("socket");
        let mut program =
            Program::spawn(&mut variant.command(&image, &socket, &[argument])).unwrap();
        assert_eq!(
            program.wait(PATIENCE).unwrap().code(),
            Some(2),
            "{argument}"
        );
        let stderr = program.stderr();
        assert!(
            stderr.contains(what) && stderr.lines().count() == 1,
            "{stderr}"
        );
    }
}

crate::for_each_variant![
    no_more_requests_pass_than_iops_allows,
    no_more_bytes_pass_than_bps_allows,
    both_limits_hold_at_once,
    a_high_limit_is_reached,
    writes_and_ranges_are_throttled_too,
    unused_quota_can_be_used_in_a_burst,
    a_request_larger_than_the_burst_passes_and_delays_the_next_one,
    flushes_and_get_id_do_not_wait,
    a_refused_request_does_not_use_the_byte_limit,
    a_flood_of_large_requests_leaves_small_ones_their_share_of_bytes,
    a_flood_on_one_queue_leaves_a_turn_to_single_requests,
    waiting_takes_no_processor_time,
    a_ring_stops_at_once_and_what_waits_is_carried_out_by_the_next_process,
    the_program_ends_at_once_and_other_messages_are_served_while_requests_wait,
    each_request_is_answered_once,
];
