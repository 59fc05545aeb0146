// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Rng: checks that the bytes of a file with known contents arrive in order, none of them twice, and no more than the quota.
//!
//! The file grows ahead of the reader, and a hole is punched behind it, so that it has no end and needs no space. Another process starts
//! at its beginning.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use fastrand::Rng;
use rustix::fs::{FallocateFlags, fallocate};
use tempfile::TempDir;

use super::back_end::BackEnd;
use super::fault::Fault;
use super::link::{Link, MOVING_SIZE};
use super::loss::{Loss, patience};
use super::report::Tally;
use super::scenario::{Lives, Scenario, Start};
use crate::front_end::{Buffer, GuestMemory, Used};
use crate::process::{Resources, option};

/// Requests in flight.
const DEPTH: usize = 64;
/// Maximum bytes of a request.
const LARGEST: u32 = 8 << 10;
/// The quota: bytes, and their period.
const MAX_BYTES: u64 = 512 << 10;
const PERIOD: Duration = Duration::from_millis(50);
/// Minimum lead of the file, and bytes added at once.
const AHEAD: u64 = 1 << 20;
/// Windows in which the quota is checked, beside the whole life of the process.
const WINDOW: Duration = Duration::from_secs(1);

/// Returns how to start the scenario.
pub fn start(lives: Lives) -> (String, Start) {
    let start = move |random| Ok(Box::new(Entropy::new(lives, random)?) as Box<dyn Scenario>);
    (lives.name("rng"), Box::new(start))
}

/// Returns `length` bytes of the file, from `position` on.
fn contents(position: u64, length: usize) -> Vec<u8> {
    let skip = (position % 8) as usize;
    let mut bytes = vec![0; (skip + length).next_multiple_of(8)];
    let (words, _) = bytes.as_chunks_mut::<8>();
    for (word, number) in words.iter_mut().zip(position / 8..) {
        let mixed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        *word = (mixed ^ mixed >> 29).to_le_bytes();
    }
    bytes.drain(..skip);
    bytes.truncate(length);
    bytes
}

/// The file.
struct Source {
    file: File,
    length: u64,
}

impl Source {
    /// Extends the file ahead of `position`, and punches a hole behind it.
    fn follow(&mut self, position: u64) -> Result<(), Loss> {
        if self.length >= position + AHEAD {
            return Ok(());
        }
        let bytes = contents(self.length, AHEAD as usize);
        self.file.write_all_at(&bytes, self.length)?;
        self.length += AHEAD;
        let behind = position & !0xffff;
        if behind > 0 {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(&self.file, flags, 0, behind).map_err(std::io::Error::from)?;
        }
        Ok(())
    }

    fn begin_anew(&mut self) -> Result<(), Loss> {
        self.file.set_len(0)?;
        self.length = 0;
        self.follow(0)
    }
}

/// A request in flight.
struct Pending {
    head: u16,
    place: usize,
    buffer: Buffer,
    /// Its address, if that is in memory that may be removed.
    moving: Option<GuestMemory>,
    since: Instant,
}

/// The scenario.
struct Entropy {
    link: Link,
    source: Source,
    _directory: TempDir,
    lives: Lives,
    random: Rng,
    /// Requests, which are answered in order.
    pending: VecDeque<Pending>,
    free: Vec<usize>,
    places: Vec<u64>,
    /// Position of the device in the file.
    position: u64,
    /// Start of a window for the quota, and the position then.
    window: (Instant, u64),
}

impl Entropy {
    fn new(lives: Lives, mut random: Rng) -> Result<Self, Loss> {
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("source");
        let file = File::create_new(&path)?;
        let mut source = Source { file, length: 0 };
        source.begin_anew()?;
        let arguments = vec![
            option("rng-source", &path),
            option("max-bytes", MAX_BYTES.to_string()),
            option("period", PERIOD.as_millis().to_string()),
        ];
        let keeps = Resources::default();
        let back_end = BackEnd::start("vhost-device-rng", arguments, keeps)?;
        let link = Link::new(back_end, &[DEPTH as u16], &[(0, 2 << 20)], &mut random)?;
        let memory = link.memory();
        Ok(Self {
            places: (0..DEPTH)
                .map(|_| memory.allocate(LARGEST.into(), 1))
                .collect(),
            free: (0..DEPTH).collect(),
            window: (link.back_end.began(), 0),
            link,
            source,
            _directory: directory,
            lives,
            random,
            pending: VecDeque::new(),
            position: 0,
        })
    }

    fn refill(&mut self) {
        let mut added = false;
        while let Some(place) = self.free.pop() {
            let moving = match (self.link.moving(), self.random.bool()) {
                (Some(start), true) => Some(start + place as u64 * u64::from(LARGEST)),
                _ => None,
            };
            let length = self.random.u32(1..=LARGEST);
            let buffer = Buffer::writable(moving.unwrap_or(self.places[place]), length);
            let chain = match length {
                // One descriptor or more, up to the limit of a chain.
                1..4 => vec![buffer],
                _ if self.random.bool() => vec![buffer],
                _ => buffer.split(&[self.random.u32(1..length / 2), 1]),
            };
            let Some(head) = self.link.queues[0].add(&chain) else {
                self.free.push(place);
                break;
            };
            added = true;
            self.pending.push_back(Pending {
                head,
                place,
                buffer,
                moving: moving.map(|_| self.link.memory().clone()),
                since: Instant::now(),
            });
        }
        if added {
            self.link.queues[0].publish();
            self.link.queues[0].kick();
        }
    }

