// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Read, write, flush, and the serial number.

use std::os::unix::fs::FileExt;

use vhost_device_tests::front_end::block::{
    FLUSH, GET_ID, ID_SIZE, IN, OK, OUT, Request, SECTOR_SIZE,
};

use crate::{Disk, IMAGE_SIZE, LARGEST, SECTORS, UNTOUCHED, Variant, assert_same, noise, ok};

fn reads_give_what_the_host_wrote(variant: Variant) {
    let image = noise(1, IMAGE_SIZE);
    let mut disk = variant.disk(&image, &[]);
    for (sector, sectors) in [(0, 1), (0, 8), (7, 3), (SECTORS - 1, 1), (0, SECTORS)] {
        let data = ok(disk
            .driver
            .read(sector, sectors as u32 * SECTOR_SIZE as u32)
            .unwrap());
        let start = sector as usize * SECTOR_SIZE;
        assert_same(&data, &image[start..start + data.len()], "data");
    }
    // Later changes by the host are seen too.
    let change = noise(2, 4096);
    disk.device.file().write_all_at(&change, 8192).unwrap();
    assert_eq!(ok(disk.driver.read(16, 4096).unwrap()), change);
}

fn writes_reach_the_image_where_they_should_and_nowhere_else(variant: Variant) {
    let mut image = noise(3, IMAGE_SIZE);
    let mut disk = variant.disk(&image, &[]);
    for (sector, sectors) in [(0, 1), (5, 2), (9, 17), (SECTORS - 1, 1), (100, 256)] {
        let data = noise(sector, sectors * SECTOR_SIZE);
        let start = sector as usize * SECTOR_SIZE;
        image[start..start + data.len()].copy_from_slice(&data);
        ok(disk.driver.write(sector, &data).unwrap());
        // An acknowledged write is in the image at once.
        assert_same(&disk.device.contents(), &image, "the image on the host");
    }
    disk.assert_contents(&image);
}

fn the_whole_disk_is_written_and_read_in_one_request(variant: Variant) {
    let image = noise(4, LARGEST as usize);
    let mut disk = variant.disk(&vec![0; LARGEST as usize], &[]);
    ok(disk.driver.write(0, &image).unwrap());
    disk.assert_contents(&image);
}

fn a_new_connection_sees_what_was_written(variant: Variant) {
    let image = noise(5, IMAGE_SIZE);
    let mut disk = variant.disk(&vec![0; IMAGE_SIZE], &[]);
    ok(disk.driver.write(0, &image).unwrap());
    let Disk {
        driver,
        front_end,
        device,
    } = disk;
    drop((driver, front_end));
    Disk::connect(device).assert_contents(&image);
}

fn a_flush_succeeds_and_changes_nothing(variant: Variant) {
    let mut image = noise(6, IMAGE_SIZE);
    let mut disk = variant.disk(&image, &[]);
    ok(disk.driver.flush().unwrap());
    image[..512].fill(7);
    ok(disk.driver.write(0, &[7; 512]).unwrap());
    ok(disk.driver.flush().unwrap());
    disk.assert_contents(&image);
}

/// The sector of a flush has no meaning.
fn a_flush_is_for_the_whole_disk_whatever_its_sector(variant: Variant) {
    let mut disk = variant.disk(&vec![0; IMAGE_SIZE], &[]);
    for sector in [1, SECTORS, u64::MAX] {
        let flush = Request {
            kind: FLUSH,
            sector,
            ..Default::default()
        };
        ok(disk.driver.request(&flush).unwrap());
    }
}

fn a_read_only_disk_can_be_read_and_flushed(variant: Variant) {
    let image = noise(8, IMAGE_SIZE);
    let mut disk = variant.disk(&image, &["--read-only"]);
    ok(disk.driver.flush().unwrap());
    disk.assert_contents(&image);
}

fn the_serial_number_has_20_bytes_filled_with_zeroes(variant: Variant) {
    for serial in [
        "",
        "x",
        "serial 0123",
        "nineteen-characters",
        "twenty characters :)",
    ] {
        let mut disk = variant.disk(&vec![0; IMAGE_SIZE], &[&format!("--serial={serial}")]);
        let id = ok(disk.driver.get_id().unwrap());
        let mut expected = serial.as_bytes().to_vec();
        expected.resize(ID_SIZE, 0);
        assert_eq!(id, expected, "{serial:?}");
    }
}

fn more_room_than_the_serial_number_needs_stays_untouched(variant: Variant) {
    let mut disk = variant.disk(&vec![0; IMAGE_SIZE], &["--serial=s"]);
    let answer = disk
        .driver
        .request(&Request {
            kind: GET_ID,
            reply_length: 512,
            ..Default::default()
        })
        .unwrap();
    assert_eq!(u32::from(answer.status), OK);
    assert_eq!(answer.length, ID_SIZE as u32 + 1);
    assert_eq!(answer.data[..3], [b's', 0, 0]);
    assert!(answer.data[ID_SIZE..].iter().all(|&byte| byte == UNTOUCHED));
}

/// The second word of the header has no meaning.
fn the_reserved_word_of_the_header_is_ignored(variant: Variant) {
    let image = noise(9, IMAGE_SIZE);
    let mut disk = variant.disk(&image, &[]);
    for kind in [IN, OUT, FLUSH, GET_ID] {
        let prepared = disk.driver.prepare(&Request {
            kind,
            data: if kind == OUT { &image[..512] } else { &[] },
            reply_length: match kind {
                IN => 512,
                GET_ID => ID_SIZE as u32,
                _ => 0,
            },
            ..Default::default()
        });
        let memory = disk.front_end.memory();
        memory.write_u32(prepared.chain[0].address + 4, 0xffff_ffff);
        let answer = disk.driver.run(&prepared).unwrap();
        assert_eq!(u32::from(answer.status), OK, "request {kind}");
    }
    disk.assert_contents(&image);
}

crate::for_each_variant!(
    reads_give_what_the_host_wrote,
    writes_reach_the_image_where_they_should_and_nowhere_else,
    the_whole_disk_is_written_and_read_in_one_request,
    a_new_connection_sees_what_was_written,
    a_flush_succeeds_and_changes_nothing,
    a_flush_is_for_the_whole_disk_whatever_its_sector,
    a_read_only_disk_can_be_read_and_flushed,
    the_serial_number_has_20_bytes_filled_with_zeroes,
    more_room_than_the_serial_number_needs_stays_untouched,
    the_reserved_word_of_the_header_is_ignored,
);
