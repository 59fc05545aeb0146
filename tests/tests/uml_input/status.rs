// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Changes that the guest makes on the device, through the status queue.

use vhost_device_tests::evdev::{
    Device, EV_ABS, EV_FF, EV_KEY, EV_LED, EV_MSC, EV_REP, EV_SND, EV_SYN, Event, FF_GAIN, KEY_A,
    LED_CAPSL, LED_NUML, LED_SCROLLL, Node, REP_DELAY, REP_PERIOD, SND_BELL, SND_TONE, devices,
    report,
};
use vhost_device_tests::front_end::Buffer;

use super::{Driver, Input, start, wait_until};

/// Asserts that the device receives exactly these events.
#[track_caller]
fn assert_received(device: &Device, expected: &[Event]) {
    let mut received = Vec::new();
    wait_until("the device is set", || {
        received.extend(device.received().unwrap());
        received.retain(|event| event.kind != EV_SYN);
        received.len() >= expected.len()
    });
    assert_eq!(received, expected);
}

#[test]
#[ignore = "needs uinput"]
fn lights_go_on_and_off() {
    let (device, node, input) = start(&devices::KEYBOARD);
    let mut driver = Driver::connect(&input);
    driver.set_report(&[(EV_LED, LED_CAPSL, 1), (EV_LED, LED_NUML, 1)]);
    assert_eq!(node.lights().unwrap(), [LED_NUML, LED_CAPSL]);
    driver.set_report(&[(EV_LED, LED_CAPSL, 0), (EV_LED, LED_SCROLLL, 1)]);
    assert_eq!(node.lights().unwrap(), [LED_NUML, LED_SCROLLL]);
    let expected = [
        (LED_CAPSL, 1),
        (LED_NUML, 1),
        (LED_CAPSL, 0),
        (LED_SCROLLL, 1),
    ];
    assert_received(
        &device,
        &expected.map(|(code, on)| Event::new(EV_LED, code, on)),
    );
}

#[test]
#[ignore = "needs uinput"]
fn the_guest_gets_no_echo_of_what_it_sets() {
    let device = Device::create(&devices::KEYBOARD).unwrap();
    // The kernel then sends changes back to all readers.
    let input = Input::start_with(device.node(), &["--no-grab"]);
    let mut driver = Driver::connect(&input);
    for on in [1, 0, 1] {
        driver.set_report(&[(EV_LED, LED_CAPSL, on)]);
    }
    driver.assert_gets(&device, &report(&[(EV_KEY, KEY_A, 1)]));
}

#[test]
#[ignore = "needs uinput"]
fn repetition_of_keys_is_set() {
    let (_device, node, input) = start(&devices::KEYBOARD);
    let mut driver = Driver::connect(&input);
    assert_ne!(node.repetition().unwrap(), [600, 50]);
    driver.set_report(&[(EV_REP, REP_DELAY, 600), (EV_REP, REP_PERIOD, 50)]);
    assert_eq!(node.repetition().unwrap(), [600, 50]);
}

#[test]
#[ignore = "needs uinput"]
fn sounds_are_made() {
    let (device, node, input) = start(&devices::BEEPER);
    let mut driver = Driver::connect(&input);
    driver.set_report(&[
        (EV_SND, SND_BELL, 1),
        (EV_SND, SND_TONE, 440),
        (EV_SND, SND_BELL, 0),
    ]);
    assert_eq!(node.sounds().unwrap(), [SND_TONE]);
    let expected = [(SND_BELL, 1), (SND_TONE, 440), (SND_BELL, 0)];
    assert_received(
        &device,
        &expected.map(|(code, on)| Event::new(EV_SND, code, on)),
    );
}

