// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The split virtqueue (VIRTIO 1.3, 2.7), from the device's side.

use std::collections::VecDeque;
use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
    VRING_USED_F_NO_NOTIFY,
};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, VolatileMemory, VolatileSlice};

use super::fault::{Step, after};
use super::inflight::InflightRing;
use super::{MAX_INDIRECT_DESCRIPTORS, RingError, RingSetup};
use crate::chain::{Chain, Segments};
use crate::memory::{DirtyLog, GuestMemory, PinnedRange};

const DESCRIPTOR_SIZE: usize = 16;
const _: () = assert!(size_of::<Descriptor>() == DESCRIPTOR_SIZE);

/// Layout of the available ring: flags u16, idx u16, ring [u16; size], used_event u16.
/// Layout of the used ring: flags u16, idx u16, ring [{id u32, len u32}; size], avail_event u16.
const FLAGS: usize = 0;
const INDEX: usize = 2;
const ENTRIES: usize = 4;

/// Storage of completed chains that is kept for the next ones.
const KEPT_SEGMENTS: usize = 256;

/// A split ring that the driver shares with this device.
///
/// Requests are taken one by one, completed in any order, and published to the driver in batches.
#[derive(Debug)]
pub struct SplitRing {
    setup: RingSetup,
    memory: Arc<GuestMemory>,
    descriptors: PinnedRange,
    available: PinnedRange,
    used: PinnedRange,
    /// Next entry of the available ring to take.
    next_available: Wrapping<u16>,
    /// The driver's index when it was last looked at.
    available_seen: Wrapping<u16>,
    /// Next entry of the used ring to fill.
    next_used: Wrapping<u16>,
    /// The used index that the driver sees.
    published: Wrapping<u16>,
    /// Requests that were taken and not completed.
    held: u16,
    /// The driver was asked to kick.
    wants_kick: bool,
    spare: Vec<Segments>,
    /// What the front-end remembers of this ring.
    inflight: Option<InflightRing>,
    /// Requests that a device before this one has taken, to be taken again before all others.
    recovered: VecDeque<u16>,
}

/// Where the parts of a ring are.
struct Parts {
    descriptors: PinnedRange,
    available: PinnedRange,
    used: PinnedRange,
}

impl SplitRing {
    /// Finds the ring in `memory`. It is to go on at `next_available` in the available ring; where
    /// the used ring goes on, its own index says. With `inflight`, that says which requests are to be
    /// carried out again first, and where the available ring goes on.
    ///
    /// # Errors
    /// A part of the ring is not aligned, or not in guest memory.
    pub fn new(
        setup: RingSetup,
        memory: Arc<GuestMemory>,
        next_available: u16,
        mut inflight: Option<InflightRing>,
    ) -> Result<Self, RingError> {
        let Parts {
            descriptors,
            available,
            used,
        } = Self::find(&setup, &memory)?;
        let next_used = Wrapping(load(&used.slice(), INDEX, Ordering::Acquire));
        let (recovered, next_available) = match &mut inflight {
            None => (VecDeque::new(), Wrapping(next_available)),
            Some(inflight) => {
                let recovered = VecDeque::from(inflight.recover(next_used.0));
                // All that was taken was either given back or is under way.
                let next_available = match inflight.was_fresh() {
                    true => Wrapping(next_available),
                    false => next_used + Wrapping(recovered.len() as u16),
                };
                (recovered, next_available)
            }
        };
        let ring = Self {
            setup,
            memory,
            descriptors,
            available,
            used,
            next_available,
            available_seen: next_available,
            next_used,
            published: next_used,
            held: 0,
            wants_kick: true,
            spare: Vec::new(),
            inflight,
            recovered,
        };
        // A device that crashed may have written to it and not come to note that.
        ring.mark_used(0, ring.used_size());
        Ok(ring)
    }

    /// Bytes of the used ring.
    fn used_size(&self) -> usize {
        self.used.slice().len()
    }

    /// Has writes to the used ring logged by another guest address, or not any more.
    pub fn set_used_log(&mut self, address: Option<u64>) {
        self.setup.used_log = address;
        self.mark_used(0, self.used_size());
    }

    /// Notes, while the guest migrates, that `length` bytes at `offset` of the used ring were written.
    #[inline]
    fn mark_used(&self, offset: usize, length: usize) {
        if let Some(log) = self.memory.log() {
            self.mark_used_in(log, offset, length);
        }
    }

