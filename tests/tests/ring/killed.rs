// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Front-ends that are killed while many of their requests are in flight.

use std::env;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use vhost_device_tests::front_end::FrontEnd;
use vhost_device_tests::process::{Program, Signal};
use vhost_device_tests::target::{Block, Console, Gpu, Rng, Scsi, Sound, Target, assert_works};

use crate::{Load, Mode, PATIENCE, usual};

/// Environment variables for the front-end that is killed: its target and socket, and whether its rings are packed.
const TARGET: &str = "VHOST_DEVICE_TEST_TARGET";
const SOCKET: &str = "VHOST_DEVICE_TEST_SOCKET";
const PACKED: &str = "VHOST_DEVICE_TEST_PACKED";
/// Output when its requests are in flight.
const BUSY: &str = "requests are on their way";

/// Requests in flight on a queue.
const DEPTH: usize = 128;

/// The front-end, in its own process.
#[test]
#[ignore = "does nothing where no other test runs it"]
fn front_end() {
    let Some(socket) = env::var_os(SOCKET) else {
        return;
    };
    let target: &dyn Target = match env::var(TARGET).unwrap().as_str() {
        "vhost-device-console" => &Console,
        "vhost-device-rng" => &Rng,
        "vhost-device-gpu" => &Gpu,
        "vhost-device-scsi" => &Scsi,
        "vhost-device-sound" => &Sound,
        _ => &Block { io_engine: "auto" },
    };
    let packed = env::var(PACKED).unwrap() == "true";
    let mode = usual(target).find(|mode| mode.packed == packed).unwrap();
    let front_end = FrontEnd::connect(Path::new(&socket), &mode.front_end()).unwrap();
    let memory = front_end.memory();
    let mut queue = mode.queue(&front_end, 256, 0);
    let mut load = Load::new(target, memory, &queue, DEPTH);
    load.run(&mut queue, 2 * DEPTH as u32);
    println!("{BUSY}");
    loop {
        load.run(&mut queue, 10_000);
    }
}

/// SIGKILL at any moment: the front-end leaves nothing behind, and the next one is served.
fn a_killed_front_end_leaves_no_resources_behind(target: &dyn Target) {
    const KILLS: usize = 6;
    let mut running = target.start();
    let before = running.program.resources().unwrap();
    let modes: Vec<Mode> = usual(target).collect();
    for mode in modes.into_iter().cycle().take(KILLS) {
        let mut command = Command::new(env::current_exe().unwrap());
        command
            .args(["killed::front_end", "--exact", "--ignored", "--nocapture"])
            .env(TARGET, target.name())
            .env(PACKED, mode.packed.to_string())
            .env(SOCKET, &running.socket);
        let mut front_end = Program::spawn(&mut command).unwrap();
        assert!(is_busy(&mut front_end), "it does nothing");
        std::thread::sleep(Duration::from_micros(fastrand::u64(0..5000)));
        front_end.end(Signal::KILL, PATIENCE).unwrap();
        let (next, mut queue) = mode.start(&running, 16, 0);
        assert_works(target, next.memory(), &mut queue);
        drop(next);
        running.program.wait_for_resources(before).unwrap();
    }
}

/// Waits until a front-end has requests in flight.
fn is_busy(front_end: &mut Program) -> bool {
    let deadline = std::time::Instant::now() + PATIENCE;
    while !front_end.stdout().contains(BUSY) {
        if std::time::Instant::now() > deadline || front_end.status().unwrap().is_some() {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    true
}

crate::for_each_target![
    Claim::NoLeak =>
    a_killed_front_end_leaves_no_resources_behind
];
