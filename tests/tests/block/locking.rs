// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The lock on the image: one writer or several readers, among programs of this project and QEMU.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::process::{Command, Output};

use tempfile::TempDir;
use vhost_device_tests::front_end::{FrontEnd, Options};
use vhost_device_tests::process::{Program, Signal};

use crate::{Device, IMAGE_SIZE, PATIENCE, Variant, driver, noise, ok, skip};

const READ_ONLY: &[&str] = &["--read-only"];
const READ_WRITE: &[&str] = &[];
const INCOMING: &[&str] = &["--incoming"];

/// Starts a second device with the image of the first one; `None` if it refused with the expected error.
fn start_second(variant: Variant, image: &Path, arguments: &[&str]) -> Option<(Program, TempDir)> {
    let sockets = tempfile::tempdir().unwrap();
    let socket = sockets.path().join("socket");
    let mut program = Program::spawn(&mut variant.command(image, &socket, arguments)).unwrap();
    if program.wait_for_listener(&socket).is_ok() {
        return Some((program, sockets));
    }
    let status = program.wait(PATIENCE).unwrap();
    let stderr = program.stderr();
    assert_eq!(status.code(), Some(1), "{stderr}");
    assert_eq!(program.stdout(), "");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.contains(image.to_str().unwrap()), "{stderr}");
    assert!(!socket.exists(), "it left a socket");
    None
}

fn assert_works(device: &Device) {
    let data = noise(1, 4096);
    let front_end = device.connect();
    let mut driver = driver(&front_end);
    ok(driver.write(0, &data).unwrap());
    assert_eq!(ok(driver.read(0, 4096).unwrap()), data);
}

fn a_second_writer_is_refused(variant: Variant) {
    let device = variant.start(&vec![0; IMAGE_SIZE], READ_WRITE);
    assert!(start_second(variant, &device.image, READ_WRITE).is_none());
    assert_works(&device);
}

fn a_reader_and_a_writer_exclude_each_other(variant: Variant) {
    for (first, second) in [(READ_WRITE, READ_ONLY), (READ_ONLY, READ_WRITE)] {
        let device = variant.start(&vec![0; IMAGE_SIZE], first);
        assert!(start_second(variant, &device.image, second).is_none());
        drop(device.connect());
    }
}

fn readers_share_an_image(variant: Variant) {
    let mut device = variant.start(&vec![0; IMAGE_SIZE], READ_ONLY);
    let second = start_second(variant, &device.image, READ_ONLY).unwrap();
    let third = start_second(variant, &device.image, READ_ONLY).unwrap();
    // A single reader excludes a writer.
    device.program.end(Signal::TERM, PATIENCE).unwrap();
    drop(second);
    assert!(start_second(variant, &device.image, READ_WRITE).is_none());
    drop(third);
    assert!(start_second(variant, &device.image, READ_WRITE).is_some());
}

/// The file is locked, whatever its name.
fn another_name_of_a_locked_image_is_refused_too(variant: Variant) {
    let device = variant.start(&vec![0; IMAGE_SIZE], READ_WRITE);
    for (name, is_hard) in [("hard", true), ("symbolic", false)] {
        let link = device.image.with_file_name(name);
        if is_hard {
            fs::hard_link(&device.image, &link).unwrap();
        } else {
            std::os::unix::fs::symlink(&device.image, &link).unwrap();
        }
        assert!(start_second(variant, &link, READ_WRITE).is_none(), "{name}");
    }
}

fn a_device_that_ends_releases_its_image(variant: Variant) {
    for signal in [Signal::TERM, Signal::KILL] {
        let mut device = variant.start(&vec![0; IMAGE_SIZE], READ_WRITE);
        device.program.end(signal, PATIENCE).unwrap();
        assert!(start_second(variant, &device.image, READ_WRITE).is_some());
    }
}

/// A guest's disk moves from one device to another and back again, as in a migration. Both run all the time.
fn an_image_is_handed_over_when_its_guest_stops(variant: Variant) {
    let here = variant.start(&vec![0; IMAGE_SIZE], READ_WRITE);
    let (_there, sockets) = start_second(variant, &here.image, INCOMING).unwrap();
    let there = sockets.path().join("socket");
    let mut ends = [
        here.connect(),
        FrontEnd::connect(&there, &Options::default()).unwrap(),
    ];
    for round in 0..4 {
        let [active, passive] = &ends;
        let mut queues = driver(active);
        // More than one queue runs.
        let second = active.queue(1, 16).unwrap();
        let data = noise(round, 4096);
        ok(queues.write(8, &data).unwrap());
        assert!(passive.queue(0, 16).is_err(), "both use the image");
        active.stop(1).unwrap();
        assert!(passive.queue(0, 16).is_err(), "both use the image");
        assert!(start_second(variant, &here.image, READ_WRITE).is_none());
        passive.stop(0).unwrap();
        active.stop(0).unwrap();
        drop(second);
        let mut queues = driver(passive);
        assert_eq!(ok(queues.read(8, 4096).unwrap()), data);
        passive.stop(0).unwrap();
        ends.reverse();
    }
}

