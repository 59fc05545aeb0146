// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Split rings. What the ring takes, reads, writes and publishes is compared with what VIRTIO says of the same memory.

use std::collections::VecDeque;
use std::sync::Arc;

use vhost_device_common::chain::{Chain, ChainError};
use vhost_device_common::ring::inflight::{InflightFile, create_file, file_size};
use vhost_device_common::ring::{Ring, RingError};

use super::{Input, Log, MOST, MOST_HELD, Step, pattern};
use crate::driver::Driver;
use crate::guest::{Guest, Piece};
use crate::split::Walked;

/// The address of a piece that is not memory. No region can contain it.
const NOWHERE: u64 = u64::MAX;

/// The readable or the writable half of a request that the device holds.
#[derive(Clone, Debug)]
struct Half {
    pieces: Vec<Piece>,
    /// Number of bytes that were consumed from the front.
    done: u64,
    /// Number of bytes that were split off at the end.
    aside: u64,
    /// The head that was split off at the front: its offset and its length.
    head: (u64, u64),
    length: u64,
    /// The device hit a piece that is not memory. What it accesses afterwards is not defined.
    is_broken: bool,
}

impl Half {
    fn new(pieces: &[Piece], guest: &Guest) -> Self {
        let mut known = Vec::new();
        for piece in pieces {
            let (mut address, mut left) = (piece.address, piece.length);
            while left > 0
                && let Some(slice) = guest.memory.slice_up_to(address, left as usize)
            {
                known.push(Piece::new(address, slice.len() as u32));
                address = address.wrapping_add(slice.len() as u64);
                left -= slice.len() as u32;
            }
            // The rest is not memory.
            known.push(Piece::new(NOWHERE, left));
        }
        known.retain(|piece| piece.length > 0);
        Self {
            length: known.iter().map(|piece| u64::from(piece.length)).sum(),
            pieces: known,
            done: 0,
            aside: 0,
            head: (0, 0),
            is_broken: false,
        }
    }

    fn left(&self) -> u64 {
        self.length - self.done - self.aside
    }

    /// Returns the pieces of `length` bytes at offset `from`.
    fn pieces(&self, from: u64, length: u64) -> Vec<Piece> {
        let mut from = from;
        let mut left = length;
        let mut pieces = Vec::new();
        for piece in &self.pieces {
            let size = u64::from(piece.length);
            if from >= size {
                from -= size;
                continue;
            }
            let size = left.min(size - from);
            if size > 0 {
                pieces.push(Piece::new(piece.address.saturating_add(from), size as u32));
            }
            from = 0;
            left -= size;
        }
        pieces
    }

    /// Returns whether all of it is memory.
    fn is_memory(&self) -> bool {
        self.pieces.iter().all(|piece| piece.address != NOWHERE)
    }
}

/// A request that the device holds, and its model.
struct Held {
    chain: Chain,
    head: u16,
    readable: Half,
    writable: Half,
    /// The pieces that were written.
    written: Vec<Piece>,
    /// The number of taken requests when it was taken from the available ring. `None` if it was taken again.
    taken_at: Option<u64>,
}

/// The head of a request that the device must take again, and its descriptors, unless the device reads them again.
type Again = (u16, Option<Walked>);

impl Held {
    /// Returns the request as the device must take it again. The driver can have changed its descriptors in the ring.
    fn again(&self) -> Again {
        let (readable, writable) = (self.readable.pieces.clone(), self.writable.pieces.clone());
        (self.head, Some(Walked { readable, writable }))
    }

    /// Expects that the device writes `bytes` to what was split off: `length` bytes at an offset.
    fn expect_apart(
        &mut self,
        guest: &mut Guest,
        (offset, length): (u64, u64),
        bytes: &[u8],
        outcome: Result<(), ChainError>,
    ) {
        // The device writes as many bytes as fit.
        let room = length.min(bytes.len() as u64);
        let pieces = self.writable.pieces(offset, room);
        let is_memory = expect(guest, &pieces, &bytes[..room as usize]);
        self.written.extend(pieces);
        if !is_memory {
            assert_eq!(outcome, Err(ChainError::NotMemory));
        } else {
            assert_eq!(outcome.is_ok(), room == bytes.len() as u64);
        }
    }
}

