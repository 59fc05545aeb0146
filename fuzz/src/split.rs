// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The driver's side of a split ring (VIRTIO 1.3, 2.7), with mistakes, and what the device must do with it.

use arbitrary::Arbitrary;
use vhost_device_common::ring::MAX_INDIRECT_DESCRIPTORS;
use virtio_bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
    VRING_USED_F_NO_NOTIFY,
};

use crate::guest::{Guest, Piece};

/// The offsets of the parts of a ring with at most 256 descriptors, and the size of a ring.
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x1400;
const RING_SIZE: u64 = 0x2000;
/// The address of the tables of indirect descriptors, and their size for each ring.
const TABLES: u64 = 0x4000;
const TABLES_SIZE: u64 = 0x2000;
pub const DESCRIPTOR_SIZE: u64 = 16;
/// The number of descriptors that fit in the tables of a ring.
pub const TABLE_DESCRIPTORS: usize = (TABLES_SIZE / DESCRIPTOR_SIZE) as usize;

const NEXT: u16 = VRING_DESC_F_NEXT as u16;
const WRITE: u16 = VRING_DESC_F_WRITE as u16;
const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

/// The addresses of the parts of one ring.
#[derive(Clone, Copy, Debug)]
pub struct Places {
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
    pub tables: u64,
}

impl Places {
    pub fn new(number: u16) -> Self {
        let descriptors = RING_SIZE * u64::from(number);
        Self {
            descriptors,
            available: descriptors + AVAILABLE,
            used: descriptors + USED,
            tables: TABLES + TABLES_SIZE * u64::from(number),
        }
    }

    /// Returns the address of a table of `length` bytes: `next`, or the address of the first table if it does not fit there.
    pub fn table(&self, next: &mut u64, length: u64) -> u64 {
        if length > (self.tables + TABLES_SIZE).saturating_sub(*next) {
            *next = self.tables;
        }
        let table = *next;
        *next += length;
        table
    }
}

/// The initial state of a ring.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct Start {
    size: u8,
    /// The index of the first available and used entries.
    index: u16,
    pub event_index: bool,
    pub indirect: bool,
    pub packed: bool,
}

impl Start {
    /// Creates a random start with enough descriptors for some requests, and with indirect descriptors.
    #[cfg(test)]
    pub fn new(random: &mut fastrand::Rng) -> Self {
        Self {
            size: random.u8(5..9) | random.u8(0..5) << 4,
            index: random.u16(..),
            event_index: random.bool(),
            indirect: true,
            packed: random.bool(),
        }
    }

    /// Returns the number of descriptors in the ring.
    pub fn size(&self) -> u16 {
        match self.packed {
            true => u16::from(self.size) + 1,
            false => 1 << (self.size % 9),
        }
    }

    /// Returns the index of the first available entry.
    pub fn index(&self) -> u16 {
        self.index
    }
}

/// A mistake of a driver.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Mistake {
    Address(u8, u64),
    Length(u8, u32),
    Flags(u8, u8),
    Next(u8, u16),
    /// A wrong entry of the available ring, counted back from the last one.
    Head(u8, u16),
    AvailableIndex(u16),
    /// The available index moves by a few entries in either direction.
    AvailableStep(i8),
    NoInterrupt(bool),
    UsedEvent(u16),
    /// Writes to the rings and the tables.
    Anything(u16, u16),
}

/// The readable and the writable pieces of a chain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Walked {
    pub readable: Vec<Piece>,
    pub writable: Vec<Piece>,
}

/// A split ring.
pub struct Split {
    start: Start,
    places: Places,
    /// The index up to which the driver has made requests available.
    available: u16,
    /// The index up to which the driver has seen used entries.
    used: u16,
    next_descriptor: u16,
    next_table: u64,
}

impl Split {
    /// Creates an empty ring.
    pub fn new(places: Places, start: Start, guest: &mut Guest) -> Self {
        guest.write(places.available + 2, &start.index.to_le_bytes());
        guest.write(places.used + 2, &start.index.to_le_bytes());
        Self {
            start,
            places,
            available: start.index,
            used: start.index,
            next_descriptor: 0,
            next_table: places.tables,
        }
    }

    fn available(&self) -> u64 {
        self.places.available
    }

    fn used(&self) -> u64 {
        self.places.used
    }

    /// Accepts what the device wrote to the used ring.
    pub fn give_used(&self, guest: &mut Guest) {
        guest.give(self.used(), 4 + 8 * u64::from(self.start.size()) + 2);
    }

