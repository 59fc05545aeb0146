// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The display shows what the guest draws.

use vhost_device_tests::front_end::gpu::{Answers, Shown, command, number, words};

use crate::scanouts::{FORMATS, bytes_in};
use crate::{B8G8R8X8, Device, QUIET, bytes, pattern};

#[test]
fn a_picture_is_shown_as_it_was_drawn() {
    let device = Device::start(&[]);
    let (mut driver, display) = device.connect_with_display(Answers::default());
    let (width, height) = (100, 50);
    let picture = pattern(width * height);
    let pages = driver.create(1, B8G8R8X8, width, height);
    driver.draw(&pages, &bytes(&picture));
    let all = [0, 0, width, height];
    driver.set_scanout(0, 1, all);
    assert_eq!(display.next(), Shown::Scanout(0, width, height));
    driver.transfer(1, width, all);
    driver.flush(1, all);
    assert_eq!(display.next(), Shown::Update(0, all, picture));
    assert_eq!(display.next_within(QUIET), None);
}

#[test]
fn only_what_is_flushed_is_sent_and_only_what_is_transferred_changes() {
    let device = Device::start(&[]);
    let (mut driver, display) = device.connect_with_display(Answers::default());
    let (width, height) = (64, 64);
    let picture = pattern(width * height);
    let pages = driver.create(1, B8G8R8X8, width, height);
    driver.draw(&pages, &bytes(&picture));
    driver.set_scanout(0, 1, [0, 0, width, height]);
    assert_eq!(display.next(), Shown::Scanout(0, width, height));
    driver.transfer(1, width, [8, 16, 20, 10]);
    driver.flush(1, [6, 15, 24, 12]);
    let expected: Vec<u32> = (15..27)
        .flat_map(|y| (6..30).map(move |x| (x, y)))
        .map(
            |(x, y)| match (8..28).contains(&x) && (16..26).contains(&y) {
                true => picture[y * 64 + x],
                false => 0,
            },
        )
        .collect();
    assert_eq!(display.next(), Shown::Update(0, [6, 15, 24, 12], expected));
}

#[test]
fn a_scanout_of_a_part_is_updated_in_its_own_coordinates() {
    let device = Device::start(&[]);
    let (mut driver, display) = device.connect_with_display(Answers::default());
    let picture = pattern(100 * 100);
    driver.create_drawn(1, B8G8R8X8, [100, 100], &bytes(&picture));
    driver.set_scanout(0, 1, [0, 0, 50, 100]);
    driver.set_scanout(3, 1, [50, 20, 50, 30]);
    driver.flush(1, [40, 10, 20, 30]);
    let part = |[x, y, w, h]: [usize; 4]| -> Vec<u32> {
        (y..y + h)
            .flat_map(|row| picture[row * 100 + x..][..w].to_vec())
            .collect()
    };
    assert_eq!(display.next(), Shown::Scanout(0, 50, 100));
    assert_eq!(display.next(), Shown::Scanout(3, 50, 30));
    let first = Shown::Update(0, [40, 10, 10, 30], part([40, 10, 10, 30]));
    assert_eq!(display.next(), first);
    let second = Shown::Update(3, [0, 0, 10, 20], part([50, 20, 10, 20]));
    assert_eq!(display.next(), second);
    assert_eq!(display.next_within(QUIET), None);
}

#[test]
fn all_formats_are_shown_in_their_colours() {
    let device = Device::start(&[]);
    let (mut driver, display) = device.connect_with_display(Answers::default());
    for (format, places) in FORMATS {
        let colours = pattern(64 * 64);
        driver.create_drawn(format, format, [64, 64], &bytes_in(places, &colours));
        driver.set_scanout(0, format, [0, 0, 64, 64]);
        driver.flush(format, [0, 0, 64, 64]);
        let shown = loop {
            if let Shown::Update(_, _, pixels) = display.next() {
                break pixels;
            }
        };
        let rgb =
            |pixels: &[u32]| -> Vec<u32> { pixels.iter().map(|pixel| pixel & 0xff_ffff).collect() };
        assert!(rgb(&shown) == rgb(&colours), "format {format}");

        // Linux uses alpha also in formats that have none.
        driver.update_cursor(0, [0, 0], format, [0, 0]);
        let Shown::CursorImage(_, _, image) = display.next() else {
            panic!("no cursor");
        };
        assert!(image == colours, "cursor in format {format}");
        driver.unref(format);
        assert_eq!(display.next(), Shown::Scanout(0, 0, 0));
    }
}

#[test]
fn the_cursor_is_shown_moved_and_hidden() {
    let device = Device::start(&[]);
    let (mut driver, display) = device.connect_with_display(Answers::default());
    let image = pattern(64 * 64);
    driver.create_drawn(1, 1, [64, 64], &bytes(&image));
    driver.update_cursor(2, [10, 20], 1, [3, 4]);
    assert_eq!(display.next(), Shown::CursorImage(2, [10, 20, 3, 4], image));
    driver.move_cursor(2, [11, 21], 1);
    assert_eq!(display.next(), Shown::CursorMove(2, 11, 21));
    driver.update_cursor(2, [0, 0], 0, [0, 0]);
    assert_eq!(display.next(), Shown::CursorHide(2));
}

#[test]
fn pages_are_looked_up_anew_for_each_transfer() {
    let device = Device::start(&[]);
    let (mut driver, display) = device.connect_with_display(Answers::default());
    driver.front_end.add_region(0x2_0000_0000, 1 << 20).unwrap();
    driver.done(number::CREATE_2D, &words(&[1, B8G8R8X8, 32, 32]));
    let mut body = words(&[1, 1]);
    body.extend(0x2_0000_0000u64.to_le_bytes());
    body.extend(words(&[4096, 0]));
    driver.done(number::ATTACH_BACKING, &body);
    driver.set_scanout(0, 1, [0, 0, 32, 32]);
    assert_eq!(display.next(), Shown::Scanout(0, 32, 32));
    for round in 0..3 {
        let picture: Vec<u32> = pattern(1024).iter().map(|pixel| pixel ^ round).collect();
        driver.draw(&[0x2_0000_0000], &bytes(&picture));
        driver.transfer(1, 32, [0, 0, 32, 32]);
        driver.flush(1, [0, 0, 32, 32]);
        assert_eq!(display.next(), Shown::Update(0, [0, 0, 32, 32], picture));
        driver.front_end.remove_region(0x2_0000_0000).unwrap();
        let mut transfer = words(&[0, 0, 32, 32, 0, 0, 1, 0]);
        transfer.truncate(32);
        let gone = driver.run(&command(number::TRANSFER_TO_HOST_2D, &transfer));
        assert_eq!(gone.kind(), number::UNSPEC);
        driver.front_end.add_region(0x2_0000_0000, 1 << 20).unwrap();
    }
}
