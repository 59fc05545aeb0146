// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Virtqueues: takes requests from the driver and gives them back. Each format has a file.

pub mod crash_point;
mod descriptors;
mod error;
pub mod inflight;
mod packed;
mod position;
mod setup;
mod shared;
mod split;

use std::sync::Arc;

use crate::chain::Chain;
use crate::memory::GuestMemory;
pub use descriptors::MAX_INDIRECT_DESCRIPTORS;
pub use error::RingError;
use inflight::InflightFile;
use packed::PackedRing;
pub use setup::RingSetup;
use split::SplitRing;

/// A ring that the driver shares with the device.
///
/// The device takes requests one by one, completes them in any order, and publishes them to the driver in batches.
#[derive(Debug)]
pub struct Ring(Format);

#[derive(Debug)]
enum Format {
    Split(SplitRing),
    Packed(PackedRing),
}

/// Evaluates the expression for a ring of either format.
macro_rules! either {
    ($ring:expr, $inner:ident => $value:expr) => {
        match $ring {
            Format::Split($inner) => $value,
            Format::Packed($inner) => $value,
        }
    };
}

impl Ring {
    /// Opens the ring in `memory`. It continues at `base` (vhost-user, SET_VRING_BASE): the index of an available entry in a split
    /// ring, two positions with their wrap counters in a packed one. A base of 0 also means the beginning of a packed ring that was
    /// never used. If there is an `inflight` file, its region for queue `index` says which requests to carry out again first, and
    /// where the ring continues.
    ///
    /// # Errors
    /// A part of the ring is not aligned or not in guest memory, or its size or `base` is invalid.
    pub fn new(
        setup: RingSetup,
        memory: Arc<GuestMemory>,
        base: u32,
        inflight: Option<&InflightFile>,
        index: u16,
    ) -> Result<Self, RingError> {
        let size = setup.size;
        let no_room = RingError::NoRoomInFlight { size };
        Ok(Self(if setup.packed {
            let inflight = inflight.map(|file| file.packed_ring(index, size).ok_or(no_room));
            Format::Packed(PackedRing::new(setup, memory, base, inflight.transpose()?)?)
        } else {
            let inflight = inflight.map(|file| file.split_ring(index, size).ok_or(no_room));
            Format::Split(SplitRing::new(setup, memory, base, inflight.transpose()?)?)
        }))
    }

    /// Looks the ring up again after the front-end changed the memory table. Requests that the device holds keep the memory they were
    /// taken from.
    ///
    /// # Errors
    /// The ring is not in the new memory. The device must take no requests until another table contains it, but may complete those it
    /// holds.
    pub fn set_memory(&mut self, memory: Arc<GuestMemory>) -> Result<(), RingError> {
        either!(&mut self.0, ring => ring.set_memory(memory))
    }

    /// Changes the guest address under which writes to the used ring are logged; `None` stops logging them.
    pub fn set_used_log(&mut self, address: Option<u64>) {
        either!(&mut self.0, ring => ring.set_used_log(address))
    }

    /// Returns where the ring continues, in the format of the base in [`Ring::new`]: the reply to GET_VRING_BASE.
    pub fn base(&self) -> u32 {
        either!(&self.0, ring => ring.base())
    }

    /// Returns the base of a ring that is not used yet.
    pub fn first_base(packed: bool) -> u32 {
        match packed {
            true => packed::FIRST_BASE,
            false => 0,
        }
    }

    /// Returns whether requests in flight are noted in a file of the front-end, so that another process can carry out what this one leaves.
    pub fn is_noted(&self) -> bool {
        either!(&self.0, ring => ring.shared.inflight.is_some())
    }

