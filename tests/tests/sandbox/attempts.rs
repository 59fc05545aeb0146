// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Attempts of a compromised thread: files, programs, sockets and more.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;

use vhost_device_tests::attempts::{
    Attempt, CREATE, EXECUTABLE, FORBIDDEN, PROGRAMS_AND_SOCKETS, SESSION, assert_cannot_read, open,
};
use vhost_device_tests::intruder::Outcome;

use crate::{Device, GPU_WITH_3D, MAIN, Scene, for_each_device};

/// Asserts that this call, made in this thread, ends the process.
fn assert_ends(device: &Device, attempt: &Attempt, thread: &str) {
    let mut scene = device.start();
    let thread = scene.name(thread);
    attempt.assert_ends(&mut scene.running.program, &thread);
}

/// Asserts that each of these calls, made in any of these threads, ends the process.
fn assert_each_ends(device: &Device, attempts: &[Attempt], threads: &[&str]) {
    for attempt in attempts {
        for thread in threads {
            assert_ends(device, attempt, thread);
        }
    }
}

fn programs_and_sockets_end_the_process_in_all_threads(device: &Device) {
    assert_each_ends(device, PROGRAMS_AND_SOCKETS, device.threads);
}

/// Each in another thread: all threads have the same rules for these.
fn forbidden_operations_end_the_process(device: &Device) {
    for (attempt, thread) in FORBIDDEN.iter().zip(device.threads.iter().cycle()) {
        assert_ends(device, attempt, thread);
    }
}

fn code_cannot_be_made(device: &Device) {
    let threads: Vec<_> = match device.compiles {
        true => vec!["control"],
        false => device.threads.to_vec(),
    };
    assert_each_ends(device, EXECUTABLE, &threads);
}

fn operations_of_the_session_end_the_process_in_other_threads(device: &Device) {
    let others: Vec<_> = device
        .threads
        .iter()
        .copied()
        .filter(|thread| *thread != MAIN)
        .collect();
    assert_each_ends(device, SESSION, &others);
}

fn files_cannot_be_read(device: &Device) {
    let mut scene = device.start();
    let file = scene.directory().join("file");
    fs::write(&file, "of value").unwrap();
    for thread in device.threads {
        let mut intruder = scene.enter(thread);
        for path in [
            &*file,
            Path::new("/etc/passwd"),
            Path::new("/proc/self/mem"),
            Path::new("/"),
        ] {
            assert_cannot_read(&mut intruder, path);
        }
    }
    scene.assert_serves();
}

fn files_cannot_be_made(device: &Device) {
    if !device.opens_files {
        return assert_each_ends(device, &[CREATE], device.threads);
    }
    let mut scene = device.start();
    for thread in [MAIN, "queues"] {
        let mut intruder = scene.enter(thread);
        let file = scene.directory().join("made");
        let refused = open(&mut intruder, &file, libc::O_WRONLY | libc::O_CREAT);
        assert_eq!(refused, -i64::from(libc::EACCES), "{thread}");
        assert!(!file.exists());
    }
    scene.assert_serves();
}

fn a_violation_is_always_reported(device: &Device) {
    for thread in &device.threads[1..] {
        let mut scene = device.start();
        let mut intruder = scene.enter(thread);
        let arguments = [libc::SIGSYS as u64, 0, 0, 8];
        let outcome = intruder.call(libc::SYS_rt_sigaction, &arguments).unwrap();
        assert_eq!(outcome, Outcome::Ended, "{thread}");
        drop(intruder);
        assert_ended(&mut scene);

        let mut scene = device.start();
        let mut intruder = scene.enter(thread);
        let all = intruder.bytes(&[0xff; 8]).unwrap();
        let arguments = [libc::SIG_SETMASK as u64, all, 0, 8];
        let outcome = intruder.call(libc::SYS_rt_sigprocmask, &arguments).unwrap();
        assert_eq!(outcome, Outcome::Returned(0));
        // It cannot report the call, so it is killed.
        let outcome = intruder.call(libc::SYS_socket, &[1, 1]).unwrap();
        assert_ne!(outcome, Outcome::Returned(0));
        drop(intruder);
        assert_ended(&mut scene);
    }
}

fn assert_ended(scene: &mut Scene) {
    let status = scene
        .running
        .program
        .wait(vhost_device_tests::process::PATIENCE);
    assert_eq!(status.unwrap().signal(), Some(libc::SIGSYS));
}

for_each_device!(
    programs_and_sockets_end_the_process_in_all_threads,
    forbidden_operations_end_the_process,
    code_cannot_be_made,
    operations_of_the_session_end_the_process_in_other_threads,
    files_cannot_be_read,
    files_cannot_be_made,
    a_violation_is_always_reported,
);

#[test]
fn the_renderer_finds_its_libraries_but_cannot_write_there() {
    if !GPU_WITH_3D.is_possible() {
        return;
    }
    let scene = GPU_WITH_3D.start();
    let mut intruder = scene.enter("queues");
    let file = Path::new("/etc/ld.so.cache");
    assert!(open(&mut intruder, file, libc::O_RDONLY) >= 0);
    assert_eq!(
        open(&mut intruder, file, libc::O_RDWR),
        -i64::from(libc::EACCES)
    );
}
