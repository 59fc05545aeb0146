// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest that continues with another device (DEVICE_STATE).

use vhost_device_tests::evdev::{
    Device, EV_KEY, EV_REL, Event, KEY_A, KEY_B, Node, REL_X, REL_Y, Report, devices, report,
};
use vhost_device_tests::front_end::state::{HEADER_SIZE, sealed};

use super::{Driver, Guest, Input, wait_until};

const KEY_C: u16 = 46;

fn keys(keys: &[(u16, i32)]) -> Report {
    let events = keys.iter().map(|(code, value)| (EV_KEY, *code, *value));
    report(&events.collect::<Vec<_>>())
}

/// Stops a guest. Returns the state for the next device.
fn save(driver: &Driver) -> Vec<u8> {
    driver.front_end.stop(0).unwrap();
    driver.front_end.stop(1).unwrap();
    driver.front_end.save_state().unwrap()
}

#[test]
#[ignore = "needs uinput"]
fn a_migrated_guest_gets_the_keys_of_the_new_device() {
    let here = Device::create(&devices::KEYBOARD).unwrap();
    let input = Input::start(&here);
    let mut driver = Driver::connect(&input);
    let mut guest = Guest::default();
    here.report(&keys(&[(KEY_A, 1), (KEY_B, 1)])).unwrap();
    guest.take(&[driver.report()]);
    guest.assert_agrees(&Node::open(here.node()).unwrap());
    let state = save(&driver);

    let there = Device::create(&devices::KEYBOARD).unwrap();
    let node = Node::open(there.node()).unwrap();
    let input = Input::start(&there);
    there.report(&keys(&[(KEY_B, 1), (KEY_C, 1)])).unwrap();
    let front_end = input.connect();
    front_end.load_state(&state).unwrap();
    let mut driver = Driver::with_front_end(front_end, 64);
    driver.start_taking();
    guest.take(&[driver.report()]);
    assert!(!guest.keys.contains(&KEY_A), "a key sticks");
    guest.assert_agrees(&node);
    // The guest then works like any other.
    let release = keys(&[(KEY_B, 0)]);
    driver.assert_gets(&there, &release);
}

#[test]
#[ignore = "needs uinput"]
fn a_partly_delivered_report_is_completed_after_migration() {
    let here = Device::create(&devices::MOUSE).unwrap();
    let input = Input::start(&here);
    let mut driver = Driver::with_queue(&input, 1);
    let movement = report(&[(EV_REL, REL_X, 7), (EV_REL, REL_Y, -7)]);
    driver.give_buffers();
    here.report(&movement).unwrap();
    assert_eq!(driver.next(super::PATIENCE), Some(movement[0]));
    let state = save(&driver);

    let there = Device::create(&devices::MOUSE).unwrap();
    let input = Input::start(&there);
    let front_end = input.connect();
    front_end.load_state(&state).unwrap();
    let mut driver = Driver::with_front_end(front_end, 64);
    driver.start_taking();
    assert_eq!(driver.report(), movement[1..]);
    driver.assert_gets(&there, &movement);
}

#[test]
#[ignore = "needs uinput"]
fn the_config_selection_is_migrated() {
    let device = Device::create(&devices::KEYBOARD).unwrap();
    let input = Input::start(&device);
    let front_end = input.connect();
    // The name.
    front_end.set_config(0, &[1, 0]).unwrap();
    let config = front_end.config(0, 136).unwrap();
    let state = front_end.save_state().unwrap();
    drop(front_end);
    let front_end = input.connect();
    assert_ne!(front_end.config(0, 136).unwrap(), config);
    front_end.load_state(&state).unwrap();
    assert_eq!(front_end.config(0, 136).unwrap(), config);
    // The device of another guest has another state.
    drop(front_end);
    assert_ne!(input.connect().config(0, 136).unwrap(), config);
}

#[test]
#[ignore = "needs uinput"]
fn a_state_that_is_refused_changes_nothing_and_none_does_harm() {
    let device = Device::create(&devices::KEYBOARD).unwrap();
    let mut input = Input::start(&device);
    let mut driver = Driver::connect(&input);
    let press = keys(&[(KEY_A, 1), (KEY_B, 1)]);
    driver.assert_gets(&device, &press);
    driver.front_end.set_config(0, &[1, 0]).unwrap();
    let state = save(&driver);
    let raw = driver.front_end.raw().unwrap();
    let part = &state[HEADER_SIZE..];
    for length in 0..state.len() {
        assert!(!raw.loads(&state[..length]), "{length} bytes");
    }
    for length in 0..part.len() {
        let cut = sealed("input", 1, &part[..length]);
        assert!(!raw.loads(&cut), "{length} bytes");
    }
    for other in ["gpu", "block", "rng"] {
        assert!(!raw.loads(&sealed(other, 1, part)));
    }
    assert_eq!(raw.saved(), state);

    let mut random = fastrand::Rng::with_seed(1);
    for _ in 0..300 {
        let mut changed = part.to_vec();
        for _ in 0..random.usize(1..4) {
            let place = random.usize(..changed.len());
            changed[place] = random.u8(..);
        }
        raw.loads(&sealed("input", 1, &changed));
    }
    assert!(raw.loads(&state));
    let mut driver = Driver::with_front_end(driver.front_end, 64);
    driver.start_taking();
    let mut told = driver.report();
    told.sort_by_key(|event| event.code);
    assert_eq!(told, press);
    wait_until("the back-end has logged the reason", || {
        input.logged("the state of the device was not loaded") > 0
    });
    assert!(input.program.status().unwrap().is_none());
    device.report(&[Event::new(EV_KEY, KEY_C, 1)]).unwrap();
    assert_eq!(driver.report(), [Event::new(EV_KEY, KEY_C, 1)]);
}
