// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The driver's side of a packed ring (VIRTIO 1.3, section 2.8), as used by [`super::Queue`].

use std::sync::atomic::{AtomicU16, Ordering, fence};

use virtio_bindings::virtio_ring::{
    VRING_PACKED_DESC_F_AVAIL, VRING_PACKED_DESC_F_USED, VRING_PACKED_EVENT_FLAG_DESC,
    VRING_PACKED_EVENT_FLAG_DISABLE, VRING_PACKED_EVENT_FLAG_ENABLE,
};

use super::descriptor::{Buffer, DESCRIPTOR_SIZE, Descriptor, NEXT, Used, write_descriptor};

/// Descriptor flag: available in the round with this wrap counter.
pub const AVAILABLE: u16 = 1 << VRING_PACKED_DESC_F_AVAIL;
/// Descriptor flag: used in the round with this wrap counter.
pub const USED: u16 = 1 << VRING_PACKED_DESC_F_USED;

/// Bytes of an event suppression structure.
pub const EVENT_SIZE: usize = 4;

/// A position in the ring, and its wrap counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// Index of the descriptor.
    pub index: u16,
    /// The wrap counter.
    pub wrap: bool,
}

impl Position {
    /// Decodes a position: index in bits 0 to 14, wrap counter in bit 15.
    pub fn from_bits(bits: u16) -> Self {
        Position {
            index: bits & 0x7fff,
            wrap: bits & 0x8000 != 0,
        }
    }

    /// Encodes the position in the same bits.
    pub fn bits(self) -> u16 {
        self.index | u16::from(self.wrap) << 15
    }

    /// Returns the position `count` descriptors later in a ring of `size`.
    pub fn after(self, count: u16, size: u16) -> Self {
        let sum = u32::from(self.index) + u32::from(count);
        let wraps = sum >= u32::from(size);
        Position {
            index: (sum - if wraps { u32::from(size) } else { 0 }) as u16,
            wrap: self.wrap != wraps,
        }
    }

    /// Returns the flags that make a descriptor here available.
    pub fn available(self) -> u16 {
        if self.wrap { AVAILABLE } else { USED }
    }

    /// Returns the flags that mark a descriptor here used.
    pub fn used(self) -> u16 {
        if self.wrap { AVAILABLE | USED } else { 0 }
    }
}

/// Addresses of the parts of the ring in this process.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pointers {
    /// `size` descriptors.
    pub descriptors: *mut u8,
    /// Event suppression of the driver.
    pub driver_event: *mut u8,
    /// Event suppression of the device.
    pub device_event: *mut u8,
}

/// The state of a driver.
#[derive(Debug)]
pub struct PackedRing {
    size: u16,
    event_idx: bool,
    pointers: Pointers,
    next_available: Position,
    next_used: Position,
    /// Ids that no chain uses.
    ids: Vec<u16>,
    /// Number of descriptors of the outstanding chain with this id, else 0.
    outstanding: Box<[u16]>,
    free: u16,
    /// The first descriptor that the device does not see yet, and the flags that publish it and all after it.
    unpublished: Option<(u16, u16)>,
    /// Position at the last decision to kick, and number of descriptors since.
    kicked: Position,
    unkicked: u16,
}

impl PackedRing {
    pub(super) fn new(size: u16, event_idx: bool, base: u16, pointers: Pointers) -> Self {
        let start = Position::from_bits(base);
        let ring = PackedRing {
            size,
            event_idx,
            pointers,
            next_available: start,
            next_used: start,
            ids: (0..size).rev().collect(),
            outstanding: vec![0; usize::from(size)].into_boxed_slice(),
            free: size,
            unpublished: None,
            kicked: start,
            unkicked: 0,
        };
        for index in 0..size {
            // What was used in the round before.
            let round = Position {
                index,
                wrap: start.wrap == (index < start.index),
            };
            ring.set_descriptor(index, Descriptor::default(), 0, round.used());
        }
        ring.set_driver_event(0, VRING_PACKED_EVENT_FLAG_ENABLE as u16);
        ring.event(ring.pointers.device_event, 0)
            .store(0, Ordering::Relaxed);
        ring.event(ring.pointers.device_event, 1)
            .store(0, Ordering::Relaxed);
        ring
    }

