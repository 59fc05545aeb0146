// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a guest can do after taking over the back-end: connect to unix sockets, and nothing else.

#![cfg(target_arch = "x86_64")]

use std::fs;
use std::path::Path;

use vhost_device_tests::attempts::{
    CREATE, EXECUTABLE, FORBIDDEN, PROGRAMS_AND_SOCKETS, assert_cannot_read,
};
use vhost_device_tests::intruder::{self, Intruder, Outcome};
use vhost_device_tests::skip::skip;

use super::*;

/// Names of the threads, the first of which is that of the program.
const THREADS: [&str; 4] = ["vhost-device-vs", "control", "log", "queues"];

/// Starts the back-end, which will not end normally, with all of its threads.
fn start() -> (Device, Guest) {
    let mut device = Device::start();
    device.program.expect_anything();
    let mut guest = device.connect();
    guest.assert_works(&device);
    (device, guest)
}

/// Returns whether this user can take over threads. Skips the test if not.
fn is_possible() -> bool {
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        skip("this host cannot run vhost-device-vsock as asked, or this is not root");
    }
    is_root
}

#[test]
fn programs_and_other_calls_end_the_process() {
    if !is_possible() {
        return;
    }
    let attempts = PROGRAMS_AND_SOCKETS.iter().chain(FORBIDDEN);
    let attempts = attempts.chain(EXECUTABLE).chain([&CREATE]);
    let mut threads = THREADS.iter().cycle();
    for attempt in attempts {
        // The threads of the queues and of the session connect to unix sockets.
        let connects = ["socket", "connect"].contains(&attempt.name);
        let thread = match connects {
            true => "control",
            false => threads.next().unwrap(),
        };
        let (mut device, _guest) = start();
        attempt.assert_ends(&mut device.program, thread);
    }
}

#[test]
fn no_other_sockets_than_unix_sockets_can_be_created() {
    if !is_possible() {
        return;
    }
    for domain in [
        libc::AF_INET,
        libc::AF_INET6,
        libc::AF_NETLINK,
        libc::AF_VSOCK,
    ] {
        let (device, _guest) = start();
        let id = device.program.id();
        let mut intruder = Intruder::enter(id, intruder::thread(id, "queues").unwrap()).unwrap();
        let arguments = [domain as u64, libc::SOCK_STREAM as u64, 0];
        let outcome = intruder.call(libc::SYS_socket, &arguments).unwrap();
        assert_eq!(outcome, Outcome::Trapped, "domain {domain}");
    }
}

#[test]
fn no_file_can_be_opened() {
    if !is_possible() {
        return;
    }
    let (device, _guest) = start();
    let file = device.path("file");
    fs::write(&file, "of value").unwrap();
    for thread in THREADS {
        let id = device.program.id();
        let mut intruder = Intruder::enter(id, intruder::thread(id, thread).unwrap()).unwrap();
        for path in [&*file, Path::new("/etc/passwd")] {
            assert_cannot_read(&mut intruder, path);
        }
    }
}
