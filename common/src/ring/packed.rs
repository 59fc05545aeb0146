// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The packed virtqueue (VIRTIO 1.3, 2.8), from the device's side.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::{
    VRING_DESC_F_WRITE, VRING_PACKED_EVENT_FLAG_DESC, VRING_PACKED_EVENT_FLAG_DISABLE,
    VRING_PACKED_EVENT_FLAG_ENABLE,
};
use virtio_queue::desc::packed::Descriptor;
use vm_memory::{Bytes, VolatileMemory, VolatileSlice};

use super::crash_point::{Step, after};
use super::descriptors::{Buffer, DESCRIPTOR_SIZE, Gathering};
use super::error::RingError;
use super::inflight::{PackedInflight, Recovered};
use super::position::{AVAILABLE, Position, USED};
use super::setup::{RingSetup, find_part};
use super::shared::{AGAIN, Shared};
use crate::chain::{Chain, Ticket};
use crate::memory::{DirtyLog, GuestMemory, PinnedRange};

const WRITE: u16 = VRING_DESC_F_WRITE as u16;

/// Layout of a descriptor: address u64, length u32, id u16, flags u16.
const DESCRIPTOR_LENGTH: usize = 8;
const DESCRIPTOR_ID: usize = 12;
const DESCRIPTOR_FLAGS: usize = 14;

/// Layout of both event suppression structures: offset and wrap counter u16, flags u16.
const EVENT_POSITION: usize = 0;
const EVENT_FLAGS: usize = 2;
const EVENT_SIZE: usize = 4;
/// The defined bits of the flags.
const EVENT_FLAGS_MASK: u16 = 3;

/// Base of a ring that is not used yet: both positions are 0, and both wrap counters 1.
pub const FIRST_BASE: u32 = 1 << 31 | 1 << 15;

/// A packed ring.
#[derive(Debug)]
pub struct PackedRing {
    pub shared: Shared<PackedInflight>,
    descriptors: PinnedRange,
    driver_event: PinnedRange,
    device_event: PinnedRange,
    /// Next descriptor to take.
    next_available: Position,
    /// That descriptor was seen to be available.
    available_seen: bool,
    /// Where the available descriptors that were seen end, if requests were put back.
    seen_end: Option<Position>,
    /// The descriptor there was reported to be available, and its request was not taken since.
    reported: Option<Position>,
    /// Next descriptor to mark used.
    next_used: Position,
    /// Index and final flags of the first used descriptor that is not published yet. Storing the flags publishes it and all that
    /// follow.
    unpublished: Option<(u16, u16)>,
    /// Number of descriptors from there to the next one to mark used.
    unpublished_descriptors: u16,
    /// Number of descriptors of the requests that the device holds.
    held_descriptors: u16,
    /// Number of descriptors of the request that was taken last.
    last_descriptors: u16,
    /// The current memory table does not contain the ring.
    is_away: bool,
    /// The descriptors of the request being taken, for the record of requests in flight.
    taken: Vec<Descriptor>,
}

/// The parts of a ring.
struct Parts {
    descriptors: PinnedRange,
    driver_event: PinnedRange,
    device_event: PinnedRange,
}

