// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The config space (VIRTIO 1.3, 5.6.4), and the two fields of it that the driver sets: they change the layout of requests.

use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU32, Ordering};

use serde::{Deserialize, Serialize};

/// The control queue and the event queue. All others are request queues.
pub const CONTROL: u16 = 0;
pub const EVENTS: u16 = 1;
pub const FIRST_REQUEST: u16 = 2;
/// Bytes of an event.
pub const EVENT_SIZE: usize = 16;
/// The longest CDB that a driver may choose, in bytes (SPC-5, 4.2.1).
pub const MAX_CDB: usize = 260;
/// The longest sense data that a driver may choose, in bytes (SPC-5, 4.4.1).
pub const MAX_SENSE: usize = 252;

const DEFAULT: Sizes = Sizes { sense: 96, cdb: 32 };
const SENSE: RangeInclusive<u32> = 18..=MAX_SENSE as u32;
const CDB: RangeInclusive<u32> = 16..=MAX_CDB as u32;
/// Offsets of `sense_size` and `cdb_size`, which follows it.
const SENSE_OFFSET: usize = 20;
const CDB_OFFSET: usize = 24;
/// `max_sectors`: no driver needs more in one request.
const MAX_SECTORS: u32 = 0xffff;
/// Commands that the driver may have in flight for each logical unit.
const CMD_PER_LUN: u32 = 128;

/// The sizes that the driver sets, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sizes {
    /// Sense data in a response.
    pub sense: u32,
    /// The CDB in a request.
    pub cdb: u32,
}

impl Sizes {
    fn is_valid(self) -> bool {
        SENSE.contains(&self.sense) && CDB.contains(&self.cdb)
    }
}

/// The config space of a device.
#[derive(Debug)]
pub struct Config {
    request_queues: u16,
    seg_max: u32,
    max_sectors: u32,
    sense: AtomicU32,
    cdb: AtomicU32,
}

impl Config {
    /// Creates the config space of a device with so many request queues. `max_bytes` is the most that one request may move.
    pub fn new(request_queues: u16, seg_max: u32, max_bytes: u64) -> Self {
        let max_sectors = u32::try_from(max_bytes / 512).unwrap_or(u32::MAX);
        Self {
            request_queues,
            seg_max,
            max_sectors: max_sectors.clamp(1, MAX_SECTORS),
            sense: AtomicU32::new(DEFAULT.sense),
            cdb: AtomicU32::new(DEFAULT.cdb),
        }
    }

    /// Returns the sizes that the driver has set.
    #[inline]
    pub fn sizes(&self) -> Sizes {
        Sizes {
            sense: self.sense.load(Ordering::Relaxed),
            cdb: self.cdb.load(Ordering::Relaxed),
        }
    }

    /// Sets the sizes. Returns whether they are valid; otherwise they stay as they are.
    #[must_use]
    pub fn set_sizes(&self, sizes: Sizes) -> bool {
        if sizes.is_valid() {
            self.sense.store(sizes.sense, Ordering::Relaxed);
            self.cdb.store(sizes.cdb, Ordering::Relaxed);
        }
        sizes.is_valid()
    }

    /// Restores the sizes that a driver finds at its start.
    pub fn reset(&self) {
        let _ = self.set_sizes(DEFAULT);
    }

    /// Writes to the config space for the driver. Returns whether it may: only valid sizes can be written.
    #[must_use]
    pub fn write(&self, offset: usize, data: &[u8]) -> bool {
        let mut sizes = self.sizes();
        let word = |bytes: &[u8]| bytes.try_into().map_or(0, u32::from_le_bytes);
        match (offset, data.len()) {
            (SENSE_OFFSET, 4) => sizes.sense = word(data),
            (CDB_OFFSET, 4) => sizes.cdb = word(data),
            (SENSE_OFFSET, 8) => {
                let (sense, cdb) = data.split_at(4);
                (sizes.sense, sizes.cdb) = (word(sense), word(cdb));
            }
            // It changes nothing.
            (_, 0) => {}
            _ => return false,
        }
        self.set_sizes(sizes)
    }

    /// Returns `struct virtio_scsi_config`.
    pub fn bytes(&self) -> Vec<u8> {
        let Sizes { sense, cdb } = self.sizes();
        let words = [
            self.request_queues.into(),
            self.seg_max,
            self.max_sectors,
            CMD_PER_LUN,
            EVENT_SIZE as u32,
            sense,
            cdb,
        ];
        let mut bytes: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
        bytes.extend(0u16.to_le_bytes()); // max_channel
        bytes.extend(255u16.to_le_bytes()); // max_target
        bytes.extend(u32::from(super::address::MAX_LUNS - 1).to_le_bytes()); // max_lun
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_sets_valid_sizes_only() {
        let config = Config::new(4, 126, u64::MAX);
        assert_eq!(config.bytes().len(), 36);
        for (offset, data) in [
            (0, vec![1, 0, 0, 0]),
            (20, vec![17, 0, 0, 0]),
            (20, vec![253, 0, 0, 0]),
            (24, vec![15, 0, 0, 0]),
            (24, vec![5, 1, 0, 0]),
            (24, vec![32]),
            (20, vec![96, 0, 0, 0, 0, 0, 0, 0]),
            (34, vec![0; 4]),
            (usize::MAX, vec![0; 4]),
        ] {
            assert!(!config.write(offset, &data), "{offset} {data:?}");
            assert_eq!(config.sizes(), DEFAULT);
        }
        assert!(config.write(20, &[252, 0, 0, 0]));
        assert!(config.write(24, &[4, 1, 0, 0]));
        let largest = Sizes {
            sense: 252,
            cdb: 260,
        };
        assert_eq!(config.sizes(), largest);
        assert_eq!(config.bytes()[20..28], [252, 0, 0, 0, 4, 1, 0, 0]);
        assert!(config.write(20, &[18, 0, 0, 0, 16, 0, 0, 0]));
        config.reset();
        assert_eq!(config.sizes(), DEFAULT);
    }

    #[test]
    fn a_request_moves_no_more_than_all_devices_take() {
        for (bytes, sectors) in [(u64::MAX, 0xffff), (512 << 10, 1024), (0, 1)] {
            let config = Config::new(1, 126, bytes);
            assert_eq!(config.bytes()[8..12], u32::to_le_bytes(sectors));
        }
    }
}
