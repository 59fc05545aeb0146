// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Requests with an operation in flight, by the number that names them to the kernel or to other threads.

use std::io;

/// The most operations that one thread has in flight.
pub const DEPTH: usize = 256;

/// A request whose operation has ended, with the outcome: the bytes that were moved, or the error.
pub type Finished<R> = (R, io::Result<u64>);

/// Room for [`DEPTH`] requests. A request does not move until it is removed.
pub struct Slots<R> {
    slots: Box<[Option<R>]>,
    free: Vec<u32>,
}

impl<R> Slots<R> {
    pub fn new() -> Self {
        Self {
            slots: (0..DEPTH).map(|_| None).collect(),
            free: (0..DEPTH as u32).rev().collect(),
        }
    }

    pub fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Inserts a request. Returns its number and a reference to it; or, without room, the request.
    #[allow(clippy::result_large_err, reason = "nothing of the request is lost")]
    pub fn insert(&mut self, request: R) -> Result<(u32, &R), R> {
        let number = self.free.pop();
        let slot = number.and_then(|number| Some((number, self.slots.get_mut(number as usize)?)));
        match slot {
            Some((number, slot)) => Ok((number, slot.insert(request))),
            None => Err(request),
        }
    }

    /// Returns the request with this number.
    pub fn get(&self, number: u32) -> Option<&R> {
        self.slots.get(number as usize)?.as_ref()
    }

    /// Iterates over all requests. They do not move.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut R> {
        self.slots.iter_mut().flatten()
    }

    /// Removes a request.
    pub fn remove(&mut self, number: u32) -> Option<R> {
        let request = self.slots.get_mut(number as usize)?.take()?;
        self.free.push(number);
        Some(request)
    }
}