impl PackedRing {
    /// Opens the ring in `memory`. It continues at `base`: the position of the next available descriptor in the lower half, that of the
    /// next used one in the upper half. If there is an `inflight` region, that says so instead.
    ///
    /// # Errors
    /// A part of the ring is not aligned or not in guest memory, or `base` is outside the ring.
    pub fn new(
        setup: RingSetup,
        memory: Arc<GuestMemory>,
        base: u32,
        mut inflight: Option<PackedInflight>,
    ) -> Result<Self, RingError> {
        let Parts {
            descriptors,
            driver_event,
            device_event,
        } = Self::find(&setup, &memory)?;
        let is_unused = |index| {
            let flags = place(index) + DESCRIPTOR_FLAGS;
            load(&descriptors.slice(), flags, Ordering::Acquire) & USED == 0
        };
        // User-Mode Linux sends 0 for a new ring, whose wrap counters are 1. A ring that reaches 0 with wrap counters of 0 later has
        // used descriptors of the previous round: the first one of each chain, which may be anywhere.
        let base = match base {
            0 if (0..setup.size).all(is_unused) => FIRST_BASE,
            base => base,
        };
        let mut next_available = Position::from_bits(base as u16);
        let mut next_used = Position::from_bits((base >> 16) as u16);
        let mut recovered = Vec::new();
        let mut held_descriptors = 0;
        if let Some(inflight) = &mut inflight {
            let ring = descriptors.slice();
            let was_published = |position: Position| {
                let place = place(position.index) + DESCRIPTOR_FLAGS;
                let flags = load(&ring, place, Ordering::Acquire);
                // The driver may have reused the descriptor since.
                flags & (AVAILABLE | USED) != position.available()
            };
            let (used, requests) = inflight.recover(next_used, was_published);
            if !inflight.was_fresh() {
                recovered = requests;
                held_descriptors = recovered.iter().map(|request| request.descriptors).sum();
                next_used = used;
                // Every request that was taken is either completed or in flight.
                next_available = used.after(held_descriptors, setup.size);
                // A batch that was not published left used flags after its first descriptor.
                let mut position = used;
                for _ in 0..held_descriptors {
                    let place = place(position.index) + DESCRIPTOR_FLAGS;
                    store(&ring, place, position.available(), Ordering::Relaxed);
                    position = position.after(1, setup.size);
                }
            }
        }
        if next_available.index.max(next_used.index) >= setup.size {
            return Err(RingError::Base {
                base,
                size: setup.size,
            });
        }
        let ring = Self {
            shared: Shared::new(setup, memory, inflight, recovered),
            descriptors,
            driver_event,
            device_event,
            next_available,
            available_seen: false,
            seen_end: None,
            reported: None,
            next_used,
            unpublished: None,
            unpublished_descriptors: 0,
            held_descriptors,
            last_descriptors: 1,
            is_away: false,
            taken: Vec::new(),
        };
        // A device that crashed may have written to the ring without logging it.
        ring.mark_all();
        Ok(ring)
    }

    /// As [`super::Ring::set_used_log`].
    pub fn set_used_log(&mut self, address: Option<u64>) {
        self.shared.setup.used_log = address;
        self.mark_all();
    }

    /// Logs a write to the whole ring, if logging is on.
    fn mark_all(&self) {
        if let Some(log) = self.shared.memory.log() {
            self.mark_descriptors(
                log,
                0,
                DESCRIPTOR_SIZE * usize::from(self.shared.setup.size),
            );
            self.mark_event();
        }
    }

    /// Logs a write of `length` bytes at `offset` of the descriptor ring.
    #[cold]
    fn mark_descriptors(&self, log: &DirtyLog, offset: usize, length: usize) {
        let ring = self.descriptors.slice();
        let pointer = ring.ptr_guard().as_ptr().addr();
        if let Some(start) = self.shared.memory.guest_address(pointer) {
            log.mark(start.saturating_add(offset as u64), length as u64);
        }
    }

    /// Logs a write to the device's event area, if logging is on.
    #[inline]
    fn mark_event(&self) {
        if let Some(log) = self.shared.memory.log()
            && let Some(start) = self.shared.setup.used_log
        {
            log.mark(start, EVENT_SIZE as u64);
        }
    }

    fn find(setup: &RingSetup, memory: &GuestMemory) -> Result<Parts, RingError> {
        let part =
            |part, address, alignment, length| find_part(memory, part, address, alignment, length);
        let size = DESCRIPTOR_SIZE * usize::from(setup.size);
        Ok(Parts {
            descriptors: part("descriptor ring", setup.descriptors, 16, size)?,
            driver_event: part("driver's event area", setup.available, 4, EVENT_SIZE)?,
            device_event: part("device's event area", setup.used, 4, EVENT_SIZE)?,
        })
    }

    /// As [`super::Ring::set_memory`].
    pub fn set_memory(&mut self, memory: Arc<GuestMemory>) -> Result<(), RingError> {
        let parts = Self::find(&self.shared.setup, &memory);
        // Completions are logged as the new table says, even if the ring is not in it.
        self.shared.memory = memory;
        let was_away = std::mem::replace(&mut self.is_away, parts.is_err());
        let parts = parts?;
        self.descriptors = parts.descriptors;
        self.driver_event = parts.driver_event;
        self.device_event = parts.device_event;
        // Completions had no guest address to log meanwhile.
        if was_away {
            self.mark_all();
        }
        Ok(())
    }

