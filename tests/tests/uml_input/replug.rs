// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Devices that are unplugged and plugged in again: at the same path, which often is a link created by udev.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use vhost_device_tests::evdev::{
    ABS_MT_TRACKING_ID, BTN_LEFT, BTN_TOUCH, Description, Device, EV_KEY, EV_LED, Event, KEY_A,
    KEY_B, LED_CAPSL, Node, devices, report,
};

use super::events::ten_fingers;
use super::{Driver, Guest, Input, wait_until};

/// A link like those in `/dev/input/by-id`.
struct Link {
    path: PathBuf,
    _directory: TempDir,
}

impl Link {
    fn to(device: &Device) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let link = Self {
            path: directory.path().join("usb-Logitech-event-mouse"),
            _directory: directory,
        };
        link.point_to(device.node());
        link
    }

    /// Replaces the link atomically, as udev does.
    fn point_to(&self, node: &Path) {
        let new = self.path.with_extension("tmp");
        symlink(node, &new).unwrap();
        fs::rename(new, &self.path).unwrap();
    }

    fn remove(&self) {
        fs::remove_file(&self.path).unwrap();
    }
}

/// Asserts that the guest can use the device.
#[track_caller]
fn assert_connected(driver: &mut Driver) {
    driver.front_end.config(0, 136).unwrap();
    driver.set(Event::new(EV_LED, LED_CAPSL, 1));
}

#[test]
#[ignore = "needs uinput"]
fn keys_are_released_when_the_device_goes_and_the_guest_stays() {
    let device = Device::create(&devices::KEYBOARD).unwrap();
    let mut input = Input::start(&device);
    let mut driver = Driver::connect(&input);
    for code in [KEY_A, KEY_B] {
        driver.assert_gets(&device, &report(&[(EV_KEY, code, 1)]));
    }
    drop(device);
    let mut guest = Guest::default();
    guest.keys.extend([KEY_A, KEY_B]);
    guest.take(&driver.reports_until(|report| report.iter().any(|event| event.code == KEY_B)));
    assert!(guest.keys.is_empty(), "{guest:?}");
    assert_connected(&mut driver);
    input.assert_idle();
    assert_eq!(input.program.status().unwrap(), None);
    // The next guest finds an idle device.
    drop(driver);
    let mut driver = Driver::connect(&input);
    assert_connected(&mut driver);
    input.assert_idle();
}

#[test]
#[ignore = "needs uinput"]
fn touches_end_when_the_device_goes() {
    let device = Device::create(&devices::TOUCHSCREEN).unwrap();
    let input = Input::start(&device);
    let mut driver = Driver::connect(&input);
    let mut guest = Guest::default();
    device.report(&ten_fingers(100)).unwrap();
    let is_touched = |report: &Vec<Event>| report.iter().any(|event| event.code == BTN_TOUCH);
    guest.take(&driver.reports_until(is_touched));
    assert_eq!(guest.touch(9, ABS_MT_TRACKING_ID), 109);
    drop(device);
    let is_touched = |guest: &Guest| {
        let mut slots = 0..10;
        !guest.keys.is_empty() || slots.any(|slot| guest.touch(slot, ABS_MT_TRACKING_ID) >= 0)
    };
    while is_touched(&guest) {
        guest.take(&[driver.report()]);
    }
}

#[test]
#[ignore = "needs uinput"]
fn events_continue_when_the_device_returns_under_another_number() {
    let device = Device::create(&devices::MOUSE).unwrap();
    let link = Link::to(&device);
    let input = Input::start_with(&link.path, &[]);
    let mut driver = Driver::connect(&input);
    let number = device.node().to_owned();
    drop(device);
    // The other device gets the free number.
    let _other = Device::create(&devices::BEEPER).unwrap();
    let device = Device::create(&devices::MOUSE).unwrap();
    assert_ne!(device.node(), number);
    link.point_to(device.node());
    let node = Node::open(device.node()).unwrap();
    wait_grabbed(&node);
    driver.assert_gets(&device, &report(&[(EV_KEY, BTN_LEFT, 1)]));
    assert_eq!(node.read().unwrap(), []);
}

/// Returns whether another process has grabbed the device.
fn is_grabbed(node: &Node) -> bool {
    let result = node.grab(true);
    if result.is_ok() {
        node.grab(false).unwrap();
    }
    result.is_err()
}

