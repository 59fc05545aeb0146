// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Virtqueues: what is taken from the driver and what is given back, one format to a file.

pub mod fault;
pub mod inflight;
mod split;

use thiserror::Error;

use crate::memory::MemoryError;
pub use split::SplitRing as Ring;

/// Most descriptors of one chain beyond the size of the ring: an indirect table may be longer than
/// the ring is, and Linux makes such tables. QEMU draws the line at the same number.
pub const MAX_INDIRECT_DESCRIPTORS: usize = 1024;

/// Where the front-end says that a ring is, and how it is to be read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingSetup {
    /// Descriptors in the ring: a power of two, at most 32768.
    pub size: u16,
    /// Descriptor table, as an address of the front-end.
    pub descriptors: u64,
    /// Available ring, as an address of the front-end.
    pub available: u64,
    /// Used ring, as an address of the front-end.
    pub used: u64,
    /// Guest address by which writes to the used ring are logged, if they are. It need not be that of the ring, or of memory.
    pub used_log: Option<u64>,
    /// VIRTIO_F_EVENT_IDX was negotiated.
    pub event_index: bool,
    /// VIRTIO_F_INDIRECT_DESC was negotiated.
    pub indirect: bool,
}

/// What is wrong with a ring. After any of these the ring can not be used until it is set up anew.
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
        index: u16,
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