    /// Returns where the ring continues, in the format of the base in [`PackedRing::new`].
    pub fn base(&self) -> u32 {
        u32::from(self.next_available.bits()) | u32::from(self.next_used.bits()) << 16
    }

    /// As [`super::Ring::has_known_available`].
    #[inline]
    pub fn has_known_available(&self) -> bool {
        self.available_seen || self.shared.recovered() > 0
    }

    /// As [`super::Ring::has_more_than`], assuming that each has as many descriptors as the last one.
    #[inline]
    pub fn has_more_than(&self, count: u16) -> bool {
        let descriptors = count.saturating_mul(self.last_descriptors);
        let free = self.shared.setup.size.saturating_sub(self.held_descriptors);
        descriptors < free
            && self.is_available(
                self.next_available
                    .after(descriptors, self.shared.setup.size),
            )
    }

    /// Returns whether the driver has made the descriptor at `position` available.
    #[inline]
    fn is_available(&self, position: Position) -> bool {
        let place = place(position.index) + DESCRIPTOR_FLAGS;
        let flags = load(&self.descriptors.slice(), place, Ordering::Acquire);
        flags & (AVAILABLE | USED) == position.available()
    }

    /// As [`super::Ring::has_available`].
    #[inline]
    pub fn has_available(&mut self) -> bool {
        // While held requests occupy all descriptors, the next one belongs to them, whatever its flags say.
        if !self.has_known_available() && self.held_descriptors < self.shared.setup.size {
            self.available_seen = self.is_available(self.next_available);
        }
        self.has_known_available()
    }

    /// As [`super::Ring::take_if`].
    pub fn take_if(
        &mut self,
        accepts: impl FnOnce(&mut Chain) -> bool,
    ) -> Result<Option<Chain>, RingError> {
        if !self.has_available() {
            return Ok(None);
        }
        if self.shared.recovered() > 0 {
            return self.shared.take_again(accepts, gather_again);
        }
        let (mut chain, end) = self.gather()?;
        if !accepts(&mut chain) {
            self.shared.storage.keep(chain);
            return Ok(None);
        }
        after(Step::Read);
        if let Some(inflight) = &mut self.shared.inflight {
            chain.set_inflight_entry(inflight.take(&self.taken));
        }
        self.reported = self.reported.filter(|at| *at != self.next_available);
        self.next_available = end;
        self.seen_end = self.seen_end.filter(|seen_end| *seen_end != end);
        self.available_seen = self.seen_end.is_some();
        self.last_descriptors = chain.ticket().descriptors;
        self.held_descriptors += self.last_descriptors;
        self.shared.took();
        Ok(Some(chain))
    }

    /// As [`super::Ring::put_back`].
    pub fn put_back(&mut self, chain: Chain) {
        if let Some(chain) = self.shared.give_back(chain) {
            let Ticket {
                descriptors, entry, ..
            } = chain.ticket();
            if let Some(inflight) = &mut self.shared.inflight {
                inflight.put_back(entry);
            }
            self.seen_end.get_or_insert(self.next_available);
            self.next_available = self
                .next_available
                .before(descriptors, self.shared.setup.size);
            self.held_descriptors = self.held_descriptors.saturating_sub(descriptors);
            self.available_seen = true;
            self.shared.storage.keep(chain);
        }
    }

    /// As [`super::Ring::resume`].
    pub fn resume(&mut self, suspended: Vec<Chain>) {
        let descriptors = suspended.iter().map(|chain| chain.ticket().descriptors);
        self.held_descriptors = descriptors.fold(self.held_descriptors, u16::saturating_add);
        self.shared.resume(suspended);
    }

    /// Reads the chain at the next available descriptor, each descriptor once. Returns it and the position after it.
    fn gather(&mut self) -> Result<(Chain, Position), RingError> {
        let size = self.shared.setup.size;
        let left = size.saturating_sub(self.held_descriptors);
        let descriptors = self.descriptors.slice();
        let mut chain = Gathering::new(&self.shared.memory, &mut self.shared.storage, left.into());
        let mut end = self.next_available;
        let mut count = 0;
        self.taken.clear();
        let id = loop {
            // The ring has `size` descriptors, of which `end` is one.
            let descriptor: Descriptor = descriptors
                .get_ref(place(end.index))
                .map(|descriptor| descriptor.load())
                .unwrap_or_default();
            end = end.after(1, size);
            count += 1;
            if self.shared.inflight.is_some() {
                self.taken.push(descriptor);
            }
            if !add(&mut chain, &self.shared.setup, &descriptor, count)? {
                break descriptor.id();
            }
        };
        let ticket = Ticket {
            id,
            descriptors: count,
            entry: 0,
            sequence: self.shared.next_sequence(),
        };
        Ok((chain.finish(ticket), end))
    }

