// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The offered features, and the config space for each command line (VIRTIO 1.3, sections 5.2.3 and 5.2.4).

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use vhost_device_tests::front_end::FrontEnd;
use vhost_device_tests::front_end::state::sealed;
use vhost_device_tests::process::Program;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};

use crate::{Device, IMAGE_SIZE, SECTORS, Variant, driver, noise, ok};

/// Bits of a block device.
const DEVICE_BITS: u64 = (1 << 24) - 1;

/// Of any disk.
const ALWAYS: [u32; 6] = [
    VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_BLK_SIZE,
    VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_CONFIG_WCE,
    VIRTIO_BLK_F_MQ,
];

/// Size of the config space including `write_zeroes_may_unmap` and its padding.
const SIZE: u32 = 60;

/// Offset of the one field that a driver may write.
const WRITEBACK: u32 = 32;

fn bits(features: &[u32]) -> u64 {
    features.iter().fold(0, |bits, feature| bits | 1 << feature)
}

/// Returns a little-endian field of the config space.
fn field(front_end: &FrontEnd, offset: u32, size: u32) -> u64 {
    let mut bytes = front_end.config(offset, size).unwrap();
    assert_eq!(bytes.len(), size as usize);
    bytes.resize(8, 0);
    u64::from_le_bytes(bytes.try_into().unwrap())
}

/// Sectors of the disk.
pub fn capacity(front_end: &FrontEnd) -> u64 {
    field(front_end, 0, 8)
}

pub fn writeback(front_end: &FrontEnd) -> u64 {
    field(front_end, WRITEBACK, 1)
}

pub fn set_writeback(front_end: &FrontEnd, writeback: u8) {
    front_end.set_config(WRITEBACK, &[writeback]).unwrap();
}

/// Maximum sectors of a segment, and maximum number of segments.
#[derive(Debug, PartialEq, Eq)]
pub struct Limits {
    pub sectors: u32,
    pub segments: u32,
}

pub fn discard_limits(front_end: &FrontEnd) -> Limits {
    Limits {
        sectors: field(front_end, 36, 4) as u32,
        segments: field(front_end, 40, 4) as u32,
    }
}

pub fn write_zeroes_limits(front_end: &FrontEnd) -> Limits {
    Limits {
        sectors: field(front_end, 48, 4) as u32,
        segments: field(front_end, 52, 4) as u32,
    }
}

fn start(size: usize, arguments: &[&str]) -> (Device, FrontEnd) {
    let device = Variant::THREADS.start(&vec![0; size], arguments);
    let front_end = device.connect();
    (device, front_end)
}

#[test]
fn a_disk_offers_what_it_can_do_and_no_more() {
    let (_device, front_end) = start(IMAGE_SIZE, &[]);
    let expected = bits(&ALWAYS) | bits(&[VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]);
    assert_eq!(front_end.offered() & DEVICE_BITS, expected);
}

#[test]
fn a_read_only_disk_says_so_and_offers_no_request_that_writes() {
    let (_device, front_end) = start(IMAGE_SIZE, &["--read-only"]);
    let expected = bits(&ALWAYS) | bits(&[VIRTIO_BLK_F_RO]);
    assert_eq!(front_end.offered() & DEVICE_BITS, expected);
}

#[test]
fn the_capacity_is_the_size_of_the_image_in_whole_blocks() {
    for (size, block, sectors) in [
        (512, "512", 1),
        (IMAGE_SIZE, "512", SECTORS),
        (IMAGE_SIZE + 511, "512", SECTORS),
        (IMAGE_SIZE + 512, "512", SECTORS + 1),
        (4096, "4096", 8),
        (IMAGE_SIZE + 4095, "4096", SECTORS),
        (IMAGE_SIZE + 4096, "4096", SECTORS + 8),
    ] {
        let (_device, front_end) = start(size, &[&format!("--logical-block-size={block}")]);
        assert_eq!(
            field(&front_end, 0, 8),
            sectors,
            "capacity of {size} bytes in blocks of {block}"
        );
    }
}

