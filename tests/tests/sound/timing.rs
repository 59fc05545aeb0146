// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! When buffers come back: a period each, never early, and what happens if there are none.

use std::time::{Duration, Instant};

use vhost_device_tests::process::Signal;

use crate::{
    Device, Driver, EVENT, EVT_XRUNS, OK, PREPARE, Params, QUIET, RELEASE, RX, START, STOP, TX,
    XRUN, assert_same, noise, wait_for_length,
};

/// Queues buffers of a period for playback.
fn play(driver: &mut Driver, count: u32) {
    for tag in 0..count {
        driver.play(0, &noise(1920, tag.into()), tag);
    }
}

#[test]
fn no_buffer_comes_back_before_the_start_or_after_the_stop() {
    let device = Device::start(&[]);
    let mut driver = device.connect();
    driver.prepare(0, &Params::USUAL);
    driver.prepare(1, &Params::USUAL);
    play(&mut driver, 8);
    for tag in 0..8 {
        driver.record(1, 1920, tag);
    }
    driver.assert_quiet(TX);
    driver.assert_quiet(RX);
    driver.commands(&[START], 0);
    driver.commands(&[START], 1);
    assert_eq!(driver.wait(TX).tag, 0);
    assert_eq!(driver.wait(RX).tag, 0);
    driver.commands(&[STOP], 0);
    driver.commands(&[STOP], 1);
    let mut next = [1, 1];
    for (queue, next) in [TX, RX].into_iter().zip(&mut next) {
        while let Some(done) = driver.take(queue) {
            assert_eq!(done.tag, *next);
            *next += 1;
        }
        driver.assert_quiet(queue);
    }
    // They are still queued, and the stream goes on with them.
    driver.commands(&[START], 0);
    assert_eq!(driver.wait(TX).tag, next[0]);
    driver.commands(&[STOP, RELEASE], 0);
}

#[test]
fn buffers_come_back_one_a_period() {
    let device = Device::start(&[]);
    let mut driver = device.connect();
    driver.prepare(0, &Params::USUAL);
    driver.prepare(1, &Params::USUAL);
    play(&mut driver, 20);
    for tag in 0..20 {
        driver.record(1, 1920, tag);
    }
    for (stream, queue) in [(0, TX), (1, RX)] {
        let before = Instant::now();
        driver.commands(&[START], stream);
        let after = Instant::now();
        let mut early = 0;
        for tag in 0..20 {
            let done = driver.wait(queue);
            assert_eq!((done.tag, done.status, done.latency), (tag, OK, 0));
            // Never early; late only as the machine is.
            assert!(before.elapsed() >= Params::PERIOD * (tag + 1), "{tag}");
            early += u32::from(after.elapsed() < Params::PERIOD * (tag + 1) + Params::PERIOD / 2);
        }
        assert!(early >= 1, "no buffer came back within half a period");
        driver.commands(&[STOP, RELEASE], stream);
    }
}

#[test]
fn an_underrun_is_silence_and_one_event() {
    let device = Device::with_playback("played", &[]);
    let mut driver = device.connect();
    driver.listen(8);
    driver.prepare(0, &Params::USUAL);
    driver.commands(&[START], 0);
    driver.play(0, &noise(1920, 0), 0);
    driver.wait(TX);
    assert_eq!(driver.event(), (XRUN, 0));
    std::thread::sleep(QUIET);
    // The clock has gone on: the next sound follows a silence of whole periods.
    play(&mut driver, 2);
    driver.wait(TX);
    driver.wait(TX);
    assert_eq!(driver.event(), (XRUN, 0), "the next underrun");
    driver.commands(&[STOP, RELEASE], 0);
    assert_eq!(driver.take_event(), None);
    let file = device.read("played");
    assert_eq!(file.len() % 1920, 0);
    let sound: Vec<_> = file
        .chunks(1920)
        .filter(|period| period.iter().any(|byte| *byte != 0))
        .collect();
    assert_same(
        &sound.concat(),
        &[noise(1920, 0), noise(1920, 0), noise(1920, 1)].concat(),
    );
    let silent = file.len() / 1920 - 3;
    assert!(silent >= (QUIET.as_millis() / 10 - 1) as usize, "{silent}");
    // Silence after the last sound is not in the file.
    assert_same(&file[file.len() - 1920..], &noise(1920, 1));
    assert_eq!(device.stream(0)["xruns"], 2);
}

