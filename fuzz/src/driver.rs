// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A driver, which writes requests to memory and to a ring. Most of them are correct.

use arbitrary::Arbitrary;
use vhost_device_common::ring::RingSetup;

use crate::guest::{Address, DATA, Guest, Piece, USER};
use crate::packed::Packed;
use crate::split::{Mistake, Places, Split, Start, TABLE_DESCRIPTORS};

/// The layout of a request in memory.
#[derive(Arbitrary, Clone, Debug)]
pub struct Shape {
    indirect: bool,
    /// The lengths of the first pieces of the readable part, and of the writable part.
    cuts: [Vec<u8>; 2],
    /// The number of a piece, and its wrong address.
    stray: Option<(u8, Address)>,
    /// The number of a piece, and its wrong length.
    length: Option<(u8, u32)>,
}

impl Shape {
    /// Creates a random shape without mistakes.
    #[cfg(test)]
    pub fn plain(random: &mut fastrand::Rng) -> Self {
        let cuts = |random: &mut fastrand::Rng| match random.bool() {
            true => vec![random.u8(1..20)],
            false => Vec::new(),
        };
        Self {
            indirect: random.bool(),
            cuts: [cuts(random), cuts(random)],
            stray: None,
            length: None,
        }
    }

    /// Returns whether all pieces have the right address and length.
    pub fn is_plain(&self) -> bool {
        self.stray.is_none() && self.length.is_none()
    }
}

/// A ring of either format.
enum Format {
    Split(Split),
    Packed(Packed),
}

/// Evaluates an expression for a ring of either format.
macro_rules! either {
    ($ring:expr, $inner:ident => $value:expr) => {
        match $ring {
            Format::Split($inner) => $value,
            Format::Packed($inner) => $value,
        }
    };
}

/// A driver with one or two rings.
pub struct Driver {
    start: Start,
    rings: Vec<Format>,
    /// The address for the next bytes.
    next: u64,
    /// The memory of requests that the device may still hold, in bytes.
    taken: u64,
    /// The number of descriptors of these requests, for each ring.
    busy: Vec<usize>,
    /// The number of descriptors in their indirect tables, for each ring.
    in_tables: Vec<usize>,
    /// The number of requests that are not completed, for each ring.
    open: Vec<usize>,
    /// All memory that the device may write.
    given: Vec<Piece>,
    /// The driver made no mistake that the device cannot detect, so it knows which memory the device may write.
    is_honest: bool,
}

impl Driver {
    pub fn new(rings: u16, start: Start, guest: &mut Guest) -> Self {
        let ring = |number| match start.packed {
            true => Format::Packed(Packed::new(Places::new(number), start, guest)),
            false => Format::Split(Split::new(Places::new(number), start, guest)),
        };
        Self {
            start,
            rings: (0..rings).map(ring).collect(),
            next: DATA.start,
            taken: 0,
            busy: vec![0; usize::from(rings)],
            in_tables: vec![0; usize::from(rings)],
            open: vec![0; usize::from(rings)],
            given: Vec::new(),
            is_honest: true,
        }
    }

    /// Returns the set-up of a ring that the front-end sends.
    pub fn setup(&self, ring: u16) -> RingSetup {
        let places = Places::new(ring);
        RingSetup {
            size: self.start.size(),
            descriptors: USER + places.descriptors,
            available: USER + places.available,
            used: USER + places.used,
            packed: self.start.packed,
            event_index: self.start.event_index,
            indirect: self.start.indirect,
            ..RingSetup::default()
        }
    }

    /// Returns the base of the rings.
    pub fn base(&self) -> u32 {
        match self.start.packed {
            true => Packed::base(self.start),
            false => self.start.index().into(),
        }
    }

    /// Returns the split ring of a driver with one ring.
    pub fn split(&self) -> &Split {
        match self.rings.first() {
            Some(Format::Split(ring)) => ring,
            _ => panic!("a driver without a split ring"),
        }
    }

    /// Returns the packed ring of a driver with one ring.
    pub fn packed(&self) -> &Packed {
        match self.rings.first() {
            Some(Format::Packed(ring)) => ring,
            _ => panic!("a driver without a packed ring"),
        }
    }

    /// Allocates `length` bytes. Uses no memory twice until all was used. Returns `None` if there is not enough memory.
    fn allocate(&mut self, length: u64) -> Option<u64> {
        if length > DATA.end - DATA.start {
            return None;
        }
        if length > DATA.end - self.next {
            self.taken += DATA.end - self.next;
            self.next = DATA.start;
        }
        self.taken += length;
        let address = self.next;
        self.next += length;
        Some(address)
    }