#[test]
#[ignore = "needs uinput"]
fn effects_are_played() {
    let device = Device::create(&devices::GAMEPAD).unwrap();
    let input = Input::start_with(device.node(), &["--no-grab"]);
    // The upload ends when the device has accepted the effect.
    let node = Node::open(device.node()).unwrap();
    let effect = std::thread::scope(|scope| {
        let upload = scope.spawn(|| node.upload_rumble().unwrap());
        wait_until("the effect is uploaded", || {
            device.received().unwrap();
            upload.is_finished()
        });
        upload.join().unwrap()
    });
    let mut driver = Driver::connect(&input);
    driver.set_report(&[
        (EV_FF, FF_GAIN, 0x8000),
        (EV_FF, effect, 1),
        (EV_FF, effect, 0),
    ]);
    let expected = [(FF_GAIN, 0x8000), (effect, 1), (effect, 0)];
    assert_received(
        &device,
        &expected.map(|(code, value)| Event::new(EV_FF, code, value)),
    );
    // The kernel removes the effect when the node is closed, and the device has to acknowledge that.
    std::thread::scope(|scope| {
        let close = scope.spawn(|| drop(node));
        wait_until("the effect is removed", || {
            device.received().unwrap();
            close.is_finished()
        });
    });
}

#[test]
#[ignore = "needs uinput"]
fn a_guest_cannot_type_or_set_what_the_device_has_not() {
    let device = Device::create(&devices::KEYBOARD).unwrap();
    let node = Node::open(device.node()).unwrap();
    let input = Input::start_with(device.node(), &["--no-grab"]);
    let mut driver = Driver::connect(&input);
    for (kind, code) in [
        (EV_KEY, KEY_A),
        (EV_ABS, 0),
        (EV_MSC, 4),
        (EV_SND, SND_BELL),
        (EV_FF, FF_GAIN),
        (EV_LED, 15),
        (EV_LED, u16::MAX),
        (EV_REP, 2),
        (EV_SYN, 3),
        (0x1f, 0),
        (u16::MAX, u16::MAX),
    ] {
        driver.set(Event::new(kind, code, 1));
    }
    driver.set(Event::REPORT);
    let light = Event::new(EV_LED, LED_NUML, 1);
    driver.set(light);
    assert_received(&device, &[light]);
    assert!(node.keys().unwrap().is_empty());
    // Other readers of the node have seen nothing else either.
    device.report(&report(&[(EV_KEY, KEY_A, 1)])).unwrap();
    let press = Event::new(EV_KEY, KEY_A, 1);
    let mut seen = node.read().unwrap();
    seen.retain(|event| !event.is_report());
    assert_eq!(seen, [light, press]);
}

#[test]
#[ignore = "needs uinput"]
fn buffers_of_any_form_come_back() {
    let (device, node, input) = start(&devices::KEYBOARD);
    let mut driver = Driver::connect(&input);
    let memory = driver.front_end.memory().clone();
    let light = |on| Event::new(EV_LED, LED_CAPSL, on).to_guest();
    let address = memory.allocate(64, 8);
    memory.write(address, &light(1));
    // The bytes after the event are ignored.
    memory.fill(address + 8, 56, 0xff);
    let readable = |length| Buffer::readable(address, length);
    let writable = Buffer::writable(address + 32, 8);
    let nowhere = 1 << 60;

    driver.send_chains(&[
        vec![readable(1)],
        vec![readable(7)],
        vec![writable],
        vec![readable(4), writable],
        vec![Buffer::readable(nowhere, 8)],
        vec![Buffer::writable(nowhere, 8)],
    ]);
    assert!(node.lights().unwrap().is_empty(), "no whole event");
    assert_eq!(
        memory.read_vec(address + 32, 8),
        [0xff; 8],
        "the device writes nothing"
    );

    driver.send_chains(&[readable(8).split(&[1; 7])]);
    assert_eq!(node.lights().unwrap(), [LED_CAPSL], "in eight pieces");
    memory.write(address, &light(0));
    driver.send_chains(&[vec![readable(24), writable]]);
    assert!(node.lights().unwrap().is_empty(), "longer than an event");

    // The event queue still works.
    driver.assert_gets(&device, &report(&[(EV_KEY, KEY_A, 1)]));
}