#[test]
fn an_overrun_drops_the_oldest_sound() {
    let contents = noise(1920 * 200, 8);
    let device = Device::with_capture("sound", &contents, &["--streams=input"]);
    let mut driver = device.connect();
    driver.listen(8);
    driver.prepare(0, &Params::USUAL);
    driver.commands(&[START], 0);
    assert_eq!(driver.event(), (XRUN, 0));
    std::thread::sleep(QUIET);
    driver.record(0, 1920, 0);
    let bytes = driver.wait(RX).data;
    let place = contents
        .chunks(1920)
        .position(|period| period == bytes)
        .unwrap();
    assert!(place >= 5, "period {place}");
}

#[test]
fn a_driver_that_wants_no_events_gets_none() {
    let device = Device::start(&[]);
    let mut driver = device.connect();
    driver.listen(4);
    let params = Params {
        features: 0,
        ..Params::USUAL
    };
    assert_eq!(Params::USUAL.features, EVT_XRUNS);
    driver.prepare(0, &params);
    driver.commands(&[START], 0);
    std::thread::sleep(QUIET);
    driver.commands(&[STOP], 0);
    assert_eq!(device.stream(0)["xruns"], 1);
    assert_eq!(driver.take_event(), None);
}

#[test]
fn an_underrun_of_an_earlier_run_is_forgotten() {
    let device = Device::start(&[]);
    let mut driver = device.connect();
    driver.prepare(0, &Params::USUAL);
    driver.commands(&[START], 0);
    std::thread::sleep(QUIET);
    driver.commands(&[STOP, RELEASE, PREPARE], 0);
    assert_eq!(device.stream(0)["xruns"], 1);
    driver.listen(1);
    driver.assert_quiet(EVENT);
}

/// The back-end does not run for 300 ms: the guest hears of it once, and the next period is in time again.
#[test]
fn a_stall_is_one_underrun() {
    let mut device = Device::with_playback("played", &[]);
    let mut driver = device.connect();
    driver.listen(8);
    driver.prepare(0, &Params::USUAL);
    play(&mut driver, 8);
    driver.commands(&[START], 0);
    driver.wait(TX);
    device.program.signal(Signal::STOP).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    device.program.signal(Signal::CONT).unwrap();
    // All of the buffers are due.
    for tag in 1..8 {
        assert_eq!(driver.wait(TX).tag, tag);
    }
    assert_eq!(driver.event(), (XRUN, 0));
    play(&mut driver, 20);
    let begin = Instant::now();
    for tag in 0..20 {
        assert_eq!(driver.wait(TX).tag, tag);
    }
    assert!(begin.elapsed() >= Params::PERIOD * 19);
    driver.commands(&[STOP, RELEASE], 0);
    let file = device.read("played");
    let periods = file.len() / 1920;
    assert!(
        periods >= 38,
        "{periods}: the silence has the length of the stall"
    );
}

/// Linux computes the position from finished buffers, modulo the size of all: if all came back at once, it would see no progress.
#[test]
fn late_buffers_do_not_all_come_back_at_once() {
    /// Bytes and time of a period.
    const BYTES: u32 = 7680;
    const PERIOD: Duration = Duration::from_millis(40);
    let mut device = Device::start(&[]);
    let mut driver = device.connect();
    let params = Params {
        period: BYTES,
        buffer: 4 * BYTES,
        ..Params::USUAL
    };
    driver.prepare(0, &params);
    driver.prepare(1, &params);
    for (stream, queue) in [(0, TX), (1, RX)] {
        for _ in 0..3 {
            for tag in 0..4 {
                match queue {
                    TX => driver.play(0, &noise(BYTES as usize, 0), tag),
                    _ => driver.record(1, BYTES, tag),
                }
            }
            driver.commands(&[START], stream);
            device.program.signal(Signal::STOP).unwrap();
            std::thread::sleep(PERIOD * 5);
            device.program.signal(Signal::CONT).unwrap();
            for tag in 0..3 {
                assert_eq!(driver.wait(queue).tag, tag);
            }
            let begin = Instant::now();
            assert_eq!(driver.wait(queue).tag, 3);
            let time = begin.elapsed();
            assert!(time >= PERIOD / 8, "{time:?}");
            driver.commands(&[STOP], stream);
        }
    }
}

