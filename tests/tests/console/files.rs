// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Ports that lead to files, logs beside ports, and their rotation.

use std::fs;
use std::os::unix::fs::symlink;

use vhost_device_tests::front_end::console::event;

use super::*;

/// Waits until all that the guest wrote to a port is in its files, or lost.
fn wait_until_written(device: &Device, port: usize) {
    device.wait_for(port, |port| {
        let files = port["files"].as_array().unwrap();
        files.iter().all(|file| file["bytes-pending"] == 0)
    });
}

#[test]
fn a_port_writes_a_file() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("new"), "old").unwrap();
    fs::write(directory.path().join("appended"), "old").unwrap();
    let ports = [
        "file=DIR/new",
        "file=DIR/appended,append",
        "name=channel,file=DIR/channel",
    ];
    let device = Device::start_in(directory, &ports, &[], |_| {});
    let mut driver = device.connect();
    let stream = text(3 << 20);
    driver.send(2, event::PORT_OPEN, 1);
    for port in 0..3 {
        for chunk in stream.chunks(1 << 20) {
            driver.submit(port, chunk, 65536);
            assert!(driver.is_taken(port, PATIENCE));
        }
    }
    assert_same(&written(&device.path("new"), stream.len()), &stream);
    assert_same(&written(&device.path("channel"), stream.len()), &stream);
    let appended = written(&device.path("appended"), 3 + stream.len());
    assert_same(&appended, &[b"old", stream.as_slice()].concat());
}

#[test]
fn logs_are_rotated_in_the_sandbox_and_bounded() {
    let device = Device::start(
        &["unix=DIR/port", "unix=DIR/other"],
        &[
            "--log=DIR/log,max-size=100K,keep=3",
            "--log=DIR/single,max-size=4K,keep=0",
            "--log=DIR/other.log,port=1",
        ],
    );
    let mut driver = device.connect();
    let stream = text(1 << 20);
    driver.write(0, &stream, PATIENCE);
    driver.write(1, b"other", PATIENCE);
    wait_until_written(&device, 0);
    wait_until_written(&device, 1);
    let read = |name: &str| fs::read(device.path(name)).unwrap();
    let all = [read("log.3"), read("log.2"), read("log.1"), read("log")];
    assert_eq!(all.each_ref().map(Vec::len)[..3], [100 << 10; 3]);
    let all = all.concat();
    assert_same(&all, &stream[stream.len() - all.len()..]);
    assert!(!device.path("log.4").exists());
    assert!(read("single").len() <= 4 << 10);
    assert!(!device.path("single.1").exists());
    assert_eq!(read("other.log"), b"other");
    assert_eq!(device.port(0)["files"][0]["bytes-lost"], 0);
}

/// No thread for files runs then.
#[test]
fn a_log_is_rotated_before_the_driver_has_started() {
    let logs = ["--log=DIR/log,max-size=4K"];
    let device = Device::start(&["unix=DIR/port"], &logs);
    let front_end = FrontEnd::connect(&device.path("socket"), &Options::default()).unwrap();
    for _ in 0..5000 {
        front_end.set_config(8, b"a\0\0\0").unwrap();
    }
    wait_until_written(&device, 0);
    assert_eq!(fs::read(device.path("log.1")).unwrap().len(), 4096);
    assert_eq!(fs::read(device.path("log")).unwrap().len(), 5000 - 4096);
}

#[test]
fn a_log_is_continued_by_the_next_process() {
    let log = |directory, line: &[u8]| {
        let device = Device::start_in(directory, &["unix=DIR/port"], &["--log=DIR/log"], |_| {});
        let mut driver = device.connect();
        driver.write(0, line, PATIENCE);
        drop(driver);
        let Device {
            mut program,
            directory,
            ..
        } = device;
        program
            .end(vhost_device_tests::process::Signal::TERM, PATIENCE)
            .unwrap();
        directory
    };
    let directory = log(tempfile::tempdir().unwrap(), b"one");
    let directory = log(directory, b"two");
    assert_eq!(fs::read(directory.path().join("log")).unwrap(), b"onetwo");
}

#[test]
fn a_full_disk_does_not_make_the_guest_wait() {
    let device = Device::start(&["unix=DIR/port", "file=/dev/full"], &[]);
    let mut driver = device.connect();
    driver.write(1, b"nothing", PATIENCE);
    wait_until_written(&device, 1);
    assert_eq!(device.port(1)["files"][0]["bytes-lost"], 7);
    let client = device.client("port");
    driver.write(0, b"works", PATIENCE);
    assert_eq!(receive(&client, 5), b"works");
    assert!(
        device
            .program
            .stderr()
            .contains("cannot write to /dev/full")
    );
}

#[test]
fn a_directory_that_is_gone_does_not_let_the_log_grow() {
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join("logs")).unwrap();
    let device = Device::start_in(
        directory,
        &["unix=DIR/port"],
        &["--log=DIR/logs/log,max-size=4K"],
        |_| {},
    );
    let mut driver = device.connect();
    driver.write(0, b"begin", PATIENCE);
    wait_until_written(&device, 0);
    let kept = device.path("kept");
    fs::hard_link(device.path("logs/log"), &kept).unwrap();
    fs::remove_dir_all(device.path("logs")).unwrap();
    driver.write(0, &text(100_000), PATIENCE);
    wait_until_written(&device, 0);
    assert!(fs::metadata(&kept).unwrap().len() <= 4 << 10);
    assert!(device.program.stderr().contains("cannot rotate"));
}

#[test]
fn a_log_through_a_symbolic_link_is_written() {
    let directory = tempfile::tempdir().unwrap();
    symlink("target", directory.path().join("log")).unwrap();
    let device = Device::start_in(directory, &["unix=DIR/port"], &["--log=DIR/log"], |_| {});
    let mut driver = device.connect();
    driver.write(0, b"line", PATIENCE);
    assert_eq!(written(&device.path("target"), 4), b"line");
}
