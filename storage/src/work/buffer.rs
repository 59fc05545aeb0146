// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory of our own that data goes through.

use vm_memory::mmap::MmapRegion;

use crate::disk::DiskError;

/// The most bytes that go through a buffer at once.
const BUFFER_SIZE: usize = 1 << 20;

/// Returns how many of `remaining` bytes go through a buffer at once.
pub fn chunk(remaining: u64) -> usize {
    usize::try_from(remaining).map_or(BUFFER_SIZE, |remaining| remaining.min(BUFFER_SIZE))
}

/// Allocates a buffer for a chunk of `remaining` bytes, filled with zeroes.
pub fn buffer(remaining: u64) -> Result<MmapRegion, DiskError> {
    MmapRegion::new(chunk(remaining)).map_err(|error| {
        log::debug!("no memory for a buffer: {error}");
        DiskError::NoMemory
    })
}