#[test]
fn the_clock_of_a_file_can_be_the_guests() {
    let device = Device::with_playback("played", &["--file-clock=free"]);
    let mut driver = device.connect();
    driver.listen(4);
    driver.prepare(0, &Params::USUAL);
    let begin = Instant::now();
    play(&mut driver, 2);
    driver.commands(&[START], 0);
    for tag in 0..200 {
        driver.wait(TX);
        driver.play(0, &noise(1920, tag), 0);
    }
    // Two seconds of sound.
    assert!(
        begin.elapsed() < Duration::from_secs(2),
        "{:?}",
        begin.elapsed()
    );
    // There are no underruns.
    driver.wait(TX);
    std::thread::sleep(QUIET);
    assert_eq!(driver.take_event(), None);
    driver.commands(&[STOP, RELEASE], 0);
}

/// Linux computes the position from finished buffers, modulo the size of all: if all were finished at once, it would see no progress.
#[test]
fn the_guests_clock_never_finishes_all_buffers_at_once() {
    let device = Device::with_playback("played", &["--file-clock=free"]);
    let mut driver = device.connect();
    driver.prepare(0, &Params::USUAL);
    play(&mut driver, 4);
    let begin = Instant::now();
    driver.commands(&[START], 0);
    driver.wait(TX);
    assert_eq!(driver.take(TX), None);
    // But it does not wait forever.
    for tag in 1..4 {
        assert_eq!(driver.wait(TX).tag, tag);
    }
    assert!(begin.elapsed() >= Duration::from_millis(50));
    // The device may find the buffers after the START that followed them.
    for tag in 0..8 {
        driver.play_later(0, &noise(1920, tag), tag as u32);
    }
    driver.publish(TX);
    driver.wait(TX);
    assert_eq!(driver.take(TX), None);
}

#[test]
fn short_periods_are_recorded_completely() {
    let device = Device::with_playback("played", &[]);
    let mut driver = device.connect();
    // 256 frames: 5.3 ms. Then one frame: 48,000 periods a second.
    for (period, buffers) in [(1024, 16), (4, 60)] {
        let params = Params {
            period,
            buffer: period * 4,
            ..Params::USUAL
        };
        driver.prepare(0, &params);
        for tag in 0..buffers {
            driver.play(0, &vec![1; period as usize], tag);
        }
        driver.commands(&[START], 0);
        for tag in 0..buffers {
            assert_eq!(driver.wait(TX).tag, tag);
        }
        driver.commands(&[STOP, RELEASE], 0);
    }
    assert_same(&device.read("played"), &[1; 1024 * 16 + 4 * 60]);
}

#[test]
fn control_requests_are_answered_while_streams_run() {
    let device = Device::with_playback("played", &[]);
    let mut driver = device.connect();
    driver.prepare(0, &Params::USUAL);
    play(&mut driver, 20);
    driver.commands(&[START], 0);
    let mut slowest = Duration::ZERO;
    while driver.take(TX).is_none_or(|done| done.tag < 19) {
        let begin = Instant::now();
        assert_eq!(driver.command(START, 0), crate::BAD_MSG);
        slowest = slowest.max(begin.elapsed());
    }
    assert!(slowest < Duration::from_secs(1), "{slowest:?}");
    wait_for_length(&device.path("played"), 1920 * 20);
}

/// The clock of a stream is that of the host.
#[test]
fn ten_seconds_take_ten_seconds() {
    const SECONDS: u32 = 10;
    let device = Device::start(&[]);
    let mut driver = device.connect();
    driver.prepare(0, &Params::USUAL);
    play(&mut driver, 60);
    let before = Instant::now();
    driver.commands(&[START], 0);
    let after = Instant::now();
    for number in 1..=SECONDS * 100 {
        driver.wait(TX);
        if number % 30 == 0 {
            play(&mut driver, 30);
        }
    }
    let (least, most) = (after.elapsed(), before.elapsed());
    let exact = Duration::from_secs(SECONDS.into());
    assert!(most >= exact, "{most:?}");
    // The last wake-up may be late.
    assert!(least < exact + Duration::from_millis(200), "{least:?}");
}
