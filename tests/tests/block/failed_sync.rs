// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Storage that loses writes. The kernel reports this once, and the next flush succeeds: a guest that trusts that
//! flush loses data.
//!
//! The storage is a loop device whose file is on a full tmpfs.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;
use vhost::vhost_user::VhostUserFrontend;
use vhost_device_tests::front_end::FrontEnd;
use vhost_device_tests::front_end::block::{BlockDriver, Completion};
use vhost_device_tests::process::{Program, Signal};
use virtio_bindings::virtio_blk::VIRTIO_BLK_S_IOERR;

use crate::config::set_writeback;
use crate::{Device, LARGEST, PATIENCE, Variant, driver, noise, ok, skip};

/// Size of the disk, its initial space, and the written bytes, in bytes.
const SIZE: u64 = 16 << 20;
const ROOM: &str = "size=2M";
const WRITTEN: usize = 8 << 20;
/// Text of the log line.
const LINE: &str = "could not be written to stable storage";

/// A small tmpfs, and a file in it that may outgrow it.
pub struct Small {
    directory: TempDir,
    device: Option<PathBuf>,
}

fn succeed(command: &mut Command) -> Option<String> {
    let output = command.stderr(Stdio::null()).output().ok()?;
    let stdout = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| stdout.trim().to_owned())
}

impl Small {
    fn new() -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", ROOM, "tmpfs"]);
        let mounted = succeed(mount.arg(directory.path()));
        if mounted.is_none() {
            skip("no file system can be mounted");
        }
        mounted?;
        let small = Self {
            directory,
            device: None,
        };
        File::create(small.file()).unwrap().set_len(SIZE).unwrap();
        Some(small)
    }

    /// Creates the same, with a block device on the file.
    pub fn with_device() -> Option<Self> {
        let mut small = Self::new()?;
        let mut losetup = Command::new("losetup");
        let device = succeed(losetup.args(["--find", "--show"]).arg(small.file()));
        if device.is_none() {
            skip("no loop device can be set up");
        }
        small.device = Some(device?.into());
        Some(small)
    }

    pub fn file(&self) -> PathBuf {
        self.directory.path().join("image")
    }

    pub fn device(&self) -> &Path {
        self.device.as_deref().unwrap()
    }

    fn make_room(&self) {
        let mut mount = Command::new("mount");
        mount.args(["-o", "remount,size=64M"]);
        succeed(mount.arg(self.directory.path())).unwrap();
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        if let Some(device) = &self.device {
            succeed(Command::new("losetup").arg("--detach").arg(device));
        }
        succeed(Command::new("umount").arg(self.directory.path()));
    }
}

/// Returns a running device with this image.
pub fn start(variant: Variant, image: &Path) -> Device {
    let sockets = tempfile::tempdir().unwrap();
    let socket = sockets.path().join("socket");
    let mut program = Program::serve(&mut variant.command(image, &socket, &[]), &socket).unwrap();
    program.expect_no_leak().unwrap();
    Device {
        program,
        socket,
        image: image.to_owned(),
        _directories: vec![sockets],
    }
}

fn write_all(driver: &mut BlockDriver) {
    let data = noise(1, LARGEST as usize);
    for start in (0..WRITTEN).step_by(data.len()) {
        ok(driver.write(start as u64 / 512, &data).unwrap());
    }
}

fn assert_fails(completion: vhost_device_tests::front_end::Result<Completion>) {
    assert_eq!(u32::from(completion.unwrap().status), VIRTIO_BLK_S_IOERR);
}

/// Flushes and write-through writes fail on all queues; other requests succeed.
fn assert_lost(front_end: &FrontEnd) {
    for index in 0..2 {
        let queue = front_end.queue(index, 16).unwrap();
        let mut driver = BlockDriver::new(front_end.memory(), queue, 4096);
        for _ in 0..3 {
            assert_fails(driver.flush());
        }
        set_writeback(front_end, 0);
        assert_fails(driver.write(0, &noise(2, 512)));
        assert_fails(driver.write_zeroes(0, 1, 0));
        set_writeback(front_end, 1);
        assert_fails(driver.flush());
        ok(driver.write(0, &noise(2, 512)).unwrap());
        ok(driver.read(0, 512).unwrap());
        front_end.stop(index).unwrap();
    }
}

