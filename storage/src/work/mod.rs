// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a request asks of a disk, cut into operations that are carried out one after the other.
//!
//! A device checks its request, makes [`Work`] of it and has an engine carry out [`Work::operation`]. It then hands the outcome to
//! [`Work::advance`], until the work is done. An operation that moves fewer bytes than it could is normal: the next one continues there.

pub mod blocking;
mod buffer;
mod ranges;
#[cfg(test)]
mod testing;
mod transfer;

use std::fmt;
use std::io;

use vhost_device_common::chain::Chain;

use crate::disk::{Disk, DiskError};
use crate::operation::Operation;
pub use ranges::Ranges;
pub use transfer::MAX_TRANSFER;
use transfer::{Direction, Transfer};

/// Bytes from which a read is large: it takes longer to copy so many than to wake another thread.
const LARGE: u64 = 64 << 10;

/// What is left to do of a request.
pub struct Work {
    kind: Kind,
    /// Data bytes that were moved so far, or zeroed or discarded.
    bytes: u64,
}

enum Kind {
    Transfer(Transfer),
    Flush,
    Ranges(Ranges),
}

impl Work {
    fn new(kind: Kind) -> Self {
        Self { kind, bytes: 0 }
    }

    /// Reads `length` bytes of the disk at `offset` into the next bytes of `chain` that can be written.
    ///
    /// # Errors
    /// The disk does not have so many bytes there, the chain does not have so many left, or `length` is 0 or above [`MAX_TRANSFER`].
    pub fn read(
        chain: &mut Chain,
        offset: u64,
        length: u64,
        disk: &Disk,
    ) -> Result<Self, DiskError> {
        Transfer::start(chain, Direction::ToGuest, offset, length, disk).map(Self::transfer)
    }

    /// Writes the next `length` bytes of `chain` that can be read to the disk at `offset`; if `stable`, the work is done when the data is
    /// on stable storage.
    ///
    /// # Errors
    /// The disk is read-only; otherwise as [`Work::read`].
    pub fn write(
        chain: &mut Chain,
        offset: u64,
        length: u64,
        stable: bool,
        disk: &Disk,
    ) -> Result<Self, DiskError> {
        disk.check_writable()?;
        let direction = Direction::ToDisk { stable };
        Transfer::start(chain, direction, offset, length, disk).map(Self::transfer)
    }

    fn transfer(transfer: Transfer) -> Self {
        Self::new(Kind::Transfer(transfer))
    }

    /// Brings all that was written to stable storage.
    pub fn flush() -> Self {
        Self::new(Kind::Flush)
    }

    /// Discards or zeroes ranges. There must be one at least.
    pub fn ranges(ranges: Ranges) -> Self {
        Self::new(Kind::Ranges(ranges))
    }

    /// Returns whether operations use guest memory.
    pub fn is_direct(&self) -> bool {
        matches!(&self.kind, Kind::Transfer(transfer) if transfer.is_direct())
    }

    /// Returns whether it changes the disk.
    pub fn is_change(&self) -> bool {
        match &self.kind {
            Kind::Transfer(transfer) => !transfer.is_read(),
            Kind::Flush => false,
            Kind::Ranges(_) => true,
        }
    }

    /// Returns whether it moves much data to the guest.
    pub fn is_large_read(&self) -> bool {
        matches!(&self.kind, Kind::Transfer(transfer) if transfer.is_read() && transfer.remaining >= LARGE)
    }

    /// Returns how many bytes are left to move, to zero or to discard.
    pub fn remaining(&self) -> u64 {
        match &self.kind {
            Kind::Transfer(transfer) => transfer.remaining,
            Kind::Flush => 0,
            Kind::Ranges(ranges) => ranges.remaining(),
        }
    }

    /// Returns how many data bytes were moved so far; those that were zeroed or discarded count once all are.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Returns the next operation, on the memory of `chain`.
    pub fn operation<'a>(&'a self, chain: &'a Chain) -> Operation<'a> {
        match &self.kind {
            Kind::Transfer(transfer) => transfer.operation(chain),
            Kind::Flush => Operation::Flush,
            Kind::Ranges(ranges) => ranges.operation(),
        }
    }

    /// Continues after the operation has ended with `outcome`. Returns whether the work is done.
    ///
    /// # Errors
    /// The work has failed; [`Work::bytes`] were moved before.
    pub fn advance(
        &mut self,
        chain: &mut Chain,
        disk: &Disk,
        outcome: io::Result<u64>,
    ) -> io::Result<bool> {
        match &mut self.kind {
            Kind::Transfer(transfer) => {
                self.bytes += transfer.advance(chain, disk, outcome?)?;
                Ok(transfer.remaining == 0)
            }
            Kind::Flush => outcome.map(|_| true),
            Kind::Ranges(ranges) => {
                let is_done = ranges.advance(disk, outcome)?;
                if is_done {
                    self.bytes = ranges.bytes;
                }
                Ok(is_done)
            }
        }
    }
}

/// What is left, for the log.
impl fmt::Display for Work {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            Kind::Transfer(transfer) => transfer.fmt(formatter),
            Kind::Flush => formatter.write_str("flush"),
            Kind::Ranges(ranges) => ranges.fmt(formatter),
        }
    }
}
