// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The unit of a disk, and the limits of discards: those of the host, which the driver reads (VIRTIO 1.3, 5.2.4).

use rustix::fs::Dev;

use super::topology::{attribute, queue_folder};

/// The unit of sizes and addresses of VIRTIO's disks, in bytes (VIRTIO 1.3, 5.2.4).
pub const SECTOR_SIZE: u64 = 512;
/// The most sectors of one discard segment: 1 GiB.
pub const MAX_DISCARD_SECTORS: u32 = 1 << 21;
/// The most sectors of one write-zeroes segment: 64 MiB, because the host may have to write them.
pub const MAX_WRITE_ZEROES_SECTORS: u32 = 1 << 17;

/// Limits of discards, in sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiscardLimits {
    /// The most sectors of one segment.
    pub max_sectors: u32,
    /// Segments that are smaller, or not aligned to this, may give no storage back.
    pub alignment: u32,
}

impl DiscardLimits {
    /// Returns the limits of a file with physical blocks of `block` bytes.
    pub fn of_file(block: u32) -> Self {
        Self {
            max_sectors: MAX_DISCARD_SECTORS,
            alignment: block / SECTOR_SIZE as u32,
        }
    }

    /// Returns the limits of a block device with logical blocks of `block` bytes. `None` if it has no discards, or the kernel does not
    /// report them.
    pub fn of_device(device: Dev, block: u32) -> Option<Self> {
        let queue = queue_folder(device)?;
        let sectors = |name| {
            let bytes = attribute(&queue, name)?;
            Some(u32::try_from(bytes / SECTOR_SIZE).unwrap_or(u32::MAX))
        };
        let max_sectors = sectors("discard_max_bytes")?.min(MAX_DISCARD_SECTORS);
        let granularity = sectors("discard_granularity").unwrap_or(0);
        (max_sectors > 0).then(|| Self {
            max_sectors,
            alignment: granularity.max(block / SECTOR_SIZE as u32),
        })
    }
}
