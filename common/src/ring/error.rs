// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Errors of rings.

use thiserror::Error;

use crate::memory::MemoryError;

/// An error of a ring. After any of these except [`RingError::Unmapped`] the ring cannot be used until it is set up again.
#[derive(Debug, Error)]
pub enum RingError {
    /// A part of the ring is not in guest memory.
    #[error("the {part} is not in guest memory: {source}")]
    Unmapped {
        /// Which part.
        part: &'static str,
        /// The range that is not there.
        source: MemoryError,
    },
    /// A part of the ring is not aligned as VIRTIO 1.3, 2.7 requires.
    #[error("the {part} at {address:#x} is not aligned to {alignment} bytes")]
    Unaligned {
        /// Which part.
        part: &'static str,
        /// Where it is.
        address: u64,
        /// What its address must be a multiple of.
        alignment: u64,
    },
    /// The size of a split ring is not a power of two.
    #[error("invalid queue size {0}: a split ring needs a power of two")]
    Size(u16),
    /// The base is outside the ring.
    #[error("invalid ring base {base:#x} for queue size {size}")]
    Base {
        /// The base that the front-end sent.
        base: u32,
        /// Descriptors in the ring.
        size: u16,
    },
    /// The driver made more requests available than the ring has entries.
    #[error("available index {index} is ahead of the device by more than the queue size {size}")]
    AvailableIndex {
        /// The driver's index.
        index: u16,
        /// Entries in the ring.
        size: u16,
    },
    /// A descriptor index is outside its table.
    #[error("descriptor index {index} is outside its table of {size}")]
    DescriptorIndex {
        /// The index.
        index: usize,
        /// Entries in the table.
        size: usize,
    },
    /// A chain has a loop, or is longer than allowed.
    #[error("a descriptor chain has more than {limit} descriptors")]
    ChainTooLong {
        /// The maximum.
        limit: usize,
    },
    /// A device-readable descriptor follows a device-writable one (VIRTIO 1.3, 2.7.4.2).
    #[error("a readable descriptor follows a writable one")]
    ReadableAfterWritable,
    /// The front-end's file of requests in flight has no region for this ring, so a crash would lose requests.
    #[error("the front-end's file of requests in flight has no region for {size} descriptors")]
    NoRoomInFlight {
        /// Descriptors of the ring.
        size: u16,
    },
    /// An indirect table is empty, not a multiple of 16 bytes, nested, or not negotiated.
    #[error("invalid indirect descriptor: {0}")]
    Indirect(&'static str),
}
