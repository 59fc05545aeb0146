// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Virtqueues: what is taken from the driver and what is given back, one format to a file.

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

/// A ring that the driver shares with this device.
///
/// Requests are taken one by one, completed in any order, and published to the driver in batches.
#[derive(Debug)]
pub struct Ring(Format);

#[derive(Debug)]
enum Format {
    Split(SplitRing),
    Packed(PackedRing),
}

/// The same for a ring of either format.
macro_rules! either {
    ($ring:expr, $inner:ident => $value:expr) => {
        match $ring {
            Format::Split($inner) => $value,
            Format::Packed($inner) => $value,
        }
    };
}

impl Ring {
    /// Finds the ring in `memory`. It is to go on at `base`, which is the index of an available entry in a split ring, and two
    /// places with their wrap counters in a packed one (vhost-user, SET_VRING_BASE); 0 is the beginning of a packed ring that was
    /// never used. With `inflight`, what that has for the ring
    /// number `index` says which requests are to be carried out again first, and where the ring goes on.
    ///
    /// # Errors
    /// A part of the ring is not aligned, or not in guest memory; its size or `base` is not one that it can have.
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

    /// Finds the ring anew after the front-end changed the memory table. Requests that are held
    /// keep the memory that they were taken from.
    ///
    /// # Errors
    /// The ring is not in the new memory: nothing may be taken until it is in another one. What is held can be completed.
    pub fn set_memory(&mut self, memory: Arc<GuestMemory>) -> Result<(), RingError> {
        either!(&mut self.0, ring => ring.set_memory(memory))
    }

    /// Has writes to the used ring logged by another guest address, or not any more.
    pub fn set_used_log(&mut self, address: Option<u64>) {
        either!(&mut self.0, ring => ring.set_used_log(address))
    }

    /// Where the ring goes on, as the base in [`Ring::new`]: what GET_VRING_BASE answers.
    pub fn base(&self) -> u32 {
        either!(&self.0, ring => ring.base())
    }

    /// Where a ring begins whose driver begins.
    pub fn first_base(packed: bool) -> u32 {
        match packed {
            true => packed::FIRST_BASE,
            false => 0,
        }
    }

    /// What kind of ring it is, for people.
    pub fn format(&self) -> &'static str {
        match self.0 {
            Format::Split(_) => "split ring",
            Format::Packed(_) => "packed ring",
        }
    }

    /// Requests that are to be taken again before all others.
    pub fn recovered(&self) -> usize {
        either!(&self.0, ring => ring.shared.recovered())
    }

    /// Requests that were taken, and neither completed nor given back.
    pub fn held(&self) -> u16 {
        either!(&self.0, ring => ring.shared.held)
    }

    /// Whether requests wait to be taken, among those seen already.
    #[inline]
    pub fn has_known_available(&self) -> bool {
        either!(&self.0, ring => ring.has_known_available())
    }

    /// Whether more than `count` requests wait to be taken, as far as that can be said without looking through the ring.
    #[inline]
    pub fn has_more_than(&self, count: u16) -> bool {
        either!(&self.0, ring => ring.has_more_than(count))
    }

    /// Whether requests wait to be taken. Looks at the ring if all known ones are taken.
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

    /// Takes the next request, if there is one and `accepts` says so. Else it stays where it is, and is read anew the next time.
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

    /// Gives a request back: the device wrote `written` bytes of it. The driver sees it with the next
    /// [`Ring::publish`].
    pub fn complete(&mut self, chain: Chain, written: u32) {
        either!(&mut self.0, ring => ring.complete(chain, written))
    }

    /// Gives a request back untouched: it is the next one to be taken. Several go back in the reverse order in which they were taken,
    /// the last first. One that is not the last is the next one to be taken too, but counts as taken: it is not in the ring any more.
    pub fn put_back(&mut self, chain: Chain) {
        either!(&mut self.0, ring => ring.put_back(chain))
    }

    /// Lets go of a request, which the ring that comes next takes again, from its beginning: it stays noted as in flight, or
    /// [`Ring::release`] gives it.
    pub fn suspend(&mut self, chain: Chain) {
        either!(&mut self.0, ring => ring.shared.suspend(chain))
    }

    /// Takes over the requests that [`Ring::release`] of the ring before this one gave: they are taken before all others.
    pub fn resume(&mut self, suspended: Vec<Chain>) {
        match &mut self.0 {
            Format::Split(ring) => ring.shared.resume(suspended),
            Format::Packed(ring) => ring.resume(suspended),
        }
    }

    /// Shows the driver all requests that were completed since the last time, with one store.
    /// Returns whether the driver wants to be called (VIRTIO 1.3, 2.7.7.1, 2.7.10 and 2.8.10).
    pub fn publish(&mut self) -> bool {
        either!(&mut self.0, ring => ring.publish())
    }

    /// Asks the driver not to kick: the device looks at the ring by itself.
    pub fn suppress_kicks(&mut self) {
        either!(&mut self.0, ring => ring.suppress_kicks())
    }

    /// Asks the driver to kick for the next request. Returns whether requests came meanwhile, for
    /// which it may not have kicked.
    ///
    /// # Errors
    /// The ring is corrupt.
    pub fn want_kick(&mut self) -> Result<bool, RingError> {
        match &mut self.0 {
            Format::Split(ring) => ring.want_kick(),
            Format::Packed(ring) => Ok(ring.want_kick()),
        }
    }

    /// Leaves the ring to the device that comes next: the driver kicks it, where this one asked it not to, if the ring `is_usable`.
    /// Gives the requests that were suspended, if the front-end keeps no file of requests in flight.
    pub fn release(&mut self, is_usable: bool) -> Vec<Chain> {
        if is_usable && !either!(&self.0, ring => ring.shared.wants_kick) {
            // Whether it is corrupt the next device finds out by itself.
            let _ = self.want_kick();
        }
        either!(&mut self.0, ring => ring.shared.release())
    }
}
