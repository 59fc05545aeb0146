// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a logical unit remembers, and the short way past it for reads and writes.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::Nexus;
use super::attention::Attention;
use super::registry::Registry;

/// The most initiators that are told of changes. More can use the logical unit.
const MAX_NEXUSES: usize = 64;
/// The most unit attentions that wait for one initiator.
const MAX_ATTENTIONS: usize = 8;

/// Values of mode pages that initiators can change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Modes {
    /// WCE: writes may stay in the cache.
    pub write_cache: bool,
    /// D_SENSE: sense data is in descriptor format.
    pub descriptors: bool,
    /// SWP: writes are refused.
    pub write_protect: bool,
}

impl Default for Modes {
    fn default() -> Self {
        Self {
            write_cache: true,
            descriptors: false,
            write_protect: false,
        }
    }
}

/// The result of a copy (SPC-4, 6.20).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Copied {
    pub nexus: Nexus,
    /// LIST IDENTIFIER.
    pub list: u8,
    /// Segments that were processed.
    pub segments: u16,
    /// Bytes that were written.
    pub bytes: u64,
    /// It ended early.
    pub failed: bool,
}

/// The state of a logical unit: what a migration takes along.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    pub(super) modes: Modes,
    /// START STOP UNIT has ejected the medium.
    pub(super) ejected: bool,
    pub(super) registry: Registry,
    /// Who holds a reservation of RESERVE.
    pub(super) reserved: Option<Nexus>,
    /// Who prevents removal of the medium.
    pub(super) preventing: Vec<Nexus>,
    /// Unit attentions by initiator.
    attentions: Vec<(Nexus, VecDeque<Attention>)>,
    /// The result of the last copy. It is kept until its initiator sends another command.
    pub(super) copied: Option<Copied>,
}

impl Saved {
    /// Checks that a logical unit can have this state.
    pub(super) fn check(&self) -> Result<(), &'static str> {
        if !self.registry.is_valid() {
            return Err("invalid persistent reservations");
        }
        let queues = self.attentions.iter();
        if self.attentions.len() > MAX_NEXUSES
            || self.preventing.len() > MAX_NEXUSES
            || queues.map(|(_, queue)| queue.len()).max() > Some(MAX_ATTENTIONS)
        {
            return Err("too many initiators or unit attentions");
        }
        Ok(())
    }

    /// Adds a unit attention for `nexus`. One that waits already is not repeated.
    pub fn attend(&mut self, nexus: Nexus, attention: Attention) {
        let queue = self
            .attentions
            .iter_mut()
            .find(|(known, _)| *known == nexus);
        if let Some((_, queue)) = queue {
            push(queue, attention);
        }
    }

    /// Adds a unit attention for all initiators that were seen, except one.
    pub fn attend_others(&mut self, except: Option<Nexus>, attention: Attention) {
        for (nexus, queue) in &mut self.attentions {
            if Some(*nexus) != except {
                push(queue, attention);
            }
        }
    }

    /// Adds the initiator, if it was not seen before, with the unit attention of a start.
    fn meet(&mut self, nexus: Nexus) {
        let is_known = self.attentions.iter().any(|(known, _)| *known == nexus);
        if !is_known && self.attentions.len() < MAX_NEXUSES {
            let queue = VecDeque::from([Attention::PowerOn]);
            self.attentions.push((nexus, queue));
        }
    }

    /// Takes the unit attention that `nexus` is told next.
    pub fn take_attention(&mut self, nexus: Nexus) -> Option<Attention> {
        self.meet(nexus);
        let mut queues = self.attentions.iter_mut();
        let (_, queue) = queues.find(|(known, _)| *known == nexus)?;
        queue.pop_front()
    }

    /// Removes the unit attentions of this kind that wait for `nexus`.
    pub fn forget(&mut self, nexus: Nexus, attention: Attention) {
        let queue = self
            .attentions
            .iter_mut()
            .find(|(known, _)| *known == nexus);
        if let Some((_, queue)) = queue {
            queue.retain(|waiting| *waiting != attention);
        }
    }

    /// Takes the result of the copy with this list identifier.
    pub fn take_copy(&mut self, nexus: Nexus, list: u8) -> Option<Copied> {
        self.copied
            .take_if(|copied| copied.nexus == nexus && copied.list == list)
    }

    /// Forgets the result of a copy of `nexus`.
    pub fn forget_copy(&mut self, nexus: Nexus) {
        self.copied.take_if(|copied| copied.nexus == nexus);
    }

    /// Prevents or allows removal of the medium.
    pub fn prevent(&mut self, nexus: Nexus, prevents: bool) {
        self.preventing.retain(|one| *one != nexus);
        if prevents && self.preventing.len() < MAX_NEXUSES {
            self.preventing.push(nexus);
        }
    }

    fn flags(&self) -> u8 {
        let waiting = self.attentions.iter().any(|(_, queue)| !queue.is_empty());
        let reserved = self.reserved.is_some() || self.registry.is_reserved();
        let special = waiting || reserved || self.ejected || self.copied.is_some();
        let Modes {
            write_cache,
            descriptors,
            write_protect,
        } = self.modes;
        let flags = [
            (special, SPECIAL),
            (write_protect, WRITE_PROTECT),
            (!write_cache, WRITE_THROUGH),
            (descriptors, DESCRIPTORS),
        ];
        let set = flags.iter().filter(|(is_set, _)| *is_set);
        set.fold(0, |flags, (_, flag)| flags | flag)
    }
}

