// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The driver's side of a packed ring (VIRTIO 1.3, 2.8), with mistakes.

use virtio_bindings::virtio_ring::{
    VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_PACKED_DESC_F_AVAIL,
    VRING_PACKED_DESC_F_USED, VRING_PACKED_EVENT_FLAG_DESC, VRING_PACKED_EVENT_FLAG_DISABLE,
    VRING_PACKED_EVENT_FLAG_ENABLE,
};

use crate::guest::{Guest, Piece};
use crate::split::{DESCRIPTOR_SIZE, Mistake, Places, Start};

const NEXT: u16 = VRING_DESC_F_NEXT as u16;
const WRITE: u16 = VRING_DESC_F_WRITE as u16;
const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;
const AVAILABLE: u16 = 1 << VRING_PACKED_DESC_F_AVAIL;
const USED: u16 = 1 << VRING_PACKED_DESC_F_USED;

/// The offsets of the buffer id and of the flags in a descriptor.
const ID: u64 = 12;
const FLAGS: u64 = 14;
/// The size of an event suppression structure, in bytes.
const EVENT_SIZE: u64 = 4;

/// A position in the ring, and its wrap counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Position {
    index: u16,
    wrap: bool,
}

impl Position {
    fn after(self, count: u16, size: u16) -> Self {
        match self.index + count {
            index if index < size => Self { index, ..self },
            index => Self {
                index: (index - size) % size,
                wrap: !self.wrap,
            },
        }
    }
}

/// When the device requests a kick.
#[derive(Clone, Copy, Debug)]
pub enum Wish {
    At(u16),
    Always,
    Never,
}

/// A packed ring.
pub struct Packed {
    size: u16,
    places: Places,
    next: Position,
    next_used: Position,
    next_table: u64,
    /// The buffer ids of requests that are not completed, and their numbers of descriptors.
    open: Vec<(u16, u16)>,
}

impl Packed {
    /// Creates an empty ring.
    pub fn new(places: Places, start: Start, guest: &mut Guest) -> Self {
        let size = start.size();
        let next = Position {
            index: start.index() % size,
            wrap: start.index() >= 0x8000,
        };
        if !next.wrap {
            // The last descriptor is used in the previous round, which distinguishes base 0 from a new ring.
            let flags = AVAILABLE | USED;
            let last = places.descriptors + DESCRIPTOR_SIZE * u64::from(size - 1);
            guest.write(last + FLAGS, &flags.to_le_bytes());
        }
        Self {
            size,
            places,
            next,
            next_used: next,
            next_table: places.tables,
            open: Vec::new(),
        }
    }

    /// Returns the base of the ring.
    pub fn base(start: Start) -> u32 {
        let bits = (start.index() % start.size()) | (start.index() & 0x8000);
        u32::from(bits) | u32::from(bits) << 16
    }

    fn place(&self, index: u16) -> u64 {
        self.places.descriptors + DESCRIPTOR_SIZE * u64::from(index)
    }

    /// Returns the memory of a descriptor. Bit 15 of `place` is its wrap counter.
    pub fn descriptor(&self, place: u16) -> Piece {
        Piece::new(self.place(place & 0x7fff), DESCRIPTOR_SIZE as u32)
    }

    /// Returns the memory of the event suppression of the device.
    pub fn device_event(&self) -> Piece {
        Piece::new(self.places.used, EVENT_SIZE as u32)
    }

    /// Returns whether the driver requests a call when the descriptors `from..to` are used. Returns `None` if it requests one for a descriptor
    /// that does not exist.
    pub fn wants_call(&self, guest: &Guest, event_index: bool, from: u16, to: u16) -> Option<bool> {
        let position = |bits: u16| Position {
            index: bits & 0x7fff,
            wrap: bits >= 0x8000,
        };
        let event = position(guest.number::<2>(self.places.available) as u16);
        let flags = guest.number::<2>(self.places.available + 2) as u32 & 3;
        if flags != VRING_PACKED_EVENT_FLAG_DESC || !event_index {
            return Some(flags != VRING_PACKED_EVENT_FLAG_DISABLE);
        }
        let (mut here, end) = (position(from), position(to));
        while here != end {
            if here == event {
                return Some(true);
            }
            here = here.after(1, self.size);
        }
        (event.index < self.size).then_some(false)
    }

    /// Checks for which descriptors the device requests a kick.
    pub fn expect_wish(&self, guest: &Guest, wish: Wish) {
        let flags = guest.number::<2>(self.places.used + 2) as u32;
        match wish {
            Wish::At(place) => {
                assert_eq!(flags, VRING_PACKED_EVENT_FLAG_DESC);
                assert_eq!(guest.number::<2>(self.places.used), u64::from(place));
            }
            Wish::Always => assert_eq!(flags, VRING_PACKED_EVENT_FLAG_ENABLE),
            Wish::Never => assert_eq!(flags, VRING_PACKED_EVENT_FLAG_DISABLE),
        }
    }

