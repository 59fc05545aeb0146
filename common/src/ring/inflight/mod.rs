// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the front-end remembers of the requests that a device holds, for the device that comes after a crash of this one
//! (vhost-user, "Inflight I/O tracking").
//!
//! A file of shared memory has a region for each ring, and after them a note of the device's own, of which other programs know nothing.
//! Each step of taking and completing requests leaves it so that the requests
//! under way can be told from it, whatever instruction the process ends at.

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

/// Each region begins at a multiple of this.
const ALIGNMENT: usize = 64;
/// Bytes of the note: a number of which the lowest byte is the device's, and the others say that it is one.
const NOTE_SIZE: usize = 64;
const NOTE_MAGIC: u64 = u64::from_be_bytes(*b"vdnote1\0");
/// Why a file cannot be used.
#[derive(Debug, Error)]
pub enum InflightError {
    /// It would not have room for the rings.
    #[error(
        "{length} bytes for the requests in flight of {queues} queues of {size}; {needed} are needed"
    )]
    Size {
        /// Bytes of the file, or announced.
        length: u64,
        /// Number of rings.
        queues: u16,
        /// Descriptors of a ring.
        size: u16,
        /// Bytes that these need.
        needed: u64,
    },
    /// Its regions would not be aligned.
    #[error("the requests in flight at offset {0:#x} of their file; it must be a multiple of 8")]
    Unaligned(u64),
    /// It cannot be made, or mapped.
    #[error("no memory for the requests in flight: {}", explained(.0))]
    Memory(#[from] io::Error),
}

/// Bytes of the region of a ring with `size` descriptors.
fn region_size(packed: bool, size: u16) -> usize {
    let (entries, entry_size) = match packed {
        true => (packed::ENTRIES, packed::ENTRY_SIZE),
        false => (split::ENTRIES, split::ENTRY_SIZE),
    };
    (entries + entry_size * usize::from(size)).next_multiple_of(ALIGNMENT)
}

/// Bytes of the regions of `queues` rings of `size` descriptors.
fn regions_size(packed: bool, queues: u16, size: u16) -> usize {
    usize::from(queues) * region_size(packed, size)
}

/// Bytes for `queues` rings of `size` descriptors, packed ones or split ones, and the note.
pub fn file_size(packed: bool, queues: u16, size: u16) -> usize {
    regions_size(packed, queues, size) + NOTE_SIZE
}

/// Makes a file for `queues` rings of `size` descriptors, packed ones or split ones.
///
/// # Errors
/// There is no memory for it.
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

/// The regions of all rings.
#[derive(Clone, Debug)]
pub struct InflightFile {
    mapping: Arc<Mapping>,
    /// Where the first region begins in the mapping.
    skip: usize,
    packed: bool,
    queues: u16,
    size: u16,
    /// Where the note is in the mapping, if the file has room for it.
    note: Option<usize>,
}

impl InflightFile {
    /// Maps a file that the front-end keeps: `length` bytes at `offset` are for `queues` rings of `size` descriptors, packed ones
    /// or split ones.
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

    /// What the device before this one has kept ([`Device::kept`](crate::device::Device::kept)): 0 for nothing; `None` if the file has no
    /// room for it, or something else there.
    pub fn kept(&self) -> Option<u8> {
        let note = self.mapping.slice(self.note?, NOTE_SIZE)?;
        let number: u64 = note.load(0, Ordering::Acquire).ok()?;
        match number ^ NOTE_MAGIC {
            kept @ 0..=0xff => Some(kept as u8),
            NOTE_MAGIC => Some(0),
            _ => None,
        }
    }

    /// Keeps this for the device after this one, if the file has room for it.
    pub fn keep(&self, kept: u8) {
        let note = self
            .note
            .and_then(|note| self.mapping.slice(note, NOTE_SIZE));
        if let Some(note) = note {
            let _ = note.store(NOTE_MAGIC | u64::from(kept), 0, Ordering::Release);
        }
    }

    /// The region of one split ring with `size` descriptors; `None` if the front-end has none for it.
    pub(super) fn split_ring(&self, index: u16, size: u16) -> Option<SplitInflight> {
        self.region(false, index, size).map(SplitInflight::new)
    }

    /// The region of one packed ring with `size` descriptors; `None` if the front-end has none for it.
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
