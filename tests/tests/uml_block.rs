// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `vhost-device-block` and `vhost-device-scsi` on block devices, which the tests create from files in memory (loop).
//!
//! `cargo xtask test` runs these in User-Mode Linux. A host with loop devices can run them directly as root:
//! `cargo test -p vhost-device-tests --test uml_block -- --ignored`.

#![cfg(test)]

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::ioctl::{IntegerSetter, Opcode, ioctl};
use tempfile::TempDir;
use vhost_device_tests::front_end::block::{
    BlockDriver, DISCARD, IOERR, OK, OUT, Request, RequestArea, UNMAP, segment,
};
use vhost_device_tests::front_end::scsi::{self, GOOD, ScsiDriver};
use vhost_device_tests::front_end::{FrontEnd, Options};
use vhost_device_tests::guest::find_program;
use vhost_device_tests::process::{PATIENCE, Program, binary, command, option};
use vhost_device_tests::target::{Block, Target};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_RO};

/// Bytes of a disk.
const SIZE: usize = 8 << 20;
/// Its sectors.
const SECTORS: u32 = SIZE as u32 / 512;
/// Directory of a tmpfs, in whose files holes can be punched.
const MEMORY: &str = "/dev/shm";

/// A block device backed by a file in memory.
struct Loop {
    node: PathBuf,
    file: PathBuf,
    /// Its limits differ from the kernel's defaults.
    is_limited: bool,
    _directory: TempDir,
}

impl Loop {
    /// Creates a completely written disk, with these options of losetup.
    fn new(options: &[&str]) -> Self {
        let directory = tempfile::tempdir_in(MEMORY).unwrap();
        let file = directory.path().join("file");
        fs::write(&file, vec![0x5a; SIZE]).unwrap();
        let made = losetup()
            .args(["--find", "--show"])
            .args(options)
            .arg(&file)
            .output()
            .unwrap();
        assert!(made.status.success(), "{made:?}");
        let node = String::from_utf8(made.stdout).unwrap();
        Self {
            node: PathBuf::from(node.trim()),
            file,
            is_limited: false,
            _directory: directory,
        }
    }

    /// Limits discards to this many bytes.
    fn set_discard_max(&mut self, bytes: u64) {
        self.is_limited = true;
        fs::write(self.attribute("queue/discard_max_bytes"), bytes.to_string()).unwrap();
    }

    /// Returns bytes of storage that its file occupies.
    fn allocated(&self) -> u64 {
        self.file.metadata().unwrap().blocks() * 512
    }

    /// Returns an attribute file of its queue.
    fn attribute(&self, name: &str) -> PathBuf {
        let device = self.node.file_name().unwrap();
        Path::new("/sys/block").join(device).join(name)
    }

    fn number(&self, name: &str) -> u64 {
        let text = fs::read_to_string(self.attribute(name)).unwrap();
        text.trim().parse().unwrap()
    }

    /// Returns how many discards it has executed.
    fn discards(&self) -> u64 {
        let stat = fs::read_to_string(self.attribute("stat")).unwrap();
        stat.split_whitespace().nth(11).unwrap().parse().unwrap()
    }
}

fn losetup() -> Command {
    Command::new(find_program("losetup").expect("losetup"))
}

impl Drop for Loop {
    /// A device with changed limits is recreated: the next one with its number would keep them.
    fn drop(&mut self) {
        let _ = losetup().arg("--detach").arg(&self.node).status();
        if !self.is_limited {
            return;
        }
        let name = self.node.to_string_lossy();
        let number = name.trim_start_matches("/dev/loop").parse().unwrap_or(0);
        let control = File::open("/dev/loop-control").unwrap();
        let end = Instant::now() + PATIENCE;
        // The program releases it after a moment.
        while ask::<LOOP_CTL_REMOVE>(&control, number) == Err(Errno::BUSY) && Instant::now() < end {
            thread::sleep(Duration::from_millis(2));
        }
        let _ = ask::<LOOP_CTL_ADD>(&control, number);
    }
}

const LOOP_CTL_ADD: Opcode = 0x4c80;
const LOOP_CTL_REMOVE: Opcode = 0x4c81;

/// Makes the kernel create or remove the loop device with this number.
#[allow(unsafe_code)]
fn ask<const OPCODE: Opcode>(control: &File, number: usize) -> Result<(), Errno> {
    // SAFETY: the argument is a number.
    unsafe { ioctl(control, IntegerSetter::<OPCODE>::new_usize(number)) }
}

/// The program, with a driver, which are dropped in this order.
struct Disk {
    driver: BlockDriver,
    front_end: FrontEnd,
    _program: Program,
    _directory: TempDir,
}

