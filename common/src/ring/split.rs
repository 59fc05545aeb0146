// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The split virtqueue (VIRTIO 1.3, 2.7), from the device's side.

use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, VolatileMemory, VolatileSlice};

use super::crash_point::{Step, after};
use super::descriptors::{Buffer, DESCRIPTOR_SIZE, Gathering};
use super::error::RingError;
use super::inflight::{Recovered, SplitInflight};
use super::setup::{RingSetup, find_part};
use super::shared::{AGAIN, Shared};
use crate::chain::{Chain, Ticket};
use crate::memory::{DirtyLog, GuestMemory, PinnedRange};

/// Layout of the available ring: flags u16, idx u16, ring [u16; size], used_event u16.
/// Layout of the used ring: flags u16, idx u16, ring [{id u32, len u32}; size], avail_event u16.
const FLAGS: usize = 0;
const INDEX: usize = 2;
const ENTRIES: usize = 4;

/// A split ring.
#[derive(Debug)]
pub struct SplitRing {
    pub shared: Shared<SplitInflight>,
    descriptors: PinnedRange,
    available: PinnedRange,
    used: PinnedRange,
    /// Next entry of the available ring to take.
    next_available: Wrapping<u16>,
    /// The driver's index when it was last read.
    available_seen: Wrapping<u16>,
    /// Next entry of the used ring to fill.
    next_used: Wrapping<u16>,
    /// The used index that the driver sees.
    published: Wrapping<u16>,
}

/// The parts of a ring.
struct Parts {
    descriptors: PinnedRange,
    available: PinnedRange,
    used: PinnedRange,
}

impl SplitRing {
    /// Opens the ring in `memory`. It continues at `base` in the available ring, and at the used ring's own index. If there is an
    /// `inflight` region, that says which requests to carry out again first, and where the available ring continues.
    ///
    /// # Errors
    /// A part of the ring is not aligned or not in guest memory, or `base` is not an index.
    pub fn new(
        setup: RingSetup,
        memory: Arc<GuestMemory>,
        base: u32,
        mut inflight: Option<SplitInflight>,
    ) -> Result<Self, RingError> {
        let Parts {
            descriptors,
            available,
            used,
        } = Self::find(&setup, &memory)?;
        let next_available = u16::try_from(base).map_err(|_| RingError::Base {
            base,
            size: setup.size,
        })?;
        let next_used = Wrapping(load(&used.slice(), INDEX, Ordering::Acquire));
        let (recovered, next_available) = match &mut inflight {
            None => (Vec::new(), Wrapping(next_available)),
            Some(inflight) => {
                let recovered = inflight.recover(next_used.0);
                // Every request that was taken is either completed or in flight.
                let next_available = match inflight.was_fresh() {
                    true => Wrapping(next_available),
                    false => next_used + Wrapping(recovered.len() as u16),
                };
                (recovered, next_available)
            }
        };
        let recovered = recovered.into_iter().map(|head| Recovered {
            entry: head,
            descriptors: 1,
        });
        let ring = Self {
            shared: Shared::new(setup, memory, inflight, recovered.collect()),
            descriptors,
            available,
            used,
            next_available,
            available_seen: next_available,
            next_used,
            published: next_used,
        };
        // A device that crashed may have written to the used ring without logging it.
        ring.mark_used(0, ring.used_size());
        Ok(ring)
    }

    /// Returns the size of the used ring in bytes.
    fn used_size(&self) -> usize {
        self.used.slice().len()
    }

    /// As [`super::Ring::set_used_log`].
    pub fn set_used_log(&mut self, address: Option<u64>) {
        self.shared.setup.used_log = address;
        self.mark_used(0, self.used_size());
    }

    /// Logs a write of `length` bytes at `offset` of the used ring, if logging is on.
    #[inline]
    fn mark_used(&self, offset: usize, length: usize) {
        if let Some(log) = self.shared.memory.log() {
            self.mark_used_in(log, offset, length);
        }
    }

    #[cold]
    fn mark_used_in(&self, log: &DirtyLog, offset: usize, length: usize) {
        if let Some(start) = self.shared.setup.used_log {
            log.mark(start.saturating_add(offset as u64), length as u64);
        }
    }

    /// Logs the writes for a request, and its entry at `offset` of the used ring.
    #[cold]
    fn mark_completed(&self, log: &DirtyLog, chain: &Chain, offset: usize) {
        chain.mark_dirty(log);
        self.mark_used_in(log, offset, 8);
    }

