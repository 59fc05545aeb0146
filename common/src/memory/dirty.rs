// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The dirty log (vhost-user, "Migration"): one bit for each page of guest memory, set when the device has written to the page.
//!
//! The front-end clears bits while the device sets them, copies these pages to the destination, and starts again. So the device sets
//! the bit after each write, even if it was set a moment ago.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use rustix::fs::fstat;
use thiserror::Error;
use vm_memory::VolatileMemory;

use super::mapping::Mapping;
use crate::log_limit::warn_limited;

/// Bytes of guest memory for each bit (VHOST_LOG_PAGE), whatever the page size of the host is.
const PAGE_SIZE: u64 = 4096;

/// Why a log cannot be used.
#[derive(Debug, Error)]
pub enum DirtyLogError {
    /// The file does not have the bytes that the front-end named.
    #[error(
        "a log of dirty pages with {size:#x} bytes at offset {offset:#x} of a file of {length:#x}"
    )]
    Size {
        /// Bytes of the log.
        size: u64,
        /// Where it begins in its file.
        offset: u64,
        /// Bytes of the file.
        length: u64,
    },
    /// Some guest memory has no bit.
    #[error("a log of dirty pages for {covered:#x} bytes of guest memory, which ends at {end:#x}")]
    TooSmall {
        /// First address without a bit.
        covered: u64,
        /// End of guest memory.
        end: u64,
    },
    /// The file cannot be mapped.
    #[error("cannot map the log of dirty pages: {0}")]
    Map(#[from] io::Error),
}

/// A dirty log, in a file that the front-end shares.
#[derive(Debug)]
pub struct DirtyLog {
    mapping: Mapping,
    /// Where the log begins in the mapping.
    skip: usize,
    /// Number of pages that have a bit.
    pages: u64,
}

impl DirtyLog {
    /// Maps the `size` bytes at `offset` of a file.
    ///
    /// # Errors
    /// The file does not have these bytes, or cannot be mapped.
    pub fn map(file: &OwnedFd, offset: u64, size: u64) -> Result<Self, DirtyLogError> {
        let stat = fstat(file).map_err(io::Error::from)?;
        let length = u64::try_from(stat.st_size).unwrap_or(0);
        let skip = offset & (rustix::param::page_size() as u64 - 1);
        let mapped = size.checked_add(skip);
        let end = offset.checked_add(size).filter(|end| *end <= length);
        let (Some(mapped), Some(_), Some(pages)) = (mapped, end, size.checked_mul(8)) else {
            return Err(DirtyLogError::Size {
                size,
                offset,
                length,
            });
        };
        // The kernel refuses to map an empty log.
        let mapped = usize::try_from(mapped).unwrap_or(usize::MAX);
        Ok(Self {
            mapping: Mapping::new(file, offset - skip, if size == 0 { 0 } else { mapped })?,
            skip: skip as usize,
            pages,
        })
    }

    /// Checks that all addresses below `end` have a bit.
    ///
    /// # Errors
    /// Some do not.
    pub fn check_covers(&self, end: u64) -> Result<(), DirtyLogError> {
        if end.div_ceil(PAGE_SIZE) <= self.pages {
            return Ok(());
        }
        Err(DirtyLogError::TooSmall {
            covered: self.pages.saturating_mul(PAGE_SIZE),
            end,
        })
    }

    /// Marks the pages of `length` bytes at guest address `address`, after they were written to. Pages without a bit are ignored.
    pub fn mark(&self, address: u64, length: u64) {
        let Some(more) = length.checked_sub(1) else {
            return;
        };
        let mut page = address / PAGE_SIZE;
        let mut end = address.saturating_add(more) / PAGE_SIZE + 1;
        if end > self.pages {
            warn_limited(format_args!(
                "the log of dirty pages has no bit for {length:#x} bytes at {address:#x}"
            ));
            end = self.pages;
        }
        while page < end {
            let in_word = 64 - page % 64;
            let is_whole = in_word == 64 && end - page >= 64;
            if is_whole && self.set_word(page) {
                page += 64;
                continue;
            }
            let count = (8 - page % 8).min(end - page);
            self.set_in_byte(page, count);
            page += count;
        }
    }

