// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest that migrates between two QEMUs, and its disk between two `vhost-device-block`, while it writes and verifies.

#![cfg(test)]

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;
use vhost_device_storage::engine::slow::SLOW_DISK;
use vhost_device_tests::guest::qemu::NewQemu;
use vhost_device_tests::guest::{Guest, Machine};
use vhost_device_tests::process::{self, Program};

/// Environment variable with another number of migrations, there and back again in turn.
const MIGRATIONS: &str = "VHOST_DEVICE_MIGRATIONS";
const FEW_MIGRATIONS: usize = 2;

const MIB: usize = 1 << 20;
/// The first part of the disk is written, the second is only read; the last sector holds messages of the host.
const WRITTEN: usize = 64 * MIB;
const READ: usize = 16 * MIB;
const SECTOR: usize = 512;
const STOP: &[u8] = b"stop";

/// Writes and verifies until the host says stop. At the same time it reads a part of the disk repeatedly: partly from the disk
/// into the cache, partly what is in the cache, which the device had written there before the migration.
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

/// How long the disk takes for an operation in a guest that migrates without waiting for it, in milliseconds.
const SLOW: u64 = 2000;

/// A back-end at its own socket, on a disk that can be slow.
struct Block {
    program: Program,
    directory: TempDir,
}

/// How guests migrate.
#[derive(Default)]
struct Migration {
    name: &'static str,
    /// Of the device.
    properties: &'static str,
    /// What the back-end calls the rings.
    format: &'static str,
    /// This QEMU migrates the requests in flight too.
    with_requests: Option<NewQemu>,
}

impl Block {
    fn start(image: &Path, options: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        fs::write(directory.path().join("milliseconds"), "0").unwrap();
        let mut command = process::command("vhost-device-block").unwrap();
        command
            .env_remove("RUST_LOG")
            .env(SLOW_DISK, directory.path().join("milliseconds"))
            .arg(process::option("socket-path", &socket))
            .arg(process::option("blk-file", image))
            .args(options);
        let program = Program::serve(&mut command, &socket).unwrap();
        Self { program, directory }
    }

    fn machine(&self, migration: &Migration, number: usize, lifetime: Duration) -> Machine {
        let device = format!("vhost-user-blk-pci{}", migration.properties);
        let machine = Machine::new(&format!("{}_{number}", migration.name), SCRIPT)
            .module("virtio_blk")
            .program("fio")
            .memory(384)
            .deadline(lifetime)
            .vhost_user(&device, &self.directory.path().join("socket"));
        match &migration.with_requests {
            Some(qemu) => machine.qemu(qemu.clone()),
            None => machine,
        }
    }

    /// Has each operation from now on begin so many milliseconds late.
    fn set_slow(&self, milliseconds: u64) {
        let file = self.directory.path().join("milliseconds");
        fs::write(file, format!("{milliseconds:<8}")).unwrap();
    }

    /// Makes the disk slow when the device is told that its guest migrates: requests from before would be waited for.
    fn slow_down_after(&self, logged: usize, is_over: &AtomicBool) {
        while self.times_logged() == logged && !is_over.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(5));
        }
        self.set_slow(SLOW);
    }

    /// Returns how many requests came along that were in flight on the other side.
    fn taken_along(&self) -> u32 {
        let log = self.program.stderr();
        let lines = log.lines().filter(|line| line.contains(" started: "));
        let counts = lines.filter_map(|line| {
            let (_, count) = line.split_once(", recovering ")?;
            count.split(' ').next()?.parse::<u32>().ok()
        });
        counts.sum()
    }

    /// Panics unless the rings of the current guest have this format.
    fn check_format(&self, format: &str) {
        let log = self.program.stderr();
        let started = log.lines().rfind(|line| line.contains(" started: "));
        let started = started.expect("a ring that was started");
        assert!(started.contains(format), "{started}");
    }

    /// Returns how often logging was enabled in the back-end.
    fn times_logged(&self) -> usize {
        self.program
            .stderr()
            .matches("dirty page logging is enabled")
            .count()
    }
}

/// Waits until the guest's disk has been busy for a while.
fn wait_for_io(guest: &mut Guest) {
    let mut requests = || -> u64 { guest.wait("io").unwrap().parse().unwrap() };
    let enough = requests() + 50;
    while requests() < enough {}
}

/// Checks fio's result on one of the machines. Returns how many bytes it verified.
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
    migrate(&Migration {
        name: "migration",
        format: "split ring",
        ..Migration::default()
    });
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn a_guest_migrates_to_and_fro_on_packed_rings() {
    migrate(&Migration {
        name: "migration_packed",
        properties: ",packed=on",
        format: "packed ring",
        ..Migration::default()
    });
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn a_guest_migrates_to_and_fro_and_does_not_wait_for_its_disk() {
    migrate_with_requests("migration_requests", ",inflight-migration=on", "split ring");
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn a_guest_migrates_to_and_fro_on_packed_rings_and_does_not_wait_for_its_disk() {
    let properties = ",inflight-migration=on,packed=on";
    migrate_with_requests("migration_requests_packed", properties, "packed ring");
}

fn migrate_with_requests(name: &'static str, properties: &'static str, format: &'static str) {
    if let Some(qemu) = NewQemu::prepare_or_skip() {
        migrate(&Migration {
            name,
            properties,
            format,
            with_requests: Some(qemu),
        });
    }
}

fn migrate(migration: &Migration) {
    let format = migration.format;
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
    let (mut verified, mut taken_along, mut fastest) = (0, 0, u64::MAX);
    let machine = here.machine(migration, 0, lifetime);
    let mut guest = machine.start().unwrap();
    for number in 1..=migrations {
        wait_for_io(&mut guest);
        let place = files.path().join(format!("migration-{number}"));
        let machine = there.machine(migration, number, lifetime);
        let mut next = machine.incoming(&place).start().unwrap();
        verified += check(&guest);
        here.check_format(format);
        let logged = here.times_logged();
        let before = there.taken_along();
        let is_over = AtomicBool::new(false);
        let report = match &migration.with_requests {
            None => guest.migrate(&place).unwrap(),
            Some(_) => std::thread::scope(|scope| {
                scope.spawn(|| here.slow_down_after(logged, &is_over));
                let report = guest.migrate(&place);
                is_over.store(true, Ordering::Relaxed);
                report.unwrap()
            }),
        };
        here.set_slow(0);
        eprintln!(
            "migration {number}: {} ms, with a downtime of {} ms",
            report["total-time"], report["downtime"]
        );
        assert_eq!(
            here.times_logged(),
            logged + 1,
            "dirty pages were not logged"
        );
        wait_for_io(&mut next);
        if migration.with_requests.is_some() {
            let downtime = report["downtime"].as_u64().unwrap();
            let requests = there.taken_along() - before;
            eprintln!("{requests} requests were in flight");
            taken_along += requests;
            fastest = fastest.min(downtime);
        }
        guest = next;
        std::mem::swap(&mut here, &mut there);
    }
    if migration.with_requests.is_some() {
        assert!(taken_along > 0, "no request was in flight");
        // A machine with much else to do lets a guest stand still for other reasons.
        assert!(fastest < SLOW / 2, "it waited for its disk");
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
