// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a ring of either format has, and does alike.

use std::collections::VecDeque;
use std::sync::Arc;

use super::crash_point::{Step, after};
use super::descriptors::Storage;
use super::error::RingError;
use super::inflight::Recovered;
use super::setup::RingSetup;
use crate::chain::Chain;
use crate::memory::GuestMemory;

/// [`Ticket::sequence`](crate::chain::Ticket::sequence) of a request that is taken again.
pub(super) const AGAIN: u64 = 0;

/// A request that is taken again before all others.
#[derive(Debug)]
enum Again {
    /// It is noted as in flight: a device before this one had taken it.
    Noted(Recovered),
    /// The ring before this one, or this one, had given it out and got it back unanswered.
    Kept(Chain),
}

/// The part of a ring that does not depend on its format. `I` notes requests in flight.
#[derive(Debug)]
pub(super) struct Shared<I> {
    pub setup: RingSetup,
    pub memory: Arc<GuestMemory>,
    pub storage: Storage,
    /// Requests that the device holds: taken, and neither completed nor given back.
    pub held: u16,
    /// The driver was asked to kick.
    pub wants_kick: bool,
    /// What the front-end remembers of this ring.
    pub inflight: Option<I>,
    /// Requests that were taken from the ring and not put back there.
    sequence: u64,
    again: VecDeque<Again>,
    /// Requests that the next ring takes again.
    suspended: Vec<Chain>,
}

impl<I> Shared<I> {
    pub fn new(
        setup: RingSetup,
        memory: Arc<GuestMemory>,
        inflight: Option<I>,
        recovered: Vec<Recovered>,
    ) -> Self {
        Self {
            setup,
            memory,
            storage: Storage::default(),
            held: 0,
            wants_kick: true,
            inflight,
            sequence: 0,
            again: recovered.into_iter().map(Again::Noted).collect(),
            suspended: Vec::new(),
        }
    }

    /// Requests that are taken again before all others.
    pub fn recovered(&self) -> usize {
        self.again.len()
    }

    /// Takes the first of these, if `accepts` says so. `gather` reads it anew where only its note is left.
    #[cold]
    pub fn take_again(
        &mut self,
        accepts: impl FnOnce(&mut Chain) -> bool,
        gather: impl FnOnce(&mut Self, Recovered) -> Result<Chain, RingError>,
    ) -> Result<Option<Chain>, RingError> {
        let (note, mut chain) = match self.again.pop_front() {
            None => return Ok(None),
            Some(Again::Kept(chain)) => (None, chain),
            Some(Again::Noted(request)) => match gather(self, request) {
                Ok(chain) => (Some(request), chain),
                Err(error) => {
                    self.again.push_front(Again::Noted(request));
                    return Err(error);
                }
            },
        };
        if !accepts(&mut chain) {
            self.again.push_front(match note {
                Some(request) => {
                    self.storage.keep(chain);
                    Again::Noted(request)
                }
                None => {
                    chain.rewind();
                    Again::Kept(chain)
                }
            });
            return Ok(None);
        }
        after(Step::TakenAgain);
        self.held += 1;
        Ok(Some(chain))
    }

    /// The number of the request that is taken from the ring next: see [`Ticket::sequence`](crate::chain::Ticket::sequence).
    pub fn next_sequence(&self) -> u64 {
        self.sequence + 1
    }

    /// Counts a request that was taken from the ring.
    #[inline]
    pub fn took(&mut self) {
        self.sequence += 1;
        self.held += 1;
    }

    /// Lets go of a request that is given back unanswered. Gives it if it is the last one that was taken from the ring, which goes
    /// back there; any other one is taken again before all others.
    pub fn give_back(&mut self, mut chain: Chain) -> Option<Chain> {
        self.held = self.held.saturating_sub(1);
        if chain.ticket().sequence == self.sequence && self.sequence != AGAIN {
            self.sequence -= 1;
            return Some(chain);
        }
        chain.rewind();
        self.again.push_front(Again::Kept(chain));
        None
    }

    /// Lets go of a request that the next ring takes again.
    pub fn suspend(&mut self, mut chain: Chain) {
        self.held = self.held.saturating_sub(1);
        chain.rewind();
        self.suspended.push(chain);
    }

    /// Takes over what [`Shared::release`] gave, if it is not noted as in flight.
    pub fn resume(&mut self, suspended: Vec<Chain>) {
        if self.inflight.is_none() {
            self.again.extend(suspended.into_iter().map(Again::Kept));
        }
    }

    /// Gives the requests that the next ring takes again and that are noted nowhere else.
    pub fn release(&mut self) -> Vec<Chain> {
        let again = self.again.drain(..).filter_map(|request| match request {
            Again::Kept(chain) => Some(chain),
            Again::Noted(_) => None,
        });
        let mut kept: Vec<_> = again.chain(self.suspended.drain(..)).collect();
        if self.inflight.is_some() {
            kept.clear();
        }
        kept
    }
}