    /// Resets the ring to its state at the start of a driver.
    pub(super) fn begin(&mut self, base: u16) {
        *self = Self::new(self.size, self.event_idx, base, self.pointers);
    }

    pub(super) fn free_descriptors(&self) -> u16 {
        self.free
    }

    /// Returns where the next chain goes.
    pub fn next_available(&self) -> Position {
        self.next_available
    }

    /// Returns the position at which the next used descriptor is expected.
    pub fn next_used(&self) -> Position {
        self.next_used
    }

    /// Returns the id that the next chain gets, if there is room for one.
    pub(super) fn next_id(&self) -> Option<u16> {
        self.ids.last().copied()
    }

    /// Adds a chain of descriptors, whose `next` is ignored. Returns its id.
    #[inline]
    pub(super) fn add(
        &mut self,
        count: usize,
        mut descriptor: impl FnMut(usize) -> Descriptor,
    ) -> Option<u16> {
        if count > usize::from(self.free) {
            return None;
        }
        let id = self.ids.pop()?;
        for position in 0..count {
            let Position { index, .. } = self.next_available;
            let entry = descriptor(position);
            let last = position + 1 == count;
            let flags =
                self.next_available.available() | entry.flags & !NEXT | if last { 0 } else { NEXT };
            // The device uses the id in the last descriptor.
            let entry_id = if last { id } else { u16::MAX };
            let hidden = position == 0 && self.unpublished.is_none();
            if hidden {
                self.unpublished = Some((index, flags));
            }
            let shown = if hidden { self.flags(index) } else { flags };
            self.set_descriptor(index, entry, entry_id, shown);
            self.next_available = self.next_available.after(1, self.size);
        }
        self.free -= count as u16;
        self.unkicked += count as u16;
        self.outstanding[usize::from(id)] = count as u16;
        Some(id)
    }

    #[inline]
    pub(super) fn publish(&mut self) {
        if let Some((index, flags)) = self.unpublished.take() {
            self.flags_field(index)
                .store(flags.to_le(), Ordering::Release);
        }
    }

    /// Returns whether the device wants a kick for what was published since the last call.
    #[inline]
    pub(super) fn wants_kick(&mut self) -> bool {
        // The descriptors must be visible before the device's event suppression is read.
        fence(Ordering::SeqCst);
        let count = std::mem::take(&mut self.unkicked);
        let from = std::mem::replace(&mut self.kicked, self.next_available);
        let (position, flags) = self.device_event();
        match u32::from(flags) {
            VRING_PACKED_EVENT_FLAG_DISABLE => false,
            VRING_PACKED_EVENT_FLAG_DESC if self.event_idx => {
                let event = Position::from_bits(position);
                let round = if event.wrap == from.wrap {
                    0
                } else {
                    self.size
                };
                let ahead = i32::from(event.index) + i32::from(round) - i32::from(from.index);
                (0..i32::from(count)).contains(&ahead)
            }
            _ => count > 0,
        }
    }

    #[inline]
    pub(super) fn has_used(&self) -> bool {
        self.flags(self.next_used.index) & (AVAILABLE | USED) == self.next_used.used()
    }

    /// Returns whether all chains are used, if each has one descriptor.
    pub(super) fn has_used_all(&self) -> bool {
        let mut position = self.next_used;
        while position != self.next_available {
            if self.flags(position.index) & (AVAILABLE | USED) != position.used() {
                return false;
            }
            position = position.after(1, self.size);
        }
        true
    }

    #[inline]
    pub(super) fn take_used(&mut self) -> Option<Used> {
        if !self.has_used() {
            return None;
        }
        let (length, id, _) = self.descriptor(self.next_used.index);
        let count = match self.outstanding.get_mut(usize::from(id)) {
            Some(count) if *count > 0 => std::mem::take(count),
            _ => panic!("the device used id {id}, which is not the id of an outstanding chain"),
        };
        self.ids.push(id);
        self.free += count;
        self.next_used = self.next_used.after(count, self.size);
        Some(Used { head: id, length })
    }