    /// Sets the bits of 64 pages at once, if they form an aligned word. Returns whether they do.
    fn set_word(&self, page: u64) -> bool {
        let place = self.skip + (page / 8) as usize;
        let Some(word) = self.mapping.slice(place, size_of::<u64>()) else {
            return false;
        };
        let Ok(word) = word.get_atomic_ref::<AtomicU64>(0) else {
            return false;
        };
        word.fetch_or(u64::MAX, Ordering::Release);
        true
    }

    /// Sets the bits of `count` pages from `page` on, all of which are in one byte.
    fn set_in_byte(&self, page: u64, count: u64) {
        let bits = u8::MAX >> (8 - count) << (page % 8);
        let place = self.skip + (page / 8) as usize;
        if let Some(byte) = self.mapping.slice(place, 1)
            && let Ok(byte) = byte.get_atomic_ref::<AtomicU8>(0)
        {
            byte.fetch_or(bits, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use super::*;

    fn file(size: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        file
    }

    fn log(file: &File, offset: u64, size: u64) -> Result<DirtyLog, DirtyLogError> {
        DirtyLog::map(&file.try_clone().unwrap().into(), offset, size)
    }

    /// Returns the pages that are marked in a log at `offset` of its file.
    fn marked(file: &File, offset: u64, size: u64) -> Vec<u64> {
        let mut bytes = vec![0; size as usize];
        file.read_exact_at(&mut bytes, offset).unwrap();
        let bit = |page: &u64| bytes[*page as usize / 8] >> (page % 8) & 1 != 0;
        (0..8 * size).filter(bit).collect()
    }

    #[test]
    fn each_page_that_a_range_touches_is_marked_and_no_other() {
        let mut random = fastrand::Rng::with_seed(3);
        for _ in 0..2000 {
            // One offset in two leaves words of the log unaligned.
            let offset = random.u64(0..3) * 4096 + random.u64(0..2) * random.u64(0..100);
            let size = random.u64(1..40);
            let file = file(offset + size + 8);
            let log = log(&file, offset, size).unwrap();
            let address = random.u64(0..size * 8 * PAGE_SIZE);
            let length = random.u64(0..=size * 8 * PAGE_SIZE - address);
            log.mark(address, length);
            let expected: Vec<u64> = match length {
                0 => Vec::new(),
                _ => (address / PAGE_SIZE..=(address + length - 1) / PAGE_SIZE).collect(),
            };
            assert_eq!(marked(&file, offset, size), expected, "{address} {length}");
            assert!(marked(&file, offset + size, 8).is_empty());
        }
    }

    #[test]
    fn a_mark_is_added_to_those_that_are_there() {
        let file = file(32);
        let log = log(&file, 0, 32).unwrap();
        for page in [0, 9, 63, 64, 255] {
            log.mark(page * PAGE_SIZE, 1);
        }
        log.mark(64 * PAGE_SIZE, 64 * PAGE_SIZE);
        let expected = [0, 9, 63].into_iter().chain(64..128).chain([255]);
        assert_eq!(marked(&file, 0, 32), expected.collect::<Vec<_>>());
    }

    #[test]
    fn pages_without_a_bit_are_left_out() {
        let file = file(64);
        let log = log(&file, 16, 2).unwrap();
        for (address, length) in [
            (16 * PAGE_SIZE, 1),
            (u64::MAX, 1),
            (u64::MAX, u64::MAX),
            (17 * PAGE_SIZE, u64::MAX),
        ] {
            log.mark(address, length);
        }
        assert!(marked(&file, 0, 64).is_empty());
        log.mark(15 * PAGE_SIZE, u64::MAX);
        assert_eq!(marked(&file, 0, 64), [16 * 8 + 15]);
        assert!(log.check_covers(16 * PAGE_SIZE).is_ok());
        assert!(log.check_covers(16 * PAGE_SIZE + 1).is_err());
    }

    #[test]
    fn a_log_that_is_not_in_its_file_is_refused() {
        let file = file(100);
        for (offset, size) in [
            (0, 101),
            (100, 1),
            (u64::MAX, 1),
            (1, u64::MAX),
            (0, u64::MAX / 8),
            (u64::MAX - 7, 8),
        ] {
            let result = log(&file, offset, size);
            assert!(matches!(result, Err(DirtyLogError::Size { .. })));
        }
        assert!(matches!(log(&file, 3, 0), Err(DirtyLogError::Map(_))));
        assert!(log(&file, 99, 1).is_ok());
    }
}
