// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How the program starts, and why it may not.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;

use vhost_device_tests::evdev::{
    Device, EV_KEY, EV_LED, Event, KEY_A, LED_CAPSL, Node, devices, report,
};
use vhost_device_tests::process::{self, PATIENCE, Program, Signal, option};

use super::{Driver, Input, start};

/// Asserts that the program ends with status 1, and says why in one line with these words.
#[track_caller]
fn assert_refused(path: &Path, words: &[&str]) {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("socket");
    let mut command = process::command("vhost-device-input").unwrap();
    command
        .arg(option("evdev-path", path))
        .arg(option("socket-path", &socket));
    let mut program = Program::spawn(&mut command).unwrap();
    let status = program.wait(PATIENCE).unwrap();
    assert_eq!(status.code(), Some(1));
    assert!(!socket.exists(), "no socket is left");
    let stderr = program.stderr();
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    for word in words.iter().chain([&path.to_str().unwrap()]) {
        assert!(stderr.contains(word), "no {word:?} in {stderr}");
    }
}

#[test]
#[ignore = "needs uinput"]
fn a_file_that_is_no_evdev_node_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    assert_refused(&directory.path().join("missing"), &["No such file"]);
    let file = directory.path().join("file");
    File::create(&file).unwrap();
    assert_refused(&file, &["not an evdev node"]);
    assert_refused(directory.path(), &["not an evdev node"]);
    assert_refused(Path::new("/dev/null"), &["not an evdev node"]);
    assert_refused(Path::new("/dev/uinput"), &["not an evdev node"]);
}

#[test]
#[ignore = "needs uinput"]
fn a_grabbed_device_is_refused_without_no_grab() {
    let device = Device::create(&devices::KEYBOARD).unwrap();
    let node = Node::open(device.node()).unwrap();
    node.grab(true).unwrap();
    assert_refused(device.node(), &["grabbed"]);
    drop(Input::start_with(device.node(), &["--no-grab"]));
    node.grab(false).unwrap();
    drop(Input::start(&device));
}

#[test]
#[ignore = "needs uinput"]
fn two_back_ends_cannot_have_one_device() {
    let device = Device::create(&devices::MOUSE).unwrap();
    let _input = Input::start(&device);
    assert_refused(device.node(), &["grabbed"]);
}

#[test]
#[ignore = "needs uinput"]
fn the_program_follows_the_conventions() {
    let (_device, node, mut input) = start(&devices::MOUSE);
    assert!(
        node.grab(true).is_err(),
        "the device is grabbed at the start"
    );
    let status = input.program.end(Signal::TERM, PATIENCE).unwrap();
    assert_eq!(status.code(), Some(0));
    assert!(!input.socket.exists(), "the socket is removed");

    let mut capabilities = process::command("vhost-device-input").unwrap();
    let output = capabilities.arg("--print-capabilities").output().unwrap();
    assert!(output.status.success());
    let capabilities: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let expected = serde_json::json!({"type": "input", "features": ["evdev-path", "no-grab"]});
    assert_eq!(capabilities, expected);
}

#[test]
#[ignore = "needs uinput"]
fn a_back_end_that_waits_is_idle() {
    let device = Device::create(&devices::MOUSE).unwrap();
    let input = Input::start(&device);
    input.assert_idle();
    let _front_end = input.connect();
    input.assert_idle();
}

/// The user `nobody`.
const NOBODY: u32 = 65534;

/// Starts the program as a user other than root, on a node with this mode. It does not listen yet.
fn start_as_nobody(device: &Device, mode: u32) -> Input {
    fs::set_permissions(device.node(), Permissions::from_mode(mode)).unwrap();
    let directory = tempfile::tempdir().unwrap();
    chown(directory.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    let socket = directory.path().join("socket");
    let mut command = process::command("vhost-device-input").unwrap();
    command
        .uid(NOBODY)
        .gid(NOBODY)
        .arg(option("evdev-path", device.node()))
        .arg(option("socket-path", &socket));
    Input {
        program: Program::spawn(&mut command).unwrap(),
        socket,
        _directory: directory,
    }
}

#[test]
#[ignore = "needs uinput"]
fn a_node_that_can_only_be_read_has_events_and_no_lights() {
    let device = Device::create(&devices::KEYBOARD).unwrap();
    let node = Node::open(device.node()).unwrap();
    let mut input = start_as_nobody(&device, 0o444);
    input.program.wait_for_listener(&input.socket).unwrap();
    let mut driver = Driver::connect(&input);
    for _ in 0..3 {
        driver.set(Event::new(EV_LED, LED_CAPSL, 1));
    }
    driver.assert_gets(&device, &report(&[(EV_KEY, KEY_A, 1)]));
    assert!(node.lights().unwrap().is_empty());
    assert!(node.grab(true).is_err());
    assert_eq!(input.logged("is read-only"), 1);
}

#[test]
#[ignore = "needs uinput"]
fn a_node_that_cannot_be_read_is_refused() {
    let device = Device::create(&devices::KEYBOARD).unwrap();
    let mut input = start_as_nobody(&device, 0o600);
    let status = input.program.wait(PATIENCE).unwrap();
    assert_eq!(status.code(), Some(1));
    let stderr = input.program.stderr();
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.contains("Permission denied"), "{stderr}");
}
