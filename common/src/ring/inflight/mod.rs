// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The record of requests in flight, which survives a crash of this process (vhost-user, "Inflight I/O tracking").
//!
//! A file of shared memory, which the front-end keeps, has a region for each ring, and after them a note that only this project uses.
//! Taking and completing requests updates a region in such an order that it shows which requests are in flight, whichever
//! instruction the process ends at.

mod packed;
mod region;
mod split;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fstat, ftruncate, memfd_create};
use thiserror::Error;
use vm_memory::Bytes;

use crate::file_limit::explained;
use crate::memory::Mapping;

pub(super) use packed::{PackedInflight, Recovered};
use region::Region;
pub(super) use split::SplitInflight;

/// Alignment of regions in bytes.
const ALIGNMENT: usize = 64;
/// Size of the note in bytes. It is a u64 whose lowest byte belongs to the device; the others are [`NOTE_MAGIC`].
const NOTE_SIZE: usize = 64;
const NOTE_MAGIC: u64 = u64::from_be_bytes(*b"vdnote1\0");
/// An error of a file of requests in flight.
#[derive(Debug, Error)]
pub enum InflightError {
    /// It is too small for the rings.
    #[error(
        "the file of requests in flight has {length} bytes; {queues} queues of size {size} need {needed}"
    )]
    Size {
        /// Size of the file in bytes, or of the part that the front-end announced.
        length: u64,
        /// Number of rings.
        queues: u16,
        /// Descriptors in each ring.
        size: u16,
        /// Bytes needed.
        needed: u64,
    },
    /// Its regions are not aligned.
    #[error("invalid offset {0:#x} in the file of requests in flight: not a multiple of 8")]
    Unaligned(u64),
    /// It cannot be created or mapped.
    #[error("cannot map the file of requests in flight: {}", explained(.0))]
    Memory(#[from] io::Error),
}

/// Returns the size of the region for a ring of `size` descriptors, in bytes.
fn region_size(packed: bool, size: u16) -> usize {
    let (entries, entry_size) = match packed {
        true => (packed::ENTRIES, packed::ENTRY_SIZE),
        false => (split::ENTRIES, split::ENTRY_SIZE),
    };
    (entries + entry_size * usize::from(size)).next_multiple_of(ALIGNMENT)
}

/// Returns the size of the regions for `queues` rings of `size` descriptors, in bytes.
fn regions_size(packed: bool, queues: u16, size: u16) -> usize {
    usize::from(queues) * region_size(packed, size)
}

/// Returns the size of a file for `queues` rings of `size` descriptors, in bytes.
pub fn file_size(packed: bool, queues: u16, size: u16) -> usize {
    regions_size(packed, queues, size) + NOTE_SIZE
}

/// Creates a file for `queues` rings of `size` descriptors.
///
/// # Errors
/// There is not enough memory, or there are too many open files.
pub fn create_file(packed: bool, queues: u16, size: u16) -> Result<OwnedFd, InflightError> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let make = || {
        let file = memfd_create("vhost-inflight", flags)?;
        ftruncate(&file, file_size(packed, queues, size) as u64)?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok(file)
    };
    make().map_err(|errno: rustix::io::Errno| InflightError::Memory(errno.into()))
}

/// A mapped file of requests in flight.
#[derive(Clone, Debug)]
pub struct InflightFile {
    mapping: Arc<Mapping>,
    /// Offset of the first region in the mapping.
    skip: usize,
    packed: bool,
    queues: u16,
    size: u16,
    /// Offset of the note in the mapping, if the file is large enough to have one.
    note: Option<usize>,
}

impl InflightFile {
    /// Maps a file that the front-end keeps: `length` bytes at `offset`, for `queues` rings of `size` descriptors.
    ///
    /// # Errors
    /// The file is too short, or cannot be mapped.
    pub fn map(
        file: &OwnedFd,
        offset: u64,
        length: u64,
        packed: bool,
        queues: u16,
        size: u16,
    ) -> Result<Self, InflightError> {
        let needed = regions_size(packed, queues, size) as u64;
        let too_short = |length| InflightError::Size {
            length,
            queues,
            size,
            needed,
        };
        let stat = fstat(file).map_err(io::Error::from)?;
        let in_file = u64::try_from(stat.st_size)
            .unwrap_or(0)
            .saturating_sub(offset);
        if length.min(in_file) < needed || needed == 0 {
            return Err(too_short(length.min(in_file)));
        }
        if !offset.is_multiple_of(8) {
            return Err(InflightError::Unaligned(offset));
        }
        let page_mask = rustix::param::page_size() as u64 - 1;
        let skip = offset & page_mask;
        let note = (needed + skip) as usize;
        let has_note = length.min(in_file) >= needed + NOTE_SIZE as u64;
        let note_size = if has_note { NOTE_SIZE } else { 0 };
        let mapping = Mapping::new(file, offset - skip, note + note_size)?;
        Ok(Self {
            note: has_note.then_some(note),
            mapping: Arc::new(mapping),
            skip: skip as usize,
            packed,
            queues,
            size,
        })
    }

    /// Returns what the previous device kept ([`Device::kept`](crate::device::Device::kept)): 0 for nothing, `None` if the file has no
    /// valid note.
    pub fn kept(&self) -> Option<u8> {
        let note = self.mapping.slice(self.note?, NOTE_SIZE)?;
        let number: u64 = note.load(0, Ordering::Acquire).ok()?;
        match number ^ NOTE_MAGIC {
            kept @ 0..=0xff => Some(kept as u8),
            NOTE_MAGIC => Some(0),
            _ => None,
        }
    }

    /// Stores `kept` in the note for the next device, if the file has one.
    pub fn keep(&self, kept: u8) {
        let note = self
            .note
            .and_then(|note| self.mapping.slice(note, NOTE_SIZE));
        if let Some(note) = note {
            let _ = note.store(NOTE_MAGIC | u64::from(kept), 0, Ordering::Release);
        }
    }

    /// Discards the requests in flight of queue `index`: another driver starts it, from its beginning.
    pub fn forget(&self, index: u16) {
        if let Some(region) = self.region(self.packed, index, self.size) {
            region.invalidate();
        }
    }

    /// Returns the region for a split ring of `size` descriptors, if the file has one.
    pub(super) fn split_ring(&self, index: u16, size: u16) -> Option<SplitInflight> {
        self.region(false, index, size).map(SplitInflight::new)
    }

    /// Returns the region for a packed ring of `size` descriptors, if the file has one.
    pub(super) fn packed_ring(&self, index: u16, size: u16) -> Option<PackedInflight> {
        self.region(true, index, size).map(PackedInflight::new)
    }

    fn region(&self, packed: bool, index: u16, size: u16) -> Option<Region> {
        let fits = packed == self.packed && index < self.queues && size <= self.size;
        fits.then(|| Region {
            mapping: Arc::clone(&self.mapping),
            start: self.skip + usize::from(index) * region_size(packed, self.size),
            length: region_size(packed, size),
            size,
        })
    }
}
