// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Discard and write-zeroes: what the guest reads afterwards, and what storage the host gets back.

use std::fs;
use std::os::unix::fs::MetadataExt;

use vhost_device_tests::front_end::block::{
    Completion, DISCARD, Request, SECTOR_SIZE, UNMAP, WRITE_ZEROES, segment,
};
use vhost_device_tests::front_end::{BlockDriver, Result};

use crate::failed_sync::{Small, start};
use crate::{Disk, IMAGE_SIZE, SECTORS, Variant, assert_same, driver, noise, ok};

/// Storage that a file system may use for itself, in bytes.
const SLACK: u64 = 64 << 10;

/// Creates a disk that is completely written and allocated. Returns it with its contents.
fn full_disk(variant: Variant, arguments: &[&str]) -> (Disk, Vec<u8>) {
    let image = noise(1, IMAGE_SIZE);
    let disk = variant.disk(&image, arguments);
    assert!(disk.device.allocated() >= IMAGE_SIZE as u64);
    (disk, image)
}

/// Sends one request of several segments: sector, sectors, flags.
fn request(disk: &mut Disk, kind: u32, segments: &[(u64, u32, u32)]) {
    let data: Vec<u8> = segments
        .iter()
        .flat_map(|&(sector, sectors, flags)| segment(sector, sectors, flags))
        .collect();
    let request = Request {
        kind,
        data: &data,
        ..Default::default()
    };
    ok(disk.driver.request(&request).unwrap());
}

fn clear(image: &mut [u8], sector: u64, sectors: u32) {
    let start = sector as usize * SECTOR_SIZE;
    image[start..start + sectors as usize * SECTOR_SIZE].fill(0);
}

/// Asserts that a request for 512 KiB frees that much storage of the host.
fn assert_frees(disk: &mut Disk, request: impl FnOnce(&mut BlockDriver) -> Result<Completion>) {
    let before = disk.device.allocated();
    ok(request(&mut disk.driver).unwrap());
    let after = disk.device.allocated();
    assert!(
        before - after >= (512 << 10) - SLACK,
        "{before} bytes before, {after} after"
    );
}

fn discarded_storage_goes_back_to_the_host(variant: Variant) {
    let (mut disk, mut image) = full_disk(variant, &["--discard=unmap"]);
    assert_frees(&mut disk, |driver| driver.discard(512, 1024));
    // A hole in a file reads as zeroes.
    clear(&mut image, 512, 1024);
    disk.assert_contents(&image);
}

fn a_discarded_range_can_be_written_again(variant: Variant) {
    let (mut disk, mut image) = full_disk(variant, &[]);
    ok(disk.driver.discard(0, SECTORS as u32).unwrap());
    image.fill(0);
    let data = noise(2, 8192);
    ok(disk.driver.write(64, &data).unwrap());
    image[64 * 512..64 * 512 + 8192].copy_from_slice(&data);
    disk.assert_contents(&image);
}

fn an_ignored_discard_succeeds_and_changes_nothing(variant: Variant) {
    let (mut disk, image) = full_disk(variant, &["--discard=ignore"]);
    let before = disk.device.allocated();
    ok(disk.driver.discard(0, SECTORS as u32).unwrap());
    assert_eq!(disk.device.allocated(), before);
    disk.assert_contents(&image);
}

/// Blocks of the file system are larger; sectors that share a block with the range must not change.
fn discards_of_any_sectors_leave_all_others_alone(variant: Variant) {
    let (mut disk, mut image) = full_disk(variant, &[]);
    for (sector, sectors) in [(1, 1), (7, 2), (15, 9), (33, 14), (SECTORS - 3, 3)] {
        ok(disk.driver.discard(sector, sectors).unwrap());
        let start = sector as usize * SECTOR_SIZE;
        let end = start + sectors as usize * SECTOR_SIZE;
        // The contents of a discarded range are unspecified.
        let seen = disk.device.contents();
        image[start..end].copy_from_slice(&seen[start..end]);
        assert_same(&seen, &image, "the image on the host");
    }
    disk.assert_contents(&image);
}

fn discards_take_several_segments(variant: Variant) {
    let (mut disk, mut image) = full_disk(variant, &[]);
    let before = disk.device.allocated();
    let segments: Vec<_> = (0..16).map(|index| (index * 128, 64, 0)).collect();
    request(&mut disk, DISCARD, &segments);
    for (sector, sectors, _) in segments {
        clear(&mut image, sector, sectors);
    }
    let after = disk.device.allocated();
    assert!(
        before - after >= (512 << 10) - SLACK,
        "{before} bytes before, {after} after"
    );
    disk.assert_contents(&image);
}

fn write_zeroes_reads_back_as_zeroes_with_and_without_unmap(variant: Variant) {
    for discard in ["--discard=unmap", "--discard=ignore"] {
        let (mut disk, mut image) = full_disk(variant, &[discard]);
        for (sector, sectors, flags) in [
            (0, 1, 0),
            (2, 1, UNMAP),
            (7, 2, 0),
            (15, 9, UNMAP),
            (31, 66, 0),
            (111, 66, UNMAP),
            (256, 512, 0),
            (1024, 512, UNMAP),
            (SECTORS - 1, 1, UNMAP),
        ] {
            ok(disk.driver.write_zeroes(sector, sectors, flags).unwrap());
            clear(&mut image, sector, sectors);
            assert_same(&disk.device.contents(), &image, "the image on the host");
        }
        disk.assert_contents(&image);
    }
}

