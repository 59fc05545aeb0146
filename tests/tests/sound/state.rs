// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A stream that continues in another process (DEVICE_STATE).

use vhost_device_tests::front_end::state::{HEADER_SIZE, sealed};
use vhost_device_tests::front_end::{FrontEnd, Options};

use crate::{
    BAD_MSG, CTL_READ, CTL_WRITE, Device, Driver, OK, Params, RELEASE, START, STOP, TX,
    assert_same, noise, word, words,
};

/// Moves a guest to another device: its memory, its queues and the device state.
fn move_to(driver: Driver, device: &Device) -> Driver {
    let bases = driver.stop_all();
    let state = driver.front_end.save_state().unwrap();
    let memory = driver.front_end.memory().clone();
    let options = Options::default();
    let front_end = FrontEnd::connect_with_memory(&device.socket, &options, memory).unwrap();
    front_end.load_state(&state).unwrap();
    for (index, (queue, base)) in driver.queues.iter().zip(bases).enumerate() {
        front_end.start(index, queue, base).unwrap();
    }
    Driver {
        front_end,
        ..driver
    }
}

#[test]
fn a_running_stream_continues_in_another_process() {
    let first = Device::with_playback("played", &[]);
    let second = Device::with_playback("played", &[]);
    let mut driver = first.connect();
    driver.prepare(0, &Params::USUAL);
    let mut bytes = Vec::new();
    for tag in 0..40 {
        let period = noise(1920, tag.into());
        driver.play(0, &period, tag);
        bytes.extend(period);
    }
    driver.commands(&[START], 0);
    for tag in 0..5 {
        assert_eq!(driver.wait(TX).tag, tag);
    }
    let mut driver = move_to(driver, &second);
    for tag in 5..40 {
        let done = driver.wait(TX);
        assert_eq!((done.tag, done.status), (tag, OK));
    }
    assert_eq!(second.stream(0)["state"], "running");
    driver.commands(&[STOP, RELEASE], 0);
    let played = [first.read("played"), second.read("played")].concat();
    assert_same(&played, &bytes);
}

#[test]
fn every_state_is_moved() {
    let paths: [&[u32]; 5] = [
        &[],
        &[crate::PREPARE],
        &[crate::PREPARE, START],
        &[crate::PREPARE, START, STOP],
        &[crate::PREPARE, RELEASE],
    ];
    for path in paths {
        let first = Device::start(&[]);
        let second = Device::start(&[]);
        let mut driver = first.connect();
        driver.set_params(1, &Params::USUAL);
        driver.commands(path, 1);
        let before = first.stream(1);
        let driver = move_to(driver, &second);
        let after = second.stream(1);
        assert_eq!(after["state"], before["state"]);
        assert_eq!(after["params"], before["params"]);
        assert_eq!(second.stream(0)["state"], "reset");
        driver.assert_alive();
    }
}

#[test]
fn volumes_are_moved() {
    let first = Device::start(&["--controls"]);
    let second = Device::start(&["--controls"]);
    let mut driver = first.connect();
    assert_eq!(driver.status(&words(&[CTL_WRITE, 0, 77])), OK);
    assert_eq!(driver.status(&words(&[CTL_WRITE, 1, 0])), OK);
    let mut driver = move_to(driver, &second);
    for (element, value) in [(0, 77), (1, 0), (2, 120)] {
        let (status, bytes) = driver.request(&words(&[CTL_READ, element]), 516);
        assert_eq!((status, word(&bytes, 0)), (OK, value));
    }
}

#[test]
fn a_state_of_other_streams_is_refused() {
    let usual = Device::start(&[]);
    let mut driver = usual.connect();
    driver.prepare(0, &Params::USUAL);
    driver.stop_all();
    let state = driver.front_end.save_state().unwrap();
    for arguments in [
        &["--streams=output"][..],
        &["--streams=output", "--streams=input", "--streams=input"],
        &["--streams=output,channels=1", "--streams=input"],
        &["--streams=output,formats=s32", "--streams=input"],
        &["--streams=output,rates=96000", "--streams=input"],
        &["--controls"],
    ] {
        let other = Device::start(arguments);
        let mut driver = other.connect();
        driver.stop_all();
        assert!(
            driver.front_end.load_state(&state).is_err(),
            "{arguments:?}"
        );
        for (index, queue) in (0..4).map(|index| (index, driver.front_end.queue(index, 64))) {
            driver.queues[index] = queue.unwrap();
        }
        // It keeps its own.
        assert_eq!(driver.command(START, 0), BAD_MSG);
    }
}

#[test]
fn a_damaged_state_is_refused() {
    let device = Device::start(&["--controls"]);
    let mut driver = device.connect();
    driver.prepare(0, &Params::USUAL);
    driver.stop_all();
    let state = driver.front_end.save_state().unwrap();
    let part = &state[HEADER_SIZE..];
    let raw = driver.front_end.raw().unwrap();
    assert!(raw.loads(&state));
    let mut refused = 0;
    for place in 0..part.len() {
        for value in [0, 1, 2, 0x7f, 0x80, 0xff] {
            let mut damaged = part.to_vec();
            damaged[place] = value;
            refused += u32::from(!raw.loads(&sealed("sound", 1, &damaged)));
        }
        assert!(!raw.loads(&sealed("sound", 1, &part[..place])), "{place}");
    }
    assert!(refused > 0);
    // Where the first buffer begins: of stream 0, and of stream 1, which has no parameters.
    // The number and the values of three control elements follow.
    let second = part.len() - 5;
    let loads_with = |place: usize, value: u8| {
        assert_eq!(part[place], 0);
        let mut changed = part.to_vec();
        changed[place] = value;
        raw.loads(&sealed("sound", 1, &changed))
    };
    assert!(loads_with(second - 3, 4));
    assert!(!loads_with(second - 3, 3), "a part of a frame");
    assert!(!loads_with(second, 4), "a stream without buffers");
    assert!(!raw.loads(&sealed("sound", 2, part)));
    assert!(!raw.loads(&sealed("gpu", 1, part)));
    assert!(raw.loads(&state));
    driver.assert_alive();
}
