// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `--max-bytes` in each `--period`.

use std::time::{Duration, Instant};

use vhost_device_tests::front_end::state::sealed;
use vhost_device_tests::front_end::{FrontEnd, Options};
use vhost_device_tests::process::Signal;

use crate::{Device, Driver, LARGEST, PATIENCE, assert_same, words};

/// A period longer than a test.
const LONG: &str = "--period=86400000";

/// Returns the arguments for `max_bytes` in periods of `period`.
fn quota(max_bytes: u32, period: Duration) -> [String; 2] {
    [
        format!("--max-bytes={max_bytes}"),
        format!("--period={}", period.as_millis()),
    ]
}

/// Reads all available bytes, `length` at a time, until more than `count` quotas have been delivered. The quota is neither exceeded nor,
/// except for delays of a busy machine, left unused.
fn flood(max_bytes: u32, count: u32, length: u32, kicks: u32) {
    let period = Duration::from_millis(100);
    let before = Instant::now();
    let arguments = quota(max_bytes, period);
    let device = Device::start(&arguments.each_ref().map(String::as_str));
    let mut driver = device.connect();
    let buffer = driver.buffer(length);
    for _ in 0..16 {
        driver.queue.submit(&[buffer]);
    }
    let mut first = None;
    let mut sum = 0;
    while sum <= max_bytes * count {
        for _ in 0..kicks {
            driver.queue.kick_anyway();
        }
        assert!(kicks > 0 || driver.queue.wait_used(PATIENCE));
        while let Some(used) = driver.queue.take_used() {
            assert!((1..=length).contains(&used.length), "{used:?}");
            sum += used.length;
            first.get_or_insert_with(Instant::now);
            driver.queue.submit(&[buffer]);
        }
    }
    let most = before.elapsed();
    let least = first.unwrap().elapsed();
    assert!(
        most >= period * count,
        "{sum} bytes within {most:?}: more than {max_bytes} in {period:?}"
    );
    assert!(
        least <= period * count * 3 / 2,
        "{sum} bytes took {least:?}: less than {max_bytes} in {period:?}"
    );
}

#[test]
fn a_flood_gets_the_quota_of_each_period() {
    for (max_bytes, length) in [(10_000, 4096), (64, 64), (1, 1), (1 << 20, LARGEST)] {
        flood(max_bytes, 10, length, 0);
    }
}

#[test]
fn kicks_neither_delay_nor_hurry_the_quota() {
    flood(1000, 10, 64, 10);
}

#[test]
fn a_request_gets_what_is_left_of_the_quota() {
    let source = words(1 << 12);
    let device = Device::with_source(&source, &["--max-bytes=10000", LONG]);
    let mut driver = device.connect();
    assert_same(&driver.read(4096), &source[..4096]);
    assert_same(&driver.read(4096), &source[4096..8192]);
    assert_same(&driver.read(4096), &source[8192..10_000]);
    driver.submit(4096);
    driver.assert_waits();
}

#[test]
fn the_default_period_is_that_of_qemu() {
    let device = Device::start(&["--max-bytes=10"]);
    let mut driver = device.connect();
    assert_eq!(driver.read(64).len(), 10);
    driver.submit(64);
    driver.assert_waits();
    // Without a quota the period has no meaning.
    let device = Device::start(&[LONG]);
    let mut driver = device.connect();
    for _ in 0..100 {
        assert_eq!(driver.read(LARGEST).len(), LARGEST as usize);
    }
}

/// A device with an exhausted quota, and a waiting request.
fn out_of_quota(device: &Device) -> Driver {
    let mut driver = device.connect();
    assert_eq!(driver.read(100).len(), 100);
    driver.submit(100);
    driver.assert_waits();
    driver
}

#[test]
fn messages_are_served_while_requests_wait_for_the_quota() {
    let device = Device::start(&["--max-bytes=100", LONG]);
    let mut driver = out_of_quota(&device);
    for _ in 0..10 {
        driver.assert_alive();
        driver.front_end.send_memory_table().unwrap();
        driver.queue.kick_anyway();
    }
    driver.front_end.add_region(1 << 40, 1 << 20).unwrap();
    driver.front_end.remove_region(1 << 40).unwrap();
    driver.assert_waits();
}

