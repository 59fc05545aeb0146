// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The region of a packed ring. Used descriptors overwrite those of requests in flight, so the region has a copy of each. Its entries
//! are linked: the free ones in a list, the others in the chain of their request.

use virtio_queue::desc::packed::Descriptor;

use super::region::Region;
use crate::ring::crash_point::{Step, after};
use crate::ring::position::Position;

/// Layout: features u64, version u16, number of descriptors u16, first free entry u16 (new and old), used index u16 (new and old), used
/// wrap counter u8 (new and old), padding; then for each descriptor: in flight u8, padding, next u16, last u16, number u16, counter
/// u64, id u16, flags u16, length u32, address u64. Numbers are in the host's byte order. Pairs that change together are stored
/// together.
const FREE_HEADS: usize = 12;
const USED: usize = 16;
pub(super) const ENTRIES: usize = 32;
pub(super) const ENTRY_SIZE: usize = 32;
const IN_FLIGHT: usize = 0;
const NEXT: usize = 2;
const LAST: usize = 4;
const NUMBER: usize = 6;
const COUNTER: usize = 8;
const ID: usize = 16;
const FLAGS: usize = 18;
const LENGTH: usize = 20;
const ADDRESS: usize = 24;

/// A new and an old value. They differ only while a batch is being published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pair<T> {
    new: T,
    old: T,
}

/// The region of a packed ring.
#[derive(Debug)]
pub(in crate::ring) struct PackedInflight {
    region: Region,
    /// Number of the next request, which gives the order of requests.
    counter: u64,
    is_fresh: bool,
    /// Requests completed since the last batch was published: first entry and number of descriptors.
    completed: Vec<(u16, u16)>,
}

/// A request that a previous device took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::ring) struct Recovered {
    /// Its first entry.
    pub entry: u16,
    /// Its descriptors in the ring.
    pub descriptors: u16,
}

impl PackedInflight {
    pub(super) fn new(region: Region) -> Self {
        Self {
            region,
            counter: 0,
            is_fresh: false,
            completed: Vec::new(),
        }
    }

    fn entry(index: u16) -> usize {
        ENTRIES + ENTRY_SIZE * usize::from(index)
    }

    fn size(&self) -> u16 {
        self.region.size
    }

    fn next(&self, index: u16) -> Option<u16> {
        let next = self.region.load::<u16>(Self::entry(index) + NEXT);
        Some(next).filter(|next| *next < self.size())
    }

    fn free_heads(&self) -> Pair<u16> {
        let [a, b, c, d] = self.region.load::<u32>(FREE_HEADS).to_ne_bytes();
        Pair {
            new: u16::from_ne_bytes([a, b]),
            old: u16::from_ne_bytes([c, d]),
        }
    }

    fn set_free_heads(&self, heads: Pair<u16>) {
        let [[a, b], [c, d]] = [heads.new, heads.old].map(u16::to_ne_bytes);
        self.region
            .store(FREE_HEADS, u32::from_ne_bytes([a, b, c, d]));
    }

    fn used(&self) -> Pair<Position> {
        let [a, b, c, d, new, old, ..] = self.region.load::<u64>(USED).to_ne_bytes();
        let position = |index, wrap| Position {
            index: u16::from_ne_bytes(index),
            wrap: wrap != 0,
        };
        Pair {
            new: position([a, b], new),
            old: position([c, d], old),
        }
    }

    fn set_used(&self, used: Pair<Position>) {
        let [[a, b], [c, d]] = [used.new.index, used.old.index].map(u16::to_ne_bytes);
        let (new, old) = (used.new.wrap.into(), used.old.wrap.into());
        self.region
            .store(USED, u64::from_ne_bytes([a, b, c, d, new, old, 0, 0]));
    }

