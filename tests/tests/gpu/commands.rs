// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Commands, their responses, and refused commands.

use vhost_device_tests::front_end::gpu::{Answers, command, fenced_command, number, words};

use crate::{B8G8R8X8, Device};

#[test]
fn a_fence_comes_back_with_its_number() {
    let device = Device::start(&["--headless"]);
    let mut driver = device.connect();
    let create = words(&[1, B8G8R8X8, 8, 8]);
    let mut fenced = fenced_command(number::CREATE_2D, 3, 0x1234_5678_9abc, &create);
    fenced[16..21].copy_from_slice(&[7, 0, 0, 0, 9]);
    let response = driver.run(&fenced);
    assert_eq!(response.kind(), number::OK_NODATA);
    assert_eq!(response.bytes[4..21], fenced[4..21]);
    let plain = driver.run(&fenced_command(number::UNREF, 0, 5, &words(&[1, 0])));
    assert_eq!(plain.bytes[4..24], [0; 20]);
}

#[test]
fn invalid_commands_are_refused() {
    let device = Device::start(&["--headless", "--max-hostmem=1M"]);
    let mut driver = device.connect();
    driver.create(1, B8G8R8X8, 16, 16);
    driver.done(number::CREATE_2D, &words(&[2, B8G8R8X8, 16, 16]));
    let transfer = |rectangle: [u32; 4], offset: u64, resource: u32| {
        let mut body = words(&rectangle);
        body.extend(offset.to_le_bytes());
        body.extend(words(&[resource, 0]));
        body
    };
    let all = [0, 0, 16, 16];
    let huge = [0, 0, u32::MAX, u32::MAX];
    let wraps = [u32::MAX, 0, 2, 1];
    let entries = |count: u32| [words(&[2, count]), vec![0; 32]].concat();
    let cases = [
        (
            "a resource without a number",
            number::CREATE_2D,
            words(&[0, 2, 1, 1]),
            number::INVALID_RESOURCE_ID,
        ),
        (
            "a number twice",
            number::CREATE_2D,
            words(&[1, 2, 1, 1]),
            number::INVALID_RESOURCE_ID,
        ),
        (
            "an unknown format",
            number::CREATE_2D,
            words(&[3, 5, 1, 1]),
            number::INVALID_PARAMETER,
        ),
        (
            "no width",
            number::CREATE_2D,
            words(&[3, 2, 0, 1]),
            number::INVALID_PARAMETER,
        ),
        (
            "more than there is room for",
            number::CREATE_2D,
            words(&[3, 2, 600, 600]),
            number::OUT_OF_MEMORY,
        ),
        (
            "a size that overflows",
            number::CREATE_2D,
            words(&[3, 2, u32::MAX, u32::MAX]),
            number::OUT_OF_MEMORY,
        ),
        (
            "unref of nothing",
            number::UNREF,
            words(&[9, 0]),
            number::INVALID_RESOURCE_ID,
        ),
        (
            "a short command",
            number::UNREF,
            words(&[]),
            number::INVALID_PARAMETER,
        ),
        (
            "scanout 16",
            number::SET_SCANOUT,
            words(&[0, 0, 16, 16, 16, 1]),
            number::INVALID_SCANOUT_ID,
        ),
        (
            "a scanout of nothing",
            number::SET_SCANOUT,
            words(&[0, 0, 16, 16, 0, 9]),
            number::INVALID_RESOURCE_ID,
        ),
        (
            "a scanout past the end",
            number::SET_SCANOUT,
            words(&[1, 0, 16, 16, 0, 1]),
            number::INVALID_PARAMETER,
        ),
        (
            "an empty scanout",
            number::SET_SCANOUT,
            words(&[0, 0, 0, 0, 0, 1]),
            number::INVALID_PARAMETER,
        ),
        (
            "a flush of nothing",
            number::FLUSH,
            words(&[0, 0, 16, 16, 9, 0]),
            number::INVALID_RESOURCE_ID,
        ),
        (
            "a flush past the end",
            number::FLUSH,
            words(&[0, 1, 16, 16, 1, 0]),
            number::INVALID_PARAMETER,
        ),
        (
            "a flush that wraps",
            number::FLUSH,
            [words(&wraps), words(&[1, 0])].concat(),
            number::INVALID_PARAMETER,
        ),
        (
            "a transfer of nothing",
            number::TRANSFER_TO_HOST_2D,
            transfer(all, 0, 9),
            number::INVALID_RESOURCE_ID,
        ),
        (
            "a transfer without backing",
            number::TRANSFER_TO_HOST_2D,
            transfer(all, 0, 2),
            number::UNSPEC,
        ),
        (
            "a transfer past the end",
            number::TRANSFER_TO_HOST_2D,
            transfer(huge, 0, 1),
            number::INVALID_PARAMETER,
        ),
        (
            "a transfer past the backing",
            number::TRANSFER_TO_HOST_2D,
            transfer(all, 4000, 1),
            number::INVALID_PARAMETER,
        ),
        (
            "an offset that overflows",
            number::TRANSFER_TO_HOST_2D,
            transfer(all, u64::MAX, 1),
            number::INVALID_PARAMETER,
        ),
        (
            "a second backing",
            number::ATTACH_BACKING,
            [words(&[1, 1]), vec![0; 16]].concat(),
            number::UNSPEC,
        ),
        (
            "a backing of nothing",
            number::ATTACH_BACKING,
            entries(0),
            number::INVALID_PARAMETER,
        ),
        (
            "more entries than there are",
            number::ATTACH_BACKING,
            entries(3),
            number::INVALID_PARAMETER,
        ),
        (
            "billions of entries",
            number::ATTACH_BACKING,
            entries(u32::MAX),
            number::INVALID_PARAMETER,
        ),
        (
            "detach without backing",
            number::DETACH_BACKING,
            words(&[2, 0]),
            number::UNSPEC,
        ),
        (
            "a UUID of nothing",
            number::ASSIGN_UUID,
            words(&[9, 0]),
            number::INVALID_RESOURCE_ID,
        ),
        (
            "EDID of scanout 16",
            number::GET_EDID,
            words(&[16, 0]),
            number::INVALID_SCANOUT_ID,
        ),
        (
            "a set of capabilities",
            0x108,
            words(&[0, 0]),
            number::INVALID_PARAMETER,
        ),
        ("a blob", 0x10c, vec![0; 32], number::UNSPEC),
        ("a context", 0x200, vec![0; 72], number::UNSPEC),
        ("an unknown command", 0xdead, Vec::new(), number::UNSPEC),
    ];
    for (what, kind, body, expected) in cases {
        let response = driver.run(&command(kind, &body));
        assert_eq!(response.kind(), expected, "{what}");
        assert_eq!(response.bytes.len(), 24, "{what}");
    }
    let headless = driver.run(&command(number::CREATE_2D, &[])[..20]);
    assert_eq!(
        headless.kind(),
        number::INVALID_PARAMETER,
        "less than a header"
    );
}