    /// Returns the name of the format, for log lines.
    pub fn format(&self) -> &'static str {
        match self.0 {
            Format::Split(_) => "split ring",
            Format::Packed(_) => "packed ring",
        }
    }

    /// Returns the number of requests that are taken again before all others.
    pub fn recovered(&self) -> usize {
        either!(&self.0, ring => ring.shared.recovered())
    }

    /// Returns the number of requests of a previous device that are taken again.
    pub fn recorded(&self) -> usize {
        either!(&self.0, ring => ring.shared.recorded())
    }

    /// Returns the number of requests that the device holds: taken, and neither completed nor given back.
    pub fn held(&self) -> u16 {
        either!(&self.0, ring => ring.shared.held)
    }

    /// Returns whether requests are available, among those seen already.
    #[inline]
    pub fn has_known_available(&self) -> bool {
        either!(&self.0, ring => ring.has_known_available())
    }

    /// Returns whether more than `count` requests are available, as far as it can tell without scanning the ring.
    #[inline]
    pub fn has_more_than(&self, count: u16) -> bool {
        either!(&self.0, ring => ring.has_more_than(count))
    }

    /// Returns whether requests are available. Reads the ring if all known ones are taken.
    ///
    /// # Errors
    /// The ring is corrupt.
    #[inline]
    pub fn has_available(&mut self) -> Result<bool, RingError> {
        match &mut self.0 {
            Format::Split(ring) => ring.has_available(),
            Format::Packed(ring) => Ok(ring.has_available()),
        }
    }

    /// Takes the next request, if there is one.
    ///
    /// # Errors
    /// The ring is corrupt; the request stays where it is.
    pub fn take(&mut self) -> Result<Option<Chain>, RingError> {
        self.take_if(|_| true)
    }

    /// Takes the next request if there is one and `accepts` returns true. Otherwise the request stays where it is, and the next call
    /// reads it again.
    ///
    /// # Errors
    /// The ring is corrupt; the request stays where it is.
    #[inline]
    pub fn take_if(
        &mut self,
        accepts: impl FnOnce(&mut Chain) -> bool,
    ) -> Result<Option<Chain>, RingError> {
        either!(&mut self.0, ring => ring.take_if(accepts))
    }

    /// Completes a request, of which the device wrote `written` bytes. The driver sees it after the next [`Ring::publish`].
    pub fn complete(&mut self, chain: Chain, written: u32) {
        either!(&mut self.0, ring => ring.complete(chain, written))
    }

    /// Puts a request back untouched: it is the next one to be taken. Several requests go back in reverse order, the one taken last
    /// first. Any other one is taken again before all others, but no longer counts as available: [`Ring::base`] stays behind it.
    pub fn put_back(&mut self, chain: Chain) {
        either!(&mut self.0, ring => ring.put_back(chain))
    }

    /// Holds a request over for the next start of the ring, which carries it out from its beginning. The request stays recorded as in
    /// flight; without a file of requests in flight, [`Ring::release`] returns it.
    pub fn suspend(&mut self, chain: Chain) {
        either!(&mut self.0, ring => ring.shared.suspend(chain))
    }

    /// Accepts the requests that [`Ring::release`] returned at the last stop of this ring. They are taken before all others.
    pub fn resume(&mut self, suspended: Vec<Chain>) {
        match &mut self.0 {
            Format::Split(ring) => ring.shared.resume(suspended),
            Format::Packed(ring) => ring.resume(suspended),
        }
    }

    /// Publishes all requests that were completed since the last call, with one store. Returns whether the driver wants a notification
    /// (VIRTIO 1.3, 2.7.7.1, 2.7.10 and 2.8.10).
    pub fn publish(&mut self) -> bool {
        either!(&mut self.0, ring => ring.publish())
    }

    /// Asks the driver not to kick, because the device polls the ring.
    pub fn suppress_kicks(&mut self) {
        either!(&mut self.0, ring => ring.suppress_kicks())
    }

    /// Asks the driver to kick for the first request after those seen already. Returns whether such requests became available meanwhile,
    /// for which the driver may not have kicked.
    ///
    /// # Errors
    /// The ring is corrupt.
    pub fn want_kick(&mut self) -> Result<bool, RingError> {
        match &mut self.0 {
            Format::Split(ring) => ring.want_kick(),
            Format::Packed(ring) => Ok(ring.want_kick()),
        }
    }

    /// Prepares the ring for its next start: asks the driver to kick again, if the ring `is_usable`. Returns the suspended requests
    /// unless the front-end keeps a file of requests in flight.
    pub fn release(&mut self, is_usable: bool) -> Vec<Chain> {
        if is_usable && !either!(&self.0, ring => ring.shared.wants_kick) {
            // The next start finds out whether the ring is corrupt.
            let _ = self.want_kick();
        }
        either!(&mut self.0, ring => ring.shared.release())
    }
}