impl Disk {
    fn start(device: &Loop, arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        let mut command = command("vhost-device-block").unwrap();
        command
            .arg(option("blk-file", &device.node))
            .arg(option("socket-path", &socket))
            .args(arguments);
        let mut program = Program::serve(&mut command, &socket).unwrap();
        program.expect_no_leak().unwrap();
        let front_end = FrontEnd::connect(&socket, &Options::default()).unwrap();
        let queue = front_end.queue(0, 256).unwrap();
        Disk {
            driver: BlockDriver::new(front_end.memory(), queue, 1 << 20),
            front_end,
            _program: program,
            _directory: directory,
        }
    }

    fn offers(&self, feature: u32) -> bool {
        self.front_end.offered() & 1 << feature != 0
    }

    /// Returns a field of four bytes in the config space.
    fn field(&self, offset: u32) -> u64 {
        let bytes = self.front_end.config(offset, 4).unwrap();
        u32::from_le_bytes(bytes.try_into().unwrap()).into()
    }
}

/// Calls `test` with each engine that the kernel supports.
fn for_each_engine(test: impl Fn(&str)) {
    for engine in ["io_uring", "threads"] {
        let block = Block { io_engine: engine };
        if block.is_possible() {
            test(&format!("--io-engine={engine}"));
        }
    }
}

#[test]
#[ignore = "needs loop devices"]
fn a_discard_reaches_the_device_and_storage_is_given_back() {
    for_each_engine(|engine| {
        let device = Loop::new(&[]);
        let mut disk = Disk::start(&device, &[engine]);
        assert!(disk.offers(VIRTIO_BLK_F_DISCARD));
        let (discards, allocated) = (device.discards(), device.allocated());
        for half in 0..2 {
            let sectors = SECTORS / 2;
            let first = u64::from(half * sectors);
            let completion = disk.driver.discard(first, sectors).unwrap();
            assert_eq!(u32::from(completion.status), OK);
        }
        assert!(
            device.discards() > discards,
            "{engine}: it was no discard to the device"
        );
        let left = device.allocated();
        assert!(
            left < allocated / 8,
            "{engine}: {left} of {allocated} bytes"
        );
        assert_eq!(disk.driver.read(0, 4096).unwrap().data, [0; 4096]);
    });
}

/// Writes and discards in flight at once, this many of each: with three descriptors each they fit the queue.
const ROUNDS: u64 = 40;

fn request(kind: u32, sector: u64, data: &[u8]) -> Request<'_> {
    Request {
        kind,
        sector,
        data,
        ..Default::default()
    }
}

#[test]
#[ignore = "needs loop devices"]
fn many_discards_and_writes_at_once_are_all_carried_out() {
    for_each_engine(|engine| {
        let device = Loop::new(&[]);
        let mut disk = Disk::start(&device, &[engine]);
        let memory = disk.driver.memory().clone();
        let data = |round: u64| [round as u8 + 1; 4096];
        let segments: Vec<_> = (0..ROUNDS)
            .map(|round| segment(4096 + round * 8, 8, 0))
            .collect();
        let mut pending = HashMap::new();
        // Three descriptors each: all are there before the device is kicked for the first one.
        for (round, segment) in (0..).zip(&segments) {
            let data = data(round);
            for request in [request(OUT, round * 8, &data), request(DISCARD, 0, segment)] {
                let prepared = RequestArea::new(&memory, 4096).prepare(&memory, &request);
                let head = disk.driver.queue.add(&prepared.chain).unwrap();
                pending.insert(head, prepared);
            }
        }
        disk.driver.queue.publish();
        disk.driver.queue.kick();
        while !pending.is_empty() {
            let Some(used) = disk.driver.queue.take_used() else {
                assert!(
                    disk.driver.queue.wait_used(PATIENCE),
                    "{engine}: {pending:?}"
                );
                continue;
            };
            let prepared = pending.remove(&used.head).unwrap();
            let status = prepared.completion(&memory, used.length).status;
            assert_eq!(u32::from(status), OK, "{engine}");
        }
        for round in 0..ROUNDS {
            let seen = disk.driver.read(round * 8, 4096).unwrap().data;
            assert!(seen == data(round), "{engine}: {round}");
        }
        assert!(device.discards() >= ROUNDS, "{engine}");
    });
}

#[test]
#[ignore = "needs loop devices"]
fn limits_of_discard_are_those_of_the_device() {
    let mut device = Loop::new(&[]);
    let disk = Disk::start(&device, &[]);
    let largest = device.number("queue/discard_max_bytes") / 512;
    assert_eq!(disk.field(36), largest.min(1 << 21), "max_discard_sectors");
    let granularity = device.number("queue/discard_granularity") / 512;
    assert_eq!(disk.field(44), granularity, "discard_sector_alignment");
    drop(disk);
    device.set_discard_max(1 << 20);
    let disk = Disk::start(&device, &[]);
    assert_eq!(disk.field(36), 2048, "max_discard_sectors");
}