    #[cold]
    fn mark_used_in(&self, log: &DirtyLog, offset: usize, length: usize) {
        if let Some(start) = self.setup.used_log {
            log.mark(start.saturating_add(offset as u64), length as u64);
        }
    }

    /// Notes what was written for a request, with its entry at `offset` of the used ring.
    #[cold]
    fn mark_completed(&self, log: &DirtyLog, chain: &Chain, offset: usize) {
        chain.mark_dirty(log);
        self.mark_used_in(log, offset, 8);
    }

    fn find(setup: &RingSetup, memory: &GuestMemory) -> Result<Parts, RingError> {
        let size = usize::from(setup.size);
        let part = |part, address: u64, alignment, length| {
            if !address.is_multiple_of(alignment) {
                return Err(RingError::Unaligned {
                    part,
                    address,
                    alignment,
                });
            }
            memory
                .pin_user_range(address, length)
                .map_err(|source| RingError::Unmapped { part, source })
        };
        let event = if setup.event_index { 2 } else { 0 };
        let descriptors = part(
            "descriptor table",
            setup.descriptors,
            16,
            DESCRIPTOR_SIZE * size,
        )?;
        let available = part(
            "available ring",
            setup.available,
            2,
            ENTRIES + 2 * size + event,
        )?;
        let used = part("used ring", setup.used, 4, ENTRIES + 8 * size + event)?;
        Ok(Parts {
            descriptors,
            available,
            used,
        })
    }

    /// Finds the ring anew after the front-end changed the memory table. Requests that are held
    /// keep the memory that they were taken from.
    ///
    /// # Errors
    /// The ring is not in the new memory.
    pub fn set_memory(&mut self, memory: Arc<GuestMemory>) -> Result<(), RingError> {
        let parts = Self::find(&self.setup, &memory)?;
        self.memory = memory;
        self.descriptors = parts.descriptors;
        self.available = parts.available;
        self.used = parts.used;
        Ok(())
    }

    /// Index of the available entry that is taken next: what GET_VRING_BASE answers.
    pub fn next_available(&self) -> u16 {
        self.next_available.0
    }

    /// Requests of a device before this one that are still to be taken again.
    pub fn recovered(&self) -> usize {
        self.recovered.len()
    }

    /// Whether another device has worked on this ring, of which nobody knows if it called the driver for all that it published.
    pub fn may_owe_call(&self) -> bool {
        let inflight = self.inflight.as_ref();
        inflight.is_some_and(|inflight| !inflight.was_fresh())
    }

    /// Requests that were taken and not yet completed.
    pub fn held(&self) -> u16 {
        self.held
    }

    /// Whether completed requests wait to be published.
    #[inline]
    fn has_unpublished(&self) -> bool {
        self.next_used != self.published
    }

    /// Whether requests wait to be taken, among those seen already.
    #[inline]
    pub fn has_known_available(&self) -> bool {
        self.next_available != self.available_seen || !self.recovered.is_empty()
    }

    /// Whether requests wait to be taken. Looks at the driver's index if all known ones are taken.
    ///
    /// # Errors
    /// The index is further ahead than the ring is long.
    #[inline]
    pub fn has_available(&mut self) -> Result<bool, RingError> {
        if self.has_known_available() {
            return Ok(true);
        }
        let index = Wrapping(load(&self.available.slice(), INDEX, Ordering::Acquire));
        // What the driver has given out and not got back fits the ring.
        let open = index - self.next_available + Wrapping(self.held);
        if open.0 > self.setup.size {
            return Err(RingError::AvailableIndex {
                index: index.0,
                size: self.setup.size,
            });
        }
        self.available_seen = index;
        Ok(index != self.next_available)
    }

