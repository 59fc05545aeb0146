// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! When a write reaches stable storage (VIRTIO 1.3, section 5.2.6.2): at once for a driver that cannot flush or chose write-through
//! caching, otherwise after a flush.
//!
//! The kernel reports which pages of the image are only in the page cache, so this is visible from outside for each I/O engine.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use vhost_device_tests::front_end::block::BlockDriver;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH};

use crate::config::{set_writeback, writeback};
use crate::{Device, IMAGE_SIZE, Variant, driver, noise, ok, skip};

const FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;
const CONFIG_WCE: u64 = 1 << VIRTIO_BLK_F_CONFIG_WCE;

/// Without these features, a write waits for the disk.
pub const WITHOUT_CACHING: u64 = FLUSH | CONFIG_WCE;

/// Length of the writes.
const LENGTH: usize = 16 << 10;

/// How often to look for a page that is not yet written; the kernel writes it after a while, or on `sync`.
const ATTEMPTS: u64 = 10;

/// Number of the system call, on all architectures.
const CACHESTAT: libc::c_long = 451;

#[repr(C)]
struct CachestatRange {
    offset: u64,
    length: u64,
}

#[repr(C)]
#[derive(Default)]
struct Cachestat {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// Pages of `file` that are not on its disk.
fn unwritten_pages(file: &File) -> io::Result<u64> {
    unwritten_pages_in(file, 0..0)
}

/// Pages in a range of `file` that are not on its disk; an empty range is all of it.
pub fn unwritten_pages_in(file: &File, range: Range<u64>) -> io::Result<u64> {
    let range = CachestatRange {
        offset: range.start,
        length: range.end - range.start,
    };
    let mut counts = Cachestat::default();
    // SAFETY: both structs are those of the kernel's interface, and live during the call.
    let result = unsafe {
        libc::syscall(
            CACHESTAT,
            file.as_raw_fd(),
            &raw const range,
            &raw mut counts,
            0,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(counts.dirty + counts.writeback)
}

/// A running device whose image is completely on its disk, or `None` if this host cannot show that.
fn start(variant: Variant) -> Option<Device> {
    let device = variant.start(&noise(1, IMAGE_SIZE), &[]);
    device.file().sync_all().unwrap();
    match unwritten_pages(&device.file()) {
        Ok(0) => return Some(device),
        Ok(_) => skip("the build's target directory is not on a disk"),
        Err(error) => skip(&format!("no cachestat: {error}")),
    }
    None
}

fn assert_write_through(device: &Device, driver: &mut BlockDriver) {
    for seed in 0..ATTEMPTS {
        let sector = seed * 50 + 1;
        ok(driver.write(sector, &noise(seed, LENGTH)).unwrap());
        assert_eq!(
            unwritten_pages(&device.file()).unwrap(),
            0,
            "pages are not written, although the write was acknowledged"
        );
    }
}

fn assert_write_back(device: &Device, driver: &mut BlockDriver) {
    let is_left_to_a_flush = (0..ATTEMPTS).any(|seed| {
        ok(driver.write(seed * 50, &noise(seed, LENGTH)).unwrap());
        unwritten_pages(&device.file()).unwrap() > 0
    });
    assert!(is_left_to_a_flush, "each write waited for the disk");
}

fn a_flush_brings_all_writes_to_the_disk(variant: Variant) {
    let Some(device) = start(variant) else { return };
    let front_end = device.connect();
    let mut driver = driver(&front_end);
    assert_write_back(&device, &mut driver);
    ok(driver.flush().unwrap());
    assert_eq!(unwritten_pages(&device.file()).unwrap(), 0);
}

fn a_driver_that_can_flush_gets_write_back_caching(variant: Variant) {
    let Some(device) = start(variant) else { return };
    let front_end = device.connect_without(CONFIG_WCE);
    assert_write_back(&device, &mut driver(&front_end));
}

fn a_driver_that_cannot_flush_gets_write_through_caching(variant: Variant) {
    let Some(device) = start(variant) else { return };
    let front_end = device.connect_without(WITHOUT_CACHING);
    assert_write_through(&device, &mut driver(&front_end));
}

fn a_driver_that_could_choose_but_cannot_flush_gets_write_through_caching(variant: Variant) {
    let Some(device) = start(variant) else { return };
    let front_end = device.connect_without(FLUSH);
    assert_write_through(&device, &mut driver(&front_end));
}

fn the_driver_chooses_the_caching_at_any_time(variant: Variant) {
    let Some(device) = start(variant) else { return };
    let front_end = device.connect();
    let mut driver = driver(&front_end);
    for _ in 0..3 {
        assert_write_back(&device, &mut driver);
        set_writeback(&front_end, 0);
        assert_write_through(&device, &mut driver);
        set_writeback(&front_end, 1);
    }
}

/// Earlier writes must not stay volatile, because such a driver no longer flushes.
fn all_is_written_when_the_driver_turns_write_back_caching_off(variant: Variant) {
    let Some(device) = start(variant) else { return };
    let front_end = device.connect();
    assert_write_back(&device, &mut driver(&front_end));
    set_writeback(&front_end, 0);
    assert_eq!(unwritten_pages(&device.file()).unwrap(), 0);
}

/// The range is no whole number of pages, so that some are written.
fn write_zeroes_is_stable_with_write_through_caching(variant: Variant) {
    let Some(device) = start(variant) else { return };
    let front_end = device.connect();
    let mut driver = driver(&front_end);
    set_writeback(&front_end, 0);
    for flags in [0, 1] {
        ok(driver.write_zeroes(3, 33, flags).unwrap());
        assert_eq!(unwritten_pages(&device.file()).unwrap(), 0);
    }
}

fn write_back_caching_is_the_default_for_the_next_connection(variant: Variant) {
    let Some(device) = start(variant) else { return };
    let front_end = device.connect();
    set_writeback(&front_end, 0);
    drop(front_end);
    let front_end = device.connect();
    assert_eq!(writeback(&front_end), 1);
    assert_write_back(&device, &mut driver(&front_end));
}

crate::for_each_engine!(
    a_flush_brings_all_writes_to_the_disk,
    a_driver_that_can_flush_gets_write_back_caching,
    a_driver_that_cannot_flush_gets_write_through_caching,
    a_driver_that_could_choose_but_cannot_flush_gets_write_through_caching,
    the_driver_chooses_the_caching_at_any_time,
    all_is_written_when_the_driver_turns_write_back_caching_off,
    write_zeroes_is_stable_with_write_through_caching,
    write_back_caching_is_the_default_for_the_next_connection,
);