    fn find(setup: &RingSetup, memory: &GuestMemory) -> Result<Parts, RingError> {
        let size = usize::from(setup.size);
        if !size.is_power_of_two() {
            return Err(RingError::Size(setup.size));
        }
        let part =
            |part, address, alignment, length| find_part(memory, part, address, alignment, length);
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

    /// As [`super::Ring::set_memory`].
    pub fn set_memory(&mut self, memory: Arc<GuestMemory>) -> Result<(), RingError> {
        let parts = Self::find(&self.shared.setup, &memory);
        // Completions are logged as the new table says, even if the ring is not in it.
        self.shared.memory = memory;
        let parts = parts?;
        self.descriptors = parts.descriptors;
        self.available = parts.available;
        self.used = parts.used;
        Ok(())
    }

    /// Returns the index of the next available entry.
    pub fn base(&self) -> u32 {
        self.next_available.0.into()
    }

    /// Returns whether completed requests are not published yet.
    #[inline]
    fn has_unpublished(&self) -> bool {
        self.next_used != self.published
    }

    /// As [`super::Ring::has_known_available`].
    #[inline]
    pub fn has_known_available(&self) -> bool {
        self.next_available != self.available_seen || self.shared.recovered() > 0
    }

    /// As [`super::Ring::has_more_than`], counting up to the driver's index when it was last read.
    #[inline]
    pub fn has_more_than(&self, count: u16) -> bool {
        (self.available_seen - self.next_available).0 > count
    }

    /// As [`super::Ring::has_available`]. The driver's index may be ahead by at most the size of the ring.
    #[inline]
    pub fn has_available(&mut self) -> Result<bool, RingError> {
        if self.has_known_available() {
            return Ok(true);
        }
        self.look()?;
        Ok(self.has_known_available())
    }

    /// Reads the driver's index.
    #[inline]
    fn look(&mut self) -> Result<(), RingError> {
        let index = Wrapping(load(&self.available.slice(), INDEX, Ordering::Acquire));
        // The requests that the driver is waiting for must fit the ring.
        let open = index - self.next_available + Wrapping(self.shared.held);
        if open.0 > self.shared.setup.size {
            return Err(RingError::AvailableIndex {
                index: index.0,
                size: self.shared.setup.size,
            });
        }
        self.available_seen = index;
        Ok(())
    }

    /// As [`super::Ring::take_if`].
    pub fn take_if(
        &mut self,
        accepts: impl FnOnce(&mut Chain) -> bool,
    ) -> Result<Option<Chain>, RingError> {
        if !self.has_available()? {
            return Ok(None);
        }
        if self.shared.recovered() > 0 {
            let descriptors = &self.descriptors;
            let walk = |shared: &mut _, request: Recovered| {
                walk(shared, descriptors, request.entry, AGAIN)
            };
            return self.shared.take_again(accepts, walk);
        }
        let slot = usize::from(self.next_available.0 & (self.shared.setup.size - 1));
        let head = load(
            &self.available.slice(),
            ENTRIES + 2 * slot,
            Ordering::Relaxed,
        );
        let sequence = self.shared.next_sequence();
        let mut chain = walk(&mut self.shared, &self.descriptors, head, sequence)?;
        if !accepts(&mut chain) {
            self.shared.storage.keep(chain);
            return Ok(None);
        }
        after(Step::Read);
        if let Some(inflight) = &mut self.shared.inflight {
            inflight.take(head);
        }
        self.next_available += 1;
        self.shared.took();
        Ok(Some(chain))
    }

    /// As [`super::Ring::put_back`].
    pub fn put_back(&mut self, chain: Chain) {
        if let Some(chain) = self.shared.give_back(chain) {
            if let Some(inflight) = &mut self.shared.inflight {
                inflight.put_back(chain.ticket().id);
            }
            self.next_available -= 1;
            self.shared.storage.keep(chain);
        }
    }

    /// As [`super::Ring::complete`].
    pub fn complete(&mut self, chain: Chain, written: u32) {
        let slot = usize::from(self.next_used.0 & (self.shared.setup.size - 1));
        let most = u32::try_from(chain.writable_total()).unwrap_or(u32::MAX);
        let entry = u64::from(chain.ticket().id) | u64::from(written.min(most)) << 32;
        let place = ENTRIES + 8 * slot;
        let used = self.used.slice();
        after(Step::CarriedOut);
        store(&used, place, entry as u32);
        store(&used, place + 4, (entry >> 32) as u32);
        after(Step::UsedEntryWritten);
        if let Some(log) = self.shared.memory.log() {
            self.mark_completed(log, &chain, place);
        }
        if let Some(inflight) = &mut self.shared.inflight {
            inflight.complete(chain.ticket().id);
        }
        self.next_used += 1;
        self.shared.held = self.shared.held.saturating_sub(1);
        self.shared.storage.keep(chain);
    }

    /// As [`super::Ring::publish`].
    pub fn publish(&mut self) -> bool {
        if !self.has_unpublished() {
            return false;
        }
        let used = self.used.slice();
        // This cannot fail: offset and alignment were checked when the ring was opened.
        let _ = used.store(self.next_used.0.to_le(), INDEX, Ordering::Release);
        after(Step::Published);
        self.mark_used(INDEX, 2);
        if let Some(inflight) = &mut self.shared.inflight {
            inflight.published(self.next_used.0);
        }
        let before = self.published;
        self.published = self.next_used;
        // The index must be visible before the driver's suppression is read, or both sides could wait.
        fence(Ordering::SeqCst);
        let available = self.available.slice();
        if self.shared.setup.event_index {
            let place = ENTRIES + 2 * usize::from(self.shared.setup.size);
            let event = Wrapping(load(&available, place, Ordering::Relaxed));
            self.next_used - event - Wrapping(1) < self.next_used - before
        } else {
            let flags = load(&available, FLAGS, Ordering::Relaxed);
            u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0
        }
    }

    /// As [`super::Ring::suppress_kicks`].
    pub fn suppress_kicks(&mut self) {
        // With EVENT_IDX the old avail_event stays, and the driver has passed it already.
        if std::mem::take(&mut self.shared.wants_kick) && !self.shared.setup.event_index {
            let used = self.used.slice();
            let _ = used.store(
                (VRING_USED_F_NO_NOTIFY as u16).to_le(),
                FLAGS,
                Ordering::Relaxed,
            );
            self.mark_used(FLAGS, 2);
        }
    }

    /// As [`super::Ring::want_kick`].
    pub fn want_kick(&mut self) -> Result<bool, RingError> {
        let used = self.used.slice();
        let place = if self.shared.setup.event_index {
            let place = ENTRIES + 8 * usize::from(self.shared.setup.size);
            let _ = used.store(self.available_seen.0.to_le(), place, Ordering::Relaxed);
            place
        } else {
            let _ = used.store(0u16, FLAGS, Ordering::Relaxed);
            FLAGS
        };
        self.mark_used(place, 2);
        self.shared.wants_kick = true;
        // The request for kicks must be visible before the index is read, or both sides could wait.
        fence(Ordering::SeqCst);
        let seen = self.available_seen;
        self.look()?;
        Ok(self.available_seen != seen)
    }
}

/// Walks the chain that starts at `head`, reading each descriptor once.
fn walk(
    shared: &mut Shared<SplitInflight>,
    descriptors: &PinnedRange,
    head: u16,
    sequence: u64,
) -> Result<Chain, RingError> {
    let size = usize::from(shared.setup.size);
    let descriptors = descriptors.slice();
    let mut chain = Gathering::new(&shared.memory, &mut shared.storage, size);
    let mut index = usize::from(head);
    let table = loop {
        let descriptor: Descriptor = match descriptors.get_ref(DESCRIPTOR_SIZE * index) {
            Ok(descriptor) if index < size => descriptor.load(),
            _ => return Err(RingError::DescriptorIndex { index, size }),
        };
        let buffer = buffer(&descriptor);
        if buffer.is_table() {
            if buffer.has_next() {
                return Err(RingError::Indirect("another descriptor follows it"));
            }
            break Some(chain.table(&shared.setup, buffer)?);
        }
        chain.add(buffer)?;
        if !buffer.has_next() {
            break None;
        }
        index = descriptor.next().into();
    };
    if let Some(table) = table {
        let mut index = 0;
        loop {
            let descriptor: Descriptor = table.get(index)?;
            let buffer = buffer(&descriptor);
            if buffer.is_table() {
                return Err(RingError::Indirect("a table inside a table"));
            }
            chain.add(buffer)?;
            if !buffer.has_next() {
                break;
            }
            index = descriptor.next().into();
        }
    }
    Ok(chain.finish(Ticket {
        id: head,
        descriptors: 1,
        entry: 0,
        sequence,
    }))
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

/// Stores a little-endian u32 of the ring; see [`load`].
#[inline]
fn store(slice: &VolatileSlice<'_>, offset: usize, value: u32) {
    let _ = slice.store(value.to_le(), offset, Ordering::Relaxed);
}
