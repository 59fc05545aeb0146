// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Scanouts, and the resources that they show.

use std::io::Read;

use fastrand::Rng;
use vhost_device_tests::front_end::gpu::{Answers, Shown, command, number, words};

use crate::{B8G8R8X8, Device, ManualDisplay, QUIET, bytes, pattern};

#[test]
fn sixteen_scanouts_show_sixteen_parts_of_a_picture() {
    let device = Device::start(&[]);
    let (mut driver, display) = device.connect_with_display(Answers::default());
    let picture = pattern(64 * 64);
    driver.create_drawn(1, B8G8R8X8, [64, 64], &bytes(&picture));
    let corner = |scanout: u32| (scanout % 4 * 16, scanout / 4 * 16);
    for scanout in 0..16 {
        let (x, y) = corner(scanout);
        driver.set_scanout(scanout, 1, [x, y, 16, 16]);
        assert_eq!(display.next(), Shown::Scanout(scanout, 16, 16));
    }
    driver.flush(1, [0, 0, 64, 64]);
    for scanout in 0..16 {
        let (x, y) = corner(scanout);
        let part = (y..y + 16)
            .flat_map(|row| picture[(row * 64 + x) as usize..][..16].to_vec())
            .collect();
        assert_eq!(display.next(), Shown::Update(scanout, [0, 0, 16, 16], part));
    }
    // A part that only one of them shows is sent to that one only.
    driver.flush(1, [17, 18, 2, 3]);
    let part = (18..21).flat_map(|row| picture[row * 64 + 17..][..2].to_vec());
    let expected = Shown::Update(5, [1, 2, 2, 3], part.collect());
    assert_eq!(display.next(), expected);
    driver.set_scanout(5, 0, [0; 4]);
    assert_eq!(display.next(), Shown::Scanout(5, 0, 0));
    driver.flush(1, [17, 18, 2, 3]);
    driver.unref(1);
    for scanout in (0..16).filter(|scanout| *scanout != 5) {
        assert_eq!(display.next(), Shown::Scanout(scanout, 0, 0));
    }
    assert_eq!(display.next_within(QUIET), None);
}

#[test]
fn a_destroyed_resource_is_no_longer_shown() {
    let device = Device::start(&[]);
    let (mut driver, display) = device.connect_with_display(Answers::default());
    driver.create(1, B8G8R8X8, 8, 8);
    driver.set_scanout(0, 1, [0, 0, 8, 8]);
    assert_eq!(display.next(), Shown::Scanout(0, 8, 8));
    driver.unref(1);
    assert_eq!(display.next(), Shown::Scanout(0, 0, 0));
    let flush = driver.run(&command(number::FLUSH, &words(&[0, 0, 8, 8, 1, 0])));
    assert_eq!(flush.kind(), number::INVALID_RESOURCE_ID);
    // Another resource with that number is not the same.
    driver.create(1, B8G8R8X8, 8, 8);
    driver.flush(1, [0, 0, 8, 8]);
    assert_eq!(display.next_within(QUIET), None);
}

#[test]
fn a_picture_that_is_half_sent_when_its_resource_goes_is_sent_to_its_end() {
    let device = Device::start(&[]);
    let mut driver = device.connect();
    let mut display = ManualDisplay::greeted(&driver, 3);
    let (width, height) = (1000, 500);
    let picture = pattern(width * height);
    driver.create_drawn(1, B8G8R8X8, [width, height], &bytes(&picture));
    driver.set_scanout(2, 1, [10, 0, width - 20, height]);
    assert_eq!(display.receive(), (7, words(&[2, width - 20, height])));
    // More than fits into the socket: it is answered although the display reads nothing for a while.
    driver.flush(1, [0, 0, width, height]);
    let mut start = [0; 1000];
    display.0.read_exact(&mut start).unwrap();
    driver.unref(1);
    let mut sent = start[12..].to_vec();
    let size = (20 + (width - 20) * height * 4) as usize;
    sent.resize(size, 0);
    display.0.read_exact(&mut sent[start.len() - 12..]).unwrap();
    assert_eq!(start[..12], words(&[8, 0, size as u32]));
    assert_eq!(sent[..20], words(&[2, 0, 0, width - 20, height]));
    let expected: Vec<u32> = picture
        .chunks(width as usize)
        .flat_map(|row| row[10..row.len() - 10].to_vec())
        .collect();
    assert!(sent[20..] == bytes(&expected), "the picture is another");
    assert_eq!(display.receive(), (7, words(&[2, 0, 0])));
}

