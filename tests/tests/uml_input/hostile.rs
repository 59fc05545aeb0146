// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Malicious guests and front-ends, on the rings of an input device. The suites `ring` and `protocol` test what does not depend on the
//! device.

use std::time::Duration;

use fastrand::Rng;
use vhost::VhostBackend;
use vhost_device_tests::evdev::{
    Device, EV_KEY, EV_LED, EV_REP, EV_SND, Event, KEY_A, LED_CAPSL, Node, devices, report,
};
use vhost_device_tests::front_end::Buffer;
use vhost_device_tests::process::PATIENCE;

use super::{Driver, Input, start};

#[test]
#[ignore = "needs uinput"]
fn a_corrupt_ring_stops_alone() {
    let (device, node, input) = start(&devices::KEYBOARD);
    let press = |down| report(&[(EV_KEY, KEY_A, down)]);
    let mut driver = Driver::connect(&input);
    // Events still arrive.
    driver.status.publish_nonsense();
    assert!(driver.status.wait_error(PATIENCE), "ERR is not signalled");
    driver.assert_gets(&device, &press(1));
    drop(driver);
    let mut driver = Driver::with_queue(&input, 16);
    // The device reads a buffer only when there is an event. The status queue still works.
    driver.events.publish_nonsense();
    device.report(&press(0)).unwrap();
    assert!(driver.events.wait_error(PATIENCE), "ERR is not signalled");
    driver.set_report(&[(EV_LED, LED_CAPSL, 1)]);
    assert_eq!(node.lights().unwrap(), [LED_CAPSL]);
    // After a new set-up, it works.
    driver.front_end.stop(0).unwrap();
    driver.events.reset();
    let start = driver.events.options().start();
    driver.front_end.start(0, &driver.events, start).unwrap();
    driver.start_taking();
    device.report(&press(1)).unwrap();
    driver.reports_until(|report| *report == press(1));
}

#[test]
#[ignore = "needs uinput"]
fn status_events_of_any_value_do_no_harm() {
    const EVENTS: usize = 3000;
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = Rng::with_seed(seed);
    let device = Device::create(&devices::KEYBOARD).unwrap();
    let node = Node::open(device.node()).unwrap();
    let input = Input::start_with(device.node(), &["--no-grab"]);
    let mut driver = Driver::connect(&input);
    let bytes = input.program.anonymous_bytes().unwrap();
    for _ in 0..EVENTS {
        let kind = match random.u8(0..6) {
            0 => EV_LED,
            1 => EV_REP,
            2 => EV_SND,
            3 => random.u16(0..0x20),
            _ => random.u16(..),
        };
        let code = match random.bool() {
            true => random.u16(0..16),
            false => random.u16(..),
        };
        let extremes = [0, 1, -1, i32::MIN, i32::MAX];
        let value = match random.bool() {
            true => *random.choice(&extremes).unwrap(),
            false => random.i32(..),
        };
        driver.set(Event::new(kind, code, value));
        // Nobody else reads the changes.
        device.received().unwrap();
    }
    let grown = input.program.anonymous_growth(bytes).unwrap();
    assert!(grown < 1 << 20, "{EVENTS} events left {grown} bytes");
    assert!(node.keys().unwrap().is_empty(), "a guest cannot type");
    driver.set_report(&[(EV_LED, LED_CAPSL, 1)]);
    assert!(node.lights().unwrap().contains(&LED_CAPSL));
}

/// Each one disconnects while it receives events.
#[test]
#[ignore = "needs uinput"]
fn front_ends_that_leave_during_events_leave_no_resources_behind() {
    const FRONT_ENDS: usize = 20;
    let device = Device::create(&devices::KEYBOARD).unwrap();
    let mut input = Input::start(&device);
    let before = input.program.resources().unwrap();
    for number in 0..FRONT_ENDS {
        let mut driver = Driver::connect(&input);
        for value in [1, 0, 1, 0] {
            device.report(&report(&[(EV_KEY, KEY_A, value)])).unwrap();
        }
        if number % 2 == 0 {
            driver.next(PATIENCE).unwrap();
        }
        drop(driver);
    }
    input.program.wait_for_resources(before).unwrap();
    let mut driver = Driver::connect(&input);
    let press = report(&[(EV_KEY, KEY_A, 1)]);
    device.report(&press).unwrap();
    driver.reports_until(|report| *report == press);
}

/// The guest's event buffers are inside its ring, or the front-end's memory is removed, while events arrive.
#[test]
#[ignore = "needs uinput"]
fn event_buffers_inside_the_ring_harm_only_that_ring() {
    let (device, node, input) = start(&devices::KEYBOARD);
    let mut driver = Driver::with_queue(&input, 16);
    let layout = *driver.events.layout();
    for place in [layout.descriptors, layout.avail, layout.used] {
        for offset in [0, 8, 64] {
            let _ = driver.events.add(&[Buffer::writable(place + offset, 8)]);
        }
        driver.events.publish();
        driver.events.kick_anyway();
        for value in [1, 0, 1, 0] {
            device.report(&report(&[(EV_KEY, KEY_A, value)])).unwrap();
        }
        driver.events.wait_error(Duration::from_millis(20));
        driver.set_report(&[(EV_LED, LED_CAPSL, 1)]);
        assert_eq!(node.lights().unwrap(), [LED_CAPSL]);
        driver.front_end.call().get_vring_base(0).unwrap();
        driver.events.reset();
        let start = driver.events.options().start();
        driver.front_end.start(0, &driver.events, start).unwrap();
    }
    drop(driver);
    let mut driver = Driver::connect(&input);
    let press = report(&[(EV_KEY, KEY_A, 1)]);
    device.report(&press).unwrap();
    driver.reports_until(|report| *report == press);
}
