// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Every command in every state of a stream (VIRTIO 1.3, 5.14.6.6.1).

use crate::{
    BAD_MSG, Device, Driver, IO_ERR, OK, PREPARE, Params, RELEASE, RX, SET_PARAMS, START, STOP, TX,
    words,
};

/// The commands that lead to a state, and the commands that are possible there.
const STATES: [(&str, &[u32], &[u32]); 6] = [
    ("reset", &[], &[SET_PARAMS]),
    ("set", &[SET_PARAMS], &[SET_PARAMS, PREPARE]),
    (
        "prepared",
        &[SET_PARAMS, PREPARE],
        &[SET_PARAMS, PREPARE, START, RELEASE],
    ),
    ("running", &[SET_PARAMS, PREPARE, START], &[STOP]),
    (
        "stopped",
        &[SET_PARAMS, PREPARE, START, STOP],
        &[START, RELEASE],
    ),
    // Linux repeats RELEASE if its wait was interrupted.
    (
        "released",
        &[SET_PARAMS, PREPARE, RELEASE],
        &[SET_PARAMS, PREPARE, RELEASE],
    ),
];
const COMMANDS: [u32; 5] = [SET_PARAMS, PREPARE, RELEASE, START, STOP];

/// The name of the state after a command.
fn after(command: u32) -> &'static str {
    match command {
        SET_PARAMS => "set",
        PREPARE => "prepared",
        RELEASE => "released",
        START => "running",
        _ => "stopped",
    }
}

fn send(driver: &mut Driver, command: u32, stream: u32) -> u32 {
    match command {
        SET_PARAMS => driver.status(&Params::USUAL.request(stream)),
        command => driver.command(command, stream),
    }
}

#[test]
fn a_command_succeeds_where_the_specification_allows_it() {
    let device = Device::start(&[]);
    for stream in [0, 1] {
        for (name, path, possible) in STATES {
            for command in COMMANDS {
                // The end of a connection resets the device.
                let mut driver = device.connect();
                for step in path {
                    assert_eq!(send(&mut driver, *step, stream), OK);
                }
                let fits = possible.contains(&command);
                let expected = if fits { OK } else { BAD_MSG };
                let status = send(&mut driver, command, stream);
                assert_eq!(status, expected, "{name} {command:#x}");
                let state = if fits { after(command) } else { name };
                let report = device.stream(stream as usize);
                assert_eq!(report["state"], state, "{name} {command:#x}");
                driver.assert_alive();
            }
        }
    }
}

#[test]
fn a_stream_takes_buffers_from_prepare_to_release() {
    let device = Device::start(&[]);
    for (name, path, _) in STATES {
        let mut driver = device.connect();
        for step in path {
            for stream in [0, 1] {
                assert_eq!(send(&mut driver, *step, stream), OK);
            }
        }
        driver.play(0, &[0; 1920], 1);
        driver.record(1, 1920, 2);
        match name {
            "prepared" | "stopped" => {
                driver.assert_quiet(TX);
                driver.assert_quiet(RX);
            }
            "running" => {
                for queue in [TX, RX] {
                    assert_eq!(driver.wait(queue).status, OK);
                }
            }
            _ => {
                for queue in [TX, RX] {
                    let done = driver.wait(queue);
                    assert_eq!((done.status, done.used), (IO_ERR, 8), "{name}");
                }
            }
        }
    }
}

#[test]
fn a_stream_can_be_used_again_and_again() {
    let device = Device::start(&[]);
    let mut driver = device.connect();
    for round in 0..50 {
        driver.prepare(0, &Params::USUAL);
        for tag in 0..4 {
            driver.play(0, &[0; 1920], tag);
        }
        driver.commands(&[START], 0);
        if round % 2 == 0 {
            assert_eq!(driver.wait(TX).tag, 0);
        }
        driver.commands(&[STOP, RELEASE], 0);
        // All buffers are back before the reply.
        while driver.take(TX).is_some() {}
        assert!(driver.pending.is_empty());
    }
}

#[test]
fn streams_that_do_not_exist_get_no_commands() {
    let device = Device::start(&[]);
    let mut driver = device.connect();
    for stream in [2, 3, 255, 1 << 16, u32::MAX] {
        for command in COMMANDS {
            assert_eq!(send(&mut driver, command, stream), BAD_MSG);
        }
    }
    for command in COMMANDS {
        assert_eq!(driver.status(&words(&[command])), BAD_MSG, "no stream");
        assert_eq!(driver.status(&[0x05, 1, 0]), BAD_MSG, "no code");
    }
    let request = Params::USUAL.request(0);
    for length in 8..request.len() {
        assert_eq!(driver.status(&request[..length]), BAD_MSG, "{length}");
    }
}

#[test]
fn new_parameters_discard_what_was_queued() {
    let device = Device::start(&[]);
    let mut driver = device.connect();
    driver.prepare(0, &Params::USUAL);
    driver.play(0, &[0; 1920], 7);
    driver.assert_quiet(TX);
    driver.set_params(0, &Params::USUAL);
    assert_eq!(driver.wait(TX).tag, 7);
    driver.commands(&[PREPARE, START, STOP, RELEASE], 0);
}
