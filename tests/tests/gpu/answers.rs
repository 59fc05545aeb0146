// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Requests to the display, and displays that answer wrongly, late, or not at all.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::time::{Duration, Instant};

use vhost_device_tests::front_end::Buffer;
use vhost_device_tests::front_end::gpu::{
    Answers, GpuDriver, Response, Shown, command, number, words,
};

use crate::{B8G8R8X8, Device, ManualDisplay, PATIENCE, bytes, pass_display, pattern, reset};

/// Less than the time that a device waits for a display.
pub const AT_ONCE: Duration = Duration::from_millis(900);

pub fn ask_info(driver: &mut GpuDriver) {
    driver.send(&command(number::GET_DISPLAY_INFO, &[]), 4096);
}

/// Waits until the device has dropped a display.
pub fn wait_until_given_up(driver: &mut GpuDriver) {
    ask_info(driver);
    let default = words(&[0, 0, 1024, 768, 1, 0]);
    assert_eq!(driver.receive().body()[..24], default);
}

pub fn ask_edid(driver: &mut GpuDriver, scanout: u32) {
    driver.send(&command(number::GET_EDID, &words(&[scanout, 0])), 4096);
}

/// Creates an answer to GET_DISPLAY_INFO or GET_EDID of identical bytes.
pub fn filled(size: usize, byte: u8) -> Vec<u8> {
    vec![byte; size]
}

pub fn assert_edid(response: &Response, byte: u8) {
    assert_eq!(response.kind(), number::OK_EDID);
    assert_eq!(response.body(), filled(1032, byte));
}

pub fn assert_info(response: &Response, byte: u8) {
    assert_eq!(response.kind(), number::OK_DISPLAY_INFO);
    assert_eq!(response.body(), filled(384, byte));
}

#[test]
fn a_display_without_edid_is_not_asked_for_it() {
    let device = Device::start(&[]);
    let mut driver = device.connect();
    let mut display = ManualDisplay::connect(&driver);
    // Asked before it is known what the display can do.
    ask_edid(&mut driver, 0);
    display.greet(2);
    assert_eq!(driver.receive().kind(), number::UNSPEC);
    // And after.
    ask_edid(&mut driver, 0);
    assert_eq!(driver.receive().kind(), number::UNSPEC);
    ask_info(&mut driver);
    assert_eq!(display.receive(), (3, Vec::new()));
    display.answer(3, &filled(408, 7));
    assert_info(&driver.receive(), 7);
}

#[test]
fn requests_before_the_handshake_are_sent_after_it() {
    let device = Device::start(&[]);
    let mut driver = device.connect();
    let mut display = ManualDisplay::connect(&driver);
    ask_edid(&mut driver, 3);
    display.greet(3);
    display.is_asked_for_edid(3);
    display.answer(11, &filled(1056, 8));
    assert_edid(&driver.receive(), 8);
}

#[test]
fn an_answer_may_arrive_in_pieces_and_between_updates() {
    use std::io::Write;
    let device = Device::start(&[]);
    let mut driver = device.connect();
    let mut display = ManualDisplay::showing(&mut driver, 8, 8);
    ask_info(&mut driver);
    assert_eq!(display.receive(), (3, Vec::new()));
    let answer = [words(&[3, 4, 408]), filled(408, 9)].concat();
    let mut driver_waits = || {
        driver.move_cursor(0, [1, 1], 1);
        assert!(!driver.control.has_used());
    };
    for piece in answer[..419].chunks(40) {
        display.0.write_all(piece).unwrap();
        driver_waits();
        assert_eq!(display.receive(), (4, words(&[0, 1, 1])));
    }
    display.0.write_all(&answer[419..]).unwrap();
    assert_info(&driver.receive(), 9);
}

#[test]
fn an_answer_during_cursor_updates_is_not_lost() {
    const TIMES: u8 = 200;
    let device = Device::start(&[]);
    let mut driver = device.connect();
    let mut display = ManualDisplay::greeted(&driver, 3);
    driver.create(1, B8G8R8X8, 64, 64);
    let update = words(&[0, 0, 0, 0, 1, 0, 0, 0]);
    let place = driver.front_end.memory().allocate(4096, 4096);
    let update = command(number::UPDATE_CURSOR, &update);
    driver.front_end.memory().write(place, &update);
    let chain = [Buffer::readable(place, update.len() as u32)];
    for time in 1..=TIMES {
        ask_info(&mut driver);
        while display.receive().0 != 3 {}
        while driver.cursor.add(&chain).is_some() {}
        driver.cursor.publish();
        driver.cursor.kick();
        display.answer(3, &filled(408, time));
        assert_info(&driver.receive(), time);
        while driver.cursor.free_descriptors() < driver.cursor.options().size {
            assert!(driver.cursor.wait_used(PATIENCE));
            driver.cursor.take_used();
        }
    }
}