/// The ring of the device, and its model.
struct Model {
    guest: Guest,
    driver: Driver,
    ring: Ring,
    inflight: Option<InflightFile>,
    log: Option<Log>,
    next_available: u16,
    seen: u16,
    next_used: u16,
    published: u16,
    held: Vec<Held>,
    /// The heads that the next device would take again, in order, and whether each is completed.
    in_flight: Vec<(u16, bool)>,
    /// The heads that this device must still take again.
    recovered: VecDeque<Again>,
    /// The number of requests that were taken from the available ring.
    taken: u64,
    wants_kick: bool,
    /// The driver made a head available again before it was used.
    repeats: bool,
}

/// Runs an input.
pub fn run(input: Input) {
    let mut guest = Guest::new();
    let driver = Driver::new(1, input.start, &mut guest);
    let size = input.start.size();
    let inflight = input.notes.then(|| {
        let file = create_file(false, 1, size).expect("a file");
        InflightFile::map(&file, 0, file_size(false, 1, size) as u64, false, 1, size)
            .expect("a mapping")
    });
    let log = input.logs.then(Log::new);
    if let Some(log) = &log {
        guest.memory = Arc::new(guest.memory.with_log(Some(log.map())));
    }
    let index = input.start.index();
    let ring = ring(&driver, &guest, &inflight, index);
    let mut model = Model {
        guest,
        driver,
        ring,
        inflight,
        log,
        next_available: index,
        seen: index,
        next_used: index,
        published: index,
        held: Vec::new(),
        in_flight: Vec::new(),
        recovered: VecDeque::new(),
        taken: 0,
        wants_kick: true,
        repeats: false,
    };
    for step in input.steps {
        if !model.step(step) {
            break;
        }
    }
    model.guest.assert_untouched();
}

fn ring(driver: &Driver, guest: &Guest, inflight: &Option<InflightFile>, index: u16) -> Ring {
    let mut setup = driver.setup(0);
    setup.used_log = guest.memory.is_logged().then_some(USED_RING.address);
    let memory = Arc::clone(&guest.memory);
    Ring::new(setup, memory, index.into(), inflight.as_ref(), 0).expect("the ring is in memory")
}

/// The beginning of the used ring.
const USED_RING: Piece = Piece {
    address: 0x1400,
    length: 4,
};
impl Model {
    /// Returns whether the ring can still be used.
    fn step(&mut self, step: Step) -> bool {
        self.log.iter().for_each(Log::clear);
        match step {
            Step::Submit(readable, writable, shape) => {
                let guest = &mut self.guest;
                self.driver
                    .submit(0, guest, &readable, writable.into(), &shape);
            }
            Step::Err(mistake) => self.driver.err(0, &mut self.guest, mistake),
            Step::Take => return self.take(),
            Step::Read(which, length) => self.read(which, length),
            Step::Write(which, length, byte) => self.write(which, length, byte),
            Step::SkipReadable(which, length) => self.skip(which, length, false),
            Step::SkipWritable(which, length) => self.skip(which, length, true),
            Step::SetAside(which, length) => self.set_aside(which, length),
            Step::WriteAside(which, length, byte) => self.write_aside(which, length, byte),
            Step::SplitHead(which, length) => self.split_head(which, length),
            Step::WriteHead(which, length, byte) => self.write_head(which, length, byte),
            Step::Complete(which, written) => self.complete(which, written),
            Step::Publish => self.publish(),
            Step::SuppressKicks => {
                self.ring.suppress_kicks();
                if std::mem::take(&mut self.wants_kick) {
                    self.driver.split().expect_wish(&mut self.guest, None);
                }
            }
            Step::WantKick => return self.want_kick(),
            Step::SetMemory => {
                let nothing = self.ring.set_memory(Arc::default());
                assert!(
                    nothing.is_err(),
                    "the ring accepts memory that does not contain it"
                );
                let memory = Arc::clone(&self.guest.memory);
                self.ring
                    .set_memory(memory)
                    .expect("the memory is the same");
            }
            Step::Restart => self.restart(),
            Step::PutBack(which) => self.put_back(which),
            Step::Stop => self.stop(),
        }
        assert_eq!(usize::from(self.ring.held()), self.held.len());
        assert_eq!(self.ring.base(), u32::from(self.next_available));
        assert_eq!(self.ring.recovered(), self.recovered.len());
        true
    }

