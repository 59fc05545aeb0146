// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Sources that deliver nothing for a while, or fail: requests wait in the ring, because a driver that gets an empty answer would not ask
//! again.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, Mode, mknodat};
use vhost_device_tests::process::Signal;

use crate::{Device, QUIET, assert_same, words};

/// Time limit for ending.
const END: Duration = Duration::from_secs(2);

/// Starts the device with a FIFO without a writer as its source.
fn with_fifo() -> Device {
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("source");
    mknodat(CWD, &source, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    Device::start_in(directory, Some(&source), &[])
}

fn writer(path: &Path) -> File {
    File::options().append(true).open(path).unwrap()
}

#[test]
fn requests_wait_for_an_empty_file_to_grow() {
    let source = words(1 << 12);
    let mut device = Device::with_source(&[], &[]);
    let mut driver = device.connect();
    let mut seen = Vec::new();
    for (number, part) in source.chunks(1000).take(3).enumerate() {
        driver.submit(2000);
        device.wait_for_complaint(number + 1);
        driver.assert_waits();
        driver.assert_alive();
        writer(&device.source()).write_all(part).unwrap();
        seen.extend(driver.answer(2000));
    }
    assert_same(&seen, &source[..3000]);
    // Once for each time that the end was reached, however often it was read.
    assert_eq!(device.complaints(), 3);
}

#[test]
fn the_last_bytes_of_a_file_are_given_before_requests_wait() {
    let source = words(1 << 12);
    let device = Device::with_source(&source, &[]);
    let mut driver = device.connect();
    assert_same(&driver.read(10_000), &source[..10_000]);
    assert_same(&driver.read(10_000), &source[10_000..]);
    driver.submit(1);
    driver.assert_waits();
}

#[test]
fn a_source_that_fails_does_not_end_the_device() {
    // Address 0 of the process itself, which is never mapped.
    let mut device = Device::start(&["--rng-source=/proc/self/mem"]);
    let mut driver = device.connect();
    driver.submit(64);
    device.wait_for_complaint(1);
    driver.assert_waits();
    driver.assert_alive();
    let base = driver.front_end.stop(0).unwrap();
    assert_eq!(base, driver.queue.used_base());
    driver.front_end.start(0, &driver.queue, base).unwrap();
    driver.assert_waits();
    drop(driver);
    let mut driver = device.connect();
    driver.submit(64);
    driver.assert_waits();
    assert_eq!(device.complaints(), 1);
    assert_eq!(
        device.program.end(Signal::TERM, END).unwrap().code(),
        Some(0)
    );
}

#[test]
fn requests_wait_for_somebody_to_write_to_a_fifo() {
    let source = words(1000);
    let mut device = with_fifo();
    let mut driver = device.connect();
    driver.submit(64);
    device.wait_for_complaint(1);
    driver.assert_waits();
    let mut fifo = writer(&device.source());
    driver.assert_waits();
    fifo.write_all(&source[..100]).unwrap();
    assert_same(&driver.answer(64), &source[..64]);
    assert_same(&driver.read(64), &source[64..100]);
    // The writer closes, and another one opens it.
    drop(fifo);
    driver.submit(64);
    device.wait_for_complaint(2);
    let mut fifo = writer(&device.source());
    fifo.write_all(&source[100..]).unwrap();
    assert_same(&driver.answer(64), &source[100..164]);
}

#[test]
fn an_idle_fifo_is_read_as_soon_as_it_has_a_byte() {
    let mut device = with_fifo();
    let mut driver = device.connect();
    driver.submit(64);
    device.wait_for_complaint(1);
    // Retries happen after 0.1, 0.3, 0.7 and 1.5 s, and then after 3.1 s.
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(1600) {
        driver.assert_waits();
    }
    let mut fifo = writer(&device.source());
    fifo.write_all(b"byte").unwrap();
    assert_eq!(driver.answer(64), b"byte");
    assert!(start.elapsed() < Duration::from_millis(3000));
}

#[test]
fn a_request_gets_what_a_slow_writer_has_written() {
    let source = words(25);
    let device = with_fifo();
    let mut fifo = writer(&device.source());
    let mut driver = device.connect();
    for byte in &source {
        driver.submit(64);
        driver.queue.kick_anyway();
        fifo.write_all(&[*byte]).unwrap();
        assert_eq!(driver.answer(64), [*byte]);
    }
    // A slow writer is no reason for a log line.
    assert_eq!(device.complaints(), 0);
}

#[test]
fn a_ring_stops_at_once_while_its_requests_wait_for_the_source() {
    let device = with_fifo();
    let mut fifo = writer(&device.source());
    let mut driver = device.connect();
    driver.submit(64);
    driver.assert_waits();
    let base = driver.front_end.stop(0).unwrap();
    assert_eq!(base, driver.queue.used_base());
    fifo.write_all(b"bytes").unwrap();
    driver.assert_waits();
    driver.front_end.start(0, &driver.queue, base).unwrap();
    assert_eq!(driver.answer(64), b"bytes");
}

#[test]
fn the_device_sleeps_while_requests_wait() {
    let fifo = with_fifo();
    let _writer = writer(&fifo.source());
    let quota = Device::start(&["--max-bytes=64", "--period=86400000"]);
    let devices = [fifo, quota, Device::with_source(&[], &[])];
    let mut drivers = devices.each_ref().map(Device::connect);
    for driver in &mut drivers {
        driver.submit(64);
        driver.queue.wait_used(QUIET);
        driver.submit(64);
        driver.queue.wait_used(QUIET);
    }
    let times = || {
        devices
            .each_ref()
            .map(|device| device.program.processor_time().unwrap())
    };
    let before = times();
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(1) {
        for driver in &mut drivers {
            driver.queue.wait_call(QUIET);
        }
    }
    for (before, after) in before.into_iter().zip(times()) {
        let used = after - before;
        assert!(
            used < Duration::from_millis(60),
            "{used:?} of processor time in a second"
        );
    }
}