#[test]
fn a_display_whose_answer_has_the_wrong_size_is_dropped_at_once() {
    for (size, payload) in [(407, 407), (409, 409), (0, 0), (u32::MAX, 10), (1056, 1056)] {
        let device = Device::start(&[]);
        let mut driver = device.connect();
        let mut display = ManualDisplay::greeted(&driver, 3);
        ask_info(&mut driver);
        assert_eq!(display.receive(), (3, Vec::new()));
        let start = Instant::now();
        let answer = [words(&[3, 4, size]), filled(payload, 0xaa)].concat();
        std::io::Write::write_all(&mut display.0, &answer).unwrap();
        let response = driver.receive();
        assert!(start.elapsed() < AT_ONCE, "the guest waits");
        assert_eq!(response.kind(), number::OK_DISPLAY_INFO);
        assert_eq!(response.body()[..24], words(&[0, 0, 1024, 768, 1, 0]));
        assert_eq!(display.told_until_silent(), 0);
        assert_next_display_works(&mut driver);
        display.wait_until_closed();
    }
}

/// Asserts that a later display shows what is drawn then.
fn assert_next_display_works(driver: &mut GpuDriver) {
    let display = driver.connect_display(Answers::default());
    let picture = pattern(64 * 64);
    driver.create_drawn(77, B8G8R8X8, [64, 64], &bytes(&picture));
    driver.set_scanout(7, 77, [0, 0, 64, 64]);
    driver.flush(77, [0, 0, 64, 64]);
    let mut told = std::iter::from_fn(|| Some(display.next()));
    let expected = Shown::Update(7, [0, 0, 64, 64], picture);
    assert!(told.any(|shown| shown == expected));
}

#[test]
fn a_display_may_close_at_any_time() {
    use std::io::{Read, Write};
    type Scene = fn(&mut GpuDriver, ManualDisplay);
    let scenes: [(&str, Scene); 6] = [
        ("before it is greeted", |driver, display| {
            drop(display);
            ask_info(driver);
            assert_eq!(driver.receive().kind(), number::OK_DISPLAY_INFO);
        }),
        ("in the middle of the greeting", |driver, mut display| {
            ask_info(driver);
            display.0.write_all(&words(&[1, 4])).unwrap();
            drop(display);
            assert_eq!(driver.receive().kind(), number::OK_DISPLAY_INFO);
        }),
        ("when it is asked", |driver, mut display| {
            display.greet(3);
            ask_edid(driver, 0);
            display.receive();
            drop(display);
            assert_eq!(driver.receive().kind(), number::OK_EDID);
        }),
        ("in the middle of an answer", |driver, mut display| {
            display.greet(3);
            ask_edid(driver, 0);
            display.receive();
            display
                .0
                .write_all(&words(&[11, 4, 1056, 1, 2, 3]))
                .unwrap();
            drop(display);
            assert_eq!(driver.receive().kind(), number::OK_EDID);
        }),
        ("in the middle of a picture", |driver, mut display| {
            display.greet(3);
            driver.create(1, B8G8R8X8, 1000, 1000);
            driver.set_scanout(0, 1, [0, 0, 1000, 1000]);
            driver.send_flush(1, [0, 0, 1000, 1000]);
            display.0.read_exact(&mut [0; 5000]).unwrap();
            drop(display);
            assert_eq!(driver.receive().kind(), number::OK_NODATA);
        }),
        ("for writing only", |driver, mut display| {
            display.greet(3);
            display.0.shutdown(std::net::Shutdown::Write).unwrap();
            display.wait_until_closed();
            ask_info(driver);
            assert_eq!(driver.receive().kind(), number::OK_DISPLAY_INFO);
        }),
    ];
    for (when, scene) in scenes {
        println!("closed {when}");
        let device = Device::start(&[]);
        let mut driver = device.connect();
        let display = ManualDisplay::connect(&driver);
        let start = Instant::now();
        scene(&mut driver, display);
        assert!(start.elapsed() < AT_ONCE, "closed {when}: the guest waits");
        assert_next_display_works(&mut driver);
    }
}

#[test]
fn a_second_display_is_used_instead_of_the_first() {
    let device = Device::start(&[]);
    let (mut driver, first) = device.connect_with_display(Answers::default());
    let picture = pattern(64 * 64);
    driver.create_drawn(1, B8G8R8X8, [64, 64], &bytes(&picture));
    driver.set_scanout(0, 1, [0, 0, 64, 64]);
    assert_eq!(first.next(), Shown::Scanout(0, 64, 64));
    let second = driver.connect_display(Answers::default());
    assert_eq!(second.next(), Shown::Scanout(0, 64, 64));
    assert_eq!(
        second.next(),
        Shown::Update(0, [0, 0, 64, 64], picture.clone())
    );
    driver.flush(1, [0, 0, 64, 64]);
    assert_eq!(second.next(), Shown::Update(0, [0, 0, 64, 64], picture));
    assert_eq!(first.next_within(crate::QUIET), None);
}

#[test]
fn a_waiting_flush_continues_on_a_new_display() {
    let device = Device::start(&[]);
    let mut driver = device.connect();
    let _stuck = ManualDisplay::greeted(&driver, 3);
    driver.create(1, B8G8R8X8, 1000, 1000);
    driver.set_scanout(0, 1, [0, 0, 1000, 1000]);
    driver.send_flush(1, [0, 0, 1000, 1000]);
    let display = driver.connect_display(Answers::default());
    assert_eq!(display.next(), Shown::Scanout(0, 1000, 1000));
    assert!(matches!(display.next(), Shown::Update(0, ..)));
    assert_eq!(driver.receive().kind(), number::OK_NODATA);
}

