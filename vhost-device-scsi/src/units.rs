// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The logical units as one queue thread uses them.

use std::io;
use std::sync::Arc;

use vhost_device_storage::access::Access;

use crate::address::Address;
use crate::shared::Shared;
use crate::unit::Unit;

/// A unit, and the access of the thread to its image.
struct Held {
    unit: Arc<Unit>,
    access: Access,
}

/// A copy of the table of units, which is read for each request.
#[derive(Default)]
pub struct Units {
    /// The generation of the table that was copied.
    generation: Option<u64>,
    /// The units of each target that there is, by their numbers.
    targets: Vec<Vec<Held>>,
    /// The units with limits.
    limited: Vec<Arc<Unit>>,
    /// Units that were removed while requests were in flight, which need their images until they end.
    removed: Vec<Held>,
}

impl Units {
    /// Copies the table again if it has changed.
    #[inline]
    pub fn refresh(&mut self, shared: &Shared) {
        if self.generation != Some(shared.table.generation()) {
            self.copy(shared);
        }
    }

    #[cold]
    fn copy(&mut self, shared: &Shared) {
        self.generation = Some(shared.table.generation());
        let mut old: Vec<_> = self.targets.drain(..).flatten().collect();
        self.limited.clear();
        for unit in shared.table.units() {
            if unit.throttle.is_some() {
                self.limited.push(Arc::clone(&unit));
            }
            let place = old.iter().position(|held| Arc::ptr_eq(&held.unit, &unit));
            let held = match place {
                Some(place) => old.swap_remove(place),
                None => Held {
                    access: unit.disk.access(),
                    unit,
                },
            };
            let target = usize::from(held.unit.address.target);
            if self.targets.len() <= target {
                self.targets.resize_with(target + 1, Vec::new);
            }
            if let Some(units) = self.targets.get_mut(target) {
                units.push(held);
            }
        }
        self.removed.extend(old);
        self.prune();
    }

    /// Returns whether removed units are kept for requests in flight.
    #[inline]
    pub fn has_removed(&self) -> bool {
        !self.removed.is_empty()
    }

    /// Lets go of removed units whose requests have ended.
    pub fn prune(&mut self) {
        let is_needed = |held: &Held| held.unit.tasks.has(None) || !held.access.is_idle();
        self.removed.retain(is_needed);
    }

    fn all(&self) -> impl Iterator<Item = &Held> {
        self.targets.iter().flatten().chain(&self.removed)
    }

    fn all_mut(&mut self) -> impl Iterator<Item = &mut Held> {
        self.targets.iter_mut().flatten().chain(&mut self.removed)
    }

    /// Returns whether locks keep other programs away from all images, as far as is known.
    pub fn are_exclusive(&self) -> bool {
        self.all().all(|held| held.access.is_exclusive())
    }

    /// Notes that requests were suspended, and that so many operations of them are in flight. Any of the units may be theirs, so all wait.
    pub fn suspended(&mut self, operations: usize) {
        let open = self.all_mut().filter(|held| held.access.is_open());
        open.for_each(|held| held.access.suspended(operations));
    }

    /// Notes that one of these operations has ended.
    pub fn ended(&mut self) {
        self.all_mut().for_each(|held| held.access.ended());
    }

    /// Notes that the flush of a unit before its image is handed over has ended.
    pub fn flushed(&mut self, unit: &Arc<Unit>) {
        let mut all = self.all_mut();
        if let Some(held) = all.find(|held| Arc::ptr_eq(&held.unit, unit)) {
            held.access.ended();
        }
    }

    /// Returns whether none of these operations is in flight.
    pub fn are_idle(&self) -> bool {
        self.all().all(|held| held.access.is_idle())
    }

    /// Releases the images when all these operations have ended. `flush` starts the flush of a unit, and returns whether it has ended.
    pub fn finish(&mut self, mut flush: impl FnMut(&Arc<Unit>) -> bool) {
        for held in self.all_mut() {
            while held.access.finish() && flush(&held.unit) {
                held.access.ended();
            }
            held.unit.release_reservations();
        }
    }

    /// Returns whether a target has units.
    pub fn has_target(&self, target: u8) -> bool {
        let units = self.targets.get(usize::from(target));
        units.is_some_and(|units| !units.is_empty())
    }

    /// Returns the unit at an address.
    #[inline]
    pub fn get(&self, Address { target, lun }: Address) -> Option<&Arc<Unit>> {
        let units = self.targets.get(usize::from(target))?;
        let place = units.binary_search_by_key(&lun, |held| held.unit.address.lun);
        Some(&units.get(place.ok()?)?.unit)
    }

    /// Opens the access to the image of a unit, which is open afterwards. Returns whether another program had the image until now.
    ///
    /// # Errors
    /// Another program has the image. Try again later.
    #[inline]
    pub fn open(&mut self, unit: &Arc<Unit>) -> io::Result<bool> {
        let Address { target, lun } = unit.address;
        let is_it = |held: &&mut Held| Arc::ptr_eq(&held.unit, unit);
        let present = self.targets.get_mut(usize::from(target)).and_then(|units| {
            let place = units.binary_search_by_key(&lun, |held| held.unit.address.lun);
            units.get_mut(place.ok()?).filter(is_it)
        });
        let held = present.or_else(|| self.removed.iter_mut().find(is_it));
        match held {
            Some(held) if !held.access.is_open() => held.access.open(),
            _ => Ok(false),
        }
    }

    /// Returns the units with limits.
    pub fn limited(&self) -> &[Arc<Unit>] {
        &self.limited
    }
}

impl Drop for Units {
    fn drop(&mut self) {
        let present = self.targets.drain(..).flatten();
        for Held { unit, access } in present.chain(self.removed.drain(..)) {
            // The last thread hands the image over.
            drop(access);
            unit.release_reservations();
        }
    }
}
