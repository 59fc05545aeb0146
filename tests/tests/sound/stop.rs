// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Queues that stop while streams run: at once, and without loss.

use std::time::{Duration, Instant};

use vhost::vhost_user::VhostUserFrontend;
use vhost_device_tests::front_end::{FrontEnd, Options};

use crate::{
    CONTROL, Device, Driver, EVENT, OK, Params, QUIET, RELEASE, RX, START, STOP, TX, assert_same,
    noise,
};

/// A second of sound, all queued.
const LONG: u32 = 60;

fn play(driver: &mut Driver, stream: u32, count: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    for tag in 0..count {
        let period = noise(1920, u64::from(stream) << 32 | u64::from(tag));
        driver.play(stream, &period, tag);
        bytes.extend(period);
    }
    bytes
}

/// Stops a queue, which must not take the time of its sound.
fn stop(driver: &Driver, queue: usize) -> u32 {
    let begin = Instant::now();
    let base = driver.front_end.stop(queue).unwrap();
    assert!(
        begin.elapsed() < Duration::from_millis(300),
        "{:?}",
        begin.elapsed()
    );
    base
}

#[test]
fn a_running_stream_stops_at_once_and_continues_where_it_was() {
    let device = Device::with_playback("played", &["--streams=output", "--streams=input"]);
    let mut driver = device.connect();
    driver.prepare(0, &Params::USUAL);
    driver.prepare(1, &Params::USUAL);
    let bytes = play(&mut driver, 0, LONG);
    for tag in 0..LONG {
        driver.record(1, 1920, tag);
    }
    driver.commands(&[START], 0);
    driver.commands(&[START], 1);
    for queue in [TX, RX] {
        driver.wait(queue);
    }
    let bases = [TX, RX].map(|queue| stop(&driver, queue));
    let mut next = [1, 1];
    for (queue, next) in [TX, RX].into_iter().zip(&mut next) {
        while let Some(done) = driver.take(queue) {
            assert_eq!(done.tag, *next);
            *next += 1;
        }
        assert!(*next < LONG / 2, "{next}: the rest was not played");
    }
    // Nothing happens while the queues are stopped, as in a paused guest.
    std::thread::sleep(QUIET);
    for (queue, base) in [TX, RX].into_iter().zip(bases) {
        assert!(driver.take(queue).is_none());
        driver
            .front_end
            .start(queue, &driver.queues[queue], base)
            .unwrap();
    }
    for (queue, next) in [TX, RX].into_iter().zip(next) {
        for tag in next..LONG {
            let done = driver.wait(queue);
            assert_eq!((done.tag, done.status), (tag, OK));
        }
    }
    driver.commands(&[STOP, RELEASE], 0);
    if device.stream(0)["xruns"] == 0 {
        assert_same(&device.read("played"), &bytes);
    }
}

#[test]
fn a_disabled_queue_pauses_its_streams() {
    let device = Device::with_playback("played", &[]);
    let mut driver = device.connect();
    driver.prepare(0, &Params::USUAL);
    let bytes = play(&mut driver, 0, 20);
    driver.commands(&[START], 0);
    driver.wait(TX);
    driver.front_end.enable(TX, false).unwrap();
    let mut next = 1;
    while let Some(done) = driver.take(TX) {
        assert_eq!(done.tag, next);
        next += 1;
    }
    driver.assert_quiet(TX);
    driver.front_end.enable(TX, true).unwrap();
    for tag in next..20 {
        assert_eq!(driver.wait(TX).tag, tag);
    }
    driver.commands(&[STOP, RELEASE], 0);
    if device.stream(0)["xruns"] == 0 {
        assert_same(&device.read("played"), &bytes);
    }
}

/// A buffer that was played in part is not played again.
#[test]
fn a_large_buffer_continues_in_its_middle() {
    let device = Device::with_playback("played", &[]);
    let mut driver = device.connect();
    driver.prepare(0, &Params::USUAL);
    let bytes = noise(1920 * 50, 4);
    driver.play(0, &bytes, 1);
    driver.commands(&[START], 0);
    for _ in 0..4 {
        std::thread::sleep(Duration::from_millis(40));
        let base = stop(&driver, TX);
        assert!(driver.take(TX).is_none());
        driver
            .front_end
            .start(TX, &driver.queues[TX], base)
            .unwrap();
    }
    assert_eq!(driver.wait(TX).status, OK);
    driver.commands(&[STOP, RELEASE], 0);
    assert_same(&device.read("played"), &bytes);
}

/// Buffers of two streams share a queue. Those before one that is finished cannot be put back.
#[test]
fn streams_that_share_a_queue_lose_no_request_when_it_stops() {
    let device = Device::start(&["--streams=output", "--streams=output"]);
    let mut driver = device.connect();
    for stream in [0, 1] {
        driver.prepare(stream, &Params::USUAL);
    }
    for tag in 0..20 {
        for stream in [0, 1] {
            driver.play(stream, &noise(1920, 0), tag << 1 | stream);
        }
    }
    // Only one of them runs.
    driver.commands(&[START], 0);
    for tag in 0..5 {
        assert_eq!(driver.wait(TX).tag, tag << 1);
    }
    let base = stop(&driver, TX);
    while driver.take(TX).is_some() {}
    let left = driver.pending.len();
    assert!(left >= 10, "{left}");
    driver
        .front_end
        .start(TX, &driver.queues[TX], base)
        .unwrap();
    driver.commands(&[STOP, RELEASE], 0);
    driver.commands(&[RELEASE], 1);
    while driver.take(TX).is_some() {}
    assert!(driver.pending.is_empty(), "{:?}", driver.pending);
}

#[test]
fn all_queues_stop_in_any_order() {
    let device = Device::start(&[]);
    for order in [
        [CONTROL, EVENT, TX, RX],
        [RX, TX, EVENT, CONTROL],
        [TX, CONTROL, RX, EVENT],
    ] {
        let mut driver = device.connect();
        driver.listen(4);
        driver.prepare(0, &Params::USUAL);
        driver.prepare(1, &Params::USUAL);
        play(&mut driver, 0, LONG);
        driver.record(1, 1920, 0);
        driver.commands(&[START], 0);
        driver.commands(&[START], 1);
        driver.wait(TX);
        // Not waited for.
        driver.send(&crate::words(&[STOP, 0]), 4);
        driver.send(&crate::words(&[RELEASE, 0]), 4);
        for queue in order {
            stop(&driver, queue);
        }
        driver.assert_alive();
    }
}

#[test]
fn a_reset_ends_all_streams() {
    let device = Device::start(&[]);
    let mut driver = device.connect();
    driver.prepare(0, &Params::USUAL);
    play(&mut driver, 0, LONG);
    driver.commands(&[START], 0);
    driver.wait(TX);
    VhostUserFrontend::reset_device(&mut *driver.front_end.call()).unwrap();
    assert_eq!(device.stream(0)["state"], "reset");
    std::thread::sleep(QUIET);
    drop(driver);
    let mut driver = device.connect();
    driver.prepare(0, &Params::USUAL);
    driver.commands(&[START, STOP, RELEASE], 0);
}

#[test]
fn the_end_of_the_connection_ends_all_streams() {
    let device = Device::start(&[]);
    for _ in 0..5 {
        let mut driver = device.connect();
        driver.prepare(0, &Params::USUAL);
        play(&mut driver, 0, LONG);
        driver.commands(&[START], 0);
        driver.wait(TX);
    }
    let _ = FrontEnd::connect(&device.socket, &Options::default()).unwrap();
    assert_eq!(device.stream(0)["state"], "reset");
}
