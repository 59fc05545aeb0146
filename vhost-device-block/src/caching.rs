// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The driver's choice between write-back and write-through caching (VIRTIO 1.3, 5.2.6.2), and what of it outlives the driver.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH};

/// The values of a choice that is [kept](Caching::kept). 0 is none.
const WRITE_BACK: u8 = 1;
const WRITE_THROUGH: u8 = 2;

/// The caching of one disk, which its queues share.
pub struct Caching {
    /// Features that the driver accepted.
    features: AtomicU64,
    /// `writeback` in the config space.
    writeback: AtomicBool,
    /// The last choice on this connection: 0, [`WRITE_BACK`] or [`WRITE_THROUGH`].
    chosen: AtomicU8,
}

impl Caching {
    /// Creates the state before the driver has chosen: write-back.
    pub fn new() -> Self {
        Self {
            features: AtomicU64::new(0),
            writeback: AtomicBool::new(true),
            chosen: AtomicU8::new(0),
        }
    }

    /// Returns whether a write must be on stable storage before it is answered.
    #[inline]
    pub fn is_write_through(&self) -> bool {
        let features = self.features.load(Ordering::Relaxed);
        if features & 1 << VIRTIO_BLK_F_CONFIG_WCE != 0 {
            !self.is_writeback()
        } else {
            features & 1 << VIRTIO_BLK_F_FLUSH == 0
        }
    }

    /// `writeback` in the config space.
    #[inline]
    pub fn is_writeback(&self) -> bool {
        self.writeback.load(Ordering::Relaxed)
    }

    /// Notes the features that the driver accepted.
    pub fn set_features(&self, accepted: u64) {
        self.features.store(accepted, Ordering::Relaxed);
        let has = |bit: u32| accepted & 1 << bit != 0;
        if has(VIRTIO_BLK_F_CONFIG_WCE) && !has(VIRTIO_BLK_F_FLUSH) {
            // A driver that cannot flush starts with write-through (VIRTIO 1.3, 5.2.5.2).
            self.writeback.store(false, Ordering::Relaxed);
        }
    }

    /// Notes a choice of the driver. Returns whether caching was write-back before.
    pub fn choose(&self, writeback: bool) -> bool {
        let chosen = if writeback { WRITE_BACK } else { WRITE_THROUGH };
        self.chosen.store(chosen, Ordering::Relaxed);
        self.writeback.swap(writeback, Ordering::Relaxed)
    }

    /// Forgets the features. The choice stays: QEMU keeps a copy of it over resets, and tells it to the next driver.
    pub fn reset(&self) {
        self.features.store(0, Ordering::Relaxed);
        let writeback = self.kept() != WRITE_THROUGH;
        self.writeback.store(writeback, Ordering::Relaxed);
    }

    /// Returns the last choice, as it is noted in the file of requests in flight.
    pub fn kept(&self) -> u8 {
        self.chosen.load(Ordering::Relaxed)
    }

    /// Restores a choice that another process noted. A missing or unknown value may have been write-through.
    pub fn set_kept(&self, kept: Option<u8>) {
        match kept {
            Some(0) => {
                self.chosen.store(0, Ordering::Relaxed);
                self.writeback.store(true, Ordering::Relaxed);
            }
            Some(WRITE_BACK) => _ = self.choose(true),
            Some(WRITE_THROUGH) => _ = self.choose(false),
            _ => {
                self.choose(false);
                log::info!(
                    "it is unknown whether this driver chose write-through caching before; \
                     writes are written through until it chooses again"
                );
            }
        }
    }
}