#[test]
fn an_image_smaller_than_a_block_is_refused_with_a_remedy() {
    for (size, block) in [(0, "512"), (511, "512"), (4095, "4096")] {
        let directory = tempfile::tempdir().unwrap();
        let (image, socket) = (
            directory.path().join("image"),
            directory.path().join("socket"),
        );
        fs::write(&image, vec![0; size]).unwrap();
        let block = format!("--logical-block-size={block}");
        let mut program =
            Program::spawn(&mut Variant::AUTO.command(&image, &socket, &[&block])).unwrap();
        let status = program.wait(Duration::from_secs(5)).unwrap();
        assert_eq!(status.code(), Some(1), "{size} bytes, {block}");
        let lines = program.stderr();
        assert_eq!(lines.lines().count(), 1, "{lines}");
        let remedy = format!("truncate -s 1G {}", image.display());
        assert!(lines.contains("smaller than one logical block"), "{lines}");
        assert!(lines.contains(&remedy), "{lines}");
        assert!(!socket.exists(), "{lines}");
    }
}

#[test]
fn the_capacity_may_need_more_than_32_bits() {
    let directory = Variant::THREADS.directory();
    let image = std::fs::File::create_new(directory.path().join("image")).unwrap();
    let sectors = (1 << 32) + 5;
    image.set_len(sectors * 512).unwrap();
    let device = Variant::THREADS.start_in(directory, &[], |_| {});
    let front_end = device.connect();
    assert_eq!(field(&front_end, 0, 8), sectors);
    // And it is there.
    let mut driver = driver(&front_end);
    let data = noise(1, 512);
    ok(driver.write(sectors - 1, &data).unwrap());
    assert_eq!(ok(driver.read(sectors - 1, 512).unwrap()), data);
    assert_eq!(ok(driver.read(4, 512).unwrap()), [0; 512]);
}

#[test]
fn block_size_and_topology_report_the_blocks_of_guest_and_host() {
    for block in [512, 4096] {
        let (device, front_end) = start(IMAGE_SIZE, &[&format!("--logical-block-size={block}")]);
        assert_eq!(field(&front_end, 20, 4), block, "blk_size");
        let physical = device.image.metadata().unwrap().blksize().min(4096);
        let exponent = field(&front_end, 24, 1);
        assert_eq!(block << exponent, physical, "physical_block_exp {exponent}");
        assert_eq!(field(&front_end, 25, 1), 0, "alignment_offset");
        assert_eq!(
            field(&front_end, 26, 2) * block,
            physical,
            "min_io_size, in blocks"
        );
        assert_eq!(field(&front_end, 28, 4), 0, "opt_io_size");
    }
}

/// With header and status. A driver without indirect descriptors waits forever for more descriptors than the ring has.
#[test]
fn a_request_of_seg_max_segments_fits_the_largest_ring_and_one_of_128() {
    for (size, expected) in [
        (2, 1),
        (4, 2),
        (16, 14),
        (64, 62),
        (128, 126),
        (1024, 126),
        (32768, 126),
    ] {
        let (_device, front_end) = start(IMAGE_SIZE, &[&format!("--queue-size={size}")]);
        assert_eq!(field(&front_end, 12, 4), expected, "--queue-size={size}");
    }
}

#[test]
fn num_queues_is_what_the_options_say() {
    for (arguments, expected) in [
        (&[][..], 64),
        (&["--num-queues=1"], 1),
        (&["--num-queues=256"], 256),
    ] {
        let (_device, front_end) = start(IMAGE_SIZE, arguments);
        assert_eq!(field(&front_end, 34, 2), expected, "num_queues");
        assert_eq!(front_end.queue_count() as u64, expected, "GET_QUEUE_NUM");
    }
}

#[test]
fn limits_of_discard_and_write_zeroes_are_set() {
    let (device, front_end) = start(IMAGE_SIZE, &[]);
    for limits in [discard_limits(&front_end), write_zeroes_limits(&front_end)] {
        assert!(limits.sectors > 0);
        assert_eq!(limits.segments, 16);
    }
    let physical = device.image.metadata().unwrap().blksize().min(4096);
    assert_eq!(
        field(&front_end, 44, 4) * 512,
        physical,
        "discard_sector_alignment"
    );
}

#[test]
fn write_zeroes_may_unmap_unless_discards_are_ignored() {
    for (argument, expected) in [("--discard=unmap", 1), ("--discard=ignore", 0)] {
        let (_device, front_end) = start(IMAGE_SIZE, &[argument]);
        assert_eq!(field(&front_end, 56, 1), expected, "{argument}");
    }
}