fn assert_told_once(device: &Device) {
    let stderr = device.program.stderr();
    assert_eq!(stderr.matches(LINE).count(), 1, "{stderr}");
}

fn after_a_failed_flush_all_flushes_fail_until_the_image_is_reopened(variant: Variant) {
    let Some(small) = Small::with_device() else {
        return;
    };
    let device = start(variant, small.device());
    let front_end = device.connect();
    let mut first = driver(&front_end);
    ok(first.flush().unwrap());
    write_all(&mut first);
    assert_fails(first.flush());
    small.make_room();
    front_end.stop(0).unwrap();
    assert_lost(&front_end);
    front_end.call().reset_device().unwrap();
    drop(front_end);
    assert_lost(&device.connect());
    assert_told_once(&device);
    drop(device);
    let device = start(variant, small.device());
    let front_end = device.connect();
    let mut driver = driver(&front_end);
    write_all(&mut driver);
    ok(driver.flush().unwrap());
}

fn a_failed_flush_when_caching_is_turned_off_is_reported_later(variant: Variant) {
    let Some(small) = Small::with_device() else {
        return;
    };
    let device = start(variant, small.device());
    let front_end = device.connect();
    let mut first = driver(&front_end);
    write_all(&mut first);
    set_writeback(&front_end, 0);
    small.make_room();
    assert_fails(first.write(0, &noise(2, 512)));
    front_end.stop(0).unwrap();
    assert_lost(&front_end);
    assert_told_once(&device);
}

fn after_a_lost_write_through_write_all_writes_fail(variant: Variant) {
    let Some(small) = Small::with_device() else {
        return;
    };
    let device = start(variant, small.device());
    let front_end = device.connect();
    let mut first = driver(&front_end);
    set_writeback(&front_end, 0);
    let data = noise(1, LARGEST as usize);
    let mut sectors = (0..SIZE / 512).step_by(LARGEST as usize / 512);
    let failed = sectors.find(|sector| first.write(*sector, &data).unwrap().status != 0);
    assert!(failed.is_some());
    small.make_room();
    front_end.stop(0).unwrap();
    assert_lost(&front_end);
    assert_told_once(&device);
}

fn a_failed_flush_at_handover_is_reported_later(variant: Variant) {
    let Some(small) = Small::with_device() else {
        return;
    };
    let device = start(variant, small.device());
    let sockets = tempfile::tempdir().unwrap();
    let socket = sockets.path().join("socket");
    let mut command = variant.command(small.device(), &socket, &["--incoming"]);
    let mut waiting = Program::spawn(&mut command).unwrap();
    waiting.wait_for_listener(&socket).unwrap();
    let front_end = device.connect();
    let mut first = driver(&front_end);
    write_all(&mut first);
    front_end.stop(0).unwrap();
    // The waiting process cannot learn of it, as it may run on another host.
    drop(front_end);
    let front_end = device.connect();
    assert_told_once(&device);
    small.make_room();
    waiting.end(Signal::TERM, PATIENCE).unwrap();
    assert_lost(&front_end);
}

/// Nothing that was written is lost: the guest knows of this failure.
fn after_a_write_through_write_without_space_others_succeed(variant: Variant) {
    let Some(small) = Small::new() else { return };
    let device = start(variant, &small.file());
    let front_end = device.connect();
    let mut driver = driver(&front_end);
    set_writeback(&front_end, 0);
    let data = noise(1, LARGEST as usize);
    let mut sectors = (0..SIZE / 512).step_by(LARGEST as usize / 512);
    let failed = sectors.find(|sector| driver.write(*sector, &data).unwrap().status != 0);
    ok(driver.flush().unwrap());
    small.make_room();
    ok(driver.write(failed.unwrap(), &data).unwrap());
    ok(driver.flush().unwrap());
}

crate::for_each_engine!(
    after_a_failed_flush_all_flushes_fail_until_the_image_is_reopened,
    a_failed_flush_when_caching_is_turned_off_is_reported_later,
    after_a_lost_write_through_write_all_writes_fail,
    a_failed_flush_at_handover_is_reported_later,
    after_a_write_through_write_without_space_others_succeed,
);
