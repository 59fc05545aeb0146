// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The cursor queue.

use std::io::Read;

use vhost_device_tests::front_end::gpu::{
    Answers, Display, GpuDriver, Shown, command, number, words,
};

use crate::{Device, ManualDisplay, QUIET, bytes, pattern};

const B8G8R8A8: u32 = 1;

/// Starts a device, and a driver with a cursor in resource 1.
fn with_image(image: &[u32]) -> (Device, GpuDriver, Display) {
    let device = Device::start(&[]);
    let (mut driver, display) = device.connect_with_display(Answers::default());
    driver.create_drawn(1, B8G8R8A8, [64, 64], &bytes(image));
    (device, driver, display)
}

fn update(driver: &mut GpuDriver, scanout: u32, resource: u32) {
    driver.update_cursor(scanout, [3, 4], resource, [1, 2]);
}

#[test]
fn invalid_cursors_are_ignored() {
    let image = pattern(64 * 64);
    let (_device, mut driver, display) = with_image(&image);
    for (resource, (width, height)) in (2..).zip([(63, 64), (64, 65), (32, 128), (1, 1), (128, 32)])
    {
        driver.create(resource, B8G8R8A8, width, height);
        update(&mut driver, 0, resource);
    }
    update(&mut driver, 0, 99);
    update(&mut driver, 16, 1);
    update(&mut driver, u32::MAX, 1);
    driver.move_cursor(16, [0, 0], 1);
    // For the other queue, unknown, short, and empty.
    driver.run_cursor(&command(number::UNREF, &words(&[1, 0, 0, 0, 0, 0, 0, 0])));
    driver.run_cursor(&command(0x302, &words(&[0; 8])));
    driver.run_cursor(&command(number::UPDATE_CURSOR, &words(&[0, 0, 0, 0, 1])));
    driver.run_cursor(&[1, 3]);
    assert_eq!(display.next_within(QUIET), None);
    update(&mut driver, 15, 1);
    assert_eq!(display.next(), Shown::CursorImage(15, [3, 4, 1, 2], image));
}

#[test]
fn cursor_commands_are_refused_on_the_control_queue() {
    let (_device, mut driver, display) = with_image(&pattern(64 * 64));
    for kind in [number::UPDATE_CURSOR, number::MOVE_CURSOR] {
        let response = driver.run(&command(kind, &words(&[0, 0, 0, 0, 1, 0, 0, 0])));
        assert_eq!(response.kind(), number::UNSPEC);
    }
    assert_eq!(display.next_within(QUIET), None);
}

#[test]
fn a_cursor_moved_before_it_has_an_image_has_none_on_the_next_display() {
    let image = pattern(64 * 64);
    let (_device, mut driver, display) = with_image(&image);
    driver.move_cursor(0, [8, 9], 1);
    assert_eq!(display.next(), Shown::CursorMove(0, 8, 9));
    drop(display);
    let display = driver.connect_display(Answers::default());
    assert_eq!(display.next(), Shown::CursorMove(0, 8, 9));
    update(&mut driver, 0, 1);
    assert_eq!(display.next(), Shown::CursorImage(0, [3, 4, 1, 2], image));
}

#[test]
fn a_cursor_keeps_the_image_that_it_was_given() {
    let image = pattern(64 * 64);
    let (_device, mut driver, display) = with_image(&image);
    update(&mut driver, 0, 1);
    let shown = Shown::CursorImage(0, [3, 4, 1, 2], image.clone());
    assert_eq!(display.next(), shown);
    driver.unref(1);
    driver.move_cursor(0, [3, 4], 1);
    assert_eq!(display.next(), Shown::CursorMove(0, 3, 4));
    drop(display);
    let display = driver.connect_display(Answers::default());
    assert_eq!(display.next(), shown);
    // A hidden cursor does not exist for the next display.
    update(&mut driver, 0, 0);
    assert_eq!(display.next(), Shown::CursorHide(0));
    drop(display);
    let display = driver.connect_display(Answers::default());
    assert_eq!(display.next_within(QUIET), None);
}

#[test]
fn a_cursor_may_be_outside_the_picture() {
    let (_device, mut driver, display) = with_image(&pattern(64 * 64));
    for (x, y) in [(u32::MAX, 0), (0, u32::MAX), (1 << 31, 1 << 31)] {
        driver.move_cursor(0, [x, y], 1);
        assert_eq!(display.next(), Shown::CursorMove(0, x, y));
    }
}

#[test]
fn a_slow_display_gets_only_the_last_cursor_move() {
    let device = Device::start(&[]);
    let mut driver = device.connect();
    let mut display = ManualDisplay::greeted(&driver, 3);
    driver.create(1, B8G8R8A8, 1000, 1000);
    driver.set_scanout(0, 1, [0, 0, 1000, 1000]);
    assert_eq!(display.receive().0, 7);
    driver.send_flush(1, [0, 0, 1000, 1000]);
    // The picture is being sent.
    let mut start = [0; 32];
    display.0.read_exact(&mut start).unwrap();
    (0..1000).for_each(|x| driver.move_cursor(0, [x, 5], 1));
    display.0.read_exact(&mut vec![0; 4_000_000]).unwrap();
    assert_eq!(display.receive(), (4, words(&[0, 999, 5])));
    assert_eq!(driver.receive().kind(), number::OK_NODATA);
}