    /// As [`super::Ring::complete`].
    pub fn complete(&mut self, chain: Chain, written: u32) {
        let Ticket {
            id,
            descriptors,
            entry,
            ..
        } = chain.ticket();
        after(Step::CarriedOut);
        let most = u32::try_from(chain.writable_total()).unwrap_or(u32::MAX);
        let written = written.min(most);
        let index = self.next_used.index;
        let ring = self.descriptors.slice();
        let place = place(index);
        // No access here can fail: offsets and alignments were checked when the ring was opened.
        let _ = ring.store(id.to_le(), place + DESCRIPTOR_ID, Ordering::Relaxed);
        let _ = ring.store(
            written.to_le(),
            place + DESCRIPTOR_LENGTH,
            Ordering::Relaxed,
        );
        let flags = self.next_used.used() | if written > 0 { WRITE } else { 0 };
        match self.unpublished {
            // The driver reads this one first, so it gets its flags last.
            None => self.unpublished = Some((index, flags)),
            Some(_) => store(&ring, place + DESCRIPTOR_FLAGS, flags, Ordering::Relaxed),
        }
        after(Step::UsedEntryWritten);
        if let Some(inflight) = &mut self.shared.inflight {
            inflight.complete(entry, descriptors);
        }
        if let Some(log) = self.shared.memory.log() {
            chain.mark_dirty(log);
            self.mark_descriptors(log, place, DESCRIPTOR_SIZE);
        }
        self.next_used = self.next_used.after(descriptors, self.shared.setup.size);
        // It can exceed the size of the ring if a request made the device overwrite the ring.
        self.unpublished_descriptors = self.unpublished_descriptors.saturating_add(descriptors);
        self.held_descriptors = self.held_descriptors.saturating_sub(descriptors);
        self.shared.held = self.shared.held.saturating_sub(1);
        self.shared.storage.keep(chain);
    }

    /// As [`super::Ring::publish`].
    pub fn publish(&mut self) -> bool {
        let Some((index, flags)) = self.unpublished.take() else {
            return false;
        };
        if let Some(inflight) = &mut self.shared.inflight {
            inflight.publishes();
        }
        let ring = self.descriptors.slice();
        store(
            &ring,
            place(index) + DESCRIPTOR_FLAGS,
            flags,
            Ordering::Release,
        );
        after(Step::Published);
        if let Some(inflight) = &mut self.shared.inflight {
            inflight.published();
        }
        if let Some(log) = self.shared.memory.log() {
            self.mark_descriptors(log, place(index), DESCRIPTOR_SIZE);
        }
        let count = std::mem::take(&mut self.unpublished_descriptors);
        // The descriptors must be visible before the driver's suppression is read, or both sides could wait.
        fence(Ordering::SeqCst);
        let event = self.driver_event.slice();
        let flags = load(&event, EVENT_FLAGS, Ordering::Acquire) & EVENT_FLAGS_MASK;
        match u32::from(flags) {
            VRING_PACKED_EVENT_FLAG_DISABLE => false,
            VRING_PACKED_EVENT_FLAG_DESC if self.shared.setup.event_index => {
                let bits = load(&event, EVENT_POSITION, Ordering::Relaxed);
                Position::from_bits(bits).was_passed(self.next_used, count, self.shared.setup.size)
            }
            _ => true,
        }
    }

    /// As [`super::Ring::suppress_kicks`].
    pub fn suppress_kicks(&mut self) {
        if std::mem::take(&mut self.shared.wants_kick) {
            self.set_event_flags(VRING_PACKED_EVENT_FLAG_DISABLE);
        }
    }