    /// Asks for an interrupt at the next used chain.
    #[inline]
    pub(super) fn want_interrupt(&self) {
        if self.event_idx {
            let position = self.next_used.bits();
            self.set_driver_event(position, VRING_PACKED_EVENT_FLAG_DESC as u16);
        } else {
            self.set_driver_event(0, VRING_PACKED_EVENT_FLAG_ENABLE as u16);
        }
    }

    #[inline]
    pub(super) fn want_no_interrupt(&self) {
        let flags = self.event(self.pointers.driver_event, 1);
        // The device reads this for each batch: it is not written without need.
        if flags.load(Ordering::Relaxed) != (VRING_PACKED_EVENT_FLAG_DISABLE as u16).to_le() {
            self.set_driver_event(0, VRING_PACKED_EVENT_FLAG_DISABLE as u16);
        }
    }

    /// Writes the driver's event suppression: position with wrap counter, then flags.
    #[inline]
    pub fn set_driver_event(&self, position: u16, flags: u16) {
        let event = self.pointers.driver_event;
        self.event(event, 0)
            .store(position.to_le(), Ordering::Relaxed);
        self.event(event, 1).store(flags.to_le(), Ordering::Release);
    }

    /// Reads the device's event suppression: position with wrap counter, and flags.
    #[inline]
    pub fn device_event(&self) -> (u16, u16) {
        let event = self.pointers.device_event;
        let flags = u16::from_le(self.event(event, 1).load(Ordering::Acquire));
        let position = u16::from_le(self.event(event, 0).load(Ordering::Relaxed));
        (position, flags)
    }

    /// Reads length, id and flags of a descriptor.
    #[inline]
    pub fn descriptor(&self, index: u16) -> (u32, u16, u16) {
        assert!(index < self.size);
        // SAFETY: the ring has `size` descriptors, aligned to 16 bytes.
        let (length, id) = unsafe {
            let entry = self
                .pointers
                .descriptors
                .add(DESCRIPTOR_SIZE * usize::from(index));
            (
                entry.add(8).cast::<u32>().read_volatile(),
                entry.add(12).cast::<u16>().read_volatile(),
            )
        };
        (u32::from_le(length), u16::from_le(id), self.flags(index))
    }

    /// Writes any descriptor; its own flags and `next` are ignored.
    #[inline]
    pub fn set_descriptor(&self, index: u16, descriptor: Descriptor, id: u16, flags: u16) {
        assert!(index < self.size);
        let entry = with_id(descriptor, id, flags);
        // SAFETY: `index` is in the ring.
        unsafe { write_descriptor(self.pointers.descriptors, index, entry) };
    }

    #[inline]
    fn flags(&self, index: u16) -> u16 {
        u16::from_le(self.flags_field(index).load(Ordering::Acquire))
    }

    #[inline]
    fn flags_field(&self, index: u16) -> &AtomicU16 {
        assert!(index < self.size);
        let offset = DESCRIPTOR_SIZE * usize::from(index) + 14;
        // SAFETY: the ring has `size` descriptors, aligned to 16 bytes.
        unsafe { AtomicU16::from_ptr(self.pointers.descriptors.add(offset).cast()) }
    }

    #[inline]
    fn event(&self, event: *mut u8, field: usize) -> &AtomicU16 {
        // SAFETY: both structures have two such fields, and are aligned to 4 bytes.
        unsafe { AtomicU16::from_ptr(event.add(2 * field).cast()) }
    }
}

/// Creates the descriptor of a buffer in an indirect table, where the id has no meaning.
#[inline]
pub(super) fn indirect(buffer: &Buffer) -> Descriptor {
    let descriptor = Descriptor::of(buffer);
    with_id(descriptor, u16::MAX, descriptor.flags)
}

/// Returns a descriptor with its fields in the order of packed rings.
#[inline]
fn with_id(descriptor: Descriptor, id: u16, flags: u16) -> Descriptor {
    Descriptor {
        flags: id,
        next: flags,
        ..descriptor
    }
}