    /// Recovers what a previous device took and did not complete. Returns where the used descriptors of the ring continue, and these
    /// requests in the order in which they were taken; they stay recorded as in flight. A new region begins at `base`.
    /// `was_published` returns whether the descriptor at a position was marked used after it was available there.
    pub fn recover(
        &mut self,
        base: Position,
        was_published: impl Fn(Position) -> bool,
    ) -> (Position, Vec<Recovered>) {
        let size = self.size();
        if !self.region.is_valid() {
            for index in 0..size {
                self.region.store(Self::entry(index) + IN_FLIGHT, 0u8);
                let next = index.wrapping_add(1);
                self.region.store(Self::entry(index) + NEXT, next);
            }
            self.set_free_heads(Pair { new: 0, old: 0 });
            let used = Pair {
                new: base,
                old: base,
            };
            self.set_used(used);
            self.region.begin();
            self.is_fresh = true;
            return (base, Vec::new());
        }
        // The region comes from the front-end: trust nothing in it.
        let (mut used, mut heads) = (self.used(), self.free_heads());
        if used.new != used.old && used.old.index < size && was_published(used.old) {
            heads.old = heads.new;
            used.old = used.new;
        } else {
            heads.new = heads.old;
            used.new = used.old;
        }
        // A free entry is not in flight: taking or completing its request was interrupted.
        let mut free = Some(heads.new).filter(|head| *head < size);
        for _ in 0..size {
            let Some(index) = free else { break };
            if self.region.load::<u8>(Self::entry(index) + IN_FLIGHT) != 0 {
                self.region.store(Self::entry(index) + IN_FLIGHT, 0u8);
                after(Step::OneRecovered);
            }
            free = self.next(index);
        }
        self.set_free_heads(heads);
        self.set_used(used);
        after(Step::IndexRecovered);
        if used.new.index >= size {
            used.new = base;
        }
        let mut taken: Vec<(u64, Recovered)> = (0..size)
            .filter(|index| self.region.load::<u8>(Self::entry(*index) + IN_FLIGHT) != 0)
            .map(|entry| {
                let descriptors = self.region.load(Self::entry(entry) + NUMBER);
                let counter = self.region.load(Self::entry(entry) + COUNTER);
                (counter, Recovered { entry, descriptors })
            })
            .collect();
        taken.sort_unstable_by_key(|(counter, request)| (*counter, request.entry));
        let counter = |(counter, _): &(u64, _)| counter.wrapping_add(1);
        self.counter = taken.last().map_or(0, counter);
        // Requests cannot have more descriptors than the ring.
        let mut room = size;
        let fits = |request: &Recovered| {
            let left = room.checked_sub(request.descriptors);
            room = left.unwrap_or(room);
            left.is_some() && request.descriptors > 0
        };
        let requests = taken.into_iter().map(|(_, request)| request);
        (used.new, requests.filter(fits).collect())
    }

    /// Returns whether no device used the region before, so that it does not say where the ring continues.
    pub fn was_fresh(&self) -> bool {
        self.is_fresh
    }

    /// Returns the copy of the descriptor in an entry, and the entry of the next one in its chain.
    pub fn descriptor(&self, entry: u16) -> (Descriptor, Option<u16>) {
        let place = Self::entry(entry);
        let descriptor = Descriptor::new(
            self.region.load(place + ADDRESS),
            self.region.load(place + LENGTH),
            self.region.load(place + ID),
            self.region.load(place + FLAGS),
        );
        (descriptor, self.next(entry))
    }

    /// Records that a request with these descriptors is taken. Returns its first entry.
    #[inline]
    pub fn take(&mut self, descriptors: &[Descriptor]) -> u16 {
        let head = self.free_heads().old;
        let mut index = head;
        let mut last = head;
        for descriptor in descriptors {
            // Only a list that the front-end changed can end here.
            if index >= self.size() {
                return head;
            }
            let place = Self::entry(index);
            self.region.store(place + ADDRESS, descriptor.addr().0);
            self.region.store(place + LENGTH, descriptor.len());
            self.region.store(place + FLAGS, descriptor.flags());
            self.region.store(place + ID, descriptor.id());
            last = index;
            index = self.next(index).unwrap_or(self.size());
        }
        let place = Self::entry(head);
        self.region.store(place + LAST, last);
        self.region.store(place + NUMBER, descriptors.len() as u16);
        self.region.store(place + COUNTER, self.counter);
        self.counter = self.counter.wrapping_add(1);
        after(Step::CounterNoted);
        self.region.store(place + IN_FLIGHT, 1u8);
        // A request whose entry is on the free list is not in flight.
        self.set_free_heads(Pair {
            new: index,
            old: index,
        });
        after(Step::Taken);
        head
    }

    /// Records that the request taken last, with this first entry, is available in the ring again.
    pub fn put_back(&mut self, entry: u16) {
        if entry >= self.size() {
            return;
        }
        let heads = self.free_heads();
        let last: u16 = self.region.load(Self::entry(entry) + LAST);
        if last < self.size() {
            self.region.store(Self::entry(last) + NEXT, heads.new);
        }
        // A request whose entry is on the free list is not in flight.
        self.set_free_heads(Pair {
            new: entry,
            old: entry,
        });
        self.region.store(Self::entry(entry) + IN_FLIGHT, 0u8);
        self.counter = self.counter.wrapping_sub(1);
    }

    /// Remembers that a request is completed. It is recorded when it is published.
    #[inline]
    pub fn complete(&mut self, entry: u16, descriptors: u16) {
        self.completed.push((entry, descriptors));
    }

    /// Records the batch that is about to be published.
    #[inline]
    pub fn publishes(&mut self) {
        let (mut heads, mut used) = (self.free_heads(), self.used());
        for (entry, descriptors) in &self.completed {
            if *entry >= self.size() {
                continue;
            }
            let last: u16 = self.region.load(Self::entry(*entry) + LAST);
            if last < self.size() {
                self.region.store(Self::entry(last) + NEXT, heads.new);
            }
            heads.new = *entry;
            used.new = used.new.after(*descriptors, self.size());
            after(Step::Linked);
        }
        self.set_free_heads(heads);
        self.set_used(used);
        after(Step::Completed);
    }

