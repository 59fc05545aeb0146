// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Displays that connect, disconnect, are slow, silent, or send invalid messages.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vhost::VhostBackend;
use vhost::vhost_user::message::FrontendReq;
use vhost_device_tests::front_end::device::RING_PACKED;
use vhost_device_tests::front_end::gpu::{
    Answers, Display, GpuDriver, Shown, command, fenced_command, number, words,
};
use vhost_device_tests::front_end::{Buffer, Options};
use vhost_device_tests::process::PATIENCE;

use crate::answers::wait_until_given_up;
use crate::{B8G8R8X8, Device, ManualDisplay, QUIET, bytes, pass_display, pattern, reset};

#[test]
fn a_display_that_reconnects_gets_the_whole_picture() {
    let device = Device::start(&[]);
    let (mut driver, display) = device.connect_with_display(Answers::default());
    let picture = pattern(64 * 64);
    driver.create_drawn(1, B8G8R8X8, [64, 64], &bytes(&picture));
    driver.set_scanout(0, 1, [0, 0, 64, 64]);
    driver.update_cursor(0, [5, 6], 1, [7, 8]);
    drop(display);
    driver.flush(1, [0, 0, 64, 64]);

    let display = driver.connect_display(Answers::default());
    assert_eq!(display.next(), Shown::Scanout(0, 64, 64));
    let image = Shown::CursorImage(0, [5, 6, 7, 8], picture.clone());
    assert_eq!(display.next(), image);
    assert_eq!(display.next(), Shown::Update(0, [0, 0, 64, 64], picture));
}

#[test]
fn a_restarted_driver_finds_no_state_of_the_previous_one() {
    let device = Device::start(&[]);
    let (mut driver, display) = device.connect_with_display(Answers::default());
    driver.create(1, B8G8R8X8, 64, 64);
    driver.set_scanout(0, 1, [0, 0, 64, 64]);
    assert_eq!(display.next(), Shown::Scanout(0, 64, 64));
    // After pause and resume, all is as before.
    let bases = [0, 1].map(|index| driver.front_end.stop(index).unwrap());
    for (index, base) in bases.into_iter().enumerate() {
        let queue = [&driver.control, &driver.cursor][index];
        driver.front_end.start(index, queue, base).unwrap();
    }
    driver.flush(1, [0, 0, 64, 64]);
    assert!(matches!(display.next(), Shown::Update(..)));
    driver.update_cursor(0, [5, 6], 1, [7, 8]);
    assert!(matches!(display.next(), Shown::CursorImage(..)));
    // After a reset, nothing is left. Each queue shows that its driver starts again.
    for index in [0, 1] {
        driver.front_end.stop(index).unwrap();
    }
    let options = *driver.control.options();
    driver.control.reset();
    driver.cursor.reset();
    let start = options.start();
    for index in [0, 1] {
        let base = [index, start].map(u32::to_ne_bytes).concat();
        let raw = driver.front_end.raw().unwrap();
        raw.acknowledged(FrontendReq::SET_VRING_BASE, &base, &[])
            .unwrap();
    }
    driver.front_end.start(0, &driver.control, start).unwrap();
    driver.front_end.start(1, &driver.cursor, start).unwrap();
    let gone = driver.run(&command(number::UNREF, &words(&[1, 0])));
    assert_eq!(gone.kind(), number::INVALID_RESOURCE_ID);
    assert_eq!(display.next(), Shown::Scanout(0, 0, 0));
    assert_eq!(display.next(), Shown::CursorHide(0));
}

/// A packed ring returns to its initial position every two rounds.
#[test]
fn a_driver_that_restarts_at_the_old_base_finds_no_old_state() {
    let device = Device::start(&[]);
    let options = Options {
        features: Options::default().features | RING_PACKED,
        ..Options::default()
    };
    let mut driver = device.connect_with(&options);
    let display = driver.connect_display(Answers::default());
    driver.create(1, B8G8R8X8, 64, 64);
    driver.set_scanout(0, 1, [0, 0, 64, 64]);
    assert_eq!(display.next(), Shown::Scanout(0, 64, 64));
    driver.update_cursor(0, [5, 6], 1, [7, 8]);
    assert!(matches!(display.next(), Shown::CursorImage(..)));
    let start = driver.control.options().start();
    while driver.control.used_base() != start {
        driver.flush(1, [0, 0, 1, 1]);
        assert!(matches!(display.next(), Shown::Update(..)));
    }
    assert_eq!(driver.front_end.stop(0).unwrap(), start);
    assert_ne!(driver.front_end.stop(1).unwrap(), start);
    driver.control.reset();
    driver.cursor.reset();
    // As QEMU does: rings are enabled when all have started.
    let (front_end, queues) = (&driver.front_end, [&driver.control, &driver.cursor]);
    for (index, queue) in queues.into_iter().enumerate() {
        front_end.enable(index, false).unwrap();
        front_end.configure(index, queue, start).unwrap();
        let kick = front_end.call().set_vring_kick(index, queue.kick_fd());
        kick.unwrap();
    }
    for index in [0, 1] {
        front_end.enable(index, true).unwrap();
    }
    let gone = driver.run(&command(number::UNREF, &words(&[1, 0])));
    assert_eq!(gone.kind(), number::INVALID_RESOURCE_ID);
    assert_eq!(display.next(), Shown::Scanout(0, 0, 0));
    assert_eq!(display.next(), Shown::CursorHide(0));
}

