// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest's resources, and the limit on the host memory that they use together.

use std::collections::HashMap;

use crate::backing::Backing;
use crate::format::{Format, PIXEL_SIZE};
use crate::pixels::Pixels;
use crate::protocol::CommandError;
use crate::resource::{OVERHEAD, Resource};

/// All resources of the guest, by ID.
#[derive(Debug)]
pub struct ResourceTable {
    all: HashMap<u32, Resource>,
    /// Memory charged, in bytes.
    used: u64,
    limit: u64,
}

impl ResourceTable {
    /// Creates a table whose resources may use `limit` bytes of memory.
    pub fn new(limit: u64) -> Self {
        Self {
            all: HashMap::new(),
            used: 0,
            limit,
        }
    }

    /// Returns an empty table with the same limit.
    pub fn empty_copy(&self) -> Self {
        Self::new(self.limit)
    }

    /// Returns all resources with their IDs.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &Resource)> {
        self.all.iter().map(|(id, resource)| (*id, resource))
    }

    /// Returns the memory charged, in bytes.
    pub fn cost(&self) -> u64 {
        self.used
    }

    /// Frees all resources.
    pub fn clear(&mut self) {
        log::debug!("freed {} resources of {} bytes", self.all.len(), self.used);
        *self = self.empty_copy();
    }

    /// Returns a resource.
    pub fn get(&self, id: u32) -> Result<&Resource, CommandError> {
        self.all.get(&id).ok_or(CommandError::InvalidResourceId)
    }

    /// Returns a mutable resource.
    pub fn get_mut(&mut self, id: u32) -> Result<&mut Resource, CommandError> {
        self.all.get_mut(&id).ok_or(CommandError::InvalidResourceId)
    }

    /// Charges memory before it is used.
    fn charge(&mut self, cost: u64) -> Result<(), CommandError> {
        let used = self.used.saturating_add(cost);
        if used > self.limit {
            return Err(CommandError::OutOfMemory);
        }
        self.used = used;
        log::debug!("resources use {used} of {} bytes", self.limit);
        Ok(())
    }

    fn refund(&mut self, cost: u64) {
        self.used = self.used.saturating_sub(cost);
        log::debug!("resources use {} of {} bytes", self.used, self.limit);
    }

    /// Checks that the ID is valid and not in use.
    fn check_new_id(&self, id: u32) -> Result<(), CommandError> {
        match id == 0 || self.all.contains_key(&id) {
            true => Err(CommandError::InvalidResourceId),
            false => Ok(()),
        }
    }

    /// Executes RESOURCE_CREATE_2D. All pixels are transparent black at first.
    pub fn create(
        &mut self,
        id: u32,
        format: Format,
        width: u32,
        height: u32,
    ) -> Result<(), CommandError> {
        self.check_new_id(id)?;
        let count = u64::from(width) * u64::from(height);
        if count == 0 {
            return Err(CommandError::InvalidParameter);
        }
        let cost = count.saturating_mul(PIXEL_SIZE).saturating_add(OVERHEAD);
        self.charge(cost)?;
        let pixels = Pixels::new(count).inspect_err(|_| self.refund(cost))?;
        self.all
            .insert(id, Resource::new(format, width, height, pixels));
        Ok(())
    }

    /// Executes RESOURCE_CREATE_3D: calls `create` to create the resource in the renderer, and charges `size` bytes.
    pub fn create_in_renderer(
        &mut self,
        id: u32,
        format: Option<Format>,
        (width, height): (u32, u32),
        size: u64,
        create: impl FnOnce() -> Result<(), CommandError>,
    ) -> Result<(), CommandError> {
        self.check_new_id(id)?;
        let resource = Resource::new_in_renderer(format, width, height, size);
        self.charge(size.saturating_add(OVERHEAD))?;
        create().inspect_err(|_| self.refund(resource.cost()))?;
        self.all.insert(id, resource);
        Ok(())
    }

    /// Prepares a resource for a scanout. If it is in the renderer, allocates its pixels and marks them stale.
    pub fn prepare_scanout(&mut self, id: u32) -> Result<(), CommandError> {
        let resource = self.get(id)?;
        resource.format.ok_or(CommandError::InvalidParameter)?;
        if resource.is_in_renderer() && resource.pixels.len() == 0 {
            let size = resource.image_size();
            self.charge(size)?;
            let pixels = Pixels::new(size / PIXEL_SIZE).inspect_err(|_| self.refund(size))?;
            self.get_mut(id)?.pixels = pixels;
        }
        self.get_mut(id)?.mark_stale();
        Ok(())
    }

    /// Returns the resources in the renderer with their IDs.
    pub fn in_renderer(&self) -> impl Iterator<Item = (u32, &Resource)> {
        self.iter()
            .filter(|(_, resource)| resource.is_in_renderer())
    }

    /// Executes RESOURCE_UNREF.
    pub fn remove(&mut self, id: u32) -> Result<(), CommandError> {
        let resource = self
            .all
            .remove(&id)
            .ok_or(CommandError::InvalidResourceId)?;
        self.refund(resource.cost());
        Ok(())
    }

    /// Executes RESOURCE_ATTACH_BACKING.
    pub fn attach_backing(&mut self, id: u32, backing: Backing) -> Result<(), CommandError> {
        if self.get(id)?.backing.is_some() {
            return Err(CommandError::Unspecified);
        }
        self.charge(backing.cost())?;
        self.get_mut(id)?.backing = Some(backing);
        Ok(())
    }

    /// Executes RESOURCE_DETACH_BACKING.
    pub fn detach_backing(&mut self, id: u32) -> Result<(), CommandError> {
        let backing = self.get_mut(id)?.backing.take();
        let cost = backing.ok_or(CommandError::Unspecified)?.cost();
        self.refund(cost);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn format() -> Format {
        Format::from_number(2).unwrap()
    }

    #[test]
    fn freed_memory_is_refunded() {
        let mut resources = ResourceTable::new(1 << 20);
        resources.create(1, format(), 100, 100).unwrap();
        resources.create(2, format(), 1, 1).unwrap();
        let mut backing = Backing::default();
        (0..10).for_each(|page| backing.push(page << 12, 4096));
        resources.attach_backing(1, backing).unwrap();
        assert_eq!(resources.used, 40_000 + 4 + 2 * OVERHEAD + 160);
        resources.detach_backing(1).unwrap();
        assert_eq!(resources.detach_backing(1), Err(CommandError::Unspecified));
        resources.remove(1).unwrap();
        resources.remove(2).unwrap();
        assert_eq!(resources.remove(2), Err(CommandError::InvalidResourceId));
        assert_eq!(resources.used, 0);
    }

    #[test]
    fn the_limit_covers_pixels_and_backings() {
        let mut resources = ResourceTable::new(1 << 16);
        let huge = resources.create(1, format(), u32::MAX, u32::MAX);
        assert_eq!(huge, Err(CommandError::OutOfMemory));
        resources.create(1, format(), 64, 64).unwrap();
        let mut backing = Backing::default();
        (0..4096).for_each(|_| backing.push(0, 1));
        assert_eq!(
            resources.attach_backing(1, backing),
            Err(CommandError::OutOfMemory)
        );
        assert_eq!(
            resources.create(1, format(), 1, 1),
            Err(CommandError::InvalidResourceId)
        );
        assert_eq!(
            resources.create(0, format(), 1, 1),
            Err(CommandError::InvalidResourceId)
        );
        assert_eq!(
            resources.create(2, format(), 0, 1),
            Err(CommandError::InvalidParameter)
        );
    }
}
