// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest's resources: images in the format of displays, and their backing in guest memory. For a resource in the
//! renderer, only the pixels that a scanout shows are here.

use std::collections::HashMap;

use vhost_device_common::memory::GuestMemory;
use zerocopy::IntoBytes;

use crate::backing::Backing;
use crate::format::{Format, PIXEL_SIZE};
use crate::pixels::Pixels;
use crate::protocol::CommandError;
use crate::rectangle::Rectangle;

/// How many pixels are copied and converted at a time, so that they are still in the processor's cache.
const CHUNK_PIXELS: usize = 4096;
/// Bytes charged for a resource in addition to its pixels, which also limits the number of small resources.
const OVERHEAD: u64 = 256;
/// The state of a resource that the renderer holds.
#[derive(Debug)]
struct RendererState {
    /// Estimated host memory in bytes.
    size: u64,
    /// Whether any pixel may have changed since all pixels were read.
    stale: bool,
}

/// A resource.
#[derive(Debug)]
pub struct Resource {
    pub width: u32,
    pub height: u32,
    /// `None` if displays cannot show it.
    format: Option<Format>,
    /// Rows of 0xAARRGGBB pixels, top first. Allocated for a resource in the renderer once a scanout shows it.
    pixels: Pixels,
    rendered: Option<RendererState>,
    backing: Option<Backing>,
    /// The UUID from RESOURCE_ASSIGN_UUID.
    pub uuid: Option<[u8; 16]>,
}

impl Resource {
    fn cost(&self) -> u64 {
        let backing = self.backing.as_ref().map_or(0, Backing::cost);
        let rendered = self.rendered.as_ref().map_or(0, |rendered| rendered.size);
        OVERHEAD + self.pixels.len() as u64 * PIXEL_SIZE + backing + rendered
    }

    /// Returns the format, or `None` if displays cannot show the resource.
    pub fn format(&self) -> Option<Format> {
        self.format
    }

    /// Returns all pixels, as 0xAARRGGBB.
    pub fn pixels_mut(&mut self) -> &mut [u32] {
        self.pixels.as_mut_slice()
    }

    /// Returns whether the renderer holds the resource.
    pub fn is_in_renderer(&self) -> bool {
        self.rendered.is_some()
    }

    /// Returns the backing, if one is attached.
    pub fn backing(&self) -> Option<&Backing> {
        self.backing.as_ref()
    }

    /// Returns the size of the whole image in bytes.
    fn image_size(&self) -> u64 {
        (u64::from(self.width) * u64::from(self.height)).saturating_mul(PIXEL_SIZE)
    }

    /// Calls `read` to fill a rectangle of the pixels of a resource in the renderer, or the whole image if it is stale.
    pub fn read_back(
        &mut self,
        rectangle: &Rectangle,
        read: impl FnOnce(&Rectangle, u32, &mut [u32]) -> Result<(), CommandError>,
    ) -> Result<(), CommandError> {
        let format = self.format.ok_or(CommandError::InvalidParameter)?;
        let rendered = self
            .rendered
            .as_mut()
            .ok_or(CommandError::InvalidParameter)?;
        let whole =
            Rectangle::new(0, 0, self.width, self.height).ok_or(CommandError::InvalidParameter)?;
        let rectangle = if rendered.stale { &whole } else { rectangle };
        read(rectangle, self.width, self.pixels.as_mut_slice())?;
        rendered.stale = false;
        let (mut start, width) = (first_pixel(self.width, rectangle), self.width as usize);
        for _ in 0..rectangle.height {
            let end = start.saturating_add(rectangle.width as usize);
            format.convert(
                self.pixels
                    .get_mut(start..end)
                    .ok_or(CommandError::InvalidParameter)?,
            );
            start += width;
        }
        Ok(())
    }

    /// Returns whether the rectangle is within the image.
    pub fn contains(&self, rectangle: &Rectangle) -> bool {
        rectangle.is_within(self.width, self.height)
    }

    fn position(&self, x: u32, y: u32) -> usize {
        y as usize * self.width as usize + x as usize
    }

    /// Returns `count` pixels of row `y`, from column `x` on.
    pub fn row(&self, x: u32, y: u32, count: u32) -> &[u32] {
        let start = self.position(x, y);
        self.pixels
            .get(start..start.saturating_add(count as usize))
            .unwrap_or_default()
    }

    /// Returns whole rows, which are contiguous.
    pub fn rows(&self, y: u32, count: u32) -> &[u32] {
        let (start, end) = (
            self.position(0, y),
            self.position(0, y.saturating_add(count)),
        );
        self.pixels.get(start..end).unwrap_or_default()
    }

