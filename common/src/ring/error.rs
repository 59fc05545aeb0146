// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What can be wrong with a ring.

use thiserror::Error;

use crate::memory::MemoryError;

/// What is wrong with a ring. After any of these but [`RingError::Unmapped`] the ring cannot be used until it is set up anew.
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
    /// A part of the ring is not aligned as VIRTIO 1.3, 2.7 asks.
    #[error("the {part} at {address:#x} is not aligned to {alignment} bytes")]
    Unaligned {
        /// Which part.
        part: &'static str,
        /// Where it is.
        address: u64,
        /// What its address must be a multiple of.
        alignment: u64,
    },
    /// A split ring that is not a power of two long.
    #[error("a split ring of {0} descriptors; it must have a power of two")]
    Size(u16),
    /// The ring is to go on at a place that it has not.
    #[error("{base:#x} is not where a ring of {size} can go on")]
    Base {
        /// What the front-end said.
        base: u32,
        /// Descriptors in the ring.
        size: u16,
    },
    /// The driver made more requests available than the ring can hold.
    #[error("available index {index} is more than the ring's {size} entries ahead of the device")]
    AvailableIndex {
        /// The driver's index.
        index: u16,
        /// Entries in the ring.
        size: u16,
    },
    /// A descriptor number is not below the size of its table.
    #[error("descriptor {index} is outside its table of {size}")]
    DescriptorIndex {
        /// The number.
        index: usize,
        /// Entries in the table.
        size: usize,
    },
    /// A chain goes round in circles, or is longer than any may be.
    #[error("a chain has more than {limit} descriptors")]
    ChainTooLong {
        /// The most that there may be.
        limit: usize,
    },
    /// A descriptor to read follows one to write.
    #[error("a readable descriptor follows a writable one")]
    ReadableAfterWritable,
    /// The front-end keeps a file of requests in flight, but has no room in it for this ring: they would be lost in a crash.
    #[error("{size} descriptors, for which the front-end's file of requests in flight has no room")]
    NoRoomInFlight {
        /// Descriptors of the ring.
        size: u16,
    },
    /// An indirect table that is empty, no multiple of 16 bytes, nested, or not negotiated.
    #[error("bad indirect descriptor: {0}")]
    Indirect(&'static str),
}
