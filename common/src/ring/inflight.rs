// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the front-end remembers of the requests that a device holds, for the device that comes after a crash of this one
//! (vhost-user, "Inflight I/O tracking").
//!
//! A file of shared memory has a region for each ring, and after them a note of the device's own, of which other programs know nothing.
//! Each step of taking and completing requests leaves it so that the requests
//! under way can be told from it, whatever instruction the process ends at.

mod packed;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fstat, ftruncate, memfd_create};
use thiserror::Error;
use vm_memory::{AtomicAccess, Bytes};

use super::fault::{Step, after};
use crate::file_limit::explained;
use crate::memory::Mapping;

pub(super) use packed::{PackedInflight, Recovered};

/// Layout of the region of a split ring: features u64, version u16, number of descriptors u16, last batch head u16, used index u16,
/// then for each descriptor: in flight u8, padding, next u16, counter u64. Numbers are in the host's byte order.
const VERSION: usize = 8;
const DESCRIPTORS: usize = 10;
const LAST_BATCH_HEAD: usize = 12;
const USED_INDEX: usize = 14;
const ENTRIES: usize = 16;
const ENTRY_SIZE: usize = 16;
const IN_FLIGHT: usize = 0;
const NEXT: usize = 6;
const COUNTER: usize = 8;
/// Each region begins at a multiple of this.
const ALIGNMENT: usize = 64;
/// Bytes of the note: a number of which the lowest byte is the device's, and the others say that it is one.
const NOTE_SIZE: usize = 64;
const NOTE_MAGIC: u64 = u64::from_be_bytes(*b"vdnote1\0");
/// The only version of the layout; a region of zeroes is fresh.
const LAYOUT_VERSION: u16 = 1;

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
        false => (ENTRIES, ENTRY_SIZE),
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
    pub fn ring(&self, index: u16, size: u16) -> Option<InflightRing> {
        self.region(false, index, size).map(|region| InflightRing {
            region,
            counter: 0,
            is_fresh: false,
            completed: Vec::new(),
        })
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

/// What the front-end keeps for one ring.
#[derive(Debug)]
struct Region {
    mapping: Arc<Mapping>,
    start: usize,
    length: usize,
    /// Descriptors of the ring.
    size: u16,
}

impl Region {
    fn load<T: AtomicAccess + Default>(&self, offset: usize) -> T {
        let region = self.mapping.slice(self.start, self.length);
        // Offsets are inside: indices are below the size of the ring, for which there is room.
        region
            .and_then(|region| region.load(offset, Ordering::Acquire).ok())
            .unwrap_or_default()
    }

    fn store<T: AtomicAccess>(&self, offset: usize, value: T) {
        if let Some(region) = self.mapping.slice(self.start, self.length) {
            let _ = region.store(value, offset, Ordering::Release);
        }
    }

    /// Whether a device has used it before, for a ring of this size.
    fn is_valid(&self) -> bool {
        self.load::<u16>(VERSION) == LAYOUT_VERSION && self.load::<u16>(DESCRIPTORS) == self.size
    }

    /// Makes it valid.
    fn begin(&self) {
        self.store(DESCRIPTORS, self.size);
        after(Step::Sized);
        self.store(VERSION, LAYOUT_VERSION);
        after(Step::Initialized);
    }
}

/// The region of a split ring.
#[derive(Debug)]
pub struct InflightRing {
    region: Region,
    /// Goes up with each request that is taken.
    counter: u64,
    /// The region was new when this device found it.
    is_fresh: bool,
    /// Heads that were completed since the used index was published.
    completed: Vec<u16>,
}

impl InflightRing {
    fn load<T: AtomicAccess + Default>(&self, offset: usize) -> T {
        self.region.load(offset)
    }

    fn store<T: AtomicAccess>(&self, offset: usize, value: T) {
        self.region.store(offset, value);
    }

    fn entry(head: u16) -> usize {
        ENTRIES + ENTRY_SIZE * usize::from(head)
    }

    /// Finds out what the device before this one had taken and not given back, given the ring's used index. Gives the heads of these
    /// requests in the order in which they were taken; they count as taken again.
    pub fn recover(&mut self, used_index: u16) -> Vec<u16> {
        let size = self.region.size;
        if !self.region.is_valid() {
            (0..size).for_each(|head| self.store(Self::entry(head) + IN_FLIGHT, 0u8));
            self.store(LAST_BATCH_HEAD, 0u16);
            self.store(USED_INDEX, used_index);
            self.region.begin();
            self.is_fresh = true;
            return Vec::new();
        }
        // The last batch was published, but not all of it was noted. What the front-end keeps may be wrong: no step is taken on trust.
        let behind = used_index.wrapping_sub(self.load(USED_INDEX));
        let mut head: u16 = self.load(LAST_BATCH_HEAD);
        if behind <= size {
            for _ in 0..behind {
                if head >= size {
                    break;
                }
                self.store(Self::entry(head) + IN_FLIGHT, 0u8);
                after(Step::OneRecovered);
                head = self.load(Self::entry(head) + NEXT);
            }
        }
        self.store(USED_INDEX, used_index);
        after(Step::IndexRecovered);
        let mut taken: Vec<(u64, u16)> = (0..size)
            .filter(|head| self.load::<u8>(Self::entry(*head) + IN_FLIGHT) != 0)
            .map(|head| (self.load(Self::entry(head) + COUNTER), head))
            .collect();
        taken.sort_unstable();
        self.counter = taken
            .last()
            .map_or(0, |(counter, _)| counter.wrapping_add(1));
        taken.into_iter().map(|(_, head)| head).collect()
    }

    /// Whether no device has used the region before, so that it does not tell where the available ring goes on.
    pub fn was_fresh(&self) -> bool {
        self.is_fresh
    }

    /// Notes that a request is taken.
    #[inline]
    pub fn take(&mut self, head: u16) {
        self.store(Self::entry(head) + COUNTER, self.counter);
        self.counter = self.counter.wrapping_add(1);
        after(Step::CounterNoted);
        self.store(Self::entry(head) + IN_FLIGHT, 1u8);
        after(Step::Taken);
    }

    /// Notes that a request is completed, which the driver does not see yet.
    #[inline]
    pub fn complete(&mut self, head: u16) {
        self.store(Self::entry(head) + NEXT, self.load::<u16>(LAST_BATCH_HEAD));
        after(Step::Linked);
        self.store(LAST_BATCH_HEAD, head);
        after(Step::Completed);
        self.completed.push(head);
    }

    /// Notes that the driver sees all that was completed.
    #[inline]
    pub fn published(&mut self, used_index: u16) {
        let mut completed = std::mem::take(&mut self.completed);
        for head in completed.drain(..) {
            self.store(Self::entry(head) + IN_FLIGHT, 0u8);
            after(Step::OneNoted);
        }
        // The storage is kept: nothing is allocated for a batch.
        self.completed = completed;
        self.store(USED_INDEX, used_index);
        after(Step::IndexNoted);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u16 = 8;

    fn file() -> InflightFile {
        let file = create_file(false, 2, SIZE).unwrap();
        let length = file_size(false, 2, SIZE) as u64;
        InflightFile::map(&file, 0, length, false, 2, SIZE).unwrap()
    }

    fn recovered(file: &InflightFile, used_index: u16) -> Vec<u16> {
        file.ring(1, SIZE).unwrap().recover(used_index)
    }

    #[test]
    fn what_is_taken_and_not_published_is_recovered_in_its_order() {
        let file = file();
        let mut ring = file.ring(1, SIZE).unwrap();
        assert!(ring.recover(100).is_empty());
        for head in [5, 2, 7, 0] {
            ring.take(head);
        }
        assert_eq!(recovered(&file, 100), [5, 2, 7, 0]);
        ring.complete(2);
        ring.complete(5);
        assert_eq!(recovered(&file, 100), [5, 2, 7, 0]);
        ring.published(102);
        assert_eq!(recovered(&file, 102), [7, 0]);
        // What is recovered has been taken before what comes then.
        let mut next = file.ring(1, SIZE).unwrap();
        assert_eq!(next.recover(102), [7, 0]);
        next.take(1);
        assert_eq!(recovered(&file, 102), [7, 0, 1]);
        assert!(file.ring(0, SIZE).unwrap().recover(0).is_empty());
    }

    #[test]
    fn a_batch_that_was_published_and_not_noted_is_not_recovered() {
        let file = file();
        let mut ring = file.ring(1, SIZE).unwrap();
        ring.recover(u16::MAX);
        (0..6).for_each(|head| ring.take(head));
        ring.complete(3);
        ring.published(0);
        ring.complete(1);
        ring.complete(4);
        // The process ends after the used index went from 0 to 2; or when half of it was noted.
        ring.store(InflightRing::entry(4) + IN_FLIGHT, 0u8);
        assert_eq!(recovered(&file, 2), [0, 2, 5]);
        assert_eq!(recovered(&file, 2), [0, 2, 5]);
    }

    #[test]
    fn nonsense_in_the_file_does_no_harm() {
        let file = file();
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..1000 {
            let ring = file.ring(1, SIZE).unwrap();
            for offset in (0..region_size(false, SIZE)).step_by(2) {
                ring.store(offset, random.u16(..));
            }
            ring.store(VERSION, LAYOUT_VERSION);
            ring.store(DESCRIPTORS, SIZE);
            let heads = recovered(&file, random.u16(..));
            assert!(heads.len() <= SIZE.into() && heads.iter().all(|head| *head < SIZE));
        }
    }

    #[test]
    fn a_device_leaves_a_note_for_the_next_one() {
        let descriptor = create_file(false, 2, SIZE).unwrap();
        let map = |length| InflightFile::map(&descriptor, 0, length, false, 2, SIZE).unwrap();
        let regions = regions_size(false, 2, SIZE) as u64;
        let length = regions + NOTE_SIZE as u64;
        assert_eq!(map(length).kept(), Some(0));
        for kept in [2, 0, 255] {
            map(length).keep(kept);
            assert_eq!(map(length).kept(), Some(kept));
        }
        // There is no room for it, and no harm done.
        let short = map(length - 1);
        short.keep(3);
        assert_eq!(short.kept(), None);
        assert_eq!(map(length).kept(), Some(255));
        for nonsense in [1, u64::MAX, NOTE_MAGIC << 8] {
            rustix::io::pwrite(&descriptor, &nonsense.to_ne_bytes(), regions).unwrap();
            assert_eq!(map(length).kept(), None, "{nonsense:#x}");
        }
        assert!(recovered(&map(length), 0).is_empty());
    }

    #[test]
    fn files_that_are_too_short_are_refused() {
        let needed = regions_size(false, 2, SIZE) as u64;
        let file = create_file(false, 2, SIZE).unwrap();
        let past = NOTE_SIZE as u64 + 64;
        for (offset, length) in [(0, needed - 1), (past, needed), (u64::MAX, needed), (0, 0)] {
            let result = InflightFile::map(&file, offset, length, false, 2, SIZE);
            assert!(matches!(result, Err(InflightError::Size { .. })));
        }
        assert!(InflightFile::map(&file, 0, needed, false, 0, SIZE).is_err());
        let file = InflightFile::map(&file, 0, needed, false, 2, SIZE).unwrap();
        assert!(file.ring(2, SIZE).is_none());
        assert!(file.ring(0, 2 * SIZE).is_none());
        // A file for split rings has no room for packed ones.
        assert!(file.packed_ring(0, SIZE).is_none());
    }
}
