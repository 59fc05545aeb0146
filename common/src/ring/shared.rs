// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The part of a ring that both formats have in common.

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
    /// It is recorded as in flight: a previous device took it.
    Noted(Recovered),
    /// The device of this process took it, and put it back or held it over.
    Kept(Chain),
}

/// The part of a ring that does not depend on its format. `I` is the record of requests in flight.
#[derive(Debug)]
pub(super) struct Shared<I> {
    pub setup: RingSetup,
    pub memory: Arc<GuestMemory>,
    pub storage: Storage,
    /// Number of requests that the device holds: taken, and neither completed nor given back.
    pub held: u16,
    /// The driver was asked to kick.
    pub wants_kick: bool,
    /// This ring's region in the front-end's file of requests in flight.
    pub inflight: Option<I>,
    /// Number of requests that were taken from the ring, less those put back.
    sequence: u64,
    again: VecDeque<Again>,
    /// Requests held over for the next start.
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

    /// Returns the number of requests that are taken again before all others.
    pub fn recovered(&self) -> usize {
        self.again.len()
    }

    /// Returns the number of those that a previous device took.
    pub fn recorded(&self) -> usize {
        let is_recorded = |request: &&Again| matches!(request, Again::Noted(_));
        self.again.iter().filter(is_recorded).count()
    }

    /// Takes the first of these if `accepts` returns true. `gather` reads it again where only its record is left.
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

    /// Returns the number of the next request that is taken from the ring: see [`Ticket::sequence`](crate::chain::Ticket::sequence).
    pub fn next_sequence(&self) -> u64 {
        self.sequence + 1
    }

    /// Counts a request that was taken from the ring.
    #[inline]
    pub fn took(&mut self) {
        self.sequence += 1;
        self.held += 1;
    }

    /// Releases a request that the device puts back. Returns it if it is the one taken last, which then is available in the ring again.
    /// Any other one is taken again before all others.
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

    /// Releases a request that the device holds over.
    pub fn suspend(&mut self, mut chain: Chain) {
        self.held = self.held.saturating_sub(1);
        chain.rewind();
        self.suspended.push(chain);
    }

    /// Accepts what [`Shared::release`] returned at the last stop.
    pub fn resume(&mut self, suspended: Vec<Chain>) {
        if self.inflight.is_none() {
            self.again.extend(suspended.into_iter().map(Again::Kept));
        }
    }

    /// Returns the requests for the next start that are recorded nowhere else.
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