    /// Returns whether a request is available. Returns `None` if the available index is wrong.
    fn look(&mut self) -> Option<bool> {
        let has_known = self.seen != self.next_available || !self.recovered.is_empty();
        if !has_known && !self.read_index() {
            return None;
        }
        Some(self.seen != self.next_available || !self.recovered.is_empty())
    }

    /// Reads the driver's index. Returns whether it is valid.
    fn read_index(&mut self) -> bool {
        let index = self.driver.split().available_index(&self.guest);
        let open = index
            .wrapping_sub(self.next_available)
            .wrapping_add(self.held.len() as u16);
        let is_valid = open <= self.driver.setup(0).size;
        if is_valid {
            self.seen = index;
        }
        is_valid
    }

    fn take(&mut self) -> bool {
        if self.held.len() >= MOST_HELD {
            return true;
        }
        let taken = self.ring.take();
        let is_there = match self.look() {
            Some(is_there) => is_there,
            None => {
                assert!(matches!(taken, Err(RingError::AvailableIndex { .. })));
                return false;
            }
        };
        if !is_there {
            assert!(matches!(taken, Ok(None)), "{taken:?}");
            return true;
        }
        let recovered = self.recovered.front().cloned();
        let ring = &self.driver.split();
        let (head, kept) = recovered
            .clone()
            .unwrap_or_else(|| (ring.head(&self.guest, self.next_available), None));
        let walked = kept.or_else(|| ring.walk(&self.guest, head));
        let (chain, walked) = match (taken, walked) {
            (Ok(Some(chain)), Some(walked)) => (chain, walked),
            (Err(_), None) => return false,
            (taken, walked) => panic!("{taken:?} where {walked:?} should be"),
        };
        if recovered.is_some() {
            self.recovered.pop_front();
        } else {
            self.next_available = self.next_available.wrapping_add(1);
            self.repeats |= self.in_flight.iter().any(|(other, _)| *other == head);
            self.in_flight.push((head, false));
            self.taken += 1;
        }
        let taken_at = recovered.is_none().then_some(self.taken);
        let Walked { readable, writable } = walked;
        let held = Held {
            chain,
            head,
            readable: Half::new(&readable, &self.guest),
            writable: Half::new(&writable, &self.guest),
            written: Vec::new(),
            taken_at,
        };
        assert_eq!(held.chain.readable_len(), held.readable.length);
        assert_eq!(held.chain.writable_len(), held.writable.length);
        let is_memory = held.readable.is_memory();
        assert_eq!(held.chain.readable_iovecs().is_ok(), is_memory);
        let is_memory = is_memory && held.writable.is_memory();
        assert_eq!(held.chain.check().is_ok(), is_memory);
        self.held.push(held);
        true
    }

    /// Selects a held request, if there is one.
    fn which(&mut self, which: u8) -> Option<(&mut Held, &mut Guest)> {
        let count = self.held.len();
        let place = usize::from(which).checked_rem(count)?;
        Some((&mut self.held[place], &mut self.guest))
    }

    fn read(&mut self, which: u8, length: u16) {
        let Some((held, guest)) = self.which(which) else {
            return;
        };
        let half = &mut held.readable;
        if half.is_broken {
            return;
        }
        let mut bytes = vec![0; usize::from(length).min(MOST)];
        let length = bytes.len() as u64;
        let outcome = held.chain.read(&mut bytes);
        if length > half.left() {
            let have = half.left();
            let need = length;
            assert_eq!(outcome, Err(ChainError::TooShort { have, need }));
            return;
        }
        let mut expected = Vec::new();
        for piece in half.pieces(half.done, length) {
            match guest.read(piece.address, piece.length as usize) {
                Some(part) => expected.extend(part),
                None => {
                    assert_eq!(outcome, Err(ChainError::NotMemory));
                    half.is_broken = true;
                    return;
                }
            }
        }
        assert_eq!(outcome, Ok(()));
        assert_eq!(bytes, expected);
        half.done += length;
    }

