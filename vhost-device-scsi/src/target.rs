// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A target, as its logical units see it.

use std::io;
use std::sync::{Arc, Weak};

use crate::lun::{Peer, Target};
use crate::procedure::PeerMedium;
use crate::reservations::Reservations;
use crate::shared::Shared;
use crate::unit::Unit;

/// A target, as its logical units see it.
pub struct TargetView {
    /// Has the units, which have this.
    shared: Weak<Shared>,
    number: u8,
    /// The file of the unit that sees the target.
    reservations: Option<Arc<Reservations>>,
}

impl TargetView {
    /// Returns what the logical units of a target see of it.
    pub fn new(shared: &Arc<Shared>, number: u8) -> Self {
        Self {
            shared: Arc::downgrade(shared),
            number,
            reservations: None,
        }
    }

    /// Adds the file of a unit, to which it stores even after it was removed: another one may have its place and its designator then.
    pub fn with_reservations(self, reservations: Option<Arc<Reservations>>) -> Self {
        Self {
            reservations,
            ..self
        }
    }

    /// Returns the designator of the target, which its first unit has determined.
    pub fn identity(&self) -> Option<u64> {
        let units = self.shared.upgrade()?.table.target(self.number);
        Some(units.first()?.logical.facts().identity.target)
    }

    fn find_unit(&self, naa: u64) -> Option<Arc<Unit>> {
        let mut units = self.shared.upgrade()?.table.units().into_iter();
        units.find(|unit| unit.logical.facts().identity.naa == naa)
    }
}

impl Target for TargetView {
    fn luns(&self) -> Vec<u16> {
        let Some(shared) = self.shared.upgrade() else {
            return Vec::new();
        };
        let units = shared.table.target(self.number);
        let devices = shared.devices.iter().map(|device| device.address);
        let devices = devices.filter(|address| address.target == self.number);
        let all = units.iter().map(|unit| unit.address).chain(devices);
        let mut luns: Vec<_> = all.map(|address| address.lun).collect();
        luns.sort_unstable();
        luns
    }

    fn find(&self, naa: u64) -> Option<Peer> {
        let unit = self.find_unit(naa)?;
        Some(Peer {
            unit: Arc::clone(&unit.logical),
            medium: Arc::new(PeerMedium::new(unit, &self.shared)),
        })
    }

    fn store(&self, _naa: u64, state: &[u8]) -> io::Result<()> {
        match &self.reservations {
            Some(file) => file.store(state),
            // There is nothing to delete either.
            None if state.is_empty() => Ok(()),
            None => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}