fn write_zeroes_with_unmap_gives_storage_back(variant: Variant) {
    let (mut disk, mut image) = full_disk(variant, &[]);
    assert_frees(&mut disk, |driver| driver.write_zeroes(512, 1024, UNMAP));
    clear(&mut image, 512, 1024);
    disk.assert_contents(&image);
}

fn write_zeroes_without_unmap_keeps_the_storage(variant: Variant) {
    for (discard, flags) in [
        ("--discard=unmap", 0),
        ("--discard=ignore", 0),
        ("--discard=ignore", UNMAP),
    ] {
        let (mut disk, mut image) = full_disk(variant, &[discard]);
        let before = disk.device.allocated();
        ok(disk.driver.write_zeroes(512, 1024, flags).unwrap());
        let after = disk.device.allocated();
        assert!(after >= before, "{before} bytes before, {after} after");
        clear(&mut image, 512, 1024);
        disk.assert_contents(&image);
    }
}

fn write_zeroes_allocates_a_hole(variant: Variant) {
    let mut disk = variant.disk(&vec![0; IMAGE_SIZE], &[]);
    ok(disk.driver.discard(0, SECTORS as u32).unwrap());
    let before = disk.device.allocated();
    ok(disk.driver.write_zeroes(0, 1024, 0).unwrap());
    let after = disk.device.allocated();
    assert!(
        after - before >= (512 << 10) - SLACK,
        "{before} bytes before, {after} after"
    );
    disk.assert_contents(&vec![0; IMAGE_SIZE]);
}

/// In any order, overlapping, next to each other, empty, with and without unmap.
fn write_zeroes_takes_several_segments(variant: Variant) {
    let (mut disk, mut image) = full_disk(variant, &[]);
    let segments = [
        (1900, 100, 0),
        (8, 8, UNMAP),
        (16, 8, 0),
        (3, 7, UNMAP),
        (100, 0, 0),
        (SECTORS, 0, UNMAP),
        (500, 33, 0),
        (510, 100, UNMAP),
        (500, 10, 0),
        (1999, 1, UNMAP),
    ];
    request(&mut disk, WRITE_ZEROES, &segments);
    for (sector, sectors, _) in segments {
        clear(&mut image, sector, sectors);
    }
    disk.assert_contents(&image);
}

/// A tmpfs has no call for it, so zeroes are written, a part at a time.
fn zeroes_are_written_where_the_file_system_cannot_make_them(variant: Variant) {
    const SIZE: usize = 5 << 20;
    let mut image = noise(3, SIZE);
    let variant = variant.in_memory();
    if !variant.is_possible() {
        return crate::skip("there is no file system in memory");
    }
    let mut disk = variant.disk(&image, &[]);
    let before = disk.device.allocated();
    // More than what is written at a time, and no whole number of it.
    for segments in [
        &[(1, (4 << 11) + 5, 0)][..],
        &[(9000, 3, 0), (9010, 2, UNMAP), (9100, 500, 0), (9600, 1, 0)],
    ] {
        let punched: u64 = segments.iter().filter(|segment| segment.2 == UNMAP).count() as u64;
        request(&mut disk, WRITE_ZEROES, segments);
        for &(sector, sectors, _) in segments {
            clear(&mut image, sector, sectors);
        }
        let after = disk.device.allocated();
        assert!(after + 4096 * punched >= before, "{before} bytes, {after}");
        assert_same(&disk.device.contents(), &image, "the image on the host");
    }
    disk.assert_contents(&image);
}

fn nothing_of_a_range_is_lost_with_o_direct(variant: Variant) {
    let (mut disk, mut image) = full_disk(variant, &["--direct"]);
    request(&mut disk, WRITE_ZEROES, &[(1, 30, 0), (101, 30, UNMAP)]);
    request(&mut disk, DISCARD, &[(201, 30, 0)]);
    for sector in [1, 101, 201] {
        clear(&mut image, sector, 30);
    }
    disk.assert_contents(&image);
}

fn a_discard_on_a_block_device_gives_storage_back(variant: Variant) {
    let Some(small) = Small::with_device() else {
        return;
    };
    let allocated = || fs::metadata(small.file()).unwrap().blocks() * SECTOR_SIZE as u64;
    let device = start(variant, small.device());
    let front_end = device.connect();
    let mut driver = driver(&front_end);
    ok(driver.write(0, &noise(1, IMAGE_SIZE)).unwrap());
    ok(driver.flush().unwrap());
    let before = allocated();
    ok(driver.discard(0, SECTORS as u32).unwrap());
    assert!(before - allocated() >= IMAGE_SIZE as u64 - SLACK);
    let read = driver.read(0, IMAGE_SIZE as u32).unwrap();
    assert_eq!(read.data, [0; IMAGE_SIZE]);
}

crate::for_each_variant!(
    discarded_storage_goes_back_to_the_host,
    a_discard_on_a_block_device_gives_storage_back,
    a_discarded_range_can_be_written_again,
    an_ignored_discard_succeeds_and_changes_nothing,
    discards_of_any_sectors_leave_all_others_alone,
    discards_take_several_segments,
    write_zeroes_reads_back_as_zeroes_with_and_without_unmap,
    write_zeroes_with_unmap_gives_storage_back,
    write_zeroes_without_unmap_keeps_the_storage,
    write_zeroes_allocates_a_hole,
    write_zeroes_takes_several_segments,
    zeroes_are_written_where_the_file_system_cannot_make_them,
    nothing_of_a_range_is_lost_with_o_direct,
);