#[test]
fn fields_of_features_that_are_not_offered_are_zero() {
    let (_device, front_end) = start(IMAGE_SIZE, &[]);
    assert_eq!(field(&front_end, 8, 4), 0, "size_max");
    assert_eq!(field(&front_end, 16, 4), 0, "geometry");
    assert_eq!(field(&front_end, 33, 1), 0, "unused");
    assert_eq!(field(&front_end, 57, 3), 0, "padding");
    // A front-end may read as much as it knows.
    assert_eq!(front_end.config(SIZE, 36).unwrap(), [0; 36]);
}

#[test]
fn the_config_space_is_the_same_read_at_once_or_byte_by_byte() {
    let (_device, front_end) = start(IMAGE_SIZE, &["--logical-block-size=4096"]);
    let whole = front_end.config(0, SIZE).unwrap();
    let bytes: Vec<u8> = (0..SIZE)
        .map(|offset| field(&front_end, offset, 1) as u8)
        .collect();
    assert_eq!(whole, bytes);
}

#[test]
fn writeback_is_on_until_the_driver_clears_it() {
    let (_device, front_end) = start(IMAGE_SIZE, &[]);
    assert_eq!(writeback(&front_end), 1);
    for value in [0, 0, 1, 0] {
        set_writeback(&front_end, value);
        assert_eq!(writeback(&front_end), u64::from(value));
    }
}

/// Section 5.2.5.2 requires it of a device that negotiated CONFIG_WCE but not FLUSH.
#[test]
fn writeback_is_off_for_a_driver_that_cannot_flush() {
    let device = Variant::THREADS.start(&vec![0; IMAGE_SIZE], &[]);
    let front_end = device.connect_without(bits(&[VIRTIO_BLK_F_FLUSH]));
    assert_eq!(writeback(&front_end), 0);
}

#[test]
fn no_other_field_can_be_written() {
    let (_device, front_end) = start(IMAGE_SIZE, &[]);
    let before = front_end.config(0, SIZE).unwrap();
    for offset in (0..SIZE).filter(|&offset| offset != WRITEBACK) {
        assert!(
            front_end.set_config(offset, &[1]).is_err(),
            "offset {offset} was written"
        );
    }
    for (offset, bytes) in [
        (WRITEBACK, &[0, 0][..]),
        (WRITEBACK - 1, &[0, 0]),
        (WRITEBACK, &[2]),
        (WRITEBACK, &[0xff]),
        (0, &[0; SIZE as usize]),
        (SIZE, &[0]),
    ] {
        assert!(
            front_end.set_config(offset, bytes).is_err(),
            "{bytes:?} was written at {offset}"
        );
    }
    assert_eq!(front_end.config(0, SIZE).unwrap(), before);
}

#[test]
fn writeback_is_on_again_for_the_next_connection() {
    let (device, front_end) = start(IMAGE_SIZE, &[]);
    set_writeback(&front_end, 0);
    drop(front_end);
    assert_eq!(writeback(&device.connect()), 1);
}

/// Write-through data must not become write-back data when another process continues.
#[test]
fn writeback_continues_in_another_process() {
    let (_here, here) = start(IMAGE_SIZE, &[]);
    let (_there, there) = start(IMAGE_SIZE, &[]);
    for value in [0, 1, 0] {
        set_writeback(&here, value);
        there.load_state(&here.save_state().unwrap()).unwrap();
        assert_eq!(writeback(&there), u64::from(value));
    }
    set_writeback(&here, 1);
    let state = here.save_state().unwrap();
    let raw = there.raw().unwrap();
    for length in 0..state.len() {
        assert!(!raw.loads(&state[..length]), "{length} bytes");
    }
    for part in [&[][..], &[2], &[1, 0]] {
        assert!(!raw.loads(&sealed("block", 1, part)), "{part:?}");
    }
    assert!(!raw.loads(&sealed("rng", 1, &[1])));
    assert_eq!(writeback(&there), 0, "it was refused, and changes nothing");
    assert!(raw.loads(&sealed("block", 1, &[1])), "the format");
    assert_eq!(writeback(&there), 1);
}