#[track_caller]
fn wait_grabbed(node: &Node) {
    wait_until("the back-end has grabbed the device", || is_grabbed(node));
}

/// Unplugs a device, and plugs in another one at the same path.
fn replug(first: &Description, second: &Description) -> (Input, Driver, Device, Link) {
    let device = Device::create(first).unwrap();
    let link = Link::to(&device);
    let input = Input::start_with(&link.path, &[]);
    let driver = Driver::connect(&input);
    drop(device);
    input.wait_gone(1);
    link.remove();
    let device = Device::create(second).unwrap();
    link.point_to(device.node());
    (input, driver, device, link)
}

#[test]
#[ignore = "needs uinput"]
fn the_same_device_is_taken_and_grabbed_again() {
    let (input, mut driver, device, _link) = replug(&devices::KEYBOARD, &devices::KEYBOARD);
    let node = Node::open(device.node()).unwrap();
    wait_grabbed(&node);
    for value in [1, 0] {
        driver.assert_gets(&device, &report(&[(EV_KEY, KEY_A, value)]));
    }
    driver.set(Event::new(EV_LED, LED_CAPSL, 1));
    assert_eq!(node.lights().unwrap(), [LED_CAPSL]);
    assert_eq!(node.read().unwrap(), []);
    // And once more.
    drop(device);
    input.wait_gone(2);
}

#[test]
#[ignore = "needs uinput"]
fn a_key_held_when_the_device_returns_is_reported() {
    let (_input, mut driver, device, _link) = replug(&devices::KEYBOARD, &devices::KEYBOARD);
    driver.assert_gets(&device, &report(&[(EV_KEY, KEY_A, 1)]));
    driver.assert_gets(&device, &report(&[(EV_KEY, KEY_A, 0)]));
}

#[test]
#[ignore = "needs uinput"]
fn another_device_at_the_path_is_not_taken() {
    let renamed = Description {
        name: "AT Translated Set 2 keyboarD",
        ..devices::KEYBOARD
    };
    let other_ids = Description {
        ids: [0x11, 1, 1, 0xab42],
        ..devices::KEYBOARD
    };
    let fewer_keys = Description {
        codes: &[(EV_KEY, 1..=88)],
        ..devices::KEYBOARD
    };
    for other in [&devices::MOUSE, &renamed, &other_ids, &fewer_keys] {
        let (input, mut driver, device, link) = replug(&devices::KEYBOARD, other);
        let node = Node::open(device.node()).unwrap();
        wait_until("the back-end reports it", || {
            input.logged("is a different device now") == 1
        });
        assert!(!is_grabbed(&node));
        assert_connected(&mut driver);
        // The right one appears later.
        let device = Device::create(&devices::KEYBOARD).unwrap();
        link.point_to(device.node());
        driver.assert_gets(&device, &report(&[(EV_KEY, KEY_B, 1)]));
        assert_eq!(input.logged("is a different device now"), 1, "said once");
    }
}

#[test]
#[ignore = "needs uinput"]
fn a_node_that_comes_back_under_its_number_is_found() {
    let device = Device::create(&devices::KEYBOARD).unwrap();
    let path = device.node().to_owned();
    let input = Input::start_with(&path, &[]);
    let mut driver = Driver::connect(&input);
    drop(device);
    input.wait_gone(1);
    let device = Device::create(&devices::KEYBOARD).unwrap();
    assert_eq!(device.node(), path, "the lowest number that is free");
    driver.assert_gets(&device, &report(&[(EV_KEY, KEY_A, 1)]));
}

#[test]
#[ignore = "needs uinput"]
fn a_device_that_is_back_before_a_guest_connects_is_used() {
    let device = Device::create(&devices::MOUSE).unwrap();
    let link = Link::to(&device);
    let input = Input::start_with(&link.path, &[]);
    drop(Driver::connect(&input));
    drop(device);
    let device = Device::create(&devices::MOUSE).unwrap();
    link.point_to(device.node());
    let mut driver = Driver::connect(&input);
    let node = Node::open(device.node()).unwrap();
    wait_grabbed(&node);
    // A movement could be over before the back-end first reads the state; a button is down until it is released.
    driver.assert_gets(&device, &report(&[(EV_KEY, BTN_LEFT, 1)]));
}