/// No other process can take the image from a guest that only pauses.
fn an_image_without_a_waiting_process_stays_locked(variant: Variant) {
    let device = variant.start(&vec![0; IMAGE_SIZE], READ_WRITE);
    let front_end = device.connect();
    let queue = front_end.queue(0, 16).unwrap();
    front_end.stop(0).unwrap();
    assert!(start_second(variant, &device.image, READ_WRITE).is_none());
    // A waiting process that ends changes nothing.
    let (second, _sockets) = start_second(variant, &device.image, INCOMING).unwrap();
    drop(second);
    front_end.start(0, &queue, 0).unwrap();
    front_end.stop(0).unwrap();
    assert!(start_second(variant, &device.image, READ_WRITE).is_none());
}

fn a_guest_whose_migration_is_cancelled_keeps_its_image(variant: Variant) {
    let device = variant.start(&vec![0; IMAGE_SIZE], READ_WRITE);
    let front_end = device.connect();
    let (_second, sockets) = start_second(variant, &device.image, INCOMING).unwrap();
    let queue = front_end.queue(0, 16).unwrap();
    front_end.stop(0).unwrap();
    front_end.start(0, &queue, 0).unwrap();
    let socket = sockets.path().join("socket");
    let other = FrontEnd::connect(&socket, &Options::default()).unwrap();
    assert!(other.queue(0, 16).is_err(), "both use the image");
    assert!(start_second(variant, &device.image, READ_WRITE).is_none());
}

/// Runs a program of QEMU; `None` if this host does not have it.
fn qemu(program: &str, arguments: &[&str], image: &Path) -> Option<Output> {
    match Command::new(program).args(arguments).arg(image).output() {
        Ok(output) => Some(output),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            skip(&format!("{program} is not installed (package qemu-utils)"));
            None
        }
        Err(error) => panic!("{program}: {error}"),
    }
}

fn qemu_img_can_look_at_an_image_in_use(variant: Variant) {
    for arguments in [READ_WRITE, READ_ONLY] {
        let device = variant.start(&vec![0; IMAGE_SIZE], arguments);
        let Some(output) = qemu("qemu-img", &["info"], &device.image) else {
            return;
        };
        let stdout = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{output:?}");
        assert!(stdout.contains(&IMAGE_SIZE.to_string()), "{stdout}");
        drop(device.connect());
    }
}

fn qemu_is_refused_to_write_to_an_image_in_use(variant: Variant) {
    for arguments in [READ_WRITE, READ_ONLY] {
        let device = variant.start(&vec![0; IMAGE_SIZE], arguments);
        let command = ["-f", "raw", "-c", "write -P 7 0 512"];
        let Some(output) = qemu("qemu-io", &command, &device.image) else {
            return;
        };
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{output:?}");
        assert!(stderr.contains("lock"), "{stderr}");
        assert!(device.contents().iter().all(|&byte| byte == 0));
    }
}

/// The storage daemon holds the image while it runs.
fn an_image_that_qemu_writes_to_is_refused(variant: Variant) {
    let directory = variant.directory();
    let image = directory.path().join("image");
    fs::write(&image, vec![0; IMAGE_SIZE]).unwrap();
    let pid_file = directory.path().join("pid");
    let node = format!("driver=file,node-name=image,filename={}", image.display());
    let mut command = Command::new("qemu-storage-daemon");
    command
        .args(["--blockdev", &node, "--export"])
        .arg(format!(
            "type=vhost-user-blk,id=export,node-name=image,writable=on,addr.type=unix,addr.path={}",
            directory.path().join("export").display()
        ))
        .arg("--pidfile")
        .arg(&pid_file);
    if qemu("qemu-storage-daemon", &["--version"], Path::new("")).is_none() {
        return;
    }
    let mut daemon = Program::spawn(&mut command).unwrap();
    daemon
        .wait_until("write its pid file", PATIENCE, || pid_file.try_exists())
        .unwrap();
    for arguments in [READ_WRITE, READ_ONLY] {
        assert!(start_second(variant, &image, arguments).is_none());
    }
    daemon.end(Signal::TERM, PATIENCE).unwrap();
    assert!(start_second(variant, &image, READ_WRITE).is_some());
}

crate::for_each_variant!(
    a_second_writer_is_refused,
    a_reader_and_a_writer_exclude_each_other,
    readers_share_an_image,
    another_name_of_a_locked_image_is_refused_too,
    a_device_that_ends_releases_its_image,
    an_image_is_handed_over_when_its_guest_stops,
    an_image_without_a_waiting_process_stays_locked,
    a_guest_whose_migration_is_cancelled_keeps_its_image,
    qemu_img_can_look_at_an_image_in_use,
    qemu_is_refused_to_write_to_an_image_in_use,
    an_image_that_qemu_writes_to_is_refused,
);