    /// Copies a rectangle from guest memory (TRANSFER_TO_HOST_2D). Its first pixel is at `offset` bytes in the backing,
    /// and rows are as long as the resource's.
    pub fn transfer(
        &mut self,
        memory: &GuestMemory,
        rectangle: &Rectangle,
        offset: u64,
    ) -> Result<(), CommandError> {
        let format = self.format.ok_or(CommandError::InvalidParameter)?;
        if self.is_in_renderer() || !self.contains(rectangle) {
            return Err(CommandError::InvalidParameter);
        }
        let backing = self.backing.as_ref().ok_or(CommandError::Unspecified)?;
        let stride = u64::from(self.width) * PIXEL_SIZE;
        let length =
            u64::from(rectangle.height - 1) * stride + u64::from(rectangle.width) * PIXEL_SIZE;
        offset
            .checked_add(length)
            .filter(|end| *end <= backing.length())
            .ok_or(CommandError::InvalidParameter)?;
        let (runs, run) = match rectangle.width == self.width {
            true => (1, rectangle.width as usize * rectangle.height as usize),
            false => (rectangle.height, rectangle.width as usize),
        };
        let mut from = offset;
        let mut to = first_pixel(self.width, rectangle);
        for _ in 0..runs {
            let pixels = self
                .pixels
                .get_mut(to..to.saturating_add(run))
                .ok_or(CommandError::InvalidParameter)?;
            let mut position = from;
            for band in pixels.chunks_mut(CHUNK_PIXELS) {
                backing.read(memory, position, band.as_mut_bytes())?;
                format.convert(band);
                position += band.len() as u64 * PIXEL_SIZE;
            }
            from += stride;
            to += self.width as usize;
        }
        Ok(())
    }
}

/// Returns the index of the first pixel of `rectangle` in an image of this width.
fn first_pixel(width: u32, rectangle: &Rectangle) -> usize {
    rectangle.y as usize * width as usize + rectangle.x as usize
}

/// All resources of the guest, by ID.
#[derive(Debug)]
pub struct Resources {
    all: HashMap<u32, Resource>,
    /// Memory charged, in bytes.
    used: u64,
    limit: u64,
}

impl Resources {
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
        let resource = Resource {
            width,
            height,
            format: Some(format),
            pixels,
            rendered: None,
            backing: None,
            uuid: None,
        };
        self.all.insert(id, resource);
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
        let resource = Resource {
            width,
            height,
            format,
            pixels: Pixels::default(),
            rendered: Some(RendererState { size, stale: true }),
            backing: None,
            uuid: None,
        };
        self.charge(size.saturating_add(OVERHEAD))?;
        create().inspect_err(|_| self.refund(resource.cost()))?;
        self.all.insert(id, resource);
        Ok(())
    }

    /// Prepares a resource for a scanout. If it is in the renderer, allocates its pixels and marks them stale.
    pub fn prepare_scanout(&mut self, id: u32) -> Result<(), CommandError> {
        let resource = self.get(id)?;
        resource.format.ok_or(CommandError::InvalidParameter)?;
        let size = resource.image_size();
        if resource.is_in_renderer() && resource.pixels.len() == 0 {
            self.charge(size)?;
            let pixels = Pixels::new(size / PIXEL_SIZE).inspect_err(|_| self.refund(size))?;
            self.get_mut(id)?.pixels = pixels;
        }
        if let Some(rendered) = &mut self.get_mut(id)?.rendered {
            rendered.stale = true;
        }
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
        let mut resources = Resources::new(1 << 20);
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
        let mut resources = Resources::new(1 << 16);
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

    #[test]
    fn transfers_without_memory_or_outside_the_image_fail() {
        let mut resources = Resources::new(1 << 20);
        resources.create(1, format(), 10, 10).unwrap();
        let memory = GuestMemory::default();
        let all = Rectangle::new(0, 0, 10, 10).unwrap();
        let transfer = |resources: &mut Resources, rectangle: &Rectangle, offset| {
            resources
                .get_mut(1)
                .unwrap()
                .transfer(&memory, rectangle, offset)
        };
        assert_eq!(
            transfer(&mut resources, &all, 0),
            Err(CommandError::Unspecified)
        );
        let mut backing = Backing::default();
        backing.push(0x1000, 400);
        resources.attach_backing(1, backing).unwrap();
        assert_eq!(
            transfer(&mut resources, &all, 0),
            Err(CommandError::Unspecified)
        );
        assert_eq!(
            transfer(&mut resources, &all, 1),
            Err(CommandError::InvalidParameter)
        );
        assert_eq!(
            transfer(&mut resources, &all, u64::MAX),
            Err(CommandError::InvalidParameter)
        );
        let outside = Rectangle::new(1, 0, 10, 10).unwrap();
        assert_eq!(
            transfer(&mut resources, &outside, 0),
            Err(CommandError::InvalidParameter)
        );
    }
}
