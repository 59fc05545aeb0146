// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Requests that the display does not answer, or answers too late.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use vhost_device_tests::front_end::gpu::{Answers, Display, GpuDriver, Shown, number, words};

use crate::answers::{AT_ONCE, ask_edid, ask_info, assert_edid, assert_info, filled};
use crate::{B8G8R8X8, Device, ManualDisplay, pass_display};

/// Sends requests until the device waits for the display again, which it may not do after the display was silent.
fn wait_until_heard(driver: &mut GpuDriver, display: &mut ManualDisplay) {
    let is_answered = |driver: &mut GpuDriver| driver.receive().body()[..24] == filled(24, 0xa5);
    loop {
        ask_info(driver);
        assert_eq!(display.receive(), (3, Vec::new()));
        display.answer(3, &filled(408, 0xa5));
        if is_answered(driver) {
            return;
        }
    }
}

/// The display of libkrun is one.
#[test]
fn a_display_that_does_not_report_features_is_used_without_any() {
    let device = Device::start(&[]);
    let mut driver = device.connect();
    let mut display = ManualDisplay::connect(&driver);
    let start = Instant::now();
    display.is_greeted();
    display.answer(3, &filled(408, 1));
    driver.create(1, B8G8R8X8, 8, 8);
    driver.set_scanout(0, 1, [0, 0, 8, 8]);
    assert_eq!(display.receive(), (7, words(&[0, 8, 8])));
    driver.flush(1, [0, 0, 8, 8]);
    assert_eq!(display.receive().0, 8);
    ask_info(&mut driver);
    assert_eq!(display.receive(), (3, Vec::new()));
    display.answer(3, &filled(408, 2));
    assert_info(&driver.receive(), 2);
    ask_edid(&mut driver, 0);
    assert_eq!(driver.receive().kind(), number::UNSPEC);
    assert!(start.elapsed() < AT_ONCE, "the guest waits");
}

#[test]
fn a_display_that_never_answers_delays_the_guest_once_and_gets_updates() {
    let device = Device::start(&[]);
    let mut driver = device.connect();
    let (display, socket) = Display::new(Answers {
        features: None,
        display_info: None,
        edid: None,
    });
    pass_display(&driver, socket.as_fd());
    let start = Instant::now();
    // The first requests of Linux.
    ask_info(&mut driver);
    assert_eq!(driver.receive().kind(), number::OK_DISPLAY_INFO);
    for scanout in 0..16 {
        ask_edid(&mut driver, scanout);
        assert_eq!(driver.receive().kind(), number::UNSPEC);
    }
    driver.create(1, B8G8R8X8, 8, 8);
    driver.set_scanout(0, 1, [0, 0, 8, 8]);
    for _ in 0..5 {
        driver.flush(1, [0, 0, 8, 8]);
        ask_info(&mut driver);
        assert_eq!(driver.receive().kind(), number::OK_DISPLAY_INFO);
    }
    let taken = start.elapsed();
    assert!(taken < Duration::from_millis(1900), "{taken:?}");
    assert_eq!(display.next(), Shown::Scanout(0, 8, 8));
    assert!(matches!(display.next(), Shown::Update(0, ..)));
}

#[test]
fn features_reported_late_are_used() {
    let device = Device::start(&[]);
    let mut driver = device.connect();
    let mut display = ManualDisplay::connect(&driver);
    driver.create(1, B8G8R8X8, 8, 8);
    driver.set_scanout(0, 1, [0, 0, 8, 8]);
    driver.flush(1, [0, 0, 8, 8]);
    display.is_greeted();
    assert_eq!(display.receive(), (7, words(&[0, 8, 8])));
    assert_eq!(display.receive().0, 8);
    display.answer(1, &3u64.to_ne_bytes());
    assert_eq!(display.receive(), (2, 3u64.to_ne_bytes().to_vec()));
    display.answer(3, &filled(408, 1));
    wait_until_heard(&mut driver, &mut display);
    ask_edid(&mut driver, 0);
    display.is_asked_for_edid(0);
    display.answer(11, &filled(1056, 8));
    assert_edid(&driver.receive(), 8);
}

/// QEMU does not answer if there is no such scanout.
#[test]
fn an_unanswered_edid_request_delays_neither_the_guest_nor_the_next_request() {
    let device = Device::start(&[]);
    let mut driver = device.connect();
    let mut display = ManualDisplay::greeted(&driver, 3);
    let start = Instant::now();
    for time in 1..10 {
        ask_edid(&mut driver, 5);
        display.is_asked_for_edid(5);
        display.answer(3, &filled(408, 0));
        assert_eq!(driver.receive().kind(), number::UNSPEC);
        ask_edid(&mut driver, 0);
        display.is_asked_for_edid(0);
        display.answer(11, &filled(1056, time));
        display.answer(3, &filled(408, 0));
        assert_edid(&driver.receive(), time);
        ask_info(&mut driver);
        assert_eq!(display.receive(), (3, Vec::new()));
        display.answer(3, &filled(408, time));
        assert_info(&driver.receive(), time);
    }
    assert!(start.elapsed() < AT_ONCE, "the guest waits");
}

#[test]
fn a_late_answer_is_not_taken_for_the_next_one() {
    let device = Device::start(&[]);
    let mut driver = device.connect();
    let mut display = ManualDisplay::greeted(&driver, 3);
    ask_edid(&mut driver, 0);
    display.is_asked_for_edid(0);
    assert_eq!(driver.receive().kind(), number::UNSPEC);
    // The device still asks, but does not wait.
    let start = Instant::now();
    ask_edid(&mut driver, 1);
    assert_eq!(driver.receive().kind(), number::UNSPEC);
    assert!(start.elapsed() < AT_ONCE, "the guest waits");
    display.is_asked_for_edid(1);
    for byte in [1, 2] {
        display.answer(11, &filled(1056, byte));
        display.answer(3, &filled(408, byte));
    }
    wait_until_heard(&mut driver, &mut display);
    ask_edid(&mut driver, 2);
    display.is_asked_for_edid(2);
    display.answer(11, &filled(1056, 3));
    assert_edid(&driver.receive(), 3);
}

#[test]
fn a_silent_display_gets_a_bounded_number_of_requests_and_is_used_when_it_answers() {
    let device = Device::start(&[]);
    let mut driver = device.connect();
    let mut display = ManualDisplay::greeted(&driver, 3);
    for _ in 0..200 {
        ask_info(&mut driver);
        assert_eq!(driver.receive().kind(), number::OK_DISPLAY_INFO);
    }
    let asked = display.told_until_silent() / 12;
    assert!((1..100).contains(&asked), "{asked} questions");
    (0..asked).for_each(|_| display.answer(3, &filled(408, 1)));
    // The last one, for which there was no room.
    assert_eq!(display.receive(), (3, Vec::new()));
    display.answer(3, &filled(408, 1));
    wait_until_heard(&mut driver, &mut display);
}
