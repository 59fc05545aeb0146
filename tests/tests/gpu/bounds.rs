// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Resources of the host that a guest and a front-end can use are bounded, and are released.

use vhost_device_tests::front_end::gpu::{Answers, GpuDriver, Shown, command, number, words};

use crate::{B8G8R8X8, Device, ManualDisplay, bytes, pattern};

fn create(driver: &mut GpuDriver, resource: u32, width: u32, height: u32) -> u32 {
    let body = words(&[resource, B8G8R8X8, width, height]);
    driver.run(&command(number::CREATE_2D, &body)).kind()
}

/// Creates resources from number 1 on until there is no room for another, and returns their number.
fn fill(driver: &mut GpuDriver, width: u32, height: u32) -> u32 {
    let mut count = 0;
    loop {
        match create(driver, count + 1, width, height) {
            number::OK_NODATA => count += 1,
            other => {
                assert_eq!(other, number::OUT_OF_MEMORY);
                return count;
            }
        }
    }
}

#[test]
fn many_small_resources_are_bounded_and_their_room_is_given_back() {
    let device = Device::start(&["--headless", "--max-hostmem=1M"]);
    let mut driver = device.connect();
    let before = device.program.resident_bytes().unwrap();
    let count = fill(&mut driver, 1, 1);
    assert!((1000..=(1 << 20) / 8).contains(&count), "{count} resources");
    let grown = device.program.resident_bytes().unwrap() - before;
    assert!(grown < 4 << 20, "{count} resources take {grown} bytes");
    for resource in 1..=count {
        driver.unref(resource);
    }
    assert_eq!(fill(&mut driver, 1, 1), count);
}

#[test]
fn large_resources_are_bounded_and_one_that_does_not_fit_harms_no_other() {
    let device = Device::start(&["--max-hostmem=1M"]);
    let (mut driver, display) = device.connect_with_display(Answers::default());
    let picture = pattern(64 * 64);
    let pages = driver.create(1000, B8G8R8X8, 64, 64);
    driver.draw(&pages, &bytes(&picture));
    driver.set_scanout(0, 1000, [0, 0, 64, 64]);
    assert_eq!(display.next(), Shown::Scanout(0, 64, 64));
    assert_eq!(fill(&mut driver, 250, 250), 4);
    assert_eq!(fill_with_backings(&mut driver), number::OUT_OF_MEMORY);
    driver.transfer(1000, 64, [0, 0, 64, 64]);
    driver.flush(1000, [0, 0, 64, 64]);
    assert_eq!(display.next(), Shown::Update(0, [0, 0, 64, 64], picture));
    driver.unref(2);
    assert_eq!(create(&mut driver, 2, 250, 250), number::OK_NODATA);
    assert_eq!(create(&mut driver, 5, 250, 250), number::OUT_OF_MEMORY);
}

#[test]
fn more_memory_than_the_host_has_is_refused_despite_max_hostmem() {
    let device = Device::start(&["--headless", "--max-hostmem=4194304G"]);
    let mut driver = device.connect();
    for resource in 1..4 {
        let kind = create(&mut driver, resource, 1 << 24, 1 << 24);
        assert_eq!(kind, number::OUT_OF_MEMORY);
    }
    assert_eq!(create(&mut driver, 1, 64, 64), number::OK_NODATA);
}

/// Attaches long lists to resources 1 to 4, until one is refused.
fn fill_with_backings(driver: &mut GpuDriver) -> u32 {
    for resource in 1..=4 {
        let count = 2000;
        let body = [words(&[resource, count]), vec![0; count as usize * 16]].concat();
        let kind = driver.run(&command(number::ATTACH_BACKING, &body)).kind();
        if kind != number::OK_NODATA {
            return kind;
        }
    }
    number::OK_NODATA
}

#[test]
fn destroyed_resources_leave_no_memory_behind() {
    let device = Device::start(&[]);
    let (mut driver, display) = device.connect_with_display(Answers::default());
    let entries = [words(&[1, 100]), vec![0; 1600]].concat();
    let round = |driver: &mut GpuDriver| {
        assert_eq!(create(driver, 1, 64, 64), number::OK_NODATA);
        driver.done(number::ATTACH_BACKING, &entries);
        let second = driver.run(&command(number::ATTACH_BACKING, &entries));
        assert_eq!(second.kind(), number::UNSPEC);
        driver.done(number::SET_SCANOUT, &words(&[0, 0, 64, 64, 0, 1]));
        driver.flush(1, [0, 0, 64, 64]);
        driver.run(&command(number::GET_DISPLAY_INFO, &[]));
        driver.run(&command(number::GET_EDID, &words(&[0, 0])));
        driver.update_cursor(0, [0, 0], 1, [0, 0]);
        driver.unref(1);
        // Takes the messages to the display, which would pile up here.
        while display.next_within(std::time::Duration::ZERO).is_some() {}
    };
    (0..100).for_each(|_| round(&mut driver));
    let before = device.program.resident_bytes().unwrap();
    (0..1000).for_each(|_| round(&mut driver));
    let after = device.program.resident_bytes().unwrap();
    // Leaking one picture each time would be 16 MiB.
    assert!(after < before + (1 << 20), "{before} bytes became {after}");
}

#[test]
fn front_ends_that_disconnect_leave_no_resources_behind() {
    let mut device = Device::start(&["--max-hostmem=1M"]);
    let before = device.program.resources().unwrap();
    let visit = |device: &Device| {
        let (mut driver, _display) = device.connect_with_display(Answers::default());
        // Nearly the whole limit, each time.
        let pages = driver.create(1, B8G8R8X8, 500, 500);
        driver.draw(&pages, &bytes(&pattern(500)));
        driver.set_scanout(0, 1, [0, 0, 500, 500]);
        driver.flush(1, [0, 0, 500, 500]);
    };
    (0..3).for_each(|_| visit(&device));
    device.program.wait_for_resources(before).unwrap();
    let memory = device.program.resident_bytes().unwrap();
    (0..30).for_each(|_| visit(&device));
    device.program.wait_for_resources(before).unwrap();
    let after = device.program.resident_bytes().unwrap();
    assert!(after < memory + (2 << 20), "{memory} bytes became {after}");
}

#[test]
fn only_the_last_of_many_displays_is_kept() {
    let mut device = Device::start(&[]);
    let driver = device.connect();
    let first = ManualDisplay::greeted(&driver, 3);
    let mut held = device.program.resources().unwrap();
    let displays: Vec<_> = (0..100).map(|_| ManualDisplay::connect(&driver)).collect();
    let display = driver.connect_display(Answers::default());
    first.wait_until_closed();
    displays
        .into_iter()
        .for_each(ManualDisplay::wait_until_closed);
    assert_eq!(device.program.resources().unwrap(), held);
    drop(display);
    held.files -= 1;
    device.program.wait_for_resources(held).unwrap();
}
