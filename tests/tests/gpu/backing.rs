// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest memory behind resources: pieces of any size, at any address, and outside guest memory.

use fastrand::Rng;
use vhost_device_tests::front_end::gpu::{
    Answers, Display, GpuDriver, Response, Shown, command, number, words,
};

use crate::{B8G8R8X8, Device, bytes, pattern};

/// An address between the two regions of the driver's memory.
const HOLE: u64 = 1 << 31;
/// Where the driver's first region ends.
const END: u64 = 32 << 20;
/// Free memory of the driver.
const FREE: u64 = 16 << 20;

const SIDE: u32 = 32;
const ALL: [u32; 4] = [0, 0, SIDE, SIDE];
const SIZE: u32 = SIDE * SIDE * 4;

fn attach(driver: &mut GpuDriver, resource: u32, entries: &[(u64, u32)]) -> Response {
    let mut body = words(&[resource, entries.len() as u32]);
    for (address, length) in entries {
        body.extend(address.to_le_bytes());
        body.extend(words(&[*length, 0]));
    }
    driver.run(&command(number::ATTACH_BACKING, &body))
}

fn transfer(driver: &mut GpuDriver, rectangle: [u32; 4], offset: u64) -> u32 {
    let mut body = words(&rectangle);
    body.extend(offset.to_le_bytes());
    body.extend(words(&[1, 0]));
    driver
        .run(&command(number::TRANSFER_TO_HOST_2D, &body))
        .kind()
}

/// Starts a device that shows all of resource 1, which has no backing.
fn shown() -> (Device, GpuDriver, Display) {
    let device = Device::start(&[]);
    let (mut driver, display) = device.connect_with_display(Answers::default());
    driver.done(number::CREATE_2D, &words(&[1, B8G8R8X8, SIDE, SIDE]));
    driver.set_scanout(0, 1, ALL);
    assert_eq!(display.next(), Shown::Scanout(0, SIDE, SIDE));
    (device, driver, display)
}

fn assert_shows(driver: &mut GpuDriver, display: &Display, picture: &[u32]) {
    driver.flush(1, ALL);
    assert_eq!(display.next(), Shown::Update(0, ALL, picture.to_vec()));
}

#[test]
fn pieces_may_have_any_size_and_lie_anywhere() {
    let (_device, mut driver, display) = shown();
    let mut random = Rng::with_seed(1);
    for longest in [1, 3, 7, 130, 4096] {
        let picture: Vec<u32> = pattern(SIDE * SIDE).iter().map(|p| p ^ longest).collect();
        let drawn = bytes(&picture);
        let (mut entries, mut done) = (Vec::new(), 0);
        let mut places = [FREE, (1 << 32) + FREE];
        while done < drawn.len() {
            let place = random.choice(&mut places).unwrap();
            *place += random.u64(0..9);
            let length = random.u32(0..=longest).min((drawn.len() - done) as u32);
            driver
                .front_end
                .memory()
                .write(*place, &drawn[done..][..length as usize]);
            entries.push((*place, length));
            *place += u64::from(length);
            done += length as usize;
        }
        assert_eq!(attach(&mut driver, 1, &entries).kind(), number::OK_NODATA);
        assert_eq!(transfer(&mut driver, ALL, 0), number::OK_NODATA);
        assert_shows(&mut driver, &display, &picture);
        driver.done(number::DETACH_BACKING, &words(&[1, 0]));
    }
}

#[test]
fn pieces_outside_guest_memory_fail_the_transfers_that_need_them() {
    let (_device, mut driver, display) = shown();
    let picture = pattern(SIDE * SIDE);
    driver.draw(&[FREE], &bytes(&picture));
    let half = SIZE / 2;
    let second_half = [0, SIDE / 2, SIDE, SIDE / 2];
    for bad in [
        (HOLE, half),
        (END, half),
        (END - 1, half),
        (END - u64::from(half) + 1, half),
        (u64::MAX, half),
        (u64::MAX - 3, half),
        (u64::MAX - u64::from(half) + 1, half),
        (HOLE, u32::MAX),
    ] {
        let entries = [(FREE, half), bad];
        assert_eq!(attach(&mut driver, 1, &entries).kind(), number::OK_NODATA);
        let kind = transfer(&mut driver, second_half, half.into());
        assert_eq!(kind, number::UNSPEC, "{bad:x?}");
        assert_eq!(transfer(&mut driver, ALL, 0), number::UNSPEC, "{bad:x?}");
        let first_half = [0, 0, SIDE, SIDE / 2];
        assert_eq!(transfer(&mut driver, first_half, 0), number::OK_NODATA);
        driver.done(number::DETACH_BACKING, &words(&[1, 0]));
    }
    assert_eq!(
        attach(&mut driver, 1, &[(FREE, SIZE)]).kind(),
        number::OK_NODATA
    );
    assert_eq!(transfer(&mut driver, ALL, 0), number::OK_NODATA);
    assert_shows(&mut driver, &display, &picture);
}