#[test]
fn a_silent_display_is_waited_for_a_while() {
    let device = Device::start(&[]);
    let answers = Answers {
        display_info: None,
        edid: None,
        ..Answers::default()
    };
    let (mut driver, display) = device.connect_with_display(answers);
    let info = driver.run(&command(number::GET_DISPLAY_INFO, &[]));
    assert_eq!(info.kind(), number::OK_DISPLAY_INFO);
    let edid = driver.run(&command(number::GET_EDID, &words(&[0, 0])));
    assert_eq!(edid.kind(), number::UNSPEC);
    driver.create(1, B8G8R8X8, 8, 8);
    driver.set_scanout(0, 1, [0, 0, 8, 8]);
    assert_eq!(display.next(), Shown::Scanout(0, 8, 8));
}

/// Creates a display that does not read: the buffer of the socket fills up.
fn stuck_display(device: &Device) -> (GpuDriver, UnixStream) {
    let mut driver = device.connect();
    let (ours, theirs) = UnixStream::pair().unwrap();
    pass_display(&driver, theirs.as_fd());
    (&ours)
        .write_all(&[&words(&[1, 4, 8, 3, 0])[..]].concat())
        .unwrap();
    driver.create(1, B8G8R8X8, 1000, 1000);
    driver.set_scanout(0, 1, [0, 0, 1000, 1000]);
    (driver, ours)
}

#[test]
fn a_stuck_display_delays_the_guest_but_stops_neither_it_nor_the_front_end() {
    let device = Device::start(&[]);
    let (mut driver, _ours) = stuck_display(&device);
    let flush = command(number::FLUSH, &words(&[0, 0, 1000, 1000, 1, 0]));
    driver.send(&flush, 4096);
    let start = Instant::now();
    driver.front_end.config(0, 16).unwrap();
    // The cursor queue continues meanwhile.
    driver.move_cursor(0, [1, 1], 0);
    assert!(
        start.elapsed() < Duration::from_millis(900),
        "a front-end waits"
    );
    assert_eq!(driver.receive().kind(), number::OK_NODATA);
    driver.unref(1);
}

#[test]
fn a_flush_is_answered_when_a_slow_display_has_the_picture_and_not_before() {
    let device = Device::start(&[]);
    let mut driver = device.connect();
    let mut display = ManualDisplay::showing(&mut driver, 1000, 1000);
    let flush = fenced_command(number::FLUSH, 1, 77, &words(&[0, 0, 1000, 1000, 1, 0]));
    driver.send(&flush, 4096);
    let mut left = 32 + 4_000_000;
    // Longer in all than the time limit for a stuck display.
    while left > 1_000_000 {
        let start = Instant::now();
        if driver.control.wait_used(Duration::from_millis(250)) {
            // On a machine that was suspended the device may have given up.
            let stood_still = start.elapsed() > Duration::from_millis(900);
            assert!(stood_still, "answered when {left} bytes were left");
            return;
        }
        let step = 500_000;
        display.0.read_exact(&mut vec![0; step]).unwrap();
        left -= step;
    }
    display.0.read_exact(&mut vec![0; left]).unwrap();
    let response = driver.receive();
    assert_eq!(response.kind(), number::OK_NODATA);
    assert_eq!(response.bytes[4..16], flush[4..16]);
}

