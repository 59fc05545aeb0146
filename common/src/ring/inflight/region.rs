// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The region of one ring.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::{AtomicAccess, Bytes};

use crate::memory::Mapping;
use crate::ring::crash_point::{Step, after};

/// Start of a region in either format: features u64, version u16, number of descriptors u16.
pub(super) const VERSION: usize = 8;
pub(super) const DESCRIPTORS: usize = 10;
/// The only version of the layout. A region of zeroes is new.
pub(super) const LAYOUT_VERSION: u16 = 1;

/// The region of one ring.
#[derive(Debug)]
pub struct Region {
    pub mapping: Arc<Mapping>,
    pub start: usize,
    pub length: usize,
    /// Descriptors of the ring.
    pub size: u16,
}

impl Region {
    pub fn load<T: AtomicAccess + Default>(&self, offset: usize) -> T {
        let region = self.mapping.slice(self.start, self.length);
        // Offsets are inside the region: indices are below the size of the ring.
        region
            .and_then(|region| region.load(offset, Ordering::Acquire).ok())
            .unwrap_or_default()
    }

    pub fn store<T: AtomicAccess>(&self, offset: usize, value: T) {
        if let Some(region) = self.mapping.slice(self.start, self.length) {
            let _ = region.store(value, offset, Ordering::Release);
        }
    }

    /// Returns whether a device used it before, for a ring of this size.
    pub fn is_valid(&self) -> bool {
        self.load::<u16>(VERSION) == LAYOUT_VERSION && self.load::<u16>(DESCRIPTORS) == self.size
    }

    /// Makes it new.
    pub fn invalidate(&self) {
        self.store(VERSION, 0u16);
    }

    /// Makes it valid.
    pub fn begin(&self) {
        self.store(DESCRIPTORS, self.size);
        after(Step::Sized);
        self.store(VERSION, LAYOUT_VERSION);
        after(Step::Initialized);
    }
}
