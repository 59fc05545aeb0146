// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The device state for migration and snapshots.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use vhost_device_common::device::StateError;

use crate::address::Address;
use crate::config::Sizes;
use crate::lun;
use crate::shared::Shared;
use crate::unit::Unit;

/// The largest state: persistent reservations of all units are most of it.
pub const MAX_STATE_SIZE: u64 = 16 << 20;

/// The device state, version 1.
#[derive(Serialize, Deserialize)]
pub struct Saved {
    /// What the driver has written to the config space.
    sizes: Sizes,
    units: Vec<SavedUnit>,
}

#[derive(Serialize, Deserialize)]
struct SavedUnit {
    target: u8,
    lun: u16,
    /// The state of the command set.
    state: lun::Saved,
}

impl SavedUnit {
    fn of(unit: &Arc<Unit>) -> Self {
        let Address { target, lun } = unit.address;
        Self {
            target,
            lun,
            state: unit.logical.save(),
        }
    }
}

impl Saved {
    /// Returns the state of all units, of which no device of the host is one.
    pub fn of(shared: &Shared) -> Self {
        Self {
            sizes: shared.config.sizes(),
            units: shared.table.units().iter().map(SavedUnit::of).collect(),
        }
    }

    /// Replaces the state of the units.
    ///
    /// # Errors
    /// The state is invalid, or has other units than this device. Nothing has changed then.
    pub fn restore(self, shared: &Shared) -> Result<(), StateError> {
        let (before, units) = (Self::of(shared), shared.table.units());
        let addresses = |saved: &Self| -> Vec<_> {
            let units = saved.units.iter();
            units.map(|unit| (unit.target, unit.lun)).collect()
        };
        if addresses(&self) != addresses(&before) {
            return Err(StateError::Contents(
                "the disks are not at the same targets and luns",
            ));
        }
        let sizes = shared.config.sizes();
        if !shared.config.set_sizes(self.sizes) {
            return Err(StateError::Contents("invalid sizes in the config space"));
        }
        for unit in &units {
            unit.has_reservations.store(true, Ordering::Release);
        }
        for (unit, saved) in units.iter().zip(self.units) {
            if let Err(error) = unit.logical.load(saved.state) {
                let _ = shared.config.set_sizes(sizes);
                for (unit, saved) in units.iter().zip(before.units) {
                    // It was valid when it was saved.
                    let _ = unit.logical.load(saved.state);
                }
                return Err(error);
            }
        }
        // Events that the driver was not told yet stayed where the guest was saved.
        shared.events().miss();
        Ok(())
    }
}
