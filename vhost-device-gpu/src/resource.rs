// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Resources: pictures of the guest's, kept here as the display takes them, and the guest memory that they come from. Those of 3D are the
//! renderer's; here is what of them is shown.

use std::collections::HashMap;

use vhost_device_common::memory::GuestMemory;
use zerocopy::IntoBytes;

use crate::backing::Backing;
use crate::format::{Format, PIXEL_SIZE};
use crate::pixels::Pixels;
use crate::protocol::CommandError;
use crate::rectangle::Rectangle;

/// Pixels that are copied before they are converted: few enough to be in the processor's cache still.
const CHUNK_PIXELS: usize = 4096;
/// What a resource costs beside its pixels, in bytes, so that many small ones are bounded too.
const OVERHEAD: u64 = 256;
/// What is known of a resource that the renderer has.
#[derive(Debug)]
struct RendererState {
    /// What it takes of the host, as far as one can tell.
    size: u64,
    /// It has been drawn in since its pixels were read, maybe anywhere.
    stale: bool,
}

/// A picture, or something else of the renderer's.
#[derive(Debug)]
pub struct Resource {
    pub width: u32,
    pub height: u32,
    /// `None` for what no display can show.
    format: Option<Format>,
    /// Rows of 0xAARRGGBB, from the top. Those of the renderer's are here when they are shown.
    pixels: Pixels,
    rendered: Option<RendererState>,
    backing: Option<Backing>,
    /// What RESOURCE_ASSIGN_UUID gave.
    pub uuid: Option<[u8; 16]>,
}

impl Resource {
    fn cost(&self) -> u64 {
        let backing = self.backing.as_ref().map_or(0, Backing::cost);
        let rendered = self.rendered.as_ref().map_or(0, |rendered| rendered.size);
        OVERHEAD + self.pixels.len() as u64 * PIXEL_SIZE + backing + rendered
    }

    /// The format of a picture that can be shown.
    pub fn format(&self) -> Option<Format> {
        self.format
    }

    /// All pixels that are here, each a number 0xAARRGGBB.
    pub fn pixels_mut(&mut self) -> &mut [u32] {
        self.pixels.as_mut_slice()
    }

    /// Whether the renderer has it.
    pub fn is_in_renderer(&self) -> bool {
        self.rendered.is_some()
    }

    pub fn backing(&self) -> Option<&Backing> {
        self.backing.as_ref()
    }

    /// Bytes of all its pixels.
    fn image_size(&self) -> u64 {
        (u64::from(self.width) * u64::from(self.height)).saturating_mul(PIXEL_SIZE)
    }

    /// Has `read` fill in a rectangle of the pixels of a resource that the renderer has, or all of them where more may have changed.
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

    /// Whether a rectangle is in the picture.
    pub fn contains(&self, rectangle: &Rectangle) -> bool {
        rectangle.is_within(self.width, self.height)
    }

    fn position(&self, x: u32, y: u32) -> usize {
        y as usize * self.width as usize + x as usize
    }

    /// `count` pixels of row `y`, from column `x` on.
    pub fn row(&self, x: u32, y: u32, count: u32) -> &[u32] {
        let start = self.position(x, y);
        self.pixels
            .get(start..start.saturating_add(count as usize))
            .unwrap_or_default()
    }

    /// Whole rows, which lie behind each other.
    pub fn rows(&self, y: u32, count: u32) -> &[u32] {
        let (start, end) = (
            self.position(0, y),
            self.position(0, y.saturating_add(count)),
        );
        self.pixels.get(start..end).unwrap_or_default()
    }

    /// Copies a rectangle from guest memory, where its first pixel is `offset` bytes into the backing and rows are as
    /// long as the resource's (TRANSFER_TO_HOST_2D).
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

/// Index of the first pixel of `rectangle` in a picture of this width.
fn first_pixel(width: u32, rectangle: &Rectangle) -> usize {
    rectangle.y as usize * width as usize + rectangle.x as usize
}

/// All resources of the guest, by the numbers that it gave them.
#[derive(Debug)]
pub struct Resources {
    all: HashMap<u32, Resource>,
    /// Bytes that they cost, and may cost.
    used: u64,
    limit: u64,
}

impl Resources {
    /// Resources that may cost `limit` bytes of memory together.
    pub fn new(limit: u64) -> Self {
        Self {
            all: HashMap::new(),
            used: 0,
            limit,
        }
    }

    /// No resources, which may cost as much as these.
    pub fn empty_copy(&self) -> Self {
        Self::new(self.limit)
    }

    /// All of them, with their numbers.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &Resource)> {
        self.all.iter().map(|(id, resource)| (*id, resource))
    }

    /// Bytes that they cost.
    pub fn cost(&self) -> u64 {
        self.used
    }

    /// Forgets all of them.
    pub fn clear(&mut self) {
        log::debug!(
            "{} resources of {} bytes are freed",
            self.all.len(),
            self.used
        );
        *self = self.empty_copy();
    }

    pub fn get(&self, id: u32) -> Result<&Resource, CommandError> {
        self.all.get(&id).ok_or(CommandError::InvalidResourceId)
    }

    pub fn get_mut(&mut self, id: u32) -> Result<&mut Resource, CommandError> {
        self.all.get_mut(&id).ok_or(CommandError::InvalidResourceId)
    }

    /// Takes note of memory that is about to be used.
    fn charge(&mut self, cost: u64) -> Result<(), CommandError> {
        let used = self.used.saturating_add(cost);
        if used > self.limit {
            return Err(CommandError::OutOfMemory);
        }
        self.used = used;
        log::debug!("resources take {used} of {} bytes", self.limit);
        Ok(())
    }

    fn refund(&mut self, cost: u64) {
        self.used = self.used.saturating_sub(cost);
        log::debug!("resources take {} of {} bytes", self.used, self.limit);
    }

    /// Whether a new resource may have this number.
    fn check_new_id(&self, id: u32) -> Result<(), CommandError> {
        match id == 0 || self.all.contains_key(&id) {
            true => Err(CommandError::InvalidResourceId),
            false => Ok(()),
        }
    }

    /// RESOURCE_CREATE_2D. The picture is black and transparent at first.
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

    /// RESOURCE_CREATE_3D: has `create` make a resource that takes about `size` bytes of the host.
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

    /// Makes sure that a resource can be shown: all pixels of one that the renderer has are to be read when it is.
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

    /// The resources that the renderer has, with their numbers.
    pub fn in_renderer(&self) -> impl Iterator<Item = (u32, &Resource)> {
        self.iter()
            .filter(|(_, resource)| resource.is_in_renderer())
    }

    /// RESOURCE_UNREF.
    pub fn remove(&mut self, id: u32) -> Result<(), CommandError> {
        let resource = self
            .all
            .remove(&id)
            .ok_or(CommandError::InvalidResourceId)?;
        self.refund(resource.cost());
        Ok(())
    }

    /// RESOURCE_ATTACH_BACKING.
    pub fn attach_backing(&mut self, id: u32, backing: Backing) -> Result<(), CommandError> {
        if self.get(id)?.backing.is_some() {
            return Err(CommandError::Unspecified);
        }
        self.charge(backing.cost())?;
        self.get_mut(id)?.backing = Some(backing);
        Ok(())
    }

    /// RESOURCE_DETACH_BACKING.
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
    fn what_is_used_is_given_back() {
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
    fn the_limit_holds_for_pixels_and_backings() {
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
    fn transfers_without_memory_or_out_of_the_picture_are_refused() {
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
