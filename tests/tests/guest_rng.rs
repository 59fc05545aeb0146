// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `vhost-device-rng` with a Linux guest in QEMU.

#![cfg(test)]

use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use tempfile::TempDir;
use vhost_device_tests::guest::{Guest, Machine, Output};
use vhost_device_tests::process::{self, Program};

/// Time limit for the guest to reach the end of the source, once it reads.
const PATIENCE: Duration = Duration::from_secs(60);

/// Size of a request of Linux, in bytes.
const REQUEST: usize = 64;

/// The back-end with its own source. Dropping it ends the back-end and removes the source.
struct Rng {
    program: Program,
    directory: TempDir,
}

impl Rng {
    /// Starts the back-end with a source of these words.
    fn start(words: std::ops::Range<u32>, options: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let rng = directory.path().join("source");
        fs::write(&rng, bytes(words)).unwrap();
        let socket = directory.path().join("socket");
        let mut command = process::command("vhost-device-rng").unwrap();
        command
            .arg(process::option("socket-path", &socket))
            .arg(process::option("rng-source", &rng))
            .args(options);
        let program = Program::serve(&mut command, &socket).unwrap();
        Self { program, directory }
    }

    fn wait_for_log(&self, message: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.program.stderr().contains(message) {
            assert!(
                Instant::now() < deadline,
                "the back-end did not log {message:?}"
            );
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Panics unless the queue was started at least this often, each time as a packed ring: QEMU offers packed rings to guests whenever a
    /// back-end supports them.
    fn assert_packed(&self, starts: usize) {
        let log = self.program.stderr();
        let started: Vec<_> = log
            .lines()
            .filter(|line| line.contains("queue 0 started: "))
            .collect();
        assert!(started.len() >= starts, "{log}");
        assert!(
            started.iter().all(|line| line.contains("packed ring")),
            "{log}"
        );
    }

    fn source(&self) -> PathBuf {
        self.directory.path().join("source")
    }

    /// Creates a machine whose `/dev/hwrng` is this device.
    fn machine(&self, name: &str, script: &str) -> Machine {
        let script = format!(
            r#"
            rng=/sys/class/misc/hw_random/rng_current
            until grep -q virtio_rng $rng; do sleep 0.1; done
            {script}
            "#
        );
        Machine::new(name, script)
            .module("virtio-rng")
            .vhost_user("vhost-user-rng-pci", &self.directory.path().join("socket"))
    }
}

/// Returns the words as bytes.
fn bytes(words: std::ops::Range<u32>) -> Vec<u8> {
    words.flat_map(u32::to_le_bytes).collect()
}

/// Panics unless the words that the guest printed are those of the source, in order. The kernel has taken the missing words
/// for itself.
fn assert_in_order(output: &Output, marker: &str, count: usize) -> u32 {
    let words: Vec<u32> = output
        .values(marker)
        .flat_map(str::split_whitespace)
        .map(|word| u32::from_str_radix(word, 16).unwrap())
        .collect();
    assert_eq!(words.len(), count);
    let mut missing = words[0];
    for pair in words.windows(2) {
        assert!(pair[0] < pair[1], "{} comes after {}", pair[1], pair[0]);
        missing += pair[1] - pair[0] - 1;
    }
    let request = (REQUEST / 4) as u32;
    assert_eq!(missing % request, 0, "{missing} words are missing");
    assert!(missing <= 16 * request, "{missing} words are missing");
    words[count - 1]
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn the_bytes_of_the_source_come_in_order() {
    let rng = Rng::start(0..1 << 20, &[]);
    let script = r#"
        dd if=/dev/hwrng of=/tmp/bytes bs=1024 count=32
        od -A n -v -t x4 /tmp/bytes | sed 's/^/@words /'
    "#;
    let mut guest = rng.machine("rng_order", script).start().unwrap();
    let output = guest.finish().unwrap();
    assert_in_order(&output, "words", 32 * 1024 / 4);
    assert_eq!(guest.qemu_stderr(), "");
    rng.assert_packed(1);
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn bytes_come_after_a_reset() {
    const COUNT: usize = 512 / 4;
    let rng = Rng::start(0..1 << 20, &[]);
    let script = r#"
        dd if=/dev/hwrng of=/tmp/bytes bs=512 count=1
        od -A n -v -t x4 /tmp/bytes | tr -d '\n' | sed 's/^/@words /'
        echo
        while :; do sleep 1; done
    "#;
    let machine = rng.machine("rng_reset", script);
    let mut guest = machine.reboots().start().unwrap();
    let boot = |guest: &mut Guest| -> Vec<u32> {
        let words = guest.wait("words").unwrap();
        let words = words.split_whitespace();
        words
            .map(|word| u32::from_str_radix(word, 16).unwrap())
            .collect()
    };
    let first = boot(&mut guest);
    let mut qmp = guest.qmp().unwrap();
    qmp.execute("system_reset", json!({})).unwrap();
    let second = boot(&mut guest);
    assert_eq!((first.len(), second.len()), (COUNT, COUNT));
    assert!(first[COUNT - 1] < second[0], "the source begins again");
    rng.assert_packed(2);
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn the_quota_holds_in_the_guest() {
    const PERIODS: f64 = 10.0;
    let rng = Rng::start(0..1 << 20, &["--max-bytes=1024", "--period=500"]);
    // The start is in the middle of a quota period, so that it makes no difference if the kernel takes a few bytes.
    let script = r#"
        dd if=/dev/hwrng of=/dev/null bs=512 count=5
        read start rest < /proc/uptime
        dd if=/dev/hwrng of=/dev/null bs=512 count=20
        read end rest < /proc/uptime
        echo "@times $start $end"
    "#;
    let mut guest = rng.machine("rng_quota", script).start().unwrap();
    let output = guest.finish().unwrap();
    let times = output.value("times").unwrap().split_whitespace();
    let times: Vec<f64> = times.map(|time| time.parse().unwrap()).collect();
    let periods = (times[1] - times[0]) / 0.5;
    println!("{periods:.2} periods for the bytes of {PERIODS}");
    assert!((periods / PERIODS - 1.0).abs() < 0.1, "{periods} periods");
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn a_guest_outlives_the_end_of_the_source() {
    const KIB: u32 = 1024 / 4;
    let rng = Rng::start(0..16 * KIB, &[]);
    let script = r#"
        dd if=/dev/hwrng of=/tmp/bytes bs=1024 count=8
        echo @begin
        dd if=/dev/hwrng bs=1024 count=16 >> /tmp/bytes
        od -A n -v -t x4 /tmp/bytes | sed 's/^/@words /'
    "#;
    let mut guest = rng.machine("rng_end", script).start().unwrap();
    guest.wait("begin").unwrap();
    rng.wait_for_log("no bytes from the source");
    let mut file = File::options().append(true).open(rng.source()).unwrap();
    file.write_all(&bytes(16 * KIB..64 * KIB)).unwrap();
    let output = guest.finish().unwrap();
    let last = assert_in_order(&output, "words", 24 * KIB as usize);
    assert!(last >= 16 * KIB);
}
