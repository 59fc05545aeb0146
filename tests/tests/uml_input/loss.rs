// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Lost events: because the guest or the back-end is slow, or nobody is connected.

use vhost_device_tests::evdev::{
    ABS_MT_POSITION_X, ABS_MT_SLOT, ABS_MT_TRACKING_ID, ABS_X, BTN_LEFT, BTN_TOUCH, Device, EV_ABS,
    EV_KEY, EV_REL, EV_SW, Event, KEY_A, KEY_B, Node, REL_WHEEL, REL_X, REL_Y, Report, SW_LID,
    devices, report,
};
use vhost_device_tests::process::Signal;

use super::events::ten_fingers;
use super::{Driver, Guest, Input, start, wait_until};

/// Log line for dropped reports.
const WARNING: &str = "does not fetch its input events";

/// Fewer reports than the kernel buffers for a reader.
const BURST: usize = 8;

/// More events than the back-end buffers for a guest.
const FLOOD: usize = 20_000;

/// Returns a unique movement. Lengths differ, so that no limit falls between two movements by chance.
fn movement(number: i32) -> Report {
    let mut movement = report(&[(EV_REL, REL_X, number), (EV_REL, REL_Y, -number)]);
    movement.resize(2 + number as usize % 2, Event::new(EV_REL, REL_WHEEL, 1));
    movement
}

/// Makes reports until the back-end has dropped some, at a rate at which it can read them. Returns how many.
fn flood(device: &Device, input: &Input, make: impl Fn(i32) -> Report) -> i32 {
    let mut count = 0;
    wait_until("the back-end drops reports", || {
        assert!((count as usize) < FLOOD, "it keeps {count} reports");
        for _ in 0..BURST {
            count += 1;
            device.report(&make(count)).unwrap();
        }
        input.logged(WARNING) > 0
    });
    count
}

#[test]
#[ignore = "needs uinput"]
fn a_slow_guest_loses_whole_reports_with_one_warning() {
    let (device, node, input) = start(&devices::MOUSE);
    let mut driver = Driver::with_queue(&input, 64);
    let count = flood(&device, &input, movement);
    // Dropped too, including the button.
    for value in [1, 0, 1] {
        device
            .report(&report(&[(EV_KEY, BTN_LEFT, value)]))
            .unwrap();
    }
    driver.start_taking();
    let press = report(&[(EV_KEY, BTN_LEFT, 1)]);
    let mut reports = driver.reports_until(|report| *report == press);
    reports.pop();
    // The first movements, all complete.
    let kept = reports.len() as i32;
    assert!(kept > 100 && kept < count, "{kept} reports of {count}");
    let expected: Vec<Report> = (1..=kept).map(movement).collect();
    assert_eq!(reports, expected);
    let mut guest = Guest::default();
    guest.take(&[press]);
    guest.assert_agrees(&node);
    // It continues as before.
    driver.assert_gets(&device, &report(&[(EV_REL, REL_WHEEL, 1)]));
    assert_eq!(input.logged(WARNING), 1);
}

#[test]
#[ignore = "needs uinput"]
fn no_key_stays_down_after_dropped_events() {
    let (device, node, input) = start(&devices::KEYBOARD);
    let mut driver = Driver::with_queue(&input, 64);
    device.report(&report(&[(EV_KEY, KEY_A, 1)])).unwrap();
    flood(&device, &input, |number| {
        report(&[(EV_KEY, KEY_B, number % 2)])
    });
    device.report(&report(&[(EV_KEY, KEY_A, 0)])).unwrap();
    device.report(&report(&[(EV_KEY, KEY_B, 0)])).unwrap();
    driver.start_taking();
    let mut guest = Guest::default();
    let reports = driver.reports_until(|report| {
        report
            .iter()
            .any(|event| (event.code, event.value) == (KEY_A, 0))
    });
    guest.take(&reports);
    guest.assert_agrees(&node);
    // Later presses are not missed.
    assert!(guest.keys.is_empty());
    driver.assert_gets(&device, &report(&[(EV_KEY, KEY_B, 1)]));
}

#[test]
#[ignore = "needs uinput"]
fn touches_agree_after_dropped_events() {
    let (device, node, input) = start(&devices::TOUCHSCREEN);
    let mut driver = Driver::with_queue(&input, 64);
    device.report(&ten_fingers(100)).unwrap();
    flood(&device, &input, |number| {
        let x = 300 + number / 10 % 2;
        report(&[
            (EV_ABS, ABS_MT_SLOT, number % 10),
            (EV_ABS, ABS_MT_POSITION_X, x),
        ])
    });
    device
        .report(&report(&[
            // One finger leaves, another is replaced, a third moves.
            (EV_ABS, ABS_MT_SLOT, 3),
            (EV_ABS, ABS_MT_TRACKING_ID, -1),
            (EV_ABS, ABS_MT_SLOT, 5),
            (EV_ABS, ABS_MT_TRACKING_ID, -1),
        ]))
        .unwrap();
    device
        .report(&report(&[
            (EV_ABS, ABS_MT_SLOT, 5),
            (EV_ABS, ABS_MT_TRACKING_ID, 777),
            (EV_ABS, ABS_MT_SLOT, 8),
            (EV_ABS, ABS_MT_POSITION_X, 3000),
            (EV_ABS, ABS_X, 3000),
        ]))
        .unwrap();
    driver.start_taking();
    let mut guest = Guest::default();
    guest.take(&driver.reports_until(|report| report.iter().any(|event| event.value == 777)));
    guest.assert_agrees(&node);
    // The next events are for the current slot of the host's device.
    let moved = report(&[(EV_ABS, ABS_MT_POSITION_X, 1234)]);
    device.report(&moved).unwrap();
    let reports = driver.reports(1);
    assert_eq!(reports, [moved]);
    guest.take(&reports);
    guest.assert_agrees(&node);
}