    /// Accepts what the device wrote to the ring and to its event suppression.
    pub fn give_used(&self, guest: &mut Guest) {
        let length = DESCRIPTOR_SIZE * u64::from(self.size);
        guest.give(self.places.descriptors, length);
        guest.give(self.places.used, EVENT_SIZE);
    }

    /// Makes a request available.
    pub fn add(&mut self, guest: &mut Guest, pieces: &[(Piece, bool)], indirect: bool) {
        let id = self.next.index;
        let flags = |is_writable: &bool| if *is_writable { WRITE } else { 0 };
        let before = self.next;
        if indirect && !pieces.is_empty() {
            let length = DESCRIPTOR_SIZE * pieces.len() as u64;
            let table = self.places.table(&mut self.next_table, length);
            for (number, (piece, is_writable)) in (0..).zip(pieces) {
                let place = table + DESCRIPTOR_SIZE * number;
                descriptor(guest, place, piece, 0, flags(is_writable));
            }
            self.push(guest, &Piece::new(table, length as u32), id, INDIRECT);
        } else {
            for (number, (piece, is_writable)) in pieces.iter().enumerate() {
                let is_last = number + 1 == pieces.len();
                let flags = flags(is_writable) | if is_last { 0 } else { NEXT };
                self.push(guest, piece, id, flags);
            }
        }
        let count = if indirect { 1 } else { pieces.len() as u16 };
        let is_somewhere_else = before.index != self.next.index || before.wrap != self.next.wrap;
        if is_somewhere_else {
            self.open.push((id, count));
        }
    }

    fn push(&mut self, guest: &mut Guest, piece: &Piece, id: u16, flags: u16) {
        let round = if self.next.wrap { AVAILABLE } else { USED };
        descriptor(guest, self.place(self.next.index), piece, id, flags | round);
        self.next = self.next.after(1, self.size);
    }

    /// Makes a mistake.
    pub fn err(&mut self, guest: &mut Guest, mistake: Mistake) {
        // `back` counts back from the newest descriptor.
        let newest = |back: u8| {
            let back = u16::from(back) % self.size + 1;
            self.place((self.next.index + self.size - back) % self.size)
        };
        match mistake {
            Mistake::Address(back, value) => guest.write(newest(back), &value.to_le_bytes()),
            Mistake::Length(back, value) => guest.write(newest(back) + 8, &value.to_le_bytes()),
            Mistake::Flags(back, value) => guest.write(newest(back) + FLAGS, &[value]),
            Mistake::Next(back, value) => guest.write(newest(back) + ID, &value.to_le_bytes()),
            Mistake::Head(back, value) => guest.write(newest(back) + FLAGS, &value.to_le_bytes()),
            Mistake::AvailableIndex(value) => {
                self.next.index = value % self.size;
                self.next.wrap = value >= 0x8000;
            }
            Mistake::AvailableStep(step) => {
                let step = u16::from(step.unsigned_abs()) % self.size;
                self.next = self.next.after(step, self.size);
            }
            Mistake::NoInterrupt(value) => {
                let flags = match value {
                    true => VRING_PACKED_EVENT_FLAG_DISABLE,
                    false => VRING_PACKED_EVENT_FLAG_ENABLE,
                };
                let place = self.places.available + 2;
                guest.write(place, &(flags as u16).to_le_bytes());
            }
            Mistake::UsedEvent(value) => {
                let event = [value, 2].map(u16::to_le_bytes).concat();
                guest.write(self.places.available, &event);
            }
            Mistake::Anything(place, value) => {
                guest.write(u64::from(place) & 0x7ffe, &value.to_le_bytes());
            }
        }
    }

    /// Returns the used descriptors since the last call: buffer ids and written lengths.
    pub fn answers(&mut self, guest: &Guest) -> Vec<(u16, u32)> {
        let mut answers = Vec::new();
        while !self.open.is_empty() {
            let place = self.place(self.next_used.index);
            let flags = guest.number::<2>(place + FLAGS) as u16;
            let round = if self.next_used.wrap {
                AVAILABLE | USED
            } else {
                0
            };
            let id = guest.number::<2>(place + ID) as u16;
            let open = self.open.iter().position(|(open, _)| *open == id);
            let Some(open) = open.filter(|_| flags & (AVAILABLE | USED) == round) else {
                break;
            };
            let (_, count) = self.open.remove(open);
            answers.push((id, guest.number::<4>(place + 8) as u32));
            self.next_used = self.next_used.after(count % (self.size + 1), self.size);
        }
        answers
    }
}

/// Writes one descriptor.
fn descriptor(guest: &mut Guest, place: u64, piece: &Piece, id: u16, flags: u16) {
    guest.write(place, &piece.address.to_le_bytes());
    guest.write(place + 8, &piece.length.to_le_bytes());
    guest.write(place + ID, &id.to_le_bytes());
    guest.write(place + FLAGS, &flags.to_le_bytes());
}