    /// Records that the driver sees the batch.
    #[inline]
    pub fn published(&mut self) {
        let mut completed = std::mem::take(&mut self.completed);
        for (entry, _) in completed.drain(..) {
            if entry < self.size() {
                self.region.store(Self::entry(entry) + IN_FLIGHT, 0u8);
            }
            after(Step::OneNoted);
        }
        // Keep the storage, so that a batch allocates nothing.
        self.completed = completed;
        let (heads, used) = (self.free_heads(), self.used());
        self.set_free_heads(Pair {
            old: heads.new,
            ..heads
        });
        self.set_used(Pair {
            old: used.new,
            ..used
        });
        after(Step::IndexNoted);
    }
}

#[cfg(test)]
mod tests {
    use super::super::{InflightFile, create_file, file_size};
    use super::*;

    const SIZE: u16 = 8;

    fn file() -> InflightFile {
        let file = create_file(true, 2, SIZE).unwrap();
        let length = file_size(true, 2, SIZE) as u64;
        InflightFile::map(&file, 0, length, true, 2, SIZE).unwrap()
    }

    fn at(index: u16, wrap: bool) -> Position {
        Position { index, wrap }
    }

    fn chain(count: u64) -> Vec<Descriptor> {
        (0..count)
            .map(|index| Descriptor::new(0x1000 * index, 16, 3, 0))
            .collect()
    }

    /// Returns where the ring continues, and the numbers of descriptors of the requests in flight.
    fn recovered(file: &InflightFile, is_used: bool) -> (Position, Vec<u16>) {
        let mut ring = file.packed_ring(1, SIZE).unwrap();
        let (used, requests) = ring.recover(at(0, true), |_| is_used);
        let numbers = requests.iter().map(|request| request.descriptors);
        (used, numbers.collect())
    }

    #[test]
    fn what_is_taken_and_not_published_is_recovered_in_its_order() {
        let file = file();
        let mut ring = file.packed_ring(1, SIZE).unwrap();
        assert_eq!(ring.recover(at(6, true), |_| false).0, at(6, true));
        assert!(ring.was_fresh());
        let entries: Vec<u16> = [2, 1, 3].map(|count| ring.take(&chain(count))).into();
        assert_eq!(recovered(&file, false), (at(6, true), vec![2, 1, 3]));
        ring.complete(entries[1], 1);
        ring.complete(entries[0], 2);
        assert_eq!(recovered(&file, false), (at(6, true), vec![2, 1, 3]));
        ring.publishes();
        ring.published();
        assert_eq!(recovered(&file, false), (at(1, false), vec![3]));
        let mut next = file.packed_ring(1, SIZE).unwrap();
        let (_, requests) = next.recover(at(0, true), |_| false);
        assert!(!next.was_fresh());
        let (first, second) = next.descriptor(requests[0].entry);
        assert_eq!((first.addr().0, first.len(), first.id()), (0, 16, 3));
        assert_eq!(next.descriptor(second.unwrap()).0.addr().0, 0x1000);
        // What is free again is enough for all the rest of the ring.
        (0..5).for_each(|_| assert!(next.take(&chain(1)) < SIZE));
        assert_eq!(recovered(&file, false).1, [3, 1, 1, 1, 1, 1]);
    }

    #[test]
    fn the_ring_tells_whether_the_last_batch_was_published() {
        for is_used in [false, true] {
            let file = file();
            let mut ring = file.packed_ring(1, SIZE).unwrap();
            ring.recover(at(0, true), |_| false);
            let entries: Vec<u16> = (0..8).map(|_| ring.take(&chain(1))).collect();
            entries.iter().for_each(|entry| ring.complete(*entry, 1));
            ring.publishes();
            let expected = match is_used {
                true => (at(0, false), vec![]),
                false => (at(0, true), vec![1; 8]),
            };
            assert_eq!(recovered(&file, is_used), expected);
        }
    }

    #[test]
    fn nonsense_in_the_file_does_no_harm() {
        let file = file();
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..1000 {
            let mut ring = file.packed_ring(1, SIZE).unwrap();
            for offset in (0..ENTRIES + ENTRY_SIZE * usize::from(SIZE)).step_by(2) {
                let value = match random.bool() {
                    true => random.u16(..),
                    false => random.u16(..SIZE),
                };
                ring.region.store(offset, value);
            }
            ring.region.begin();
            let is_used = random.bool();
            let (used, requests) = ring.recover(at(0, true), |_| is_used);
            let sum: u32 = requests.iter().map(|r| u32::from(r.descriptors)).sum();
            assert!(used.index < SIZE && sum <= SIZE.into());
            assert!(requests.iter().all(|request| request.entry < SIZE));
            for _ in 0..4 {
                let entry = ring.take(&chain(2));
                ring.complete(entry, 2);
                ring.publishes();
                ring.published();
            }
        }
    }
}
