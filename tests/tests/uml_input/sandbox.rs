// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a guest can do after taking over the back-end: use the node, and nothing else.

#![cfg(target_arch = "x86_64")]

use std::fs;
use std::path::Path;

use vhost_device_tests::attempts::{
    CREATE, EXECUTABLE, FORBIDDEN, PROGRAMS_AND_SOCKETS, assert_cannot_read,
};
use vhost_device_tests::evdev::{Device, devices};
use vhost_device_tests::intruder::{self, Intruder};

use super::{Driver, Input};

/// Names of the threads, the first of which is that of the program.
const THREADS: [&str; 4] = ["vhost-device-in", "control", "log", "queues"];

/// Starts the back-end, which will not end normally.
fn start(device: &Device) -> Input {
    let mut input = Input::start(device);
    input.program.expect_anything();
    input
}

#[test]
#[ignore = "needs uinput"]
fn programs_and_sockets_end_the_process_in_all_threads() {
    let device = Device::create(&devices::KEYBOARD).unwrap();
    for attempt in PROGRAMS_AND_SOCKETS {
        for thread in THREADS {
            let mut input = start(&device);
            let _driver = Driver::connect(&input);
            attempt.assert_ends(&mut input.program, thread);
        }
    }
}

#[test]
#[ignore = "needs uinput"]
fn forbidden_operations_end_the_process() {
    let device = Device::create(&devices::KEYBOARD).unwrap();
    let attempts = FORBIDDEN.iter().chain(EXECUTABLE).chain([&CREATE]);
    for (attempt, thread) in attempts.zip(THREADS.iter().cycle()) {
        let mut input = start(&device);
        let _driver = Driver::connect(&input);
        attempt.assert_ends(&mut input.program, thread);
    }
}

#[test]
#[ignore = "needs uinput"]
fn no_file_can_be_opened() {
    let device = Device::create(&devices::KEYBOARD).unwrap();
    let input = start(&device);
    let _driver = Driver::connect(&input);
    let stderr = input.program.stderr();
    assert!(!stderr.contains("landlock"), "{stderr}");
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    fs::write(&file, "of value").unwrap();
    for thread in THREADS {
        let id = input.program.id();
        let mut intruder = Intruder::enter(id, intruder::thread(id, thread).unwrap()).unwrap();
        for path in [&*file, Path::new("/dev/uinput"), device.node()] {
            assert_cannot_read(&mut intruder, path);
        }
    }
}
