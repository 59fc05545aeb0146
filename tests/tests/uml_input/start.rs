// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How the program starts, and why it does not.

use std::fs::File;
use std::path::Path;

use vhost_device_tests::evdev::{Device, Node, devices};
use vhost_device_tests::process::{self, PATIENCE, Program, Signal, option};

use super::Input;

/// The program ends with status 1, and says why in one line that has these words.
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
fn what_is_no_evdev_node_is_refused() {
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
fn a_device_that_somebody_has_grabbed_is_refused_unless_it_need_not_be_grabbed() {
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
fn two_back_ends_can_not_have_one_device() {
    let device = Device::create(&devices::MOUSE).unwrap();
    let _input = Input::start(&device);
    assert_refused(device.node(), &["grabbed"]);
}

#[test]
#[ignore = "needs uinput"]
fn the_program_follows_the_conventions() {
    let device = Device::create(&devices::MOUSE).unwrap();
    let node = Node::open(device.node()).unwrap();
    let mut input = Input::start(&device);
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
