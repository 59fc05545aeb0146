// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The location and the features of a ring.

use super::error::RingError;
use crate::memory::{GuestMemory, PinnedRange};

/// The location of a ring, as the front-end sets it, and the features that decide how to read it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingSetup {
    /// Descriptors in the ring: at most 32768, and a power of two in a split ring.
    pub size: u16,
    /// Descriptor area, as an address of the front-end.
    pub descriptors: u64,
    /// Driver area (available ring, or the driver's event suppression), as an address of the front-end.
    pub available: u64,
    /// Device area (used ring, or the device's event suppression), as an address of the front-end.
    pub used: u64,
    /// Guest address under which writes to the device area are logged, if any. It may differ from the device area's own address, and
    /// may be outside guest memory.
    pub used_log: Option<u64>,
    /// VIRTIO_F_RING_PACKED was negotiated.
    pub packed: bool,
    /// VIRTIO_F_EVENT_IDX was negotiated.
    pub event_index: bool,
    /// VIRTIO_F_INDIRECT_DESC was negotiated.
    pub indirect: bool,
}

/// Looks up a part of a ring: `length` bytes at `address` of the front-end.
pub(super) fn find_part(
    memory: &GuestMemory,
    part: &'static str,
    address: u64,
    alignment: u64,
    length: usize,
) -> Result<PinnedRange, RingError> {
    if !address.is_multiple_of(alignment) {
        return Err(RingError::Unaligned {
            part,
            address,
            alignment,
        });
    }
    memory
        .pin_user_range(address, length)
        .map_err(|source| RingError::Unmapped { part, source })
}
