// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The driver's side of a split ring (VIRTIO 1.3, section 2.7), as used by [`super::Queue`].

use std::sync::atomic::{AtomicU16, Ordering, fence};

use virtio_bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};

use super::descriptor::{Descriptor, Used, write_descriptor};

/// Bytes of an entry of the used ring.
const USED_ENTRY_SIZE: usize = 8;

/// Returns bytes of the avail ring with its used_event.
pub(super) fn avail_size(size: u16) -> usize {
    6 + 2 * usize::from(size)
}

/// Returns bytes of the used ring with its avail_event.
pub(super) fn used_size(size: u16) -> usize {
    6 + USED_ENTRY_SIZE * usize::from(size)
}

/// Addresses of the parts of the ring in this process.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pointers {
    /// `size` descriptors.
    pub descriptors: *mut u8,
    /// [`avail_size`] bytes.
    pub avail: *mut u8,
    /// [`used_size`] bytes.
    pub used: *mut u8,
}

/// The state of a driver.
#[derive(Debug)]
pub struct SplitRing {
    size: u16,
    event_idx: bool,
    pointers: Pointers,
    /// Own copy of the descriptors' `next`, which also links the free ones.
    next: Box<[u16]>,
    /// Number of descriptors of the outstanding chain with this head, else 0.
    outstanding: Box<[u16]>,
    free_head: u16,
    free: u16,
    /// Avail index that the next added chain gets.
    next_avail: u16,
    /// Avail index at the last decision to kick.
    kicked_avail: u16,
    /// Used index up to which entries were taken.
    next_used: u16,
    /// Used index when it was last read from the ring.
    seen_used: u16,
}

impl SplitRing {
    /// Initialises ring memory as it would be after `base` chains.
    pub(super) fn new(size: u16, event_idx: bool, base: u16, pointers: Pointers) -> Self {
        let ring = SplitRing {
            size,
            event_idx,
            pointers,
            next: (1..=size).collect(),
            outstanding: vec![0; usize::from(size)].into_boxed_slice(),
            free_head: 0,
            free: size,
            next_avail: base,
            kicked_avail: base,
            next_used: base,
            seen_used: base,
        };
        ring.set_avail_index(base);
        ring.used_field(2).store(base.to_le(), Ordering::Release);
        ring.set_used_event(base);
        ring.used_field(used_size(size) - 2)
            .store(base.to_le(), Ordering::Relaxed);
        ring.set_no_interrupt(false);
        ring
    }

    /// Resets the ring to its state at the start of a driver.
    pub(super) fn begin(&mut self, base: u16) {
        *self = Self::new(self.size, self.event_idx, base, self.pointers);
    }

    pub(super) fn free_descriptors(&self) -> u16 {
        self.free
    }

    /// Used index of the entry that is taken next.
    pub fn next_used(&self) -> u16 {
        self.next_used
    }

    /// Returns the head that the next chain gets, if there is room for one.
    pub(super) fn next_head(&self) -> Option<u16> {
        (self.free > 0).then_some(self.free_head)
    }

    /// Adds a chain of descriptors, made by a function that gets the place in the chain and the index of the next descriptor. Returns its head.
    #[inline]
    pub(super) fn add(
        &mut self,
        count: usize,
        mut descriptor: impl FnMut(usize, u16) -> Descriptor,
    ) -> Option<u16> {
        if count > usize::from(self.free) {
            return None;
        }
        let head = self.free_head;
        for position in 0..count {
            let index = self.free_head;
            self.free_head = self.next[usize::from(index)];
            self.set_descriptor(index, descriptor(position, self.free_head));
        }
        self.free -= count as u16;
        self.outstanding[usize::from(head)] = count as u16;
        self.append(head);
        Some(head)
    }

    /// Makes a chain the next available one, once it is published.
    #[inline]
    pub(super) fn append(&mut self, head: u16) {
        self.set_avail_entry(self.next_avail, head);
        self.next_avail = self.next_avail.wrapping_add(1);
    }

    #[inline]
    pub(super) fn publish(&mut self) {
        self.set_avail_index(self.next_avail);
    }

    /// Returns whether the device wants a kick for what was published since the last call.
    #[inline]
    pub(super) fn wants_kick(&mut self) -> bool {
        // The store of the avail index must be visible before the device's request is read.
        fence(Ordering::SeqCst);
        let old = std::mem::replace(&mut self.kicked_avail, self.next_avail);
        if self.event_idx {
            needs_event(self.avail_event(), self.next_avail, old)
        } else {
            old != self.next_avail && self.used_flags() & VRING_USED_F_NO_NOTIFY as u16 == 0
        }
    }

    #[inline]
    pub(super) fn has_used(&self) -> bool {
        self.used_index() != self.next_used
    }

    /// Returns whether all published chains are used.
    pub(super) fn has_used_all(&self) -> bool {
        self.used_index() == self.avail_index()
    }