/// Adds a unit attention to a queue. A reset makes all others meaningless.
fn push(queue: &mut VecDeque<Attention>, attention: Attention) {
    if attention.is_reset() {
        queue.clear();
    }
    if !queue.contains(&attention) && queue.len() < MAX_ATTENTIONS {
        queue.push_back(attention);
    }
}

/// Some initiator is told something, or cannot use the medium.
const SPECIAL: u8 = 1;
const WRITE_PROTECT: u8 = 2;
const WRITE_THROUGH: u8 = 4;
const DESCRIPTORS: u8 = 8;

/// The state with what reads and writes need to know, which takes no lock.
pub struct State {
    flags: AtomicU8,
    /// The initiator that was seen last.
    nexus: AtomicU64,
    saved: Mutex<Saved>,
}

impl State {
    pub fn new() -> Self {
        Self {
            // The first initiator is not known yet.
            flags: AtomicU8::new(SPECIAL),
            nexus: AtomicU64::new(0),
            saved: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Saved> {
        self.saved.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads and changes the state.
    pub fn with<R>(&self, change: impl FnOnce(&mut Saved) -> R) -> R {
        let mut saved = self.lock();
        let result = change(&mut saved);
        self.flags.store(saved.flags(), Ordering::Release);
        result
    }

    /// Reads and changes the state when `nexus` sends a command.
    pub fn with_nexus<R>(&self, nexus: Nexus, change: impl FnOnce(&mut Saved) -> R) -> R {
        let mut saved = self.lock();
        saved.meet(nexus);
        let result = change(&mut saved);
        self.nexus.store(nexus.0, Ordering::Relaxed);
        self.flags.store(saved.flags(), Ordering::Release);
        result
    }

    /// Returns whether a command of `nexus` finds nothing that it must be told of: no unit attention, no reservation, and a medium.
    pub fn is_quiet(&self, nexus: Nexus) -> bool {
        self.flags.load(Ordering::Acquire) & SPECIAL == 0
            && self.nexus.load(Ordering::Relaxed) == nexus.0
    }

    fn has(&self, flag: u8) -> bool {
        self.flags.load(Ordering::Acquire) & flag != 0
    }

    pub fn is_write_protected(&self) -> bool {
        self.has(WRITE_PROTECT)
    }

    pub fn is_write_through(&self) -> bool {
        self.has(WRITE_THROUGH)
    }

    /// Returns whether sense data is in descriptor format.
    pub fn has_descriptors(&self) -> bool {
        self.has(DESCRIPTORS)
    }
}