#[test]
fn a_command_without_room_for_its_response_is_carried_out_or_refused_and_the_next_one_too() {
    let device = Device::start(&["--headless"]);
    let mut driver = device.connect();
    driver.send(&command(number::CREATE_2D, &words(&[1, B8G8R8X8, 1, 1])), 0);
    assert!(driver.receive().bytes.is_empty());
    driver.send(&command(number::GET_DISPLAY_INFO, &[]), 100);
    assert_eq!(driver.receive().kind(), number::INVALID_PARAMETER);
    driver.unref(1);
}

#[test]
fn memory_of_destroyed_resources_is_freed() {
    let device = Device::start(&["--headless", "--max-hostmem=1M"]);
    let mut driver = device.connect();
    for _ in 0..100 {
        driver.done(number::CREATE_2D, &words(&[1, B8G8R8X8, 500, 500]));
        let mut body = words(&[1, 1]);
        body.extend(words(&[0, 0, 4096, 0]));
        driver.done(number::ATTACH_BACKING, &body);
        driver.unref(1);
    }
}

#[test]
fn a_headless_device_has_one_screen() {
    let device = Device::start(&["--headless"]);
    let mut driver = device.connect();
    let response = driver.run(&command(number::GET_DISPLAY_INFO, &[]));
    assert_eq!(response.kind(), number::OK_DISPLAY_INFO);
    assert_eq!(response.bytes.len(), 408);
    assert_eq!(response.body()[..24], words(&[0, 0, 1024, 768, 1, 0]));
    assert!(response.body()[24..].iter().all(|byte| *byte == 0));
}

#[test]
fn a_uuid_is_random_and_stays() {
    let device = Device::start(&["--headless"]);
    let mut driver = device.connect();
    driver.create(1, B8G8R8X8, 1, 1);
    driver.create(2, B8G8R8X8, 1, 1);
    let mut uuid = |resource| {
        let response = driver.run(&command(number::ASSIGN_UUID, &words(&[resource, 0])));
        assert_eq!(response.kind(), number::OK_RESOURCE_UUID);
        let uuid: [u8; 16] = response.body().try_into().unwrap();
        assert_eq!((uuid[6] >> 4, uuid[8] >> 6), (4, 2), "version and variant");
        uuid
    };
    let first = uuid(1);
    assert_eq!(uuid(1), first);
    assert_ne!(uuid(2), first);
}

#[test]
fn the_display_is_asked_for_its_modes_and_its_edid() {
    let device = Device::start(&[]);
    let answers = Answers::default();
    let (mut driver, _display) = device.connect_with_display(answers.clone());
    let info = driver.run(&command(number::GET_DISPLAY_INFO, &[]));
    assert_eq!(info.kind(), number::OK_DISPLAY_INFO);
    assert_eq!(info.body(), &answers.display_info.unwrap()[24..]);
    let edid = driver.run(&command(number::GET_EDID, &words(&[1, 0])));
    assert_eq!(edid.kind(), number::OK_EDID);
    assert_eq!(edid.body(), &answers.edid.unwrap()[24..]);
}