    /// As [`super::Ring::want_kick`].
    pub fn want_kick(&mut self) -> bool {
        let next = self.seen_end.unwrap_or(self.next_available);
        if self.shared.setup.event_index {
            let event = self.device_event.slice();
            store(&event, EVENT_POSITION, next.bits(), Ordering::Relaxed);
            self.set_event_flags(VRING_PACKED_EVENT_FLAG_DESC);
        } else {
            self.set_event_flags(VRING_PACKED_EVENT_FLAG_ENABLE);
        }
        self.shared.wants_kick = true;
        // The request for kicks must be visible before the descriptor is read, or both sides could wait.
        fence(Ordering::SeqCst);
        let has_more = self.held_descriptors < self.shared.setup.size
            && self.reported != Some(next)
            && self.is_available(next);
        if has_more {
            // It is seen now. A handler that leaves it in the ring is not called for it again and again.
            self.reported = Some(next);
            self.available_seen = true;
        }
        has_more
    }

    fn set_event_flags(&self, flags: u32) {
        let event = self.device_event.slice();
        store(&event, EVENT_FLAGS, flags as u16, Ordering::Release);
        self.mark_event();
    }
}

/// Reads the chain of a request that a previous device took, from the copies of its descriptors.
fn gather_again(
    shared: &mut Shared<PackedInflight>,
    request: Recovered,
) -> Result<Chain, RingError> {
    let limit = request.descriptors.into();
    let mut chain = Gathering::new(&shared.memory, &mut shared.storage, limit);
    let (mut id, mut next) = (0, Some(request.entry));
    for count in 1..=request.descriptors {
        let (Some(inflight), Some(entry)) = (&shared.inflight, next) else {
            break;
        };
        let descriptor;
        (descriptor, next) = inflight.descriptor(entry);
        id = descriptor.id();
        if !add(&mut chain, &shared.setup, &descriptor, count)? {
            break;
        }
    }
    Ok(chain.finish(Ticket {
        id,
        descriptors: request.descriptors,
        entry: request.entry,
        sequence: AGAIN,
    }))
}

/// Adds descriptor number `count` to its chain. Returns whether another one follows.
fn add(
    chain: &mut Gathering,
    setup: &RingSetup,
    descriptor: &Descriptor,
    count: u16,
) -> Result<bool, RingError> {
    let buffer = buffer(descriptor);
    if !buffer.is_table() {
        chain.add(buffer)?;
        return Ok(buffer.has_next());
    }
    if buffer.has_next() || count > 1 {
        return Err(RingError::Indirect("other descriptors are beside it"));
    }
    let table = chain.table(setup, buffer)?;
    // The descriptors of a table form one chain, in order (VIRTIO 1.3, 2.8.7).
    for index in 0..table.entries() {
        let buffer = self::buffer(&table.get(index)?);
        if buffer.is_table() {
            return Err(RingError::Indirect("a table inside a table"));
        }
        chain.add(buffer)?;
    }
    Ok(false)
}

/// Returns the offset of a descriptor in the ring, in bytes.
fn place(index: u16) -> usize {
    DESCRIPTOR_SIZE * usize::from(index)
}

fn buffer(descriptor: &Descriptor) -> Buffer {
    Buffer {
        address: descriptor.addr().0,
        length: descriptor.len(),
        flags: descriptor.flags(),
    }
}

/// Loads a little-endian u16 of the ring. Offsets were checked when the ring was opened, so the
/// default is never used.
#[inline]
fn load(slice: &VolatileSlice<'_>, offset: usize, order: Ordering) -> u16 {
    u16::from_le(slice.load(offset, order).unwrap_or_default())
}

/// Stores a little-endian u16 of the ring; see [`load`].
#[inline]
fn store(slice: &VolatileSlice<'_>, offset: usize, value: u16, order: Ordering) {
    let _ = slice.store(value.to_le(), offset, order);
}

#[cfg(test)]
mod tests {
    use vhost::vhost_user::message::VhostUserMemoryRegion;

    use super::*;

    fn at(index: u16, wrap: bool) -> Position {
        Position { index, wrap }
    }

    #[test]
    fn the_wrap_counter_changes_where_the_ring_ends() {
        assert_eq!(at(3, true).after(1, 5), at(4, true));
        assert_eq!(at(4, true).after(1, 5), at(0, false));
        assert_eq!(at(2, false).after(5, 5), at(2, true));
        assert_eq!(at(32767, true).after(32768, 32768), at(32767, false));
        for bits in [0, 5, 0x8000, 0xffff] {
            assert_eq!(Position::from_bits(bits).bits(), bits);
        }
    }