/// Stops the back-end while more happens than the kernel buffers for it (SYN_DROPPED).
#[track_caller]
fn overflow(input: &mut Input, device: &Device, reports: impl IntoIterator<Item = Report>) {
    input.program.signal(Signal::STOP).unwrap();
    let status = format!("/proc/{}/status", input.program.id());
    wait_until("the back-end has stopped", || {
        let status = std::fs::read_to_string(&status).unwrap();
        status.contains("State:\tT")
    });
    for report in reports {
        device.report(&report).unwrap();
    }
    input.program.signal(Signal::CONT).unwrap();
}

#[test]
#[ignore = "needs uinput"]
fn keys_agree_after_the_kernel_has_dropped_events() {
    let (device, node, mut input) = start(&devices::KEYBOARD);
    let mut driver = Driver::connect(&input);
    let a_down = report(&[(EV_KEY, KEY_A, 1)]);
    device.report(&a_down).unwrap();
    let mut guest = Guest::default();
    guest.take(&[driver.report()]);
    let presses = (0..1001).map(|number| report(&[(EV_KEY, KEY_B, (number + 1) % 2)]));
    let a_up = report(&[(EV_KEY, KEY_A, 0)]);
    overflow(&mut input, &device, [a_up].into_iter().chain(presses));
    let reports = driver.reports_until(|report| report.iter().any(|event| event.code == KEY_A));
    guest.take(&reports);
    assert!(reports.len() < 1000, "the kernel has dropped no events");
    assert_eq!(node.keys().unwrap(), [KEY_B]);
    guest.assert_agrees(&node);
    driver.assert_gets(&device, &report(&[(EV_KEY, KEY_B, 0)]));
}

#[test]
#[ignore = "needs uinput"]
fn touches_agree_after_the_kernel_has_dropped_events() {
    let (device, node, mut input) = start(&devices::TOUCHSCREEN);
    let mut driver = Driver::connect(&input);
    let mut guest = Guest::default();
    device.report(&ten_fingers(100)).unwrap();
    let is_touched = |report: &Report| report.iter().any(|event| event.code == BTN_TOUCH);
    guest.take(&driver.reports_until(is_touched));
    guest.assert_agrees(&node);
    let lifted = report(&[
        (EV_ABS, ABS_MT_SLOT, 2),
        (EV_ABS, ABS_MT_TRACKING_ID, -1),
        (EV_ABS, ABS_MT_SLOT, 6),
        (EV_ABS, ABS_MT_TRACKING_ID, 888),
    ]);
    let moves = (0..2000).map(|number| {
        report(&[
            (EV_ABS, ABS_MT_POSITION_X, 500 + number),
            (EV_ABS, ABS_X, 500 + number),
        ])
    });
    overflow(&mut input, &device, [lifted].into_iter().chain(moves));
    let reports =
        driver.reports_until(|report| report.iter().any(|event| event.value == 500 + 1999));
    assert!(reports.len() < 2000, "the kernel has dropped no events");
    guest.take(&reports);
    guest.assert_agrees(&node);
    driver.assert_gets(&device, &report(&[(EV_ABS, ABS_MT_POSITION_X, 77)]));
}

#[test]
#[ignore = "needs uinput"]
fn a_guest_that_connects_gets_no_old_events() {
    let (device, node, input) = start(&devices::KEYBOARD);
    // Without a guest, and with a guest that took nothing.
    let type_b = || {
        for value in [1, 0] {
            device.report(&report(&[(EV_KEY, KEY_B, value)])).unwrap();
        }
    };
    type_b();
    let driver = Driver::with_queue(&input, 64);
    type_b();
    drop(driver);
    type_b();
    device.report(&report(&[(EV_KEY, KEY_A, 1)])).unwrap();
    let mut driver = Driver::connect(&input);
    // A key that is still down is not an old event.
    let down = report(&[(EV_KEY, KEY_A, 1)]);
    assert_eq!(driver.report(), down);
    let mut guest = Guest::default();
    guest.take(&[down]);
    guest.assert_agrees(&node);
    driver.assert_gets(&device, &report(&[(EV_KEY, KEY_A, 0)]));
}

