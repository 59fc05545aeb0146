// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Packed rings. If the driver makes no mistakes, the device must take its requests in order, with their content, and complete them.

use std::collections::VecDeque;
use std::sync::Arc;

use vhost_device_common::chain::Chain;
use vhost_device_common::ring::Ring;
use vhost_device_common::ring::inflight::{InflightFile, create_file, file_size};

use super::{Input, Log, MOST_HELD, Step, pattern};
use crate::driver::Driver;
use crate::guest::{Guest, Piece};
use crate::packed::Wish;

/// A request that was made available.
#[derive(Clone)]
struct Made {
    /// The readable content, if the pieces have the right addresses.
    readable: Option<Vec<u8>>,
    writable: u64,
    /// Its number, if the device took it before and put it back.
    number: Option<usize>,
    /// It is no longer in the ring.
    is_again: bool,
}

/// A request that the device holds.
struct Held {
    chain: Chain,
    writable: u64,
    /// Its number in the order of taking.
    number: usize,
    is_again: bool,
}

struct Model {
    guest: Guest,
    driver: Driver,
    ring: Ring,
    waiting: VecDeque<Made>,
    held: Vec<Held>,
    /// The written lengths of requests that were completed and not published.
    completed: Vec<u32>,
    inflight: Option<InflightFile>,
    log: Option<Log>,
    /// The position of the next descriptor to publish.
    published: u16,
    wants_kick: bool,
    /// The requests that the next device would take again: number, request, and whether it is completed.
    in_flight: Vec<(usize, Made, bool)>,
    taken: usize,
    /// How many requests at the front of the ring were put back, and the position after them.
    put_back: (usize, u16),
    /// The position of the request that the device last found when it asked for kicks, until it is taken.
    reported: Option<u16>,
}

/// Runs an input.
pub fn run(input: Input) {
    let mut guest = Guest::new();
    let driver = Driver::new(1, input.start, &mut guest);
    let size = input.start.size();
    let inflight = input.notes.then(|| {
        let file = create_file(true, 1, size).expect("a file");
        InflightFile::map(&file, 0, file_size(true, 1, size) as u64, true, 1, size)
            .expect("a mapping")
    });
    let log = input.logs.then(Log::new);
    if let Some(log) = &log {
        guest.memory = Arc::new(guest.memory.with_log(Some(log.map())));
    }
    let ring = ring(&driver, &guest, &inflight, driver.base());
    let mut model = Model {
        published: next_used(&ring),
        wants_kick: true,
        ring,
        inflight,
        log,
        in_flight: Vec::new(),
        taken: 0,
        put_back: (0, 0),
        reported: None,
        guest,
        driver,
        waiting: VecDeque::new(),
        held: Vec::new(),
        completed: Vec::new(),
    };
    for step in input.steps {
        if !model.step(step) {
            break;
        }
    }
    model.driver.assert_untouched(&mut model.guest);
}

/// Starts the ring at `base`.
fn ring(driver: &Driver, guest: &Guest, inflight: &Option<InflightFile>, base: u32) -> Ring {
    let mut setup = driver.setup(0);
    let event = driver.packed().device_event();
    setup.used_log = guest.memory.is_logged().then_some(event.address);
    let memory = Arc::clone(&guest.memory);
    let ring = Ring::new(setup, memory, base, inflight.as_ref(), 0);
    ring.expect("the ring is in memory and its base is valid")
}

/// Returns the position of the next used descriptor.
fn next_used(ring: &Ring) -> u16 {
    (ring.base() >> 16) as u16
}

impl Model {
    fn assert_logged(&self, piece: Piece) {
        if let Some(log) = &self.log {
            assert!(log.has(piece), "{piece:?} was written and not logged");
        }
    }

    fn which(&mut self, which: u8) -> Option<&mut Chain> {
        let place = usize::from(which).checked_rem(self.held.len())?;
        self.held.get_mut(place).map(|held| &mut held.chain)
    }

