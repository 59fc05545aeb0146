// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest that migrates between two QEMUs, and its disk between two `vhost-device-block`, while it writes and verifies.

#![cfg(test)]

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;
use vhost_device_tests::guest::{Guest, Machine};
use vhost_device_tests::process::{self, Program};

/// Environment variable with another number of migrations, there and back again in turn.
const MIGRATIONS: &str = "VHOST_DEVICE_MIGRATIONS";
const FEW_MIGRATIONS: usize = 2;

const MIB: usize = 1 << 20;
/// The first part of the disk is written, the second is only read; the last sector is for messages of the host.
const WRITTEN: usize = 64 * MIB;
const READ: usize = 16 * MIB;
const SECTOR: usize = 512;
const STOP: &[u8] = b"stop";

/// Writes and verifies until the host says stop. At the same time a part of the disk is read, again and again: some times from the disk
/// into the cache, some times what lies in the cache, which the device had written there before the guest migrated.
const SCRIPT: &str = r#"
    exec 3< /dev/vda
    sum() { dd if=/dev/vda bs=1M skip=64 count=16 2> /dev/null | md5sum; }
    sum > /tmp/sum
    while [ ! -e /tmp/stop ]; do
        for i in 1 2 3; do sum | cmp -s - /tmp/sum || touch /tmp/wrong; echo >> /tmp/sums; done
        echo 3 > /proc/sys/vm/drop_caches
    done &
    reader=$!
    (
        while [ ! -e /tmp/stop ]; do
            echo "@io $(awk '{ print $1 + $5 }' /sys/block/vda/stat)"
            sleep 1
            word=$(dd if=/dev/vda bs=512 skip=163840 count=1 iflag=direct 2> /dev/null | head -c 4)
            [ "$word" != stop ] || touch /tmp/stop
        done
    ) &
    while [ ! -e /tmp/stop ]; do
        fio --name=verify --filename=/dev/vda --size=64m --direct=1 --ioengine=libaio --iodepth=16 --rw=randrw \
            --verify=crc32c --verify_backlog=256 --verify_fatal=1 --time_based --runtime=8 --bsrange=4k-64k \
            --disable_lat=1 --disable_slat=1 --disable_clat=1 --eta=never --output-format=json --output=/tmp/fio
        echo "@fio $(tr -d ' \n' < /tmp/fio)"
    done
    wait $reader
    echo "@sums $(wc -l < /tmp/sums)"
    [ ! -e /tmp/wrong ] || echo "@wrong"
"#;

/// A back-end at its own socket.
struct Block {
    program: Program,
    directory: TempDir,
}

impl Block {
    fn start(image: &Path, options: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        let mut command = process::command("vhost-device-block").unwrap();
        command
            .env_remove("RUST_LOG")
            .arg(process::option("socket-path", &socket))
            .arg(process::option("blk-file", image))
            .args(options);
        let program = Program::serve(&mut command, &socket).unwrap();
        Self { program, directory }
    }

    fn machine(&self, name: &str, properties: &str, lifetime: Duration) -> Machine {
        let device = format!("vhost-user-blk-pci{properties}");
        Machine::new(name, SCRIPT)
            .module("virtio_blk")
            .program("fio")
            .memory(384)
            .deadline(lifetime)
            .vhost_user(&device, &self.directory.path().join("socket"))
    }

    /// Panics unless the rings of the guest that is here are of this format.
    fn check_format(&self, format: &str) {
        let log = self.program.stderr();
        let started = log.lines().rfind(|line| line.contains(" started: "));
        let started = started.expect("a ring that was started");
        assert!(started.contains(format), "{started}");
    }

    /// Returns how often the back-end was told to log what it writes.
    fn times_logged(&self) -> usize {
        self.program.stderr().matches("writes is logged").count()
    }
}

/// Waits until the guest's disk has been busy for a while.
fn wait_for_io(guest: &mut Guest) {
    let mut requests = || -> u64 { guest.wait("io").unwrap().parse().unwrap() };
    let enough = requests() + 50;
    while requests() < enough {}
}

/// Checks what fio wrote on one of the machines. Returns how many bytes it verified.
fn check(guest: &Guest) -> u64 {
    let output = guest.output();
    assert_eq!(output.values("wrong").count(), 0, "what was read is wrong");
    let reports = output.values("fio").map(|report| {
        let report: Value = serde_json::from_str(report).unwrap();
        let job = &report["jobs"][0];
        assert_eq!(job["error"], 0, "{job:#}");
        job["read"]["io_bytes"].as_u64().unwrap()
    });
    reports.sum()
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn a_guest_migrates_to_and_fro_while_it_writes_and_verifies() {
    migrate("migration", "", "split ring");
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn a_guest_migrates_to_and_fro_on_packed_rings() {
    migrate("migration_packed", ",packed=on", "packed ring");
}

fn migrate(name: &str, properties: &str, format: &str) {
    let migrations = std::env::var(MIGRATIONS).map_or(FEW_MIGRATIONS, |text| {
        text.parse().expect("a number of migrations")
    });
    let lifetime = Duration::from_secs(240 + 60 * migrations as u64);
    let files = tempfile::tempdir().unwrap();
    let image = files.path().join("image");
    let mut content = vec![0; WRITTEN + READ + SECTOR];
    File::open("/dev/urandom")
        .unwrap()
        .read_exact(&mut content)
        .unwrap();
    fs::write(&image, &content).unwrap();

    let mut here = Block::start(&image, &[]);
    let mut there = Block::start(&image, &["--incoming"]);
    let mut verified = 0;
    let machine = here.machine(&format!("{name}_0"), properties, lifetime);
    let mut guest = machine.start().unwrap();
    for number in 1..=migrations {
        wait_for_io(&mut guest);
        let place = files.path().join(format!("migration-{number}"));
        let machine = there.machine(&format!("{name}_{number}"), properties, lifetime);
        let mut next = machine.incoming(&place).start().unwrap();
        verified += check(&guest);
        here.check_format(format);
        let logged = here.times_logged();
        let report = guest.migrate(&place).unwrap();
        eprintln!(
            "migration {number}: {} ms, of which the guest stood still for {} ms",
            report["total-time"], report["downtime"]
        );
        assert_eq!(
            here.times_logged(),
            logged + 1,
            "dirty pages were not logged"
        );
        wait_for_io(&mut next);
        guest = next;
        std::mem::swap(&mut here, &mut there);
    }
    let disk = File::options().write(true).open(&image).unwrap();
    disk.write_all_at(STOP, (WRITTEN + READ) as u64).unwrap();
    let output = guest.finish().unwrap();
    here.check_format(format);
    verified += check(&guest);
    assert!(verified > MIB as u64, "{verified} bytes were verified");
    let sums: u32 = output.value("sums").unwrap().parse().unwrap();
    assert!(sums > 3, "{sums} sums");
    let unchanged = fs::read(&image).unwrap();
    assert!(unchanged[WRITTEN..][..READ] == content[WRITTEN..][..READ]);
}
