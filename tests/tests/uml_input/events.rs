// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Events of the device in the guest.

use vhost_device_tests::evdev::{
    ABS_DISTANCE, ABS_HAT0X, ABS_MT_ORIENTATION, ABS_MT_POSITION_X, ABS_MT_POSITION_Y,
    ABS_MT_PRESSURE, ABS_MT_SLOT, ABS_MT_TOUCH_MAJOR, ABS_MT_TOUCH_MINOR, ABS_MT_TRACKING_ID,
    ABS_PRESSURE, ABS_RZ, ABS_TILT_X, ABS_TILT_Y, ABS_X, ABS_Y, BTN_LEFT, BTN_SOUTH, BTN_STYLUS,
    BTN_TOOL_DOUBLETAP, BTN_TOOL_FINGER, BTN_TOOL_PEN, BTN_TOUCH, Description, Device, EV_ABS,
    EV_KEY, EV_MSC, EV_REL, EV_SW, Event, KEY_A, MSC_SCAN, MSC_SERIAL, Node, REL_HWHEEL,
    REL_HWHEEL_HI_RES, REL_WHEEL, REL_WHEEL_HI_RES, REL_X, REL_Y, Report, SW_LID, devices, report,
};
use vhost_device_tests::front_end::Buffer;
use vhost_device_tests::process::PATIENCE;

use super::{Driver, Guest, Input, start, wait_until};

/// Returns a report of ten fingers with all their axes.
pub fn ten_fingers(first_id: i32) -> Report {
    let mut events = Vec::new();
    for finger in 0..10 {
        events.extend([
            (EV_ABS, ABS_MT_SLOT, finger),
            (EV_ABS, ABS_MT_TRACKING_ID, first_id + finger),
            (EV_ABS, ABS_MT_TOUCH_MAJOR, 20 + finger),
            (EV_ABS, ABS_MT_TOUCH_MINOR, 10 + finger),
            (EV_ABS, ABS_MT_ORIENTATION, 1),
            (EV_ABS, ABS_MT_POSITION_X, 100 + finger),
            (EV_ABS, ABS_MT_POSITION_Y, 200 + finger),
        ]);
    }
    events.extend([
        (EV_KEY, BTN_TOUCH, 1),
        (EV_ABS, ABS_X, 100),
        (EV_ABS, ABS_Y, 200),
    ]);
    // A new device is in the first slot, and does not report its current slot.
    events.remove(0);
    report(&events)
}

/// Asserts that the guest receives these reports of the device unchanged, after the initial state of the device.
#[track_caller]
fn check_reports(description: &Description, reports: &[&[(u16, u16, i32)]]) {
    let (device, node, input) = start(description);
    let mut driver = Driver::connect(&input);
    let mut guest = Guest::default();
    let reports: Vec<Report> = reports.iter().map(|events| report(events)).collect();
    let mut received = Vec::new();
    for report in &reports {
        device.report(report).unwrap();
        let more = driver.reports_until(|received| received == report);
        guest.take(&more);
        guest.assert_agrees(&node);
        received.extend(more);
    }
    let start = received.len() - reports.len();
    assert!(
        start <= 1,
        "{start} reports of the state at the beginning: {received:?}"
    );
    assert_eq!(received[start..], reports);
}

#[test]
#[ignore = "needs uinput"]
fn a_keyboard_types() {
    let press = |value| [(EV_MSC, MSC_SCAN, 0x1e), (EV_KEY, KEY_A, value)];
    check_reports(
        &devices::KEYBOARD,
        &[&press(1), &press(0), &press(1), &press(0)],
    );
}

#[test]
#[ignore = "needs uinput"]
fn a_mouse_moves_clicks_and_turns_its_wheels() {
    check_reports(
        &devices::MOUSE,
        &[
            &[(EV_REL, REL_X, 5), (EV_REL, REL_Y, -3)],
            &[(EV_MSC, MSC_SCAN, 0x90001), (EV_KEY, BTN_LEFT, 1)],
            &[(EV_MSC, MSC_SCAN, 0x90001), (EV_KEY, BTN_LEFT, 0)],
            &[(EV_REL, REL_WHEEL_HI_RES, 15)],
            &[(EV_REL, REL_WHEEL, -1), (EV_REL, REL_WHEEL_HI_RES, -120)],
            &[(EV_REL, REL_HWHEEL, 1), (EV_REL, REL_HWHEEL_HI_RES, 120)],
            &[(EV_REL, REL_X, i32::MAX), (EV_REL, REL_Y, i32::MIN)],
        ],
    );
}