    #[inline]
    pub(super) fn take_used(&mut self) -> Option<Used> {
        if self.next_used == self.seen_used {
            self.seen_used = self.used_index();
            if self.next_used == self.seen_used {
                return None;
            }
        }
        let (id, length) = self.used_entry(self.next_used);
        let count = match self.outstanding.get_mut(id as usize) {
            Some(count) if *count > 0 => std::mem::take(count),
            _ => panic!(
                "the device used descriptor {id}, which is not the head of an outstanding chain"
            ),
        };
        self.next_used = self.next_used.wrapping_add(1);
        let head = id as u16;
        let mut last = head;
        for _ in 1..count {
            last = self.next[usize::from(last)];
        }
        self.next[usize::from(last)] = self.free_head;
        self.free_head = head;
        self.free += count;
        Some(Used { head, length })
    }

    /// Asks for an interrupt at the next used chain.
    #[inline]
    pub(super) fn want_interrupt(&self) {
        if self.event_idx {
            self.set_used_event(self.next_used);
        } else {
            self.set_no_interrupt(false);
        }
    }

    /// Does nothing with EVENT_IDX: the event that has passed suppresses interrupts.
    #[inline]
    pub(super) fn want_no_interrupt(&self) {
        if !self.event_idx {
            self.set_no_interrupt(true);
        }
    }

    /// Writes descriptor `index` of the ring.
    #[inline]
    pub fn set_descriptor(&self, index: u16, descriptor: Descriptor) {
        assert!(index < self.size);
        // SAFETY: the table has `size` descriptors.
        unsafe { write_descriptor(self.pointers.descriptors, index, descriptor) };
    }

    /// Writes entry `slot` (modulo the size) of the avail ring.
    #[inline]
    pub fn set_avail_entry(&self, slot: u16, head: u16) {
        let slot = usize::from(slot & (self.size - 1));
        self.avail_field(4 + 2 * slot)
            .store(head.to_le(), Ordering::Relaxed);
    }

    /// Writes any avail index. Chains that are added later follow the last added chain, not this index.
    #[inline]
    pub fn set_avail_index(&self, index: u16) {
        self.avail_field(2).store(index.to_le(), Ordering::Release);
    }

    /// Returns the avail index as the device sees it.
    pub fn avail_index(&self) -> u16 {
        u16::from_le(self.avail_field(2).load(Ordering::Relaxed))
    }

    /// Sets VIRTQ_AVAIL_F_NO_INTERRUPT.
    #[inline]
    pub fn set_no_interrupt(&self, no_interrupt: bool) {
        let flags = if no_interrupt {
            VRING_AVAIL_F_NO_INTERRUPT as u16
        } else {
            0
        };
        self.avail_field(0).store(flags.to_le(), Ordering::Relaxed);
    }

    /// Sets used_event: the device interrupts when its used index passes it.
    #[inline]
    pub fn set_used_event(&self, index: u16) {
        self.avail_field(avail_size(self.size) - 2)
            .store(index.to_le(), Ordering::Relaxed);
    }

    /// Returns the device's VIRTQ_USED_F_NO_NOTIFY and unknown flags.
    #[inline]
    pub fn used_flags(&self) -> u16 {
        u16::from_le(self.used_field(0).load(Ordering::Relaxed))
    }

    /// Returns the device's avail_event: it wants a kick when the avail index passes it.
    #[inline]
    pub fn avail_event(&self) -> u16 {
        u16::from_le(
            self.used_field(used_size(self.size) - 2)
                .load(Ordering::Relaxed),
        )
    }

    /// Returns the device's used index.
    #[inline]
    pub fn used_index(&self) -> u16 {
        u16::from_le(self.used_field(2).load(Ordering::Acquire))
    }

    /// Returns entry `slot` (modulo the size) of the used ring: descriptor and length.
    #[inline]
    pub fn used_entry(&self, slot: u16) -> (u32, u32) {
        let slot = usize::from(slot & (self.size - 1));
        // SAFETY: the used ring has `size` aligned entries of 8 bytes after its first 4.
        let (id, length) = unsafe {
            let entry = self
                .pointers
                .used
                .add(4 + USED_ENTRY_SIZE * slot)
                .cast::<u32>();
            (entry.read_volatile(), entry.add(1).read_volatile())
        };
        (u32::from_le(id), u32::from_le(length))
    }

    #[inline]
    fn avail_field(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: callers stay within the bytes of the avail ring, at even offsets.
        unsafe { AtomicU16::from_ptr(self.pointers.avail.add(offset).cast()) }
    }

    #[inline]
    fn used_field(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: callers stay within the bytes of the used ring, at even offsets.
        unsafe { AtomicU16::from_ptr(self.pointers.used.add(offset).cast()) }
    }
}

/// Returns whether the step from `old` to `new` passes `event` (vring_need_event of the specification).
#[inline]
fn needs_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