    #[test]
    fn more_descriptors_are_used_before_they_are_published_than_16_bits_can_count() {
        const SIZE: u16 = 1024;
        const NEXT: u16 = 1;
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x1_0000).unwrap();
        let info = VhostUserMemoryRegion::new(0, 0x1_0000, 0, 0);
        let memory = GuestMemory::default().with_region(&info, file.into());
        let memory = Arc::new(memory.unwrap());
        let setup = RingSetup {
            size: SIZE,
            available: 0x8000,
            used: 0x9000,
            packed: true,
            ..RingSetup::default()
        };
        let base = u32::from(at(0, true).bits());
        let mut ring =
            PackedRing::new(setup, Arc::clone(&memory), base | base << 16, None).unwrap();
        let descriptors = memory.slice(0, place(SIZE)).unwrap();
        // A driver need not wait: what the device writes to the ring can be data too.
        for round in 0..=u16::MAX / SIZE {
            let available = if round % 2 == 0 { AVAILABLE } else { USED };
            for index in 0..SIZE {
                let next = if index + 1 < SIZE { NEXT } else { 0 };
                let flags = place(index) + DESCRIPTOR_FLAGS;
                store(&descriptors, flags, available | next, Ordering::Relaxed);
            }
            let chain = ring.take_if(|_| true).unwrap().unwrap();
            ring.complete(chain, 0);
        }
        assert!(ring.publish());
    }

    /// Returns a ring without requests.
    fn empty_ring(size: u16) -> PackedRing {
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x1_0000).unwrap();
        let info = VhostUserMemoryRegion::new(0, 0x1_0000, 0, 0);
        let memory = GuestMemory::default().with_region(&info, file.into());
        let setup = RingSetup {
            size,
            available: 0x8000,
            used: 0x9000,
            packed: true,
            ..RingSetup::default()
        };
        PackedRing::new(setup, Arc::new(memory.unwrap()), FIRST_BASE, None).unwrap()
    }

    fn make_available(ring: &PackedRing, position: Position) {
        let flags = place(position.index) + DESCRIPTOR_FLAGS;
        let available = position.available();
        store(
            &ring.descriptors.slice(),
            flags,
            available,
            Ordering::Release,
        );
    }

    #[test]
    fn a_request_that_is_left_in_the_ring_is_reported_once() {
        let mut ring = empty_ring(4);
        // Twice around the ring.
        for number in 0..8 {
            let position = at(number % 4, number < 4);
            assert!(!ring.want_kick(), "{number}");
            make_available(&ring, position);
            assert!(ring.want_kick(), "{number}");
            assert!(!ring.want_kick(), "{number}");
            assert!(ring.has_known_available());
            let chain = ring.take_if(|_| true).unwrap().unwrap();
            ring.complete(chain, 0);
            ring.publish();
            assert!(!ring.has_known_available());
        }
    }

    #[test]
    fn a_request_behind_one_that_is_put_back_is_reported_once() {
        let mut ring = empty_ring(4);
        make_available(&ring, at(0, true));
        let put_back = |ring: &mut PackedRing| {
            let chain = ring.take_if(|_| true).unwrap().unwrap();
            ring.put_back(chain);
        };
        put_back(&mut ring);
        assert!(!ring.want_kick());
        make_available(&ring, at(1, true));
        assert!(ring.want_kick());
        put_back(&mut ring);
        assert!(!ring.want_kick());
        for _ in 0..2 {
            let chain = ring.take_if(|_| true).unwrap().unwrap();
            ring.complete(chain, 0);
        }
        ring.publish();
        assert!(ring.take_if(|_| true).unwrap().is_none());
        make_available(&ring, at(2, true));
        assert!(ring.want_kick());
    }

    #[test]
    fn an_event_counts_when_its_descriptor_is_among_those_just_used() {
        let size = 8;
        // Descriptors 6 and 7 of one round and 0 of the next.
        let here = at(1, false);
        for passed in [at(6, true), at(7, true), at(0, false)] {
            assert!(passed.was_passed(here, 3, size), "{passed:?}");
        }
        for other in [
            at(5, true),
            at(1, false),
            at(6, false),
            at(0, true),
            at(32767, true),
        ] {
            assert!(!other.was_passed(here, 3, size), "{other:?}");
        }
    }
}