#[test]
fn commands_answered_before_a_waiting_flush_return_with_it() {
    let device = Device::start(&[]);
    let mut driver = device.connect();
    let mut display = ManualDisplay::showing(&mut driver, 1000, 1000);
    let place = driver.front_end.memory().allocate(4096, 4096);
    let flush = command(number::FLUSH, &words(&[0, 0, 1000, 1000, 1, 0]));
    let uuid = command(number::ASSIGN_UUID, &words(&[1, 0]));
    let both = |driver: &mut GpuDriver| {
        let memory = driver.front_end.memory();
        for (bytes, place) in [(&uuid, place), (&flush, place + 1024)] {
            memory.write(place, bytes);
            let chain = [
                Buffer::readable(place, bytes.len() as u32),
                Buffer::writable(place + 512, 40),
            ];
            driver.control.add(&chain).unwrap();
        }
        driver.control.publish();
        driver.control.kick();
    };
    both(&mut driver);
    display.0.read_exact(&mut [0; 32]).unwrap();
    assert!(!driver.control.has_used(), "one signal is enough for both");
    display.0.read_exact(&mut vec![0; 4_000_000]).unwrap();
    for length in [40, 24] {
        assert!(driver.control.wait_used(PATIENCE));
        assert_eq!(driver.control.take_used().unwrap().length, length);
    }
    // A queue that stops returns both.
    both(&mut driver);
    display.0.read_exact(&mut [0; 32]).unwrap();
    driver.front_end.stop(0).unwrap();
    for length in [40, 24] {
        assert_eq!(driver.control.take_used().unwrap().length, length);
    }
}

#[test]
fn a_reset_closes_the_display_and_frees_what_was_shown() {
    let device = Device::start(&[]);
    let mut driver = device.connect();
    let display = ManualDisplay::showing(&mut driver, 8, 8);
    reset(&driver);
    display.wait_until_closed();
    let options = *driver.control.options();
    driver.control.reset();
    driver.cursor.reset();
    let start = options.start();
    driver.front_end.start(0, &driver.control, start).unwrap();
    driver.front_end.start(1, &driver.cursor, start).unwrap();
    let display = driver.connect_display(Answers::default());
    let gone = driver.run(&command(number::UNREF, &words(&[1, 0])));
    assert_eq!(gone.kind(), number::INVALID_RESOURCE_ID);
    assert_eq!(display.next_within(QUIET), None);
}

#[test]
fn a_display_is_acknowledged_and_one_without_a_socket_refused() {
    let device = Device::start(&[]);
    let driver = device.connect();
    let (display, socket) = Display::new(Answers::default());
    pass_display(&driver, socket.as_fd());
    assert_eq!(display.next(), Shown::Features(3));
    let raw = driver.front_end.raw().unwrap();
    let refused = raw.acknowledged(FrontendReq::GPU_SET_SOCKET, &[], &[]);
    assert_ne!(refused.unwrap(), 0);
    driver.front_end.config(0, 16).unwrap();
}

#[test]
fn a_queue_stops_at_once_although_the_display_is_stuck() {
    let device = Device::start(&[]);
    let (mut driver, ours) = stuck_display(&device);
    let start = Instant::now();
    driver.send_flush(1, [0, 0, 1000, 1000]);
    while rustix::io::ioctl_fionread(&ours).unwrap() < 10_000 {
        assert!(start.elapsed() < Duration::from_secs(20), "nothing is sent");
    }
    let start = Instant::now();
    driver.front_end.stop(0).unwrap();
    assert!(
        start.elapsed() < Duration::from_millis(900),
        "GET_VRING_BASE waits"
    );
    assert_eq!(driver.receive().kind(), number::OK_NODATA);
}

#[test]
fn a_display_with_invalid_messages_is_dropped_and_the_next_one_is_used() {
    let device = Device::start(&[]);
    for nonsense in [
        words(&[2, 4, 8, 3, 0]),
        words(&[1, 0, 8, 3, 0]),
        words(&[1, 4, 0xffff_ffff, 3, 0]),
        vec![0xff; 1000],
        words(&[1, 4, 8, 3, 0, 11, 4, 1056]),
    ] {
        let mut driver = device.connect();
        let mut nobody = ManualDisplay::connect(&driver);
        nobody.0.write_all(&nonsense).unwrap();
        wait_until_given_up(&mut driver);
        nobody.told_until_silent();
        driver.move_cursor(0, [1, 1], 1);
        assert_eq!(nobody.told_until_silent(), 0);
        let _display = driver.connect_display(Answers::default());
        driver.create(1, B8G8R8X8, 8, 8);
    }
}

#[test]
fn a_display_that_closes_in_the_middle_of_a_picture_does_no_harm() {
    let device = Device::start(&[]);
    let (mut driver, ours) = stuck_display(&device);
    driver.send_flush(1, [0, 0, 1000, 1000]);
    drop(ours);
    assert_eq!(driver.receive().kind(), number::OK_NODATA);
    driver.unref(1);
}