    /// Takes the next request, if there is one.
    ///
    /// # Errors
    /// The ring is corrupt; the request stays where it is.
    pub fn take(&mut self) -> Result<Option<Chain>, RingError> {
        if !self.has_available()? {
            return Ok(None);
        }
        let recovered = self.recovered.front().copied();
        let head = recovered.unwrap_or_else(|| {
            let slot = usize::from(self.next_available.0 & (self.setup.size - 1));
            let place = ENTRIES + 2 * slot;
            load(&self.available.slice(), place, Ordering::Relaxed)
        });
        let mut readable = self.spare.pop().unwrap_or_default();
        let mut writable = self.spare.pop().unwrap_or_default();
        self.walk(head, &mut readable, &mut writable)?;
        match recovered {
            Some(_) => {
                self.recovered.pop_front();
                after(Step::TakenAgain);
            }
            None => {
                after(Step::Read);
                if let Some(inflight) = &mut self.inflight {
                    inflight.take(head);
                }
                self.next_available += 1;
            }
        }
        self.held += 1;
        Ok(Some(Chain::new(
            head,
            Arc::clone(&self.memory),
            readable,
            writable,
        )))
    }

    /// Follows the chain that starts at `head`, reading each descriptor once.
    fn walk(
        &self,
        head: u16,
        readable: &mut Segments,
        writable: &mut Segments,
    ) -> Result<(), RingError> {
        let mut table = Table {
            slice: Some(self.descriptors.slice()),
            start: 0,
            entries: usize::from(self.setup.size),
            indirect: false,
        };
        let mut limit = table.entries;
        let mut index = head;
        let mut count = 0;
        loop {
            count += 1;
            if count > limit {
                return Err(RingError::ChainTooLong { limit });
            }
            let descriptor = table.get(index, &self.memory)?;
            let flags = u32::from(descriptor.flags());
            let (address, length) = (descriptor.addr().0, descriptor.len() as usize);
            if flags & VRING_DESC_F_INDIRECT != 0 {
                if table.indirect {
                    return Err(RingError::Indirect("a table inside a table"));
                }
                if flags & VRING_DESC_F_NEXT != 0 {
                    return Err(RingError::Indirect("another descriptor follows it"));
                }
                table = self.indirect_table(address, length)?;
                limit = MAX_INDIRECT_DESCRIPTORS.max(limit);
                // The descriptor that names the table is none of the chain's.
                count -= 1;
                index = 0;
                continue;
            }
            let half = if flags & VRING_DESC_F_WRITE != 0 {
                &mut *writable
            } else if writable.len() > 0 {
                return Err(RingError::ReadableAfterWritable);
            } else {
                &mut *readable
            };
            self.push(half, address, length);
            if flags & VRING_DESC_F_NEXT == 0 {
                return Ok(());
            }
            index = descriptor.next();
        }
    }

