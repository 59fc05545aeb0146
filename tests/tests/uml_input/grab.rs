// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Who receives the events: only the guest, or the host too.

use std::fs;
use std::path::Path;

use vhost_device_tests::evdev::{
    Device, EV_KEY, Event, KEY_A, KEY_B, KEY_ENTER, Node, devices, report,
};
use vhost_device_tests::process::{PATIENCE, Signal};

use super::{Driver, Input, start, wait_until};

/// Asserts that another reader of the node has seen none of the guest's events, or all of them.
#[track_caller]
fn check_other_reader(options: &[&str], sees_all: bool) {
    let device = Device::create(&devices::KEYBOARD).unwrap();
    let node = Node::open(device.node()).unwrap();
    let input = Input::start_with(device.node(), options);
    let mut driver = Driver::connect(&input);
    let mut expected = Vec::new();
    for value in [1, 0] {
        let press = report(&[(EV_KEY, KEY_A, value)]);
        driver.assert_gets(&device, &press);
        expected.extend(press);
        expected.push(Event::REPORT);
    }
    let seen = node.read().unwrap();
    assert_eq!(seen, if sees_all { expected } else { Vec::new() });
}

#[test]
#[ignore = "needs uinput"]
fn the_host_sees_nothing_of_a_grabbed_device() {
    check_other_reader(&[], false);
}

#[test]
#[ignore = "needs uinput"]
fn the_host_sees_all_of_a_device_that_is_not_grabbed() {
    check_other_reader(&["--no-grab"], true);
}

#[test]
#[ignore = "needs uinput"]
fn the_device_is_released_when_the_back_end_ends() {
    for signal in [Signal::TERM, Signal::KILL] {
        let (device, node, mut input) = start(&devices::KEYBOARD);
        let mut driver = Driver::connect(&input);
        driver.assert_gets(&device, &report(&[(EV_KEY, KEY_A, 1)]));
        assert!(node.grab(true).is_err(), "the back-end holds the device");
        input.program.end(signal, PATIENCE).unwrap();
        assert_eq!(node.read().unwrap(), []);
        let press = report(&[(EV_KEY, KEY_B, 1)]);
        device.report(&press).unwrap();
        assert_eq!(node.read().unwrap(), [press[0], Event::REPORT]);
        node.grab(true).unwrap();
    }
}

#[test]
#[ignore = "needs uinput"]
fn the_device_stays_grabbed_between_two_guests() {
    let (device, node, input) = start(&devices::KEYBOARD);
    drop(Driver::connect(&input));
    for value in [1, 0] {
        device.report(&report(&[(EV_KEY, KEY_A, value)])).unwrap();
    }
    assert_eq!(node.read().unwrap(), []);
    Driver::connect(&input);
    assert_eq!(node.read().unwrap(), []);
    assert!(node.grab(true).is_err());
}

#[test]
#[ignore = "needs uinput"]
fn the_key_that_started_the_back_end_is_released_on_the_host_first() {
    let device = Device::create(&devices::KEYBOARD).unwrap();
    let node = Node::open(device.node()).unwrap();
    let press = |value| report(&[(EV_KEY, KEY_ENTER, value)]);
    device.report(&press(1)).unwrap();
    let input = std::thread::scope(|scope| {
        let start = scope.spawn(|| Input::start(&device));
        // The node is open, and not grabbed yet.
        wait_until("the back-end opens the node", || {
            readers(device.node()) > 1 || start.is_finished()
        });
        device.report(&press(0)).unwrap();
        start.join().unwrap()
    });
    let up = Event::new(EV_KEY, KEY_ENTER, 0);
    assert!(node.read().unwrap().contains(&up), "the host missed it");
    let mut driver = Driver::connect(&input);
    driver.assert_gets(&device, &report(&[(EV_KEY, KEY_A, 1)]));
    assert_eq!(node.read().unwrap(), []);
}

/// Returns how many open files of all processes are this node.
fn readers(node: &Path) -> usize {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let files = processes.filter_map(|process| fs::read_dir(process.path().join("fd")).ok());
    files
        .flat_map(|files| files.flatten())
        .filter(|file| fs::read_link(file.path()).is_ok_and(|link| link == node))
        .count()
}

#[test]
#[ignore = "needs uinput"]
fn a_key_that_stays_down_does_not_keep_the_back_end_from_starting() {
    let device = Device::create(&devices::KEYBOARD).unwrap();
    let node = Node::open(device.node()).unwrap();
    device.report(&report(&[(EV_KEY, KEY_A, 1)])).unwrap();
    let input = Input::start(&device);
    assert!(node.grab(true).is_err());
    let mut driver = Driver::connect(&input);
    assert_eq!(driver.report(), report(&[(EV_KEY, KEY_A, 1)]));
}
