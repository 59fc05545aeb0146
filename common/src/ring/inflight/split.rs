// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The region of a split ring.

use vm_memory::AtomicAccess;

use super::region::Region;
use crate::ring::crash_point::{Step, after};

/// Layout of the region of a split ring: features u64, version u16, number of descriptors u16, last batch head u16, used index u16,
/// then for each descriptor: in flight u8, padding, next u16, counter u64. Numbers are in the host's byte order.
const LAST_BATCH_HEAD: usize = 12;
const USED_INDEX: usize = 14;
pub const ENTRIES: usize = 16;
pub const ENTRY_SIZE: usize = 16;
const IN_FLIGHT: usize = 0;
const NEXT: usize = 6;
const COUNTER: usize = 8;

/// The region of a split ring.
#[derive(Debug)]
pub(in crate::ring) struct SplitInflight {
    region: Region,
    /// Number of the next request, which gives the order of requests.
    counter: u64,
    /// No device used the region before.
    is_fresh: bool,
    /// Heads of the requests completed since the last batch was published.
    completed: Vec<u16>,
}

impl SplitInflight {
    pub(super) fn new(region: Region) -> Self {
        Self {
            region,
            counter: 0,
            is_fresh: false,
            completed: Vec::new(),
        }
    }

    fn load<T: AtomicAccess + Default>(&self, offset: usize) -> T {
        self.region.load(offset)
    }

    fn store<T: AtomicAccess>(&self, offset: usize, value: T) {
        self.region.store(offset, value);
    }

    fn entry(head: u16) -> usize {
        ENTRIES + ENTRY_SIZE * usize::from(head)
    }

    /// Recovers what a previous device took and did not complete, given the ring's used index. Returns the heads of these requests in
    /// the order in which they were taken; they stay recorded as in flight.
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
        // The last batch was published, but not all of it was recorded. The region comes from the front-end: trust nothing in it.
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

    /// Returns whether no device used the region before, so that it does not say where the available ring continues.
    pub fn was_fresh(&self) -> bool {
        self.is_fresh
    }

    /// Records that a request is taken.
    #[inline]
    pub fn take(&mut self, head: u16) {
        self.store(Self::entry(head) + COUNTER, self.counter);
        self.counter = self.counter.wrapping_add(1);
        after(Step::CounterNoted);
        self.store(Self::entry(head) + IN_FLIGHT, 1u8);
        after(Step::Taken);
    }

    /// Records that the request taken last is available in the ring again.
    pub fn put_back(&mut self, head: u16) {
        self.store(Self::entry(head) + IN_FLIGHT, 0u8);
        self.counter = self.counter.wrapping_sub(1);
    }

    /// Records that a request is completed, which the driver does not see yet.
    #[inline]
    pub fn complete(&mut self, head: u16) {
        self.store(Self::entry(head) + NEXT, self.load::<u16>(LAST_BATCH_HEAD));
        after(Step::Linked);
        self.store(LAST_BATCH_HEAD, head);
        after(Step::Completed);
        self.completed.push(head);
    }

    /// Records that the driver sees all completed requests.
    #[inline]
    pub fn published(&mut self, used_index: u16) {
        let mut completed = std::mem::take(&mut self.completed);
        for head in completed.drain(..) {
            self.store(Self::entry(head) + IN_FLIGHT, 0u8);
            after(Step::OneNoted);
        }
        // Keep the storage, so that a batch allocates nothing.
        self.completed = completed;
        self.store(USED_INDEX, used_index);
        after(Step::IndexNoted);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::inflight::region::{DESCRIPTORS, LAYOUT_VERSION, VERSION};
    use crate::ring::inflight::*;

    const SIZE: u16 = 8;

    fn file() -> InflightFile {
        let file = create_file(false, 2, SIZE).unwrap();
        let length = file_size(false, 2, SIZE) as u64;
        InflightFile::map(&file, 0, length, false, 2, SIZE).unwrap()
    }

    fn recovered(file: &InflightFile, used_index: u16) -> Vec<u16> {
        file.split_ring(1, SIZE).unwrap().recover(used_index)
    }

    #[test]
    fn what_is_taken_and_not_published_is_recovered_in_its_order() {
        let file = file();
        let mut ring = file.split_ring(1, SIZE).unwrap();
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
        let mut next = file.split_ring(1, SIZE).unwrap();
        assert_eq!(next.recover(102), [7, 0]);
        next.take(1);
        assert_eq!(recovered(&file, 102), [7, 0, 1]);
        assert!(file.split_ring(0, SIZE).unwrap().recover(0).is_empty());
    }

    #[test]
    fn a_batch_that_was_published_and_not_noted_is_not_recovered() {
        let file = file();
        let mut ring = file.split_ring(1, SIZE).unwrap();
        ring.recover(u16::MAX);
        (0..6).for_each(|head| ring.take(head));
        ring.complete(3);
        ring.published(0);
        ring.complete(1);
        ring.complete(4);
        // The process ends after the used index went from 0 to 2; or when half of it was noted.
        ring.store(SplitInflight::entry(4) + IN_FLIGHT, 0u8);
        assert_eq!(recovered(&file, 2), [0, 2, 5]);
        assert_eq!(recovered(&file, 2), [0, 2, 5]);
    }

    #[test]
    fn nonsense_in_the_file_does_no_harm() {
        let file = file();
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..1000 {
            let ring = file.split_ring(1, SIZE).unwrap();
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
        assert!(file.split_ring(2, SIZE).is_none());
        assert!(file.split_ring(0, 2 * SIZE).is_none());
        // A file for split rings has no room for packed ones.
        assert!(file.packed_ring(0, SIZE).is_none());
    }
}