#[test]
fn unanswered_requests_go_to_the_next_display() {
    let device = Device::start(&[]);
    let mut driver = device.connect();
    let mut first = ManualDisplay::greeted(&driver, 3);
    ask_edid(&mut driver, 2);
    first.is_asked_for_edid(2);
    let mut second = ManualDisplay::greeted(&driver, 3);
    second.is_asked_for_edid(2);
    second.answer(11, &filled(1056, 6));
    second.answer(3, &filled(408, 6));
    assert_edid(&driver.receive(), 6);
    ask_info(&mut driver);
    assert_eq!(second.receive(), (3, Vec::new()));
    // The handshake asks each display for this anyway.
    let mut third = ManualDisplay::connect(&driver);
    third.is_greeted();
    third.answer(1, &3u64.to_ne_bytes());
    third.answer(3, &filled(408, 7));
    assert_info(&driver.receive(), 7);
    assert_eq!(third.receive().0, 2);
    // A display that cannot answer.
    ask_edid(&mut driver, 2);
    third.is_asked_for_edid(2);
    let start = Instant::now();
    let _fourth = ManualDisplay::greeted(&driver, 2);
    assert_eq!(driver.receive().kind(), number::UNSPEC);
    assert!(start.elapsed() < AT_ONCE, "the guest waits");
}

#[test]
fn files_other_than_stream_sockets_are_not_used_as_displays() {
    let device = Device::start(&[]);
    let mut driver = device.connect();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let files: [OwnedFd; 6] = [
        tempfile::tempfile().unwrap().into(),
        File::open("/dev/null").unwrap().into(),
        File::open("/").unwrap().into(),
        std::io::pipe().unwrap().1.into(),
        UnixDatagram::unbound().unwrap().into(),
        UnixListener::bind(&path).unwrap().into(),
    ];
    for file in files {
        pass_display(&driver, file.as_fd());
        let start = Instant::now();
        ask_info(&mut driver);
        let response = driver.receive();
        assert_eq!(response.body()[..24], words(&[0, 0, 1024, 768, 1, 0]));
        assert!(start.elapsed() < AT_ONCE, "the guest waits for {file:?}");
    }
    assert_next_display_works(&mut driver);
}

/// QEMU waits forever on a display socket whose other end is closed, using a whole CPU, until the guest is reset.
#[test]
fn a_headless_device_keeps_the_socket_of_a_display_and_says_nothing_until_it_is_reset() {
    let device = Device::start(&["--headless"]);
    let mut driver = device.connect();
    let mut display = ManualDisplay::connect(&driver);
    driver.create(1, B8G8R8X8, 8, 8);
    driver.set_scanout(0, 1, [0, 0, 8, 8]);
    driver.flush(1, [0, 0, 8, 8]);
    ask_info(&mut driver);
    assert_eq!(driver.receive().kind(), number::OK_DISPLAY_INFO);
    assert_eq!(display.told_until_silent(), 0);
    // Another one replaces it.
    let mut second = ManualDisplay::connect(&driver);
    display.wait_until_closed();
    assert_eq!(second.told_until_silent(), 0);
    reset(&driver);
    second.wait_until_closed();
}

#[test]
fn a_dropped_display_stays_open_until_the_device_is_reset() {
    let device = Device::start(&[]);
    let mut driver = device.connect();
    let mut display = ManualDisplay::greeted(&driver, 3);
    std::io::Write::write_all(&mut display.0, &[0xff; 100]).unwrap();
    wait_until_given_up(&mut driver);
    driver.create(1, B8G8R8X8, 8, 8);
    driver.set_scanout(0, 1, [0, 0, 8, 8]);
    driver.flush(1, [0, 0, 8, 8]);
    display.told_until_silent();
    driver.flush(1, [0, 0, 8, 8]);
    assert_eq!(display.told_until_silent(), 0);
    reset(&driver);
    display.wait_until_closed();
}

#[test]
fn a_headless_device_reports_an_edid_with_its_mode() {
    let device = Device::start(&["--headless"]);
    let mut driver = device.connect();
    for scanout in [0, 15] {
        ask_edid(&mut driver, scanout);
        let response = driver.receive();
        assert_eq!(response.kind(), number::OK_EDID);
        assert_eq!(response.body().len(), 1032);
        let (size, edid) = response.body().split_at(8);
        assert_eq!(size, words(&[128, 0]));
        let (edid, rest) = edid.split_at(128);
        assert!(rest.iter().all(|byte| *byte == 0));
        assert_eq!(edid[..8], [0, 255, 255, 255, 255, 255, 255, 0]);
        assert_eq!(
            edid.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)),
            0
        );
        // The preferred mode: width and height.
        let side = |low: usize, high: usize| u32::from(edid[low]) | u32::from(edid[high] >> 4) << 8;
        assert_eq!((side(56, 58), side(59, 61)), (1024, 768));
    }
}
