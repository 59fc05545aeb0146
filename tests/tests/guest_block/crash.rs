// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A back-end that is killed repeatedly under a guest, and its successors, to which QEMU connects.

use std::os::unix::process::ExitStatusExt;
use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;
use vhost_device_common::ring::crash_point::{KILL_AFTER, Step};
use vhost_device_tests::guest::{Guest, Machine};
use vhost_device_tests::process::{Program, Signal, kills};

use super::{Block, FORMATS, VERIFY, assert_format, check_verified, spawn};

/// Default number of kills.
const FEW_KILLS: u64 = 3;
/// Seconds that the guest works, in addition to those for each kill.
const SECONDS: u64 = 10;
const SECONDS_PER_KILL: u64 = 2;
/// Time limit for QEMU and its guest, which are slow without KVM.
const PATIENCE: Duration = Duration::from_secs(60);

/// Interval at which the log of a device is read.
const INTERVAL: Duration = Duration::from_millis(2);

/// Numbers of requests of the protocol.
const GET_INFLIGHT_FD: u32 = 31;
const SET_INFLIGHT_FD: u32 = 32;

/// Steps after which a device kills itself, in turn. At least after the first, requests are in flight.
const STEPS: [Step; 4] = [
    Step::Taken,
    Step::CarriedOut,
    Step::Completed,
    Step::Published,
];

/// Log line of a device when QEMU has connected to it.
const STARTED: &str = "queue 0 started";

/// Kills a device some time after QEMU has connected to it.
fn kill(program: &mut Program, after: Duration) {
    let deadline = Instant::now() + PATIENCE;
    let mut end = None;
    while end.is_none_or(|end| Instant::now() < end) {
        if end.is_none() && program.stderr().contains(STARTED) {
            end = Some(Instant::now() + after);
        }
        assert!(Instant::now() < deadline, "QEMU does not connect");
        thread::sleep(INTERVAL);
    }
    program.signal(Signal::KILL).unwrap();
}

/// Returns the number of requests that a device has taken over from its predecessor, according to its log.
fn taken_again(log: &str) -> u64 {
    let started = log.lines().find(|line| line.contains(STARTED));
    let count = started.and_then(|line| line.split_once(", recovering "));
    count.map_or(0, |(_, rest)| {
        rest.split(' ').next().unwrap().parse().unwrap()
    })
}

/// Returns how often QEMU has sent a request.
fn sent(guest: &Guest, request: u32) -> u64 {
    let message = format!("vhost_user_write req:{request} ");
    let trace = guest.qemu_stderr();
    trace.lines().filter(|line| line.contains(&message)).count() as u64
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn fio_finds_no_error_while_the_device_is_killed() {
    kill_under_a_guest(FORMATS[0]);
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn fio_finds_no_error_while_the_device_is_killed_with_packed_rings() {
    kill_under_a_guest(FORMATS[1]);
}

fn kill_under_a_guest((format, properties): (&str, &str)) {
    let kills = kills(FEW_KILLS);
    let seconds = SECONDS + SECONDS_PER_KILL * kills;
    let script = format!(
        r#"{VERIFY}
        verify --bsrange=4k-64k --runtime={seconds} &
        job=$!
        while [ "$(awk '{{ print $5 }}' /sys/block/vda/stat)" -lt 100 ]; do kill -0 $job; done
        echo "@busy"
        wait $job
        "#
    );
    let mut block = Block::start(128, &[]);
    let socket = block.directory.path().join("socket");
    let mut guest = Machine::new(&format!("fio_kills_{format}"), script)
        .module("virtio_blk")
        .program("fio")
        .vhost_user_reconnecting(&format!("vhost-user-blk-pci{properties}"), &socket)
        .memory(768)
        .deadline(Duration::from_secs(240 + seconds))
        .argument("-trace")
        .argument("vhost_user_write")
        .start()
        .unwrap();
    guest.wait("busy").unwrap();
    let files = sent(&guest, GET_INFLIGHT_FD);
    assert_ne!(files, 0);

    let start = Instant::now();
    let mut random = Rng::with_seed(17);
    let mut steps = STEPS.iter().cycle();
    let mut again = 0;
    for number in 0..kills {
        // Every second one kills itself, except the first, which has no such setting.
        if number % 2 == 0 {
            kill(&mut block.program, Duration::from_millis(random.u64(..300)));
        }
        let status = block.program.wait(PATIENCE).unwrap();
        assert_eq!(status.signal(), Some(Signal::KILL.as_raw()), "{status}");
        again += taken_again(&block.program.stderr());
        block.program = spawn(block.directory.path(), |command| {
            if number % 2 == 0 && number + 1 < kills {
                let step = steps.next().unwrap().name();
                command.env(KILL_AFTER, format!("{step}:{}", random.u8(1..=100)));
            }
        });
    }
    let took = start.elapsed();
    assert!(
        took < Duration::from_secs(seconds),
        "the guest may have been done before the last kill: they took {took:?}"
    );
    check_verified(&guest.finish().unwrap(), seconds);

    again += taken_again(&block.program.stderr());
    assert!(again > 0, "no request was taken again");
    assert_format(&block, format);
    println!("{again} requests taken again over {kills} kills in {took:?}");
    // All devices get the file that the first one created for this driver.
    assert_eq!(sent(&guest, GET_INFLIGHT_FD), files);
    assert!(sent(&guest, SET_INFLIGHT_FD) >= files + kills);
}
