// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Positions in a packed ring (VIRTIO 1.3, 2.8.1).

use virtio_bindings::virtio_ring::{
    VRING_PACKED_DESC_F_AVAIL, VRING_PACKED_DESC_F_USED, VRING_PACKED_EVENT_F_WRAP_CTR,
};

/// Flags of a descriptor (VIRTIO 1.3, 2.8.1). Their meaning depends on the wrap counter.
pub(super) const AVAILABLE: u16 = 1 << VRING_PACKED_DESC_F_AVAIL;
pub(super) const USED: u16 = 1 << VRING_PACKED_DESC_F_USED;

/// An index in the ring, with the wrap counter of its round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Position {
    pub index: u16,
    pub wrap: bool,
}

impl Position {
    /// Decodes a position: bits 0 to 14 are the index, bit 15 is the wrap counter. The event suppression structures and each half of a
    /// ring base (vhost-user, SET_VRING_BASE) have this format.
    pub fn from_bits(bits: u16) -> Self {
        let wrap = 1 << VRING_PACKED_EVENT_F_WRAP_CTR;
        Self {
            index: bits & !wrap,
            wrap: bits & wrap != 0,
        }
    }

    pub fn bits(self) -> u16 {
        self.index | u16::from(self.wrap) << VRING_PACKED_EVENT_F_WRAP_CTR
    }

    /// Returns the position `count` descriptors later in a ring of `size`; `count` is at most `size`.
    pub fn after(self, count: u16, size: u16) -> Self {
        // Both are at most 32768.
        let index = u32::from(self.index) + u32::from(count);
        match index.checked_sub(size.into()) {
            None => Self {
                index: index as u16,
                wrap: self.wrap,
            },
            Some(index) => Self {
                index: index as u16,
                wrap: !self.wrap,
            },
        }
    }

    /// Returns the position `count` descriptors earlier in a ring of `size`; `count` is at most `size`.
    pub fn before(self, count: u16, size: u16) -> Self {
        match self.index.checked_sub(count) {
            Some(index) => Self {
                index,
                wrap: self.wrap,
            },
            // The sum is at most `size`.
            None => Self {
                index: (u32::from(self.index) + u32::from(size) - u32::from(count)) as u16,
                wrap: !self.wrap,
            },
        }
    }

    /// Returns the flags of an available descriptor here.
    pub fn available(self) -> u16 {
        if self.wrap { AVAILABLE } else { USED }
    }

    /// Returns the flags of a used descriptor here.
    pub fn used(self) -> u16 {
        if self.wrap { AVAILABLE | USED } else { 0 }
    }

    /// Returns whether `self` is among the last `count` descriptors before `here`.
    pub fn was_passed(self, here: Self, count: u16, size: u16) -> bool {
        let round = if self.wrap == here.wrap { 0 } else { size };
        let distance = i32::from(here.index) + i32::from(round) - i32::from(self.index);
        (1..=i32::from(count)).contains(&distance)
    }
}