    fn slot(&self, index: u16) -> u64 {
        u64::from(index & (self.start.size() - 1))
    }

    /// Makes a request available.
    pub fn add(&mut self, guest: &mut Guest, pieces: &[(Piece, bool)], indirect: bool) {
        let flags = |is_writable: &bool| if *is_writable { WRITE } else { 0 };
        let head = self.next_descriptor;
        if indirect && !pieces.is_empty() {
            let length = DESCRIPTOR_SIZE * pieces.len() as u64;
            let table = self.places.table(&mut self.next_table, length);
            for (number, (piece, is_writable)) in (0..).zip(pieces) {
                let is_last = usize::from(number) + 1 == pieces.len();
                let flags = flags(is_writable) | if is_last { 0 } else { NEXT };
                descriptor(guest, table, number, piece, flags, number + 1);
            }
            let table = Piece::new(table, length as u32);
            self.push(guest, &table, INDIRECT, false);
        } else {
            for (number, (piece, is_writable)) in pieces.iter().enumerate() {
                self.push(guest, piece, flags(is_writable), number + 1 < pieces.len());
            }
        }
        let entry = self.available() + 4 + 2 * self.slot(self.available);
        guest.write(entry, &head.to_le_bytes());
        self.available = self.available.wrapping_add(1);
        guest.write(self.available() + 2, &self.available.to_le_bytes());
    }

    /// Writes the next descriptor.
    fn push(&mut self, guest: &mut Guest, piece: &Piece, flags: u16, continues: bool) {
        let number = self.next_descriptor;
        self.next_descriptor = (number + 1) & (self.start.size() - 1);
        let flags = flags | if continues { NEXT } else { 0 };
        descriptor(
            guest,
            self.places.descriptors,
            number,
            piece,
            flags,
            self.next_descriptor,
        );
    }

    /// Makes a mistake.
    pub fn err(&mut self, guest: &mut Guest, mistake: Mistake) {
        // `back` counts back from the newest descriptor.
        let field = |back: u8, field: u64| {
            let number = self
                .next_descriptor
                .wrapping_sub(u16::from(back))
                .wrapping_sub(1);
            self.places.descriptors + DESCRIPTOR_SIZE * self.slot(number) + field
        };
        match mistake {
            Mistake::Address(back, value) => guest.write(field(back, 0), &value.to_le_bytes()),
            Mistake::Length(back, value) => guest.write(field(back, 8), &value.to_le_bytes()),
            Mistake::Flags(back, value) => {
                guest.write(field(back, 12), &u16::from(value).to_le_bytes());
            }
            Mistake::Next(back, value) => guest.write(field(back, 14), &value.to_le_bytes()),
            Mistake::Head(back, value) => {
                let index = self.available.wrapping_sub(u16::from(back)).wrapping_sub(1);
                let entry = self.available() + 4 + 2 * self.slot(index);
                guest.write(entry, &value.to_le_bytes());
            }
            Mistake::AvailableIndex(value) => {
                self.available = value;
                guest.write(self.available() + 2, &value.to_le_bytes());
            }
            Mistake::AvailableStep(step) => {
                self.available = self.available.wrapping_add_signed(step.into());
                guest.write(self.available() + 2, &self.available.to_le_bytes());
            }
            Mistake::NoInterrupt(value) => {
                let flags = if value { VRING_AVAIL_F_NO_INTERRUPT } else { 0 };
                guest.write(self.available(), &(flags as u16).to_le_bytes());
            }
            Mistake::UsedEvent(value) => {
                let event = self.available() + 4 + 2 * u64::from(self.start.size());
                guest.write(event, &value.to_le_bytes());
            }
            Mistake::Anything(place, value) => {
                guest.write(u64::from(place) & 0x7ffe, &value.to_le_bytes());
            }
        }
    }

    /// Reads the available index in the ring.
    pub fn available_index(&self, guest: &Guest) -> u16 {
        guest.number::<2>(self.available() + 2) as u16
    }

    /// Reads the used index in the ring.
    pub fn used_index(&self, guest: &Guest) -> u16 {
        guest.number::<2>(self.used() + 2) as u16
    }

    /// Returns the used entries since the last call: heads and written lengths.
    pub fn answers(&mut self, guest: &Guest) -> Vec<(u16, u32)> {
        let count = self.used_index(guest).wrapping_sub(self.used);
        let mut answers = Vec::new();
        for _ in 0..count.min(self.start.size()) {
            let entry = self.used() + 4 + 8 * self.slot(self.used);
            let head = guest.number::<4>(entry) as u16;
            answers.push((head, guest.number::<4>(entry + 4) as u32));
            self.used = self.used.wrapping_add(1);
        }
        answers
    }