    fn take(&mut self, tally: &Tally) -> Result<usize, Loss> {
        let mut count = 0;
        let before = Instant::now();
        while let Some(used) = self.link.queues[0].take_used() {
            self.check(used)?;
            tally.answered(used.length.into());
            count += 1;
        }
        self.check_quota(before)?;
        Ok(count)
    }

    fn check(&mut self, used: Used) -> Result<(), Loss> {
        let pending = self.pending.pop_front();
        let pending = pending.ok_or_else(|| Loss(format!("{used:?} was not in flight")))?;
        self.free.push(pending.place);
        if used.head != pending.head {
            return Err(Loss(format!(
                "{used:?} overtakes the request of head {}",
                pending.head
            )));
        }
        let may_fail = pending.moving.is_some();
        if used.length > pending.buffer.length || (used.length == 0 && !may_fail) {
            return Err(Loss(format!("{used:?} for {:?}", pending.buffer)));
        }
        if !may_fail {
            self.link
                .check_log(0, pending.since, &[pending.buffer], used.length)?;
        }
        let memory = pending.moving.as_ref().unwrap_or(self.link.memory());
        let seen = memory.read_vec(pending.buffer.address, used.length as usize);
        let expected = contents(self.position, seen.len());
        if let Some(at) = seen.iter().zip(&expected).position(|(a, b)| a != b) {
            return Err(Loss(format!(
                "byte {} of the source is not what the guest got as byte {at} of {}",
                self.position + at as u64,
                used.length
            )));
        }
        self.position += u64::from(used.length);
        Ok(())
    }

    /// Checks that no more quota periods have begun than fit in the time since the start, and since the window began. What is taken now was
    /// delivered after `before`, or is in the window that ends here.
    fn check_quota(&mut self, before: Instant) -> Result<(), Loss> {
        let most = |since: Instant, more: u64| {
            let periods = since.elapsed().as_nanos() / PERIOD.as_nanos();
            MAX_BYTES * (periods as u64 + more)
        };
        let (start, position) = self.window;
        let given = self.position - position;
        let all = most(self.link.back_end.began(), 1);
        if self.position > all || given > most(start, 2) {
            return Err(Loss(format!(
                "{} bytes since the process began, {given} within {:?}: more than {MAX_BYTES} in {PERIOD:?}",
                self.position,
                start.elapsed()
            )));
        }
        if start.elapsed() > WINDOW {
            self.window = (before, self.position);
        }
        Ok(())
    }

    fn take_or_wait(&mut self, tally: &Tally) -> Result<(), Loss> {
        self.source.follow(self.position)?;
        if self.take(tally)? == 0 {
            self.link.queues[0].wait_used(Duration::from_millis(5));
            if let Some(first) = self.pending.front()
                && first.since.elapsed() > patience()
            {
                return Err(Loss::late("a request for bytes"));
            }
        }
        Ok(())
    }
}

impl Scenario for Entropy {
    fn link(&mut self) -> &mut Link {
        &mut self.link
    }

    fn lives(&self) -> Lives {
        self.lives
    }

    fn load(&mut self, until: Instant, tally: &Tally) -> Result<(), Loss> {
        while Instant::now() < until {
            self.refill();
            self.take_or_wait(tally)?;
        }
        Ok(())
    }

    fn collect(&mut self, tally: &Tally) -> Result<(), Loss> {
        self.take(tally).map(|_| ())
    }

    fn forget(&mut self, _fault: Fault) -> Result<(), Loss> {
        let places = self.pending.drain(..).map(|pending| pending.place);
        self.free.extend(places);
        Ok(())
    }

    /// The next process starts at the beginning of the file.
    fn inspect(&mut self) -> Result<(), Loss> {
        self.position = 0;
        self.source.begin_anew()
    }

    fn connected(&mut self, is_new: bool, _has_state: bool) -> Result<(), Loss> {
        if is_new {
            self.window = (self.link.back_end.began(), 0);
        }
        Ok(())
    }

    fn settle(&mut self, tally: &Tally) -> Result<(), Loss> {
        while !self.pending.is_empty() {
            self.take_or_wait(tally)?;
        }
        Ok(())
    }
}

// Each request has its own part of the memory that is removed.
const _: () = assert!(DEPTH * LARGEST as usize <= MOVING_SIZE);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_the_same_wherever_one_begins() {
        let all = contents(0, 1000);
        for (position, length) in [(0, 8), (1, 7), (7, 2), (8, 100), (13, 987)] {
            assert_eq!(
                contents(position as u64, length),
                all[position..position + length]
            );
        }
    }
}
