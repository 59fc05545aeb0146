// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Rings and chains in the memory of a malicious guest. Compares what the ring takes, reads, writes and publishes with a model that follows
//! the VIRTIO specification.

mod packed;
mod split;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use arbitrary::Arbitrary;
use vhost_device_common::memory::DirtyLog;

use crate::driver::Shape;
use crate::guest::{Piece, file};
use crate::split::{Mistake, Start};

/// Limit for one read or write, in bytes.
const MOST: usize = 1 << 14;
/// Limit for the requests that the device holds.
const MOST_HELD: usize = 64;

/// The events of a ring.
#[derive(Arbitrary, Debug)]
pub struct Input {
    start: Start,
    /// The front-end has a file for requests in flight.
    notes: bool,
    /// The guest migrates: writes of the device are logged.
    logs: bool,
    steps: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    /// The driver makes a request available.
    Submit(Vec<u8>, u16, Shape),
    /// The driver makes a mistake.
    Err(Mistake),
    Take,
    /// The device reads a request that it holds. The first number selects the request, here and below.
    Read(u8, u16),
    SkipReadable(u8, u16),
    Write(u8, u16, u8),
    SkipWritable(u8, u16),
    SetAside(u8, u16),
    WriteAside(u8, u16, u8),
    Complete(u8, u32),
    Publish,
    SuppressKicks,
    WantKick,
    /// The front-end sends the same memory again.
    SetMemory,
    /// The process is killed and started again.
    Restart,
    /// The device puts a request back.
    PutBack(u8),
    /// The queue stops while the device suspends its requests, and starts again.
    Stop,
    SplitHead(u8, u16),
    WriteHead(u8, u16, u8),
}

impl Input {
    /// Runs the input.
    ///
    /// # Panics
    /// Panics if the ring violates the specification.
    pub fn run(self) {
        match self.start.packed {
            true => packed::run(self),
            false => split::run(self),
        }
    }
}

/// The guest memory that a log of two bytes covers, in bytes.
const LOGGED: u64 = 16 * PAGE;
const PAGE: u64 = 4096;

/// A log of dirty pages that does not cover all memory.
struct Log(OwnedFd);

impl Log {
    fn new() -> Self {
        Self(file(2))
    }

    fn map(&self) -> Arc<DirtyLog> {
        Arc::new(DirtyLog::map(&self.0, 0, 2).expect("a log"))
    }

    fn clear(&self) {
        assert_eq!(rustix::io::pwrite(&self.0, &[0; 2], 0), Ok(2));
    }

    /// Returns whether all pages of a piece that the log covers are marked.
    fn has(&self, piece: Piece) -> bool {
        let mut bits = [0; 2];
        let read = rustix::io::pread(&self.0, &mut bits, 0);
        assert_eq!(read, Ok(2));
        let bits = u16::from_le_bytes(bits);
        let first = piece.address / PAGE;
        let last = piece
            .address
            .saturating_add(u64::from(piece.length).saturating_sub(1))
            / PAGE;
        (first..=last.min(LOGGED / PAGE - 1)).all(|page| bits >> page & 1 == 1)
    }
}

fn pattern(length: u16, byte: u8) -> Vec<u8> {
    (0..usize::from(length).min(MOST))
        .map(|number| byte.wrapping_add(number as u8))
        .collect()
}

#[cfg(test)]
mod tests {
    use fastrand::Rng;

    use super::*;

    fn step(random: &mut Rng) -> Step {
        let which = random.u8(..);
        match random.u8(0..20) {
            0..6 => {
                let readable = vec![random.u8(..); random.usize(1..40)];
                Step::Submit(readable, random.u16(0..40), Shape::plain(random))
            }
            6..11 => Step::Take,
            11 => Step::Read(which, random.u16(0..20)),
            12 => match random.bool() {
                true => Step::Write(which, random.u16(0..20), which),
                false => Step::SkipWritable(which, random.u16(0..20)),
            },
            13 => match random.u8(0..4) {
                0 => Step::SetAside(which, random.u16(0..20)),
                1 => Step::WriteAside(which, random.u16(0..20), which),
                2 => Step::SplitHead(which, random.u16(0..20)),
                _ => Step::WriteHead(which, random.u16(0..20), which),
            },
            14..16 => Step::Complete(which, random.u32(0..50)),
            16 => Step::Publish,
            17 => Step::PutBack(which),
            18 => match random.u8(0..4) {
                0 => Step::SuppressKicks,
                1 => Step::SetMemory,
                _ => Step::WantKick,
            },
            _ if random.u8(0..8) == 0 => Step::Restart,
            _ => Step::Stop,
        }
    }

    #[test]
    fn requests_of_an_honest_driver_are_taken_put_back_held_over_and_completed_as_the_model_says() {
        for seed in 0..4000 {
            let mut random = Rng::with_seed(seed);
            let input = Input {
                start: Start::new(&mut random),
                notes: random.bool(),
                logs: random.bool(),
                steps: (0..random.usize(1..60))
                    .map(|_| step(&mut random))
                    .collect(),
            };
            input.run();
        }
    }
}
