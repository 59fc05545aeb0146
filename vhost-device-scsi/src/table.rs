// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The logical units that there are now.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use crate::address::Address;
use crate::unit::Unit;

type Units = BTreeMap<Address, Arc<Unit>>;

/// The logical units by their addresses. Threads keep copies, which they renew when the generation has changed.
#[derive(Default)]
pub struct Table {
    units: RwLock<Units>,
    generation: AtomicU64,
}

impl Table {
    /// Returns all units in the order of their addresses.
    pub fn units(&self) -> Vec<Arc<Unit>> {
        self.read().values().cloned().collect()
    }

    fn read(&self) -> RwLockReadGuard<'_, Units> {
        self.units.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns a number that changes with the units.
    #[inline]
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Returns the unit at an address.
    pub fn get(&self, address: Address) -> Option<Arc<Unit>> {
        self.read().get(&address).cloned()
    }

    /// Returns the units of a target, in ascending order.
    pub fn target(&self, target: u8) -> Vec<Arc<Unit>> {
        let (first, last) = (
            Address { target, lun: 0 },
            Address {
                target,
                lun: u16::MAX,
            },
        );
        let units = self.read();
        units
            .range(first..=last)
            .map(|(_, unit)| Arc::clone(unit))
            .collect()
    }

    /// Adds a unit. Returns false if there is one at its address.
    #[must_use]
    pub fn add(&self, unit: Arc<Unit>) -> bool {
        let mut units = self.units.write().unwrap_or_else(PoisonError::into_inner);
        let is_free = !units.contains_key(&unit.address);
        if is_free {
            units.insert(unit.address, unit);
            self.generation.fetch_add(1, Ordering::AcqRel);
        }
        is_free
    }

    /// Removes the unit at an address.
    pub fn remove(&self, address: Address) -> Option<Arc<Unit>> {
        let mut units = self.units.write().unwrap_or_else(PoisonError::into_inner);
        let removed = units.remove(&address);
        self.generation.fetch_add(1, Ordering::AcqRel);
        removed
    }

    /// Returns lun 0 of the first target without units that `is_taken` does not name.
    pub fn free(&self, is_taken: impl Fn(u8) -> bool) -> Address {
        let units = self.read();
        let is_used =
            |target| is_taken(target) || units.keys().any(|address| address.target == target);
        let target = (0..=u8::MAX).find(|target| !is_used(*target));
        Address {
            target: target.unwrap_or(u8::MAX),
            lun: 0,
        }
    }
}