#[test]
#[ignore = "needs uinput"]
fn two_fingers_scroll_on_a_touchpad() {
    check_reports(
        &devices::TOUCHPAD,
        &[
            &[
                (EV_ABS, ABS_MT_TRACKING_ID, 45),
                (EV_ABS, ABS_MT_POSITION_X, 3000),
                (EV_ABS, ABS_MT_POSITION_Y, 2500),
                (EV_ABS, ABS_MT_PRESSURE, 60),
                (EV_KEY, BTN_TOUCH, 1),
                (EV_ABS, ABS_X, 3000),
                (EV_ABS, ABS_Y, 2500),
                (EV_ABS, ABS_PRESSURE, 60),
                (EV_KEY, BTN_TOOL_FINGER, 1),
            ],
            &[
                (EV_ABS, ABS_MT_SLOT, 1),
                (EV_ABS, ABS_MT_TRACKING_ID, 46),
                (EV_ABS, ABS_MT_POSITION_X, 3600),
                (EV_ABS, ABS_MT_POSITION_Y, 2550),
                (EV_ABS, ABS_MT_PRESSURE, 55),
                (EV_KEY, BTN_TOOL_FINGER, 0),
                (EV_KEY, BTN_TOOL_DOUBLETAP, 1),
            ],
            &[
                (EV_ABS, ABS_MT_SLOT, 0),
                (EV_ABS, ABS_MT_POSITION_Y, 2700),
                (EV_ABS, ABS_MT_SLOT, 1),
                (EV_ABS, ABS_MT_POSITION_Y, 2750),
                (EV_ABS, ABS_Y, 2700),
            ],
            &[
                (EV_ABS, ABS_MT_SLOT, 0),
                (EV_ABS, ABS_MT_TRACKING_ID, -1),
                (EV_KEY, BTN_TOOL_FINGER, 1),
                (EV_KEY, BTN_TOOL_DOUBLETAP, 0),
            ],
            &[
                (EV_ABS, ABS_MT_SLOT, 1),
                (EV_ABS, ABS_MT_TRACKING_ID, -1),
                (EV_KEY, BTN_TOUCH, 0),
                (EV_ABS, ABS_PRESSURE, 0),
                (EV_KEY, BTN_TOOL_FINGER, 0),
            ],
        ],
    );
}

#[test]
#[ignore = "needs uinput"]
fn a_pen_comes_near_draws_and_leaves() {
    check_reports(
        &devices::TABLET,
        &[
            &[
                (EV_KEY, BTN_TOOL_PEN, 1),
                (EV_ABS, ABS_X, 20000),
                (EV_ABS, ABS_Y, 10000),
                (EV_ABS, ABS_DISTANCE, 40),
                (EV_ABS, ABS_TILT_X, -12),
                (EV_ABS, ABS_TILT_Y, 30),
                (EV_MSC, MSC_SERIAL, 0x4bb0_0241),
            ],
            &[
                (EV_KEY, BTN_TOUCH, 1),
                (EV_ABS, ABS_X, 20100),
                (EV_ABS, ABS_DISTANCE, 0),
                (EV_ABS, ABS_PRESSURE, 4096),
                (EV_MSC, MSC_SERIAL, 0x4bb0_0241),
            ],
            &[(EV_KEY, BTN_STYLUS, 1), (EV_ABS, ABS_PRESSURE, 8191)],
            &[
                (EV_KEY, BTN_STYLUS, 0),
                (EV_KEY, BTN_TOUCH, 0),
                (EV_KEY, BTN_TOOL_PEN, 0),
                (EV_ABS, ABS_PRESSURE, 0),
            ],
        ],
    );
}

#[test]
#[ignore = "needs uinput"]
fn a_gamepad_plays_and_a_lid_closes() {
    check_reports(
        &devices::GAMEPAD,
        &[
            &[(EV_KEY, BTN_SOUTH, 1), (EV_ABS, ABS_X, -32768)],
            &[(EV_ABS, ABS_HAT0X, -1), (EV_ABS, ABS_RZ, 255)],
            &[
                (EV_KEY, BTN_SOUTH, 0),
                (EV_ABS, ABS_X, 1000),
                (EV_ABS, ABS_HAT0X, 0),
            ],
        ],
    );
    check_reports(
        &devices::SWITCHES,
        &[&[(EV_SW, SW_LID, 1)], &[(EV_SW, SW_LID, 0)]],
    );
}

#[test]
#[ignore = "needs uinput"]
fn a_starting_guest_gets_the_state_of_the_device() {
    let device = Device::create(&devices::TOUCHSCREEN).unwrap();
    let node = Node::open(device.node()).unwrap();
    device.report(&ten_fingers(70)).unwrap();
    let seventh = [(EV_ABS, ABS_MT_SLOT, 7), (EV_ABS, ABS_MT_TRACKING_ID, -1)];
    device.report(&report(&seventh)).unwrap();
    let input = Input::start(&device);
    let mut driver = Driver::connect(&input);
    let mut guest = Guest::default();
    guest.take(&[driver.report()]);
    guest.assert_agrees(&node);
}