    fn write(&mut self, which: u8, length: u16, byte: u8) {
        let Some((held, guest)) = self.which(which) else {
            return;
        };
        let half = &mut held.writable;
        if half.is_broken {
            return;
        }
        let bytes = pattern(length, byte);
        let length = bytes.len() as u64;
        let outcome = held.chain.write(&bytes);
        if length > half.left() {
            let have = half.left();
            let need = length;
            assert_eq!(outcome, Err(ChainError::TooShort { have, need }));
            return;
        }
        let pieces = half.pieces(half.done, length);
        let is_memory = expect(guest, &pieces, &bytes);
        held.written.extend(pieces);
        match is_memory {
            true => assert_eq!(outcome, Ok(())),
            false => assert_eq!(outcome, Err(ChainError::NotMemory)),
        }
        half.is_broken = !is_memory;
        half.done += length;
    }

    fn skip(&mut self, which: u8, length: u16, is_writable: bool) {
        let Some((held, _)) = self.which(which) else {
            return;
        };
        let Held {
            chain,
            readable,
            writable,
            ..
        } = held;
        let length = u64::from(length);
        let (half, outcome) = match is_writable {
            _ if readable.is_broken || writable.is_broken => return,
            true => (writable, chain.skip_writable(length)),
            false => (readable, chain.skip_readable(length)),
        };
        if length > half.left() {
            assert!(matches!(outcome, Err(ChainError::TooShort { .. })));
            return;
        }
        if outcome.is_err() {
            assert!(!half.is_memory());
            half.is_broken = true;
            return;
        }
        half.done += length;
        let iovecs = match is_writable {
            true => chain.writable_iovecs(),
            false => chain.readable_iovecs(),
        };
        if let Ok(iovecs) = iovecs {
            let length: u64 = iovecs.iter().map(|iovec| iovec.iov_len as u64).sum();
            assert_eq!(length, half.left());
        }
    }

    fn set_aside(&mut self, which: u8, length: u16) {
        let Some((held, _)) = self.which(which) else {
            return;
        };
        let half = &mut held.writable;
        if half.is_broken {
            return;
        }
        let length = u64::from(length);
        let outcome = held.chain.split_tail(length);
        assert_eq!(outcome.is_ok(), length <= half.left());
        half.aside += outcome.map_or(0, |()| length);
        assert_eq!(held.chain.writable_len(), half.left());
    }

    fn write_aside(&mut self, which: u8, length: u16, byte: u8) {
        let Some((held, guest)) = self.which(which) else {
            return;
        };
        let half = &held.writable;
        if half.is_broken {
            return;
        }
        let bytes = pattern(length, byte);
        let outcome = held.chain.write_tail(&bytes);
        let tail = (half.length - half.aside, half.aside);
        held.expect_apart(guest, tail, &bytes, outcome);
    }

    fn split_head(&mut self, which: u8, length: u16) {
        let Some((held, _)) = self.which(which) else {
            return;
        };
        let half = &mut held.writable;
        if half.is_broken {
            return;
        }
        let length = u64::from(length);
        let outcome = held.chain.split_head(length);
        assert_eq!(outcome.is_ok(), length <= half.left());
        if outcome.is_ok() {
            half.head = (half.done, length);
            half.done += length;
        }
        assert_eq!(held.chain.writable_len(), half.left());
    }

    fn write_head(&mut self, which: u8, length: u16, byte: u8) {
        let Some((held, guest)) = self.which(which) else {
            return;
        };
        if held.writable.is_broken {
            return;
        }
        let bytes = pattern(length, byte);
        let outcome = held.chain.write_head(&bytes);
        held.expect_apart(guest, held.writable.head, &bytes, outcome);
    }

    fn complete(&mut self, which: u8, written: u32) {
        if self.held.is_empty() {
            return;
        }
        let held = self.held.remove(usize::from(which) % self.held.len());
        self.ring.complete(held.chain, written);
        if let Some(log) = &self.log {
            assert!(log.has(USED_RING), "the used ring was not logged");
            let whole = |piece: &Piece| {
                self.guest
                    .read(piece.address, piece.length as usize)
                    .is_some()
            };
            for piece in held.written.iter().filter(|piece| whole(piece)) {
                assert!(log.has(*piece), "{piece:?} was written and not logged");
            }
        }
        let most = u32::try_from(held.writable.length).unwrap_or(u32::MAX);
        let (ring, guest) = (&self.driver.split(), &mut self.guest);
        ring.expect_used(guest, self.next_used, held.head, written.min(most));
        self.next_used = self.next_used.wrapping_add(1);
        let noted = self
            .in_flight
            .iter_mut()
            .find(|note| **note == (held.head, false));
        if let Some((_, is_completed)) = noted {
            *is_completed = true;
        }
    }