#[test]
fn a_piece_may_lie_in_two_regions_that_touch() {
    let (_device, mut driver, display) = shown();
    let picture = pattern(SIDE * SIDE);
    let start = END - 1000;
    assert_eq!(
        attach(&mut driver, 1, &[(start, SIZE)]).kind(),
        number::OK_NODATA
    );
    assert_eq!(transfer(&mut driver, ALL, 0), number::UNSPEC);
    driver.front_end.add_region(END, 1 << 20).unwrap();
    let drawn = bytes(&picture);
    driver.front_end.memory().write(start, &drawn[..1000]);
    driver.front_end.memory().write(END, &drawn[1000..]);
    assert_eq!(transfer(&mut driver, ALL, 0), number::OK_NODATA);
    assert_shows(&mut driver, &display, &picture);
    driver.front_end.remove_region(END).unwrap();
    assert_eq!(transfer(&mut driver, ALL, 0), number::UNSPEC);
}

#[test]
fn a_backing_shorter_than_the_picture_can_be_used_in_part() {
    let (_device, mut driver, display) = shown();
    let picture = pattern(SIDE * SIDE);
    driver.draw(&[FREE], &bytes(&picture));
    // Ten rows, and one pixel less than half a row.
    let length = 10 * SIDE * 4 + 15 * 4;
    assert_eq!(
        attach(&mut driver, 1, &[(FREE, length)]).kind(),
        number::OK_NODATA
    );
    let row = u64::from(SIDE) * 4;
    for (rectangle, offset, expected) in [
        (ALL, 0, number::INVALID_PARAMETER),
        ([0, 0, SIDE, 11], 0, number::INVALID_PARAMETER),
        ([0, 10, 16, 1], 10 * row, number::INVALID_PARAMETER),
        ([0, 0, 1, 1], 10 * row + 57, number::INVALID_PARAMETER),
        ([0, 0, 1, 1], u64::MAX, number::INVALID_PARAMETER),
        ([0, 0, 1, 1], u64::MAX - 3, number::INVALID_PARAMETER),
        ([0, 0, SIDE, SIDE], 1 << 63, number::INVALID_PARAMETER),
        ([0, 0, SIDE, 10], 0, number::OK_NODATA),
        ([0, 10, 15, 1], 10 * row, number::OK_NODATA),
    ] {
        let kind = transfer(&mut driver, rectangle, offset);
        assert_eq!(kind, expected, "{rectangle:?} at {offset:#x}");
    }
    let mut expected = vec![0; (SIDE * SIDE) as usize];
    let there = (length / 4) as usize;
    expected[..there].copy_from_slice(&picture[..there]);
    assert_shows(&mut driver, &display, &expected);
}

#[test]
fn transfer_offsets_are_in_bytes_and_independent_of_the_rectangle() {
    let (_device, mut driver, display) = shown();
    let source = pattern(2048);
    driver.front_end.memory().write(FREE, &bytes(&source));
    assert_eq!(
        attach(&mut driver, 1, &[(FREE, 8192)]).kind(),
        number::OK_NODATA
    );
    // Not even whole pixels.
    assert_eq!(transfer(&mut driver, [5, 6, 2, 3], 1001), number::OK_NODATA);
    let drawn = bytes(&source);
    let mut expected = vec![0; (SIDE * SIDE) as usize];
    for (y, x) in [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)] {
        let at = 1001 + y * SIDE as usize * 4 + x * 4;
        let pixel = u32::from_le_bytes(drawn[at..at + 4].try_into().unwrap());
        expected[(6 + y) * SIDE as usize + 5 + x] = pixel;
    }
    assert_shows(&mut driver, &display, &expected);
}

#[test]
fn a_backing_stays_attached_until_detached() {
    let (_device, mut driver, display) = shown();
    let picture = pattern(SIDE * SIDE);
    driver.draw(&[FREE], &bytes(&picture));
    assert_eq!(transfer(&mut driver, ALL, 0), number::UNSPEC);
    assert_eq!(
        attach(&mut driver, 1, &[(FREE, SIZE)]).kind(),
        number::OK_NODATA
    );
    assert_eq!(
        attach(&mut driver, 1, &[(HOLE, SIZE)]).kind(),
        number::UNSPEC
    );
    assert_eq!(transfer(&mut driver, ALL, 0), number::OK_NODATA);
    assert_shows(&mut driver, &display, &picture);
    driver.done(number::DETACH_BACKING, &words(&[1, 0]));
    let detached = driver.run(&command(number::DETACH_BACKING, &words(&[1, 0])));
    assert_eq!(detached.kind(), number::UNSPEC);
    assert_eq!(transfer(&mut driver, ALL, 0), number::UNSPEC);
    // The picture does not depend on the backing.
    assert_shows(&mut driver, &display, &picture);
}

#[test]
fn a_backing_longer_than_guest_memory_does_no_harm() {
    let (_device, mut driver, _display) = shown();
    let length = 3 << 30;
    let entries = vec![(FREE, length); 1000];
    assert_eq!(attach(&mut driver, 1, &entries).kind(), number::OK_NODATA);
    assert_eq!(transfer(&mut driver, ALL, 0), number::OK_NODATA);
    assert_eq!(transfer(&mut driver, ALL, 1 << 30), number::UNSPEC);
    // At the start and at the end of the last one.
    let end = 1000 * u64::from(length);
    let start = end - u64::from(length);
    assert_eq!(transfer(&mut driver, ALL, start), number::OK_NODATA);
    let last = end - u64::from(SIZE);
    assert_eq!(transfer(&mut driver, ALL, last), number::UNSPEC);
    assert_eq!(
        transfer(&mut driver, ALL, last + 1),
        number::INVALID_PARAMETER
    );
}