#[test]
#[ignore = "needs uinput"]
fn a_ring_that_stops_and_starts_loses_no_state() {
    let (device, node, input) = start(&devices::KEYBOARD);
    let mut driver = Driver::connect(&input);
    let down = report(&[(EV_KEY, KEY_A, 1)]);
    device.report(&down).unwrap();
    let mut guest = Guest::default();
    guest.take(&[driver.report()]);
    let base = driver.front_end.stop(0).unwrap();
    for (code, value) in [(KEY_A, 0), (KEY_B, 1)] {
        device.report(&report(&[(EV_KEY, code, value)])).unwrap();
    }
    driver.front_end.start(0, &driver.events, base).unwrap();
    let is_told = |report: &Report| report.iter().any(|event| event.code == KEY_B);
    guest.take(&driver.reports_until(is_told));
    guest.assert_agrees(&node);
}

#[test]
#[ignore = "needs uinput"]
fn switches_that_changed_without_a_guest_are_reported() {
    let (device, node, input) = start(&devices::SWITCHES);
    let closed = report(&[(EV_SW, SW_LID, 1)]);
    device.report(&closed).unwrap();
    let mut driver = Driver::connect(&input);
    assert_eq!(driver.report(), closed);
    drop(driver);
    device.report(&report(&[(EV_SW, SW_LID, 0)])).unwrap();
    let mut driver = Driver::connect(&input);
    device.report(&closed).unwrap();
    let mut guest = Guest::default();
    guest.take(&[driver.report()]);
    guest.assert_agrees(&node);
}

/// Connects a guest that has received four events of a report, and has no buffer for the rest.
fn within_a_report(device: &Device, input: &Input) -> Driver {
    let mut driver = Driver::with_queue(input, 4);
    driver.start_taking();
    // The state of the axes, which is a separate report.
    driver.report();
    driver.is_quick = false;
    device.report(&ten_fingers(100)).unwrap();
    wait_until("the device has used all buffers", || {
        driver.events.has_used_all()
    });
    driver
}

/// Asserts that the rest arrives, and that the guest then agrees with the device.
#[track_caller]
fn assert_completed(driver: &mut Driver, guest: &mut Guest, node: &Node) {
    driver.start_taking();
    guest.take(&driver.reports_until(|report| *report == ten_fingers(100)));
    while guest.difference(node).is_some() {
        guest.take(&[driver.report()]);
    }
}

#[test]
#[ignore = "needs uinput"]
fn a_ring_stopped_within_a_report_continues_within_it() {
    let (device, node, input) = start(&devices::TOUCHSCREEN);
    let mut driver = within_a_report(&device, &input);
    let base = driver.front_end.stop(0).unwrap();
    let gone = report(&[(EV_ABS, ABS_MT_SLOT, 4), (EV_ABS, ABS_MT_TRACKING_ID, -1)]);
    device.report(&gone).unwrap();
    driver.front_end.start(0, &driver.events, base).unwrap();
    let mut guest = Guest::default();
    assert_completed(&mut driver, &mut guest, &node);
    assert_eq!(guest.touch(4, ABS_MT_TRACKING_ID), -1);
    assert_eq!(guest.touch(5, ABS_MT_TRACKING_ID), 105);
}

#[test]
#[ignore = "needs uinput"]
fn a_device_unplugged_within_a_report_completes_it() {
    let device = Device::create(&devices::TOUCHSCREEN).unwrap();
    let input = Input::start(&device);
    let mut driver = within_a_report(&device, &input);
    drop(device);
    input.wait_gone(1);
    // It is back, and nothing touches it.
    let device = Device::create(&devices::TOUCHSCREEN).unwrap();
    let node = Node::open(device.node()).unwrap();
    let mut guest = Guest::default();
    assert_completed(&mut driver, &mut guest, &node);
    device.report(&ten_fingers(300)).unwrap();
    while guest.touch(9, ABS_MT_TRACKING_ID) != 309 {
        guest.take(&[driver.report()]);
    }
    guest.assert_agrees(&node);
}

#[test]
#[ignore = "needs uinput"]
fn touches_agree_after_repeated_losses() {
    let (device, node, mut input) = start(&devices::TOUCHSCREEN);
    let mut driver = Driver::connect(&input);
    let mut guest = Guest::default();
    let mut random = fastrand::Rng::with_seed(7);
    let mut id = 0;
    let mut touch = || {
        let mut events = Vec::new();
        for _ in 0..random.usize(1..4) {
            if random.bool() {
                events.push((EV_ABS, ABS_MT_SLOT, random.i32(0..10)));
            }
            id += 1;
            events.push(match random.u8(0..8) {
                0 => (EV_ABS, ABS_MT_TRACKING_ID, -1),
                1..3 => (EV_ABS, ABS_MT_TRACKING_ID, id),
                _ => (EV_ABS, ABS_MT_POSITION_X, random.i32(0..3264)),
            });
        }
        report(&events)
    };
    for _ in 0..20 {
        let lost: Vec<Report> = (0..200).map(|_| touch()).collect();
        overflow(&mut input, &device, lost);
        // More happens while the back-end reads the state of the device.
        for _ in 0..50 {
            device.report(&touch()).unwrap();
        }
        while guest.difference(&node).is_some() {
            guest.take(&[driver.report()]);
        }
    }
}