    /// Allocates `length` bytes in pieces.
    fn place(&mut self, length: u64, cuts: &[u8]) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let mut left = length;
        let mut cuts = cuts.iter();
        while left > 0 {
            let most = cuts.next().map_or(0x4000, |cut| u64::from(*cut));
            let size = left.min(most);
            let address = self.allocate(size).unwrap_or(DATA.start);
            pieces.push(Piece::new(address, size as u32));
            left -= size;
        }
        pieces
    }

    /// Makes a request available on a ring. Returns the pieces that the device may write.
    pub fn submit(
        &mut self,
        ring_number: u16,
        guest: &mut Guest,
        readable: &[u8],
        writable: u64,
        shape: &Shape,
    ) -> Vec<Piece> {
        let [read_cuts, write_cuts] = &shape.cuts;
        let mut to_read = self.place(readable.len() as u64, read_cuts);
        let mut to_write = self.place(writable, write_cuts);
        let mut rest = readable;
        for piece in &to_read {
            let (front, back) = rest.split_at(piece.length as usize);
            guest.write(piece.address, front);
            rest = back;
        }
        let count = to_read.len() + to_write.len();
        let mut all: Vec<_> = to_read.iter_mut().chain(&mut to_write).collect();
        if let Some((number, Address(address))) = shape.stray
            && count > 0
        {
            all[usize::from(number) % count].address = address;
            self.is_honest &= address >= DATA.start;
        }
        if let Some((number, length)) = shape.length
            && count > 0
        {
            all[usize::from(number) % count].length = length;
        }
        if !shape.is_plain() {
            // It can overlap with the memory of other requests.
            self.taken = DATA.end;
        }
        let busy = &mut self.busy[usize::from(ring_number)];
        let in_tables = &mut self.in_tables[usize::from(ring_number)];
        if shape.indirect {
            *busy += 1;
            *in_tables += count;
        } else {
            *busy += count;
        }
        // The driver must not reuse descriptors that are in use, and an empty request would repeat an old descriptor.
        self.is_honest &= count > 0 && *busy <= self.start.size().into();
        self.is_honest &= self.start.indirect || !shape.indirect;
        // A table that does not fit at the end leaves up to half of the space unused.
        self.is_honest &= *in_tables <= TABLE_DESCRIPTORS / 2;
        self.given.extend(&to_write);
        let readable = to_read.iter().map(|piece| (*piece, false));
        let writable = to_write.iter().map(|piece| (*piece, true));
        let pieces: Vec<_> = readable.chain(writable).collect();
        let ring = &mut self.rings[usize::from(ring_number)];
        either!(ring, ring => ring.add(guest, &pieces, shape.indirect));
        self.open[usize::from(ring_number)] += 1;
        to_write
    }

    /// Returns whether the requests since [`Driver::settle`] do not overlap in memory.
    pub fn is_apart(&self) -> bool {
        self.taken <= DATA.end - DATA.start
    }

    /// Returns the requests that the device completed on a ring since the last call: head or buffer id, and the written length.
    pub fn answers(&mut self, ring: u16, guest: &Guest) -> Vec<(u16, u32)> {
        let answers = either!(&mut self.rings[usize::from(ring)], ring => ring.answers(guest));
        let open = &mut self.open[usize::from(ring)];
        *open = open.saturating_sub(answers.len());
        answers
    }

    /// Returns whether all requests are completed.
    pub fn is_empty(&mut self, guest: &Guest) -> bool {
        (0..self.rings.len()).for_each(|ring| drop(self.answers(ring as u16, guest)));
        self.open.iter().all(|open| *open == 0)
    }

    /// Marks all requests as completed, so that their memory can be used again.
    pub fn settle(&mut self) {
        self.taken = 0;
        self.busy.fill(0);
        self.in_tables.fill(0);
    }

    /// Makes a mistake on a ring.
    pub fn err(&mut self, ring: u16, guest: &mut Guest, mistake: Mistake) {
        let is_harmless = matches!(mistake, Mistake::NoInterrupt(_) | Mistake::UsedEvent(_));
        self.is_honest &= is_harmless;
        either!(&mut self.rings[usize::from(ring)], ring => ring.err(guest, mistake));
    }

    /// Returns false once the driver has made a mistake that the device cannot detect.
    pub fn is_honest(&self) -> bool {
        self.is_honest
    }

    /// Checks that the device wrote only to the memory that it may write, and to the rings.
    pub fn assert_untouched(&self, guest: &mut Guest) {
        if !self.is_honest {
            return;
        }
        for ring in &self.rings {
            either!(ring, ring => ring.give_used(guest));
        }
        for piece in &self.given {
            guest.give(piece.address, piece.length.into());
        }
        guest.assert_untouched();
    }
}