#[test]
#[ignore = "needs uinput"]
fn many_reports_come_in_order() {
    let device = Device::create(&devices::MOUSE).unwrap();
    let input = Input::start(&device);
    let mut driver = Driver::connect(&input);
    for round in 0..100 {
        // No more at a time than the kernel buffers for a reader.
        let reports: Vec<Report> = (1..=8)
            .map(|step| match step % 3 {
                0 => report(&[(EV_REL, REL_WHEEL_HI_RES, 8 * round + step)]),
                1 => report(&[(EV_REL, REL_X, round + 1), (EV_REL, REL_Y, -step)]),
                _ => report(&[(EV_REL, REL_X, -step), (EV_KEY, BTN_LEFT, 1)]),
            })
            .collect();
        let end = report(&[(EV_KEY, BTN_LEFT, 0)]);
        for report in reports.iter().chain([&end]) {
            device.report(report).unwrap();
        }
        let mut expected = reports;
        expected.push(end);
        // A pressed button cannot be pressed again.
        let mut is_down = false;
        for report in &mut expected {
            report.retain(|event| {
                let passes = event.kind != EV_KEY || (event.value == 1) != is_down;
                is_down = if event.kind == EV_KEY {
                    event.value == 1
                } else {
                    is_down
                };
                passes
            });
        }
        assert_eq!(driver.reports(expected.len()), expected, "round {round}");
    }
}

#[test]
#[ignore = "needs uinput"]
fn a_large_report_streams_through_a_ring_of_four() {
    let (device, node, input) = start(&devices::TOUCHSCREEN);
    let mut driver = Driver::with_queue(&input, 4);
    driver.start_taking();
    let mut guest = Guest::default();
    for first_id in [100, 200] {
        let fingers = ten_fingers(first_id);
        assert!(fingers.len() > 60);
        device.report(&fingers).unwrap();
        let is_begun = |received: &Report| {
            let mut ids = received
                .iter()
                .filter(|event| event.code == ABS_MT_TRACKING_ID);
            ids.any(|event| event.value == first_id + 9)
        };
        let reports = driver.reports_until(is_begun);
        if first_id == 100 {
            assert_eq!(reports.last(), Some(&fingers));
        }
        guest.take(&reports);
        guest.assert_agrees(&node);
        let slots = (0..10).rev().flat_map(|slot| {
            [
                (EV_ABS, ABS_MT_SLOT, slot),
                (EV_ABS, ABS_MT_TRACKING_ID, -1),
            ]
        });
        let mut leave: Vec<_> = slots.collect();
        leave.remove(0);
        leave.push((EV_KEY, BTN_TOUCH, 0));
        let leave = report(&leave);
        device.report(&leave).unwrap();
        let left = driver.report();
        assert_eq!(left, leave);
        guest.take(&[left]);
        guest.assert_agrees(&node);
    }
}

#[test]
#[ignore = "needs uinput"]
fn the_guest_repeats_held_keys_itself() {
    let device = Device::create(&devices::KEYBOARD).unwrap();
    let input = Input::start_with(device.node(), &["--no-grab"]);
    let node = Node::open(device.node()).unwrap();
    let mut driver = Driver::connect(&input);
    let down = report(&[(EV_KEY, KEY_A, 1)]);
    let up = report(&[(EV_KEY, KEY_A, 0)]);
    device.report(&down).unwrap();
    wait_until("the host repeats the key", || node.repeats().unwrap());
    device.report(&up).unwrap();
    assert_eq!(driver.reports(2), [down, up]);
}

#[test]
#[ignore = "needs uinput"]
fn an_event_waits_for_a_buffer_large_enough() {
    let device = Device::create(&devices::MOUSE).unwrap();
    let input = Input::start(&device);
    let mut driver = Driver::with_queue(&input, 64);
    let memory = driver.front_end.memory().clone();
    let address = memory.allocate(64, 8);
    memory.fill(address, 64, 0xee);
    let writable = |length| Buffer::writable(address, length);
    // The device returns these empty.
    for chain in [
        vec![writable(7)],
        vec![Buffer::readable(address, 8)],
        vec![Buffer::writable(1 << 60, 8)],
    ] {
        driver.events.submit(&chain);
    }
    // In pieces, and with more room than needed.
    driver.events.submit(&writable(8).split(&[1; 7]));
    driver.events.submit(&[Buffer::writable(address + 8, 56)]);
    device.report(&report(&[(EV_REL, REL_WHEEL, -2)])).unwrap();
    for length in [0, 0, 0, 8, 8] {
        assert!(driver.events.wait_used(PATIENCE));
        assert_eq!(driver.events.take_used().unwrap().length, length);
    }
    let event = Event::new(EV_REL, REL_WHEEL, -2);
    assert_eq!(memory.read_vec(address, 8), event.to_guest());
    assert_eq!(memory.read_vec(address + 8, 8), Event::REPORT.to_guest());
    assert_eq!(memory.read_vec(address + 16, 48), [0xee; 48]);
    driver.start_taking();
    driver.assert_gets(&device, &report(&[(EV_REL, REL_X, 1)]));
}
