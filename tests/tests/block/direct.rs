// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `--direct` and `--logical-block-size=4096`: all bytes are correct, whatever the layout of guest memory.

use std::fs;

use vhost_device_tests::front_end::Buffer;
use vhost_device_tests::front_end::block::{IN, NO_STATUS, OK, OUT, header};

use crate::framing::{assert_any_pieces, assert_transfer, ring};
use crate::{Device, IMAGE_SIZE, PATIENCE, SECTORS, Variant, assert_same, noise, ok};

/// Open flags of the image in the program, as the kernel shows them.
fn open_flags(device: &Device) -> Vec<i32> {
    let process = format!("/proc/{}", device.program.id());
    fs::read_dir(format!("{process}/fd"))
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| fs::read_link(entry.path()).is_ok_and(|path| path == device.image))
        .map(|entry| {
            let number = entry.file_name().into_string().unwrap();
            let information = fs::read_to_string(format!("{process}/fdinfo/{number}")).unwrap();
            let flags = information
                .lines()
                .find_map(|line| line.strip_prefix("flags:"))
                .unwrap();
            i32::from_str_radix(flags.trim(), 8).unwrap()
        })
        .collect()
}

fn the_page_cache_is_bypassed_if_asked_for(variant: Variant) {
    for (arguments, expected) in [(&[][..], false), (&["--direct"], true)] {
        let device = variant.start(&vec![0; IMAGE_SIZE], arguments);
        let flags = open_flags(&device);
        assert!(!flags.is_empty());
        for flags in flags {
            assert_eq!(flags & libc::O_DIRECT != 0, expected, "{arguments:?}");
        }
    }
}

fn aligned_requests_are_right(variant: Variant) {
    for arguments in [
        &["--direct"][..],
        &["--direct", "--logical-block-size=4096"],
        &["--logical-block-size=4096"],
    ] {
        let mut image = noise(1, IMAGE_SIZE);
        let mut disk = variant.disk(&image, arguments);
        for (sector, length) in [(0, 4096), (8, 4096), (80, 65536), (SECTORS - 8, 4096)] {
            let data = noise(sector, length);
            ok(disk.driver.write(sector, &data).unwrap());
            let start = sector as usize * 512;
            image[start..start + length].copy_from_slice(&data);
        }
        disk.assert_contents(&image);
    }
}

/// One data descriptor at each offset from an aligned address.
fn data_may_lie_at_odd_addresses(variant: Variant) {
    let mut image = noise(2, 4 * IMAGE_SIZE);
    let mut disk = variant.disk(&image, &["--direct"]);
    let memory = disk.front_end.memory().clone();
    let area = memory.allocate(64 << 10, 4096);
    let (request, status) = (memory.allocate(16, 16), memory.allocate(1, 1));
    for shift in [0, 1, 2, 3, 4, 8, 255, 256, 511, 512, 513, 2048, 4095] {
        for (sector, length) in [(shift, 512), (shift + 16, 4096), (shift + 32, 12 << 10)] {
            let data = noise(shift + 9, length);
            let start = sector as usize * 512;
            let place = area + 4096 + shift;
            for (kind, writable) in [(OUT, false), (IN, true)] {
                memory.write(request, &header(kind, sector));
                memory.write_u8(status, NO_STATUS);
                if writable {
                    memory.fill(area, length + 3 * 4096, NO_STATUS);
                } else {
                    memory.write(place, &data);
                    image[start..start + length].copy_from_slice(&data);
                }
                disk.driver.queue.submit(&[
                    Buffer::readable(request, 16),
                    Buffer {
                        address: place,
                        length: length as u32,
                        writable,
                    },
                    Buffer::writable(status, 1),
                ]);
                assert!(disk.driver.queue.wait_used(PATIENCE));
                disk.driver.queue.take_used().unwrap();
                let what = format!("request {kind} of {length} bytes at {place:#x}");
                assert_eq!(u32::from(memory.read_u8(status)), OK, "status of {what}");
                assert_same(&memory.read_vec(place, length), &data, &what);
            }
            // Nothing else was written.
            for address in [place - 1, place + length as u64] {
                assert_eq!(memory.read_u8(address), NO_STATUS, "at {address:#x}");
            }
        }
    }
    disk.assert_contents(&image);
}

fn data_may_come_in_odd_pieces(variant: Variant) {
    assert_any_pieces(variant, &["--direct"]);
}

/// More than is copied at a time.
fn many_megabytes_in_odd_pieces_are_right(variant: Variant) {
    let disk = variant.disk(&vec![0; 8 << 20], &["--direct"]);
    disk.front_end.stop(0).unwrap();
    let mut queue = ring(&disk.front_end, 1024, 1022);
    for megabytes in [1, 3] {
        for count in [1, 3, 1001] {
            // One sector more or less than what a buffer may hold.
            for length in [
                (megabytes << 20) - 512,
                megabytes << 20,
                (megabytes << 20) + 512,
            ] {
                assert_transfer(disk.front_end.memory(), &mut queue, length, count);
            }
        }
    }
}

/// Sectors are the unit of the protocol whatever the block size is, which is a recommendation (section 5.2.5).
fn parts_of_a_block_can_be_read_and_written(variant: Variant) {
    let mut image = noise(3, IMAGE_SIZE);
    let mut disk = variant.disk(&image, &["--logical-block-size=4096"]);
    for (sector, length) in [(1, 512), (7, 1024), (SECTORS - 1, 512)] {
        let data = noise(sector, length);
        ok(disk.driver.write(sector, &data).unwrap());
        let start = sector as usize * 512;
        image[start..start + length].copy_from_slice(&data);
        assert_eq!(ok(disk.driver.read(sector, length as u32).unwrap()), data);
    }
    disk.assert_contents(&image);
}

crate::for_each_variant!(
    the_page_cache_is_bypassed_if_asked_for,
    aligned_requests_are_right,
    data_may_lie_at_odd_addresses,
    data_may_come_in_odd_pieces,
    many_megabytes_in_odd_pieces_are_right,
    parts_of_a_block_can_be_read_and_written,
);
