// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Requests under way, by the number that names them to the kernel or to other threads.

use super::DEPTH;

/// Room for [`DEPTH`] requests. One that was put in does not move until it is taken out.
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

    /// Puts a request in; gives its number and the request where it now stays. Without room it is given back.
    #[allow(clippy::result_large_err, reason = "nothing of the request is lost")]
    pub fn insert(&mut self, request: R) -> Result<(u32, &R), R> {
        let number = self.free.pop();
        let slot = number.and_then(|number| Some((number, self.slots.get_mut(number as usize)?)));
        match slot {
            Some((number, slot)) => Ok((number, slot.insert(request))),
            None => Err(request),
        }
    }

    /// A request that is in.
    pub fn get(&self, number: u32) -> Option<&R> {
        self.slots.get(number as usize)?.as_ref()
    }

    /// Takes a request out.
    pub fn remove(&mut self, number: u32) -> Option<R> {
        let request = self.slots.get_mut(number as usize)?.take()?;
        self.free.push(number);
        Some(request)
    }
}