    fn publish(&mut self) {
        let calls = self.ring.publish();
        let (ring, guest) = (&self.driver.split(), &mut self.guest);
        if self.published != self.next_used {
            ring.expect_used_index(guest, self.next_used);
        }
        assert_eq!(
            calls,
            ring.wants_call(guest, self.published, self.next_used)
        );
        self.published = self.next_used;
        if self.held.is_empty() && self.next_available == ring.available_index(guest) {
            self.driver.settle();
        }
        self.in_flight.retain(|(_, is_completed)| !is_completed);
    }

    fn want_kick(&mut self) -> bool {
        let seen = self.seen;
        let outcome = self.ring.want_kick();
        self.wants_kick = true;
        self.driver.split().expect_wish(&mut self.guest, Some(seen));
        let is_valid = self.read_index();
        match is_valid {
            true => assert!(matches!(outcome, Ok(has_more) if has_more == (self.seen != seen))),
            false => assert!(outcome.is_err()),
        }
        is_valid
    }

    /// Puts a request back: to the available ring if it is the last one taken from there, otherwise to the front of the recovered ones.
    fn put_back(&mut self, which: u8) {
        let Some(place) = usize::from(which).checked_rem(self.held.len()) else {
            return;
        };
        let held = self.held.remove(place);
        let head = held.head;
        if held.taken_at == Some(self.taken) {
            self.taken -= 1;
            self.next_available = self.next_available.wrapping_sub(1);
            let mut notes = self.in_flight.iter();
            let last = notes.rposition(|note| *note == (head, false));
            self.in_flight.remove(last.expect("it was in flight"));
        } else {
            self.recovered.push_front(held.again());
        }
        self.ring.put_back(held.chain);
    }

    /// Stops the ring and starts it again in the same process.
    fn stop(&mut self) {
        if self.repeats || !self.driver.is_honest() {
            return;
        }
        self.publish();
        for held in self.held.drain(..) {
            self.recovered.push_back(held.again());
            self.ring.suspend(held.chain);
        }
        if self.inflight.is_some() {
            let heads = self.in_flight.iter().map(|(head, _)| (*head, None));
            self.recovered = heads.collect();
        }
        let suspended = self.ring.release(true);
        let next = self.next_available;
        if !std::mem::replace(&mut self.wants_kick, true) {
            let seen = self.seen;
            self.driver.split().expect_wish(&mut self.guest, Some(seen));
        }
        self.ring = ring(&self.driver, &self.guest, &self.inflight, next);
        self.ring.resume(suspended);
        self.seen = next;
        self.taken = 0;
    }

    /// Starts another device, which recovers the requests in flight.
    fn restart(&mut self) {
        let heads = self.in_flight.iter().map(|(head, _)| (*head, None));
        let heads: VecDeque<_> = heads.collect();
        // The file for requests in flight is not reliable if the driver uses a descriptor twice.
        if self.inflight.is_none() || self.repeats || !self.driver.is_honest() {
            return;
        }
        self.held.clear();
        self.ring = ring(
            &self.driver,
            &self.guest,
            &self.inflight,
            self.next_available,
        );
        self.wants_kick = true;
        self.published = self.driver.split().used_index(&self.guest);
        self.next_used = self.published;
        self.recovered = heads;
        self.taken = 0;
        self.in_flight
            .iter_mut()
            .for_each(|(_, is_completed)| *is_completed = false);
        self.next_available = self.ring.base() as u16;
        self.seen = self.next_available;
    }
}

/// Expects that the device writes `bytes` to these pieces, up to the first one that is not memory. Returns whether all are memory.
fn expect(guest: &mut Guest, pieces: &[Piece], bytes: &[u8]) -> bool {
    let mut rest = bytes;
    pieces.iter().all(|piece| {
        let (front, back) = rest.split_at(piece.length as usize);
        rest = back;
        guest.expect(piece.address, front)
    })
}