    fn indirect_table(&self, start: u64, length: usize) -> Result<Table<'_>, RingError> {
        if !self.setup.indirect {
            return Err(RingError::Indirect("the feature was not negotiated"));
        }
        if length == 0 || !length.is_multiple_of(DESCRIPTOR_SIZE) {
            return Err(RingError::Indirect("its length is no multiple of 16"));
        }
        Ok(Table {
            slice: self.memory.slice(start, length).ok(),
            start,
            entries: length / DESCRIPTOR_SIZE,
            indirect: true,
        })
    }

    /// Adds the memory that a descriptor names to one half of its chain.
    fn push(&self, half: &mut Segments, mut address: u64, mut length: usize) {
        while length > 0 {
            let Some(slice) = self.memory.slice_up_to(address, length) else {
                half.push_hole(length);
                return;
            };
            half.push(&slice);
            length -= slice.len();
            // The slice ends inside guest memory, so this can not wrap further than to 0.
            address = address.wrapping_add(slice.len() as u64);
        }
    }

    /// Gives a request back: the device wrote `written` bytes of it. The driver sees it with the next
    /// [`SplitRing::publish`].
    pub fn complete(&mut self, chain: Chain, written: u32) {
        let slot = usize::from(self.next_used.0 & (self.setup.size - 1));
        let most = u32::try_from(chain.writable_total()).unwrap_or(u32::MAX);
        let entry = u64::from(chain.head()) | u64::from(written.min(most)) << 32;
        let place = ENTRIES + 8 * slot;
        let used = self.used.slice();
        after(Step::CarriedOut);
        store(&used, place, entry as u32);
        store(&used, place + 4, (entry >> 32) as u32);
        after(Step::UsedEntryWritten);
        if let Some(log) = self.memory.log() {
            self.mark_completed(log, &chain, place);
        }
        if let Some(inflight) = &mut self.inflight {
            inflight.complete(chain.head());
        }
        self.next_used += 1;
        self.held = self.held.saturating_sub(1);
        for segments in chain.into_segments() {
            if self.spare.len() < KEPT_SEGMENTS {
                self.spare.push(segments.recycle());
            }
        }
    }

    /// Shows the driver all requests that were completed since the last time, with one store.
    /// Returns whether the driver wants to be called (VIRTIO 1.3, 2.7.7.1 and 2.7.10).
    pub fn publish(&mut self) -> bool {
        if !self.has_unpublished() {
            return false;
        }
        let used = self.used.slice();
        // A failure is impossible: offset and alignment were checked when the ring was found.
        let _ = used.store(self.next_used.0.to_le(), INDEX, Ordering::Release);
        after(Step::Published);
        self.mark_used(INDEX, 2);
        if let Some(inflight) = &mut self.inflight {
            inflight.published(self.next_used.0);
        }
        let before = self.published;
        self.published = self.next_used;
        // The index is visible before the driver's wish is read, or both sides could wait.
        fence(Ordering::SeqCst);
        let available = self.available.slice();
        if self.setup.event_index {
            let place = ENTRIES + 2 * usize::from(self.setup.size);
            let event = Wrapping(load(&available, place, Ordering::Relaxed));
            self.next_used - event - Wrapping(1) < self.next_used - before
        } else {
            let flags = load(&available, FLAGS, Ordering::Relaxed);
            u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0
        }
    }

    /// Asks the driver not to kick: the device looks at the ring by itself.
    pub fn suppress_kicks(&mut self) {
        // With EVENT_IDX the old avail_event stays, which the driver has passed already.
        if std::mem::take(&mut self.wants_kick) && !self.setup.event_index {
            let used = self.used.slice();
            let _ = used.store(
                (VRING_USED_F_NO_NOTIFY as u16).to_le(),
                FLAGS,
                Ordering::Relaxed,
            );
            self.mark_used(FLAGS, 2);
        }
    }

    /// Asks the driver to kick for the next request. Returns whether requests came meanwhile, for
    /// which it may not have kicked.
    ///
    /// # Errors
    /// The driver's index is further ahead than the ring is long.
    pub fn want_kick(&mut self) -> Result<bool, RingError> {
        let used = self.used.slice();
        let place = if self.setup.event_index {
            let place = ENTRIES + 8 * usize::from(self.setup.size);
            let _ = used.store(self.next_available.0.to_le(), place, Ordering::Relaxed);
            place
        } else {
            let _ = used.store(0u16, FLAGS, Ordering::Relaxed);
            FLAGS
        };
        self.mark_used(place, 2);
        self.wants_kick = true;
        // The wish is visible before the index is read, or both sides could wait.
        fence(Ordering::SeqCst);
        self.has_available()
    }
}

/// Where the descriptors of a chain are.
struct Table<'a> {
    /// `None` for an indirect table that spans regions of guest memory, or is not in it.
    slice: Option<VolatileSlice<'a>>,
    /// Guest address of an indirect table.
    start: u64,
    entries: usize,
    indirect: bool,
}

impl Table<'_> {
    fn get(&self, index: u16, memory: &GuestMemory) -> Result<Descriptor, RingError> {
        let place = usize::from(index);
        if place >= self.entries {
            return Err(RingError::DescriptorIndex {
                index,
                size: self.entries,
            });
        }
        let offset = DESCRIPTOR_SIZE * place;
        match &self.slice {
            Some(slice) => slice.get_ref(offset).ok().map(|entry| entry.load()),
            None => self
                .start
                .checked_add(offset as u64)
                .and_then(|address| memory.slice(address, DESCRIPTOR_SIZE).ok())
                .and_then(|slice| slice.get_ref(0).ok().map(|entry| entry.load())),
        }
        .ok_or(RingError::Indirect("its table is not in guest memory"))
    }
}

/// Loads a little-endian u16 of the ring. Offsets were checked when the ring was found, so the
/// default is never used.
#[inline]
fn load(slice: &VolatileSlice<'_>, offset: usize, order: Ordering) -> u16 {
    u16::from_le(slice.load(offset, order).unwrap_or_default())
}

/// Stores a little-endian u32 of the ring; see [`load`].
#[inline]
fn store(slice: &VolatileSlice<'_>, offset: usize, value: u32) {
    let _ = slice.store(value.to_le(), offset, Ordering::Relaxed);
}
