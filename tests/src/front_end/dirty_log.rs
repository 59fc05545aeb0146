// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a front-end does while its guest migrates: it enables logging of the pages that the device writes, and copies them.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU8, Ordering};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost::VhostUserDirtyLogRegion;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

use super::memory::{GuestMemory, Region};

/// Feature bit 26, VHOST_F_LOG_ALL: what the device writes is logged.
pub const LOG_ALL: u64 = 1 << 26;
/// Flag of SET_VRING_ADDR: what the device writes to the used ring is logged.
pub const LOG_RING: u32 = 1;
/// Bytes of guest memory per bit of the log.
pub const PAGE_SIZE: u64 = 4096;

/// Pages, by their number.
pub type Pages = BTreeSet<u64>;

/// Returns the pages of `length` bytes at a guest address.
pub fn pages(address: u64, length: u64) -> Pages {
    match length {
        0 => Pages::new(),
        _ => (address / PAGE_SIZE..=(address + length - 1) / PAGE_SIZE).collect(),
    }
}

/// A log of dirty pages.
#[derive(Debug)]
pub struct DirtyLog {
    mapping: MmapRegion,
    offset: usize,
    size: usize,
}

impl DirtyLog {
    /// Creates a log for all guest addresses below `end`.
    pub fn new(end: u64) -> Self {
        Self::at_offset(0, end.div_ceil(8 * PAGE_SIZE) as usize)
    }

    /// Creates a log of `size` bytes that begins `offset` bytes into its memfd.
    pub fn at_offset(offset: usize, size: usize) -> Self {
        let memfd = memfd_create("dirty-log", MemfdFlags::CLOEXEC).expect("memfd_create");
        ftruncate(&memfd, (offset + size) as u64).expect("size the memfd");
        let file = FileOffset::new(File::from(memfd), 0);
        DirtyLog {
            mapping: MmapRegion::from_file(file, offset + size).expect("map the memfd"),
            offset,
            size,
        }
    }

    /// Returns the memfd.
    pub fn file(&self) -> &File {
        self.mapping.file_offset().expect("made with a file").file()
    }

    /// Returns the log as SET_LOG_BASE describes it.
    pub fn region(&self) -> VhostUserDirtyLogRegion {
        VhostUserDirtyLogRegion {
            mmap_size: self.size as u64,
            mmap_offset: self.offset as u64,
            mmap_handle: self.file().as_raw_fd(),
        }
    }

    /// Returns whether the page of a guest address is marked.
    pub fn has(&self, address: u64) -> bool {
        let page = address / PAGE_SIZE;
        let offset = self.offset + (page / 8) as usize;
        let byte = self.mapping.get_atomic_ref::<AtomicU8>(offset);
        let byte = byte.expect("inside the log");
        byte.load(Ordering::SeqCst) >> (page % 8) & 1 != 0
    }

    /// Takes the marked pages out of the log.
    pub fn take(&self) -> Pages {
        let mut pages = Pages::new();
        for index in 0..self.size {
            let byte = self.mapping.get_atomic_ref::<AtomicU8>(self.offset + index);
            let byte = byte.expect("inside the log");
            // Most words are zero: those are not written.
            if byte.load(Ordering::SeqCst) != 0 {
                let bits = byte.swap(0, Ordering::SeqCst);
                let marked = (0..8).filter(|bit| bits >> bit & 1 != 0);
                pages.extend(marked.map(|bit| 8 * index as u64 + bit));
            }
        }
        pages
    }
}

/// Guest memory at the destination of a migration.
pub struct Shadow {
    memory: GuestMemory,
    /// The contents of each region.
    copies: Vec<Vec<u8>>,
}

impl Shadow {
    /// Copies all of `memory`.
    pub fn new(memory: &GuestMemory) -> Self {
        let copy = |region: &std::sync::Arc<Region>| {
            memory.read_vec(region.guest_address(), region.size() as usize)
        };
        Shadow {
            copies: memory.regions().iter().map(copy).collect(),
            memory: memory.clone(),
        }
    }

    /// Copies these pages, some of which may not be in memory.
    pub fn copy(&mut self, pages: &Pages) {
        for page in pages {
            let address = page * PAGE_SIZE;
            for (region, copy) in self.memory.regions().iter().zip(&mut self.copies) {
                let offset = address.checked_sub(region.guest_address());
                if let Some(offset) = offset.filter(|offset| *offset < region.size()) {
                    let copy = &mut copy[offset as usize..][..PAGE_SIZE as usize];
                    self.memory.read(address, copy);
                }
            }
        }
    }

    /// Returns the pages that differ from the memory that was copied.
    pub fn differences(&self) -> Pages {
        let mut different = Pages::new();
        for (region, copy) in self.memory.regions().iter().zip(&self.copies) {
            let (start, size) = (region.guest_address(), region.size() as usize);
            let now = self.memory.read_vec(start, size);
            let both = now
                .chunks(PAGE_SIZE as usize)
                .zip(copy.chunks(PAGE_SIZE as usize));
            let pages = both.enumerate().filter(|(_, (now, copy))| now != copy);
            different.extend(pages.map(|(index, _)| start / PAGE_SIZE + index as u64));
        }
        different
    }
}
