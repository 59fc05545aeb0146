// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A driver: puts requests into memory and into a ring, most of them as it should.

use arbitrary::Arbitrary;
use vhost_device_common::ring::RingSetup;

use crate::guest::{Address, DATA, Guest, Piece, USER};
use crate::packed::Packed;
use crate::split::{Mistake, Places, Split, Start, TABLE_DESCRIPTORS};

/// How a request is spread over memory.
#[derive(Arbitrary, Clone, Debug)]
pub struct Shape {
    indirect: bool,
    /// Lengths of the first pieces of each half.
    cuts: [Vec<u8>; 2],
    /// A piece that is elsewhere.
    stray: Option<(u8, Address)>,
    /// A piece that has another length.
    length: Option<(u8, u32)>,
}

impl Shape {
    /// A shape with all pieces where they should be.
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

    /// Whether all pieces are where they should be.
    pub fn is_plain(&self) -> bool {
        self.stray.is_none() && self.length.is_none()
    }
}

/// A ring of either format.
enum Format {
    Split(Split),
    Packed(Packed),
}

/// The same for a ring of either format.
macro_rules! either {
    ($ring:expr, $inner:ident => $value:expr) => {
        match $ring {
            Format::Split($inner) => $value,
            Format::Packed($inner) => $value,
        }
    };
}

/// A driver with one ring, or two.
pub struct Driver {
    start: Start,
    rings: Vec<Format>,
    /// Where the next bytes go.
    next: u64,
    /// Bytes that requests take which the device may still hold.
    taken: u64,
    /// Descriptors of each ring that such requests take.
    busy: Vec<usize>,
    /// Descriptors in tables that such requests take.
    in_tables: Vec<usize>,
    /// Requests of each ring that are not answered.
    open: Vec<usize>,
    /// All that the device was given to write.
    given: Vec<Piece>,
    /// The driver wrote nothing but what it should, so that it knows what it gave.
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

    /// A ring as the front-end tells the device.
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

    /// Where the device begins.
    pub fn base(&self) -> u32 {
        match self.start.packed {
            true => Packed::base(self.start),
            false => self.start.index().into(),
        }
    }

    /// The split ring of a driver that has no other.
    pub fn split(&self) -> &Split {
        match self.rings.first() {
            Some(Format::Split(ring)) => ring,
            _ => panic!("a driver without a split ring"),
        }
    }

    /// The packed ring of a driver that has no other.
    pub fn packed(&self) -> &Packed {
        match self.rings.first() {
            Some(Format::Packed(ring)) => ring,
            _ => panic!("a driver without a packed ring"),
        }
    }

    /// Memory for `length` bytes, none of it twice until all was used; `None` if there is not that much.
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

    /// Pieces for `length` bytes.
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

    /// Makes a request available on a ring. Gives the pieces that the device is to write.
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
            // It may have memory of others.
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
        // Descriptors that are in use cannot be used again, and one of nothing is what was there before.
        self.is_honest &= count > 0 && *busy <= self.start.size().into();
        self.is_honest &= self.start.indirect || !shape.indirect;
        // A table that has no room at the end leaves up to half of it unused.
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

    /// Whether requests since [`Driver::settle`] have no memory in common.
    pub fn is_apart(&self) -> bool {
        self.taken <= DATA.end - DATA.start
    }

    /// What the device gave back on a ring since the last time: names, and how much it wrote.
    pub fn answers(&mut self, ring: u16, guest: &Guest) -> Vec<(u16, u32)> {
        let answers = either!(&mut self.rings[usize::from(ring)], ring => ring.answers(guest));
        let open = &mut self.open[usize::from(ring)];
        *open = open.saturating_sub(answers.len());
        answers
    }

    /// Whether all requests were answered.
    pub fn is_empty(&mut self, guest: &Guest) -> bool {
        (0..self.rings.len()).for_each(|ring| drop(self.answers(ring as u16, guest)));
        self.open.iter().all(|open| *open == 0)
    }

    /// The device is done with all requests.
    pub fn settle(&mut self) {
        self.taken = 0;
        self.busy.fill(0);
        self.in_tables.fill(0);
    }

    /// Writes something wrong, about a ring.
    pub fn err(&mut self, ring: u16, guest: &mut Guest, mistake: Mistake) {
        let is_harmless = matches!(mistake, Mistake::NoInterrupt(_) | Mistake::UsedEvent(_));
        self.is_honest &= is_harmless;
        either!(&mut self.rings[usize::from(ring)], ring => ring.err(guest, mistake));
    }

    /// Whether the driver did nothing wrong so far that the device could not tell.
    pub fn is_honest(&self) -> bool {
        self.is_honest
    }

    /// Checks that the device wrote what it was given to write, and the ring, and nothing else.
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