    /// Returns whether the ring can still be used.
    fn step(&mut self, step: Step) -> bool {
        self.log.iter().for_each(Log::clear);
        match step {
            Step::Submit(readable, writable, shape) => {
                let guest = &mut self.guest;
                let pieces = self
                    .driver
                    .submit(0, guest, &readable, writable.into(), &shape);
                self.waiting.push_back(Made {
                    readable: shape.is_plain().then_some(readable),
                    writable: pieces.iter().map(|piece| u64::from(piece.length)).sum(),
                    number: None,
                    is_again: false,
                });
            }
            Step::Err(mistake) => self.driver.err(0, &mut self.guest, mistake),
            Step::Take => return self.take(),
            Step::Read(which, length) => {
                let mut bytes = pattern(length, 0);
                let _ = self.which(which).map(|chain| chain.read(&mut bytes));
            }
            Step::SkipReadable(which, length) => {
                let length = length.into();
                let _ = self.which(which).map(|chain| chain.skip_readable(length));
            }
            Step::Write(which, length, byte) => {
                let bytes = pattern(length, byte);
                let _ = self.which(which).map(|chain| chain.write(&bytes));
            }
            Step::SkipWritable(which, length) => {
                let length = length.into();
                let _ = self.which(which).map(|chain| chain.skip_writable(length));
            }
            Step::SetAside(which, length) => {
                let length = length.into();
                let _ = self.which(which).map(|chain| chain.split_tail(length));
            }
            Step::WriteAside(which, length, byte) => {
                let bytes = pattern(length, byte);
                let _ = self.which(which).map(|chain| chain.write_tail(&bytes));
            }
            Step::SplitHead(which, length) => {
                let length = length.into();
                let _ = self.which(which).map(|chain| chain.split_head(length));
            }
            Step::WriteHead(which, length, byte) => {
                let bytes = pattern(length, byte);
                let _ = self.which(which).map(|chain| chain.write_head(&bytes));
            }
            Step::Complete(which, written) => {
                if let Some(place) = usize::from(which).checked_rem(self.held.len()) {
                    let Held {
                        chain,
                        writable: most,
                        number,
                        ..
                    } = self.held.remove(place);
                    let descriptor = self.driver.packed().descriptor(next_used(&self.ring));
                    self.ring.complete(chain, written);
                    self.assert_logged(descriptor);
                    let mut notes = self.in_flight.iter_mut();
                    if let Some(note) = notes.find(|note| note.0 == number) {
                        note.2 = true;
                    }
                    let most = u32::try_from(most).unwrap_or(u32::MAX);
                    self.completed.push(written.min(most));
                }
            }
            Step::Publish => self.publish(),
            Step::SuppressKicks => {
                self.ring.suppress_kicks();
                if std::mem::take(&mut self.wants_kick) {
                    self.expect_wish(Wish::Never);
                }
            }
            Step::WantKick => {
                let is_there = self.ring.want_kick();
                self.wants_kick = true;
                self.expect_kick();
                if self.driver.is_honest() {
                    let in_ring = self.waiting.iter().filter(|made| !made.is_again).count();
                    let has_more = in_ring > self.put_back.0;
                    let next = Some(self.next());
                    let is_new = has_more && self.reported != next;
                    if is_new {
                        self.reported = next;
                    }
                    assert!(matches!(is_there, Ok(found) if found == is_new));
                }
            }
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
        true
    }

    fn take(&mut self) -> bool {
        if self.held.len() >= MOST_HELD {
            return true;
        }
        let is_honest = self.driver.is_honest();
        let from = self.ring.base() as u16;
        let taken = self.ring.take();
        let Ok(chain) = taken else {
            assert!(!is_honest, "{taken:?}");
            return false;
        };
        let Some(mut chain) = chain else {
            assert!(
                !is_honest || self.waiting.is_empty(),
                "no request was taken"
            );
            return true;
        };
        let made = self.waiting.pop_front();
        let most = chain.writable_len();
        if is_honest {
            let made = made.clone().expect("what is taken was made available");
            assert_eq!(most, made.writable);
            if let Some(readable) = made.readable {
                assert_eq!(chain.readable_len(), readable.len() as u64);
                let mut bytes = vec![0; readable.len()];
                chain.read(&mut bytes).expect("the driver has this memory");
                assert!(!self.driver.is_apart() || bytes == readable);
            }
        }
        let known = made.as_ref().and_then(|made| made.number);
        let is_again = made.as_ref().is_some_and(|made| made.is_again);
        let number = known.unwrap_or(self.taken);
        if known.is_none() {
            self.taken += 1;
        }
        if let Some(made) = made {
            let place = self.in_flight.partition_point(|note| note.0 < number);
            self.in_flight.insert(place, (number, made, false));
        }
        if !is_again {
            self.reported = self.reported.filter(|position| *position != from);
            self.put_back.0 = self.put_back.0.saturating_sub(1);
        }
        self.held.push(Held {
            chain,
            writable: most,
            number,
            is_again,
        });
        true
    }

    /// Returns the position after all requests that the device has seen.
    fn next(&self) -> u16 {
        match self.put_back {
            (0, _) => self.ring.base() as u16,
            (_, end) => end,
        }
    }

    /// Checks that the device requests a kick for the next descriptor.
    fn expect_kick(&self) {
        // Where the requests of another driver end is not known.
        if !self.driver.is_honest() {
            return;
        }
        self.expect_wish(match self.driver.setup(0).event_index {
            true => Wish::At(self.next()),
            false => Wish::Always,
        });
    }

    /// Checks the event suppression that the device has just written, and that the write is logged.
    fn expect_wish(&self, wish: Wish) {
        let ring = self.driver.packed();
        ring.expect_wish(&self.guest, wish);
        self.assert_logged(ring.device_event());
    }

    fn publish(&mut self) {
        let calls = self.ring.publish();
        let (from, to) = (self.published, next_used(&self.ring));
        self.published = to;
        if !self.completed.is_empty() {
            self.assert_logged(self.driver.packed().descriptor(from));
        }
        if self.driver.is_honest() {
            let event_index = self.driver.setup(0).event_index;
            let packed = self.driver.packed();
            let wish = packed.wants_call(&self.guest, event_index, from, to);
            let is_due = wish.map(|wish| wish && !self.completed.is_empty());
            assert_eq!(calls, is_due.unwrap_or(calls));
        }
        self.in_flight.retain(|(_, _, is_completed)| !is_completed);
        let completed = std::mem::take(&mut self.completed);
        let answers = self.driver.answers(0, &self.guest);
        if self.driver.is_honest() {
            let written: Vec<_> = answers.iter().map(|(_, written)| *written).collect();
            assert_eq!(written, completed);
        }
        if self.held.is_empty() && self.waiting.is_empty() {
            self.driver.settle();
        }
    }

    /// Puts a request back: to the ring if it is the last one taken from there. It is the next one to take.
    fn put_back(&mut self, which: u8) {
        let Some(place) = usize::from(which).checked_rem(self.held.len()) else {
            return;
        };
        let held = self.held.remove(place);
        let base = self.ring.base();
        let is_last = !held.is_again && held.number + 1 == self.taken;
        if let Some(mut made) = self.forget(held.number) {
            made.number = (!is_last).then_some(held.number);
            made.is_again = !is_last;
            // Requests that are taken again come before those in the ring.
            let again = self.waiting.iter().take_while(|made| made.is_again);
            let place = if is_last { again.count() } else { 0 };
            self.waiting.insert(place, made);
        }
        self.ring.put_back(held.chain);
        if is_last {
            self.taken -= 1;
            let (count, end) = self.put_back;
            let end = if count == 0 { base as u16 } else { end };
            self.put_back = (count + 1, end);
        }
        if self.driver.is_honest() {
            assert_eq!(self.ring.base() == base, !is_last);
        }
    }

    /// Removes the request with this number from those in flight. Returns it.
    fn forget(&mut self, number: usize) -> Option<Made> {
        let place = self.in_flight.iter().position(|note| note.0 == number)?;
        Some(self.in_flight.remove(place).1)
    }

    /// Stops the queue while requests are suspended, and starts it again in the same process.
    fn stop(&mut self) {
        if !self.driver.is_honest() {
            return;
        }
        self.publish();
        let is_kept = |made: &&Made| made.is_again;
        let kept = self.waiting.iter().take_while(is_kept).count();
        let rest = self.waiting.split_off(kept);
        for held in std::mem::take(&mut self.held) {
            if let Some(mut made) = self.forget(held.number) {
                (made.number, made.is_again) = (Some(held.number), true);
                self.waiting.push_back(made);
            }
            self.ring.suspend(held.chain);
        }
        if self.inflight.is_some() {
            let waiting = self.waiting.make_contiguous();
            waiting.sort_by_key(|made| made.number.unwrap_or(usize::MAX));
        }
        self.waiting.extend(rest);
        let base = self.ring.base();
        let suspended = self.ring.release(true);
        if !std::mem::replace(&mut self.wants_kick, true) {
            self.expect_kick();
        }
        self.put_back = (0, 0);
        self.reported = None;
        self.ring = ring(&self.driver, &self.guest, &self.inflight, base);
        self.ring.resume(suspended);
        assert_eq!(self.ring.base(), base);
    }

    /// Starts another device, after this one stopped or was killed.
    fn restart(&mut self) {
        let has_kept = self.waiting.front().is_some_and(|made| made.is_again);
        let is_noted = self.inflight.is_some() || !has_kept;
        let is_done = self.held.is_empty() && self.completed.is_empty() && is_noted;
        // The file for requests in flight is not reliable if the driver makes mistakes.
        if !is_done && (self.inflight.is_none() || !self.driver.is_honest()) {
            return;
        }
        if is_done {
            self.ring.release(true);
            if !self.wants_kick {
                self.expect_kick();
            }
        }
        self.put_back = (0, 0);
        self.reported = None;
        self.held.clear();
        self.completed.clear();
        // The requests to take again are in flight, like the held ones.
        let is_again = |made: &Made| made.number.is_some();
        let again = self
            .waiting
            .iter()
            .take_while(|made| is_again(made))
            .count();
        let rest = self.waiting.split_off(again);
        let again = std::mem::replace(&mut self.waiting, rest);
        let notes = self
            .in_flight
            .drain(..)
            .map(|(number, made, _)| (number, made));
        let mut all: Vec<_> = notes.collect();
        all.extend(
            again
                .into_iter()
                .map(|made| (made.number.unwrap_or_default(), made)),
        );
        all.sort_by_key(|(number, _)| *number);
        for (_, made) in all.into_iter().rev() {
            self.waiting.push_front(Made {
                readable: None,
                number: None,
                is_again: true,
                ..made
            });
        }
        let base = match self.inflight {
            Some(_) => self.driver.base(),
            None => self.ring.base(),
        };
        self.ring = ring(&self.driver, &self.guest, &self.inflight, base);
        self.published = next_used(&self.ring);
        self.wants_kick = true;
    }
}
