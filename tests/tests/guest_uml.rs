// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Devices of a guest without QEMU: User-Mode Linux is the front-end, a second implementation beside QEMU's. Its calls are stream
//! sockets, it uses no ERR eventfd, and its packed rings begin at base 0.

#![cfg(test)]

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vhost_device_tests::process::{Program, command, option};
use vhost_device_tests::uml;
use vhost_device_tests::uml::front_end::{self, Device};

/// VIRTIO's numbers of device types.
const BLOCK: u32 = 2;
const RNG: u32 = 4;

/// A guest takes about a second. One that hangs is ended.
const LIMIT: Duration = Duration::from_secs(5);
const PATIENCE: Duration = Duration::from_secs(60);

/// A back-end, and the directory that it shares with a guest.
struct BackEnd {
    work: TempDir,
    program: Program,
}

impl BackEnd {
    fn start(name: &str, arguments: impl FnOnce(&Path, &mut Command)) -> Self {
        // The kernel is built before the clock starts.
        vhost_device_tests::uml::kernel::prepare().unwrap();
        let work = uml::work().unwrap();
        let socket = work.path().join("socket");
        let mut command = command(name).unwrap();
        command.arg(option("socket-path", &socket));
        arguments(work.path(), &mut command);
        let program = Program::serve(&mut command, &socket).unwrap();
        Self { work, program }
    }

    /// Runs a script in a guest with this device.
    fn guest(&mut self, id: u32, script: &str) {
        let work = self.work.path();
        let socket = work.join("socket");
        let begin = Instant::now();
        let device = Device {
            socket: &socket,
            id,
        };
        let status = front_end::run(&[device], script, work, PATIENCE).unwrap();
        assert_eq!(status, 0, "status of the script");
        assert!(begin.elapsed() < LIMIT, "{:?}", begin.elapsed());
        assert!(self.program.status().unwrap().is_none());
    }
}

fn random_bytes(count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    fastrand::Rng::with_seed(3).fill(&mut bytes);
    bytes
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn user_mode_linux_reads_and_writes_a_disk() {
    const SIZE: usize = 4 << 20;
    const HALF: usize = SIZE / 2;
    let contents = random_bytes(SIZE);
    let mut back_end = BackEnd::start("vhost-device-block", |work, command| {
        fs::write(work.join("image"), &contents).unwrap();
        command.arg(option("blk-file", work.join("image")));
    });
    // Twice: the second guest finds what the first one has left.
    for round in 0..2u8 {
        back_end.guest(
            BLOCK,
            "dd bs=64k if=/dev/vda of=$work/read || exit 2
            dd bs=64k if=$work/read of=/dev/vda seek=32 count=32 conv=fsync || exit 3",
        );
        let work = back_end.work.path();
        let image = fs::read(work.join("image")).unwrap();
        let mut read = fs::read(work.join("read")).unwrap();
        if round == 0 {
            assert!(read == contents, "what the guest has read");
        }
        read.copy_within(..HALF, HALF);
        assert!(image == read, "what the guest has written");
    }
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn user_mode_linux_gets_random_numbers() {
    let contents = random_bytes(1 << 20);
    let mut back_end = BackEnd::start("vhost-device-rng", |work, command| {
        fs::write(work.join("source"), &contents).unwrap();
        command.arg(option("rng-source", work.join("source")));
    });
    back_end.guest(
        RNG,
        "dd if=/dev/hwrng of=$work/read bs=512 count=1 || exit 2",
    );
    let read = fs::read(back_end.work.path().join("read")).unwrap();
    assert_eq!(read.len(), 512);
    let is_part = contents.windows(64).any(|part| part == &read[..64]);
    assert!(is_part, "the bytes are not those of the source");
}
