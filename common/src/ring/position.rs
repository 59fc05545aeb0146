// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Places in a packed ring (VIRTIO 1.3, 2.8.1).

use virtio_bindings::virtio_ring::{
    VRING_PACKED_DESC_F_AVAIL, VRING_PACKED_DESC_F_USED, VRING_PACKED_EVENT_F_WRAP_CTR,
};

/// Flags of a descriptor: it is available, or used, in the round that the bit stands for.
pub(super) const AVAILABLE: u16 = 1 << VRING_PACKED_DESC_F_AVAIL;
pub(super) const USED: u16 = 1 << VRING_PACKED_DESC_F_USED;

/// A place in the ring, and the wrap counter of the round that it is reached in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Position {
    pub index: u16,
    pub wrap: bool,
}

impl Position {
    /// Bits 0 to 14 are the index, bit 15 is the wrap counter: as in the event suppression structures, and in each half of the
    /// base of a ring (vhost-user, SET_VRING_BASE).
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

    /// The place `count` descriptors on, in a ring of `size`; `count` is at most `size`.
    pub fn after(self, count: u16, size: u16) -> Self {
        // Neither is above 32768.
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

    /// The place `count` descriptors before, in a ring of `size`; `count` is at most `size`.
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

    /// Flags that mark a descriptor here available.
    pub fn available(self) -> u16 {
        if self.wrap { AVAILABLE } else { USED }
    }

    /// Flags that mark a descriptor here used.
    pub fn used(self) -> u16 {
        if self.wrap { AVAILABLE | USED } else { 0 }
    }

    /// Whether `self` was passed on the way that led here over the last `count` descriptors.
    pub fn was_passed(self, here: Self, count: u16, size: u16) -> bool {
        let round = if self.wrap == here.wrap { 0 } else { size };
        let distance = i32::from(here.index) + i32::from(round) - i32::from(self.index);
        (1..=i32::from(count)).contains(&distance)
    }
}