#[test]
#[ignore = "needs loop devices"]
fn discards_are_not_offered_for_a_device_that_has_none() {
    let mut device = Loop::new(&[]);
    device.set_discard_max(0);
    let mut disk = Disk::start(&device, &[]);
    assert!(!disk.offers(VIRTIO_BLK_F_DISCARD));
    // A driver that asks nevertheless loses nothing.
    let completion = disk.driver.discard(0, 8).unwrap();
    assert_eq!(u32::from(completion.status), OK);
    assert_eq!(disk.driver.read(0, 512).unwrap().data, [0x5a; 512]);
}

#[test]
#[ignore = "needs loop devices"]
fn write_zeroes_reads_back_as_zeroes() {
    for_each_engine(|engine| {
        let device = Loop::new(&[]);
        let mut disk = Disk::start(&device, &[engine]);
        for (sector, flags) in [(8, 0), (4096, UNMAP)] {
            let completion = disk.driver.write_zeroes(sector, 16, flags).unwrap();
            assert_eq!(u32::from(completion.status), OK);
            let seen = disk.driver.read(sector - 8, 32 * 512).unwrap().data;
            let expected = [[0x5a; 4096], [0; 4096], [0; 4096], [0x5a; 4096]].concat();
            assert!(seen == expected, "{engine}: flags {flags}");
        }
    });
}

#[test]
#[ignore = "needs loop devices"]
fn blocks_are_as_large_as_those_of_the_device() {
    let device = Loop::new(&["--sector-size=4096"]);
    let disk = Disk::start(&device, &[]);
    let exponent = disk.front_end.config(24, 1).unwrap()[0];
    assert_eq!(512 << exponent, 4096, "physical_block_exp");
}

#[test]
#[ignore = "needs loop devices"]
fn a_device_that_cannot_be_written_is_served_read_only_or_not_at_all() {
    let device = Loop::new(&["--read-only"]);
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("socket");
    let mut command = command("vhost-device-block").unwrap();
    command
        .arg(option("blk-file", &device.node))
        .arg(option("socket-path", &socket));
    let mut program = Program::spawn(&mut command).unwrap();
    let status = program.wait(PATIENCE).unwrap();
    assert_eq!(status.code(), Some(1));
    let log = program.stderr();
    assert!(log.contains("--read-only"), "{log}");
    assert_eq!(log.lines().count(), 1, "{log}");

    let mut disk = Disk::start(&device, &["--read-only"]);
    assert!(disk.offers(VIRTIO_BLK_F_RO));
    assert_eq!(disk.driver.read(0, 512).unwrap().data, [0x5a; 512]);
    let completion = disk.driver.write(0, &[0; 512]).unwrap();
    assert_eq!(u32::from(completion.status), IOERR);
}

/// The sandbox lets a running SCSI host examine a block device that a client passes, although it may open no other files.
#[test]
#[ignore = "needs loop devices"]
fn a_block_device_is_added_to_a_scsi_host_with_its_limits() {
    for_each_engine(|engine| {
        let mut device = Loop::new(&["--sector-size=4096"]);
        device.set_discard_max(1 << 20);
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let mut command = command("vhost-device-scsi").unwrap();
        command
            .arg(option("socket-path", path("socket")))
            .arg(option("control-socket", path("control")))
            .arg(engine);
        let program = Program::serve(&mut command, &path("socket")).unwrap();
        let front_end = FrontEnd::connect(&path("socket"), &Options::default()).unwrap();
        let queue = front_end.queue(scsi::REQUEST_QUEUE, 256).unwrap();
        let mut driver = ScsiDriver::new(front_end.memory(), queue, 1 << 20);
        let added = Command::new(binary("vhost-device-ctl").unwrap())
            .arg(option("file", &device.node))
            .arg(path("control"))
            .args(["add-disk", "logical-block-size=4096"])
            .output()
            .unwrap();
        assert!(added.status.success(), "{added:?}\n{}", program.stderr());
        let lun = scsi::address(0, 0);
        driver.clear_attentions(lun);
        let page = driver.command(lun, &[0x12, 1, 0xb0, 0, 64, 0], 64).data;
        let number = |at: usize| u32::from_be_bytes(page[at..at + 4].try_into().unwrap());
        assert_eq!(number(20), (1 << 20) / 4096, "MAXIMUM UNMAP LBA COUNT");
        let (discards, allocated) = (device.discards(), device.allocated());
        // UNMAP of 1 MiB.
        let mut list = vec![0, 22, 0, 16, 0, 0, 0, 0];
        list.extend(0u64.to_be_bytes());
        list.extend([0, 0, 1, 0, 0, 0, 0, 0]);
        let unmap = [0x42, 0, 0, 0, 0, 0, 0, 0, list.len() as u8, 0];
        let completion = driver.send(lun, &unmap, &list);
        assert_eq!(completion.status, GOOD, "{completion:?}");
        assert!(device.discards() > discards, "{engine}");
        assert!(device.allocated() < allocated, "{engine}");
        let mut read = [0; 10];
        (read[0], read[5], read[8]) = (0x28, 0, 1);
        assert_eq!(driver.command(lun, &read, 4096).data, [0; 4096]);
    });
}