#[test]
fn scanouts_larger_than_displays_can_be_are_refused() {
    let device = Device::start(&["--headless", "--max-hostmem=8G"]);
    let mut driver = device.connect();
    for (width, height) in [(1 << 15, 1), (1, 1 << 15), (1 << 30, 1)] {
        driver.done(number::CREATE_2D, &words(&[1, B8G8R8X8, width, height]));
        let scanout = words(&[0, 0, width, height, 0, 1]);
        let response = driver.run(&command(number::SET_SCANOUT, &scanout));
        assert_eq!(response.kind(), number::INVALID_PARAMETER);
        let (width, height) = (width.min(32767), height.min(32767));
        driver.set_scanout(0, 1, [0, 0, width, height]);
        driver.unref(1);
    }
}

/// Positions of alpha (or the unused byte), red, green and blue in a pixel.
pub const FORMATS: [(u32, [usize; 4]); 8] = [
    (1, [3, 2, 1, 0]),
    (2, [3, 2, 1, 0]),
    (3, [0, 1, 2, 3]),
    (4, [0, 1, 2, 3]),
    (67, [3, 0, 1, 2]),
    (68, [0, 3, 2, 1]),
    (121, [0, 3, 2, 1]),
    (134, [3, 0, 1, 2]),
];

/// Returns pixels of alpha, red, green and blue as they are stored in guest memory in one of the [`FORMATS`].
pub fn bytes_in(places: [usize; 4], pixels: &[u32]) -> Vec<u8> {
    let bytes_of = |pixel: &u32| {
        let mut bytes = [0; 4];
        for (place, byte) in places.into_iter().zip(pixel.to_be_bytes()) {
            bytes[place] = byte;
        }
        bytes
    };
    pixels.iter().flat_map(bytes_of).collect()
}

#[test]
fn any_rectangles_of_pictures_of_any_width_and_format_are_right() {
    let device = Device::start(&[]);
    let (mut driver, display) = device.connect_with_display(Answers::default());
    let mut random = Rng::with_seed(2);
    for (format, places) in FORMATS {
        for width in [1, 3, 17, 63, 101] {
            let height = 23;
            let pages = driver.create(1, format, width, height);
            let all = [0, 0, width, height];
            driver.set_scanout(0, 1, all);
            assert_eq!(display.next(), Shown::Scanout(0, width, height));
            let mut expected = vec![0; (width * height) as usize];
            for _ in 0..8 {
                let colours: Vec<u32> = expected.iter().map(|_| random.u32(..)).collect();
                driver.draw(&pages, &bytes_in(places, &colours));
                let mut rectangle = || {
                    let (x, y) = (random.u32(..width), random.u32(..height));
                    [x, y, random.u32(1..=width - x), random.u32(1..=height - y)]
                };
                let ([x, y, w, h], flushed) = (rectangle(), rectangle());
                driver.transfer(1, width, [x, y, w, h]);
                for row in y..y + h {
                    let range = (row * width + x) as usize..(row * width + x + w) as usize;
                    expected[range.clone()].copy_from_slice(&colours[range]);
                }
                driver.flush(1, flushed);
                let Shown::Update(0, place, pixels) = display.next() else {
                    panic!("no update");
                };
                assert_eq!(place, flushed);
                let [x, y, w, h] = flushed;
                let rows = (y..y + h).map(|row| (row * width + x) as usize);
                let part = rows.flat_map(|at| &expected[at..at + w as usize]);
                let rgb = |pixel: &u32| pixel & 0xff_ffff;
                assert!(
                    pixels.iter().map(rgb).eq(part.map(rgb)),
                    "format {format}, width {width}, {flushed:?}"
                );
            }
            driver.unref(1);
            assert_eq!(display.next(), Shown::Scanout(0, 0, 0));
        }
    }
}