#[test]
fn a_ring_stops_at_once_while_its_requests_wait_for_the_quota() {
    let device = Device::start(&["--max-bytes=100", LONG]);
    let mut driver = out_of_quota(&device);
    let base = driver.front_end.stop(0).unwrap();
    driver.check(100, 0);
    assert_eq!(base, driver.queue.used_base());
    driver.front_end.start(0, &driver.queue, base).unwrap();
    driver.assert_waits();
}

#[test]
fn neither_a_stop_nor_a_new_connection_renews_the_quota() {
    let mut device = Device::start(&["--max-bytes=100", LONG]);
    drop(out_of_quota(&device));
    for _ in 0..3 {
        let mut driver = device.connect();
        driver.submit(100);
        driver.assert_waits();
    }
    let status = device.program.end(Signal::TERM, Duration::from_secs(2));
    assert_eq!(status.unwrap().code(), Some(0));
}

#[test]
fn requests_that_wait_get_their_bytes_when_the_next_period_begins() {
    let source = words(1 << 12);
    let device = Device::with_source(&source, &["--max-bytes=1000", "--period=300"]);
    let mut driver = device.connect();
    let mut seen = Vec::new();
    for _ in 0..10 {
        seen.extend(driver.read(400));
    }
    assert_same(&seen, &source[..seen.len()]);
    assert!(seen.len() > 3000);
}

/// Stops a device. Returns the state for the next device of its guest.
fn save(driver: &Driver) -> Vec<u8> {
    driver.front_end.stop(0).unwrap();
    driver.front_end.save_state().unwrap()
}

/// Connects a driver to a device, and loads a state into it.
fn connect_with_state(device: &Device, state: &[u8]) -> Driver {
    let front_end = FrontEnd::connect(&device.socket, &Options::default()).unwrap();
    front_end.load_state(state).unwrap();
    Driver::new(front_end)
}

#[test]
fn the_quota_continues_in_another_process() {
    let arguments = ["--max-bytes=100", LONG];
    let (here, there) = (Device::start(&arguments), Device::start(&arguments));
    let mut driver = here.connect();
    assert_eq!(driver.read(70).len(), 70);
    let mut driver = connect_with_state(&there, &save(&driver));
    assert_eq!(driver.read(100).len(), 30);
    driver.submit(100);
    driver.assert_waits();
}

#[test]
fn the_next_period_begins_at_the_same_time_in_another_process() {
    let arguments = quota(100, Duration::from_secs(2));
    let arguments = arguments.each_ref().map(String::as_str);
    let here = Device::start(&arguments);
    let driver = out_of_quota(&here);
    let there = Device::start(&arguments);
    let started = Instant::now();
    let mut driver = connect_with_state(&there, &save(&driver));
    driver.submit(100);
    assert_eq!(driver.answer(100).len(), 100);
    // The period there began with the process, and is not shortened either.
    assert!(started.elapsed() > Duration::from_secs(1));
}

#[test]
fn no_state_renews_the_quota_or_puts_it_off_for_more_than_a_period() {
    let arguments = ["--max-bytes=100", LONG];
    let unused = {
        let device = Device::start(&arguments);
        save(&device.connect())
    };
    let device = Device::start(&arguments);
    let driver = out_of_quota(&device);
    let exhausted = save(&driver);
    let raw = driver.front_end.raw().unwrap();
    assert!(raw.loads(&unused));
    // Nothing was delivered, and the period is over.
    assert!(raw.loads(&sealed("rng", 1, &[0, 0])));
    let mut driver = Driver::new(driver.front_end);
    driver.submit(100);
    driver.assert_waits();

    let device = Device::start(&["--max-bytes=100", "--period=500"]);
    let mut driver = connect_with_state(&device, &exhausted);
    driver.submit(100);
    assert_eq!(driver.answer(100).len(), 100);
}