    /// Reads the available entry with this index.
    pub fn head(&self, guest: &Guest, index: u16) -> u16 {
        guest.number::<2>(self.available() + 4 + 2 * self.slot(index)) as u16
    }

    /// Expects a used entry with this index.
    pub fn expect_used(&self, guest: &mut Guest, index: u16, head: u16, length: u32) {
        let entry = self.used() + 4 + 8 * self.slot(index);
        guest.expect(entry, &u32::from(head).to_le_bytes());
        guest.expect(entry + 4, &length.to_le_bytes());
    }

    /// Expects this used index.
    pub fn expect_used_index(&self, guest: &mut Guest, index: u16) {
        guest.expect(self.used() + 2, &index.to_le_bytes());
    }

    /// Expects that the device requests a kick for the request with this index, or no kick.
    pub fn expect_wish(&self, guest: &mut Guest, wish: Option<u16>) {
        if self.start.event_index {
            let event = self.used() + 4 + 8 * u64::from(self.start.size());
            if let Some(index) = wish {
                guest.expect(event, &index.to_le_bytes());
            }
        } else {
            let flags = wish.map_or(VRING_USED_F_NO_NOTIFY, |_| 0);
            guest.expect(self.used(), &(flags as u16).to_le_bytes());
        }
    }

    /// Returns whether the driver requests a call when the used index changes from `before` to `after`.
    pub fn wants_call(&self, guest: &Guest, before: u16, after: u16) -> bool {
        if before == after {
            return false;
        }
        if self.start.event_index {
            let event =
                guest.number::<2>(self.available() + 4 + 2 * u64::from(self.start.size())) as u16;
            // The driver waits for one of the entries before..after.
            let count = after.wrapping_sub(before);
            event.wrapping_sub(before) < count
        } else {
            guest.number::<2>(self.available()) & u64::from(VRING_AVAIL_F_NO_INTERRUPT) == 0
        }
    }

    /// Follows the chain at `head`. Returns `None` if it is not valid.
    pub fn walk(&self, guest: &Guest, head: u16) -> Option<Walked> {
        let mut walked = Walked::default();
        let mut table = (self.places.descriptors, u64::from(self.start.size()));
        let mut is_inside = false;
        let mut most = usize::from(self.start.size());
        let mut number = u64::from(head);
        loop {
            if walked.readable.len() + walked.writable.len() >= most || number >= table.1 {
                return None;
            }
            let address = table.0.checked_add(DESCRIPTOR_SIZE * number)?;
            let mut bytes = [0; DESCRIPTOR_SIZE as usize];
            let entry = guest.memory.slice(address, bytes.len()).ok()?;
            entry.copy_to(&mut bytes);
            let (address, rest) = bytes.split_first_chunk()?;
            let (length, rest) = rest.split_first_chunk()?;
            let (flags, rest) = rest.split_first_chunk()?;
            let piece = Piece::new(u64::from_le_bytes(*address), u32::from_le_bytes(*length));
            let flags = u16::from_le_bytes(*flags);
            let next = u16::from_le_bytes(rest.try_into().ok()?);
            if flags & INDIRECT != 0 {
                let count = u64::from(piece.length) / DESCRIPTOR_SIZE;
                let is_whole = count > 0 && u64::from(piece.length) % DESCRIPTOR_SIZE == 0;
                if is_inside || !self.start.indirect || flags & NEXT != 0 || !is_whole {
                    return None;
                }
                table = (piece.address, count);
                is_inside = true;
                most = most.max(MAX_INDIRECT_DESCRIPTORS);
                number = 0;
                continue;
            }
            if flags & WRITE != 0 {
                walked.writable.push(piece);
            } else if walked.writable.iter().any(|piece| piece.length > 0) {
                return None;
            } else {
                walked.readable.push(piece);
            }
            if flags & NEXT == 0 {
                return Some(walked);
            }
            number = next.into();
        }
    }
}

/// Writes one descriptor of a table.
fn descriptor(guest: &mut Guest, table: u64, number: u16, piece: &Piece, flags: u16, next: u16) {
    let place = table + DESCRIPTOR_SIZE * u64::from(number);
    guest.write(place, &piece.address.to_le_bytes());
    guest.write(place + 8, &piece.length.to_le_bytes());
    guest.write(place + 12, &flags.to_le_bytes());
    guest.write(place + 14, &next.to_le_bytes());
}
