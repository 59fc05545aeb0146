// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Resources: pictures of the guest's, kept here as the display takes them, and the guest memory that they come from. Those of 3D are the
//! renderer's; here is what of them is shown.

use std::collections::HashMap;

use vhost_device_common::memory::GuestMemory;
use zerocopy::IntoBytes;

use crate::backing::Backing;
use crate::format::{Format, PIXEL_SIZE};
use crate::pixels::Pixels;
use crate::protocol::Refusal;
use crate::rectangle::Rectangle;

/// Pixels that are copied before they are converted: few enough to be in the processor's cache still.
const BAND: usize = 4096;
/// What a resource costs beside its pixels, in bytes, so that many small ones are bounded too.
const OVERHEAD: u64 = 256;
/// What is known of a resource that the renderer has.
#[derive(Debug)]
struct Rendered {
    /// What it takes of the host, as far as one can tell.
    size: u64,
    /// It has been drawn in since its pixels were read, maybe anywhere.
    unread: bool,
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
    rendered: Option<Rendered>,
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
    pub fn is_rendered(&self) -> bool {
        self.rendered.is_some()
    }

    pub fn backing(&self) -> Option<&Backing> {
        self.backing.as_ref()
    }

    /// Bytes of all its pixels.
    fn picture_size(&self) -> u64 {
        (u64::from(self.width) * u64::from(self.height)).saturating_mul(PIXEL_SIZE)
    }

    /// Has `read` fill in a rectangle of the pixels of a resource that the renderer has, or all of them where more may have changed.
    pub fn read_back(
        &mut self,
        rectangle: &Rectangle,
        read: impl FnOnce(&Rectangle, u32, &mut [u32]) -> Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        let format = self.format.ok_or(Refusal::Parameter)?;
        let rendered = self.rendered.as_mut().ok_or(Refusal::Parameter)?;
        let whole = Rectangle::new(0, 0, self.width, self.height).ok_or(Refusal::Parameter)?;
        let rectangle = if rendered.unread { &whole } else { rectangle };
        read(rectangle, self.width, self.pixels.as_mut_slice())?;
        rendered.unread = false;
        let (mut start, width) = (y_x(self.width, rectangle), self.width as usize);
        for _ in 0..rectangle.height {
            let end = start.saturating_add(rectangle.width as usize);
            format.convert(self.pixels.get_mut(start..end).ok_or(Refusal::Parameter)?);
            start += width;
        }
        Ok(())
    }

    /// Whether a rectangle is in the picture.
    pub fn has(&self, rectangle: &Rectangle) -> bool {
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
    ) -> Result<(), Refusal> {
        let format = self.format.ok_or(Refusal::Parameter)?;
        if self.is_rendered() || !self.has(rectangle) {
            return Err(Refusal::Parameter);
        }
        let backing = self.backing.as_ref().ok_or(Refusal::Unspecified)?;
        let stride = u64::from(self.width) * PIXEL_SIZE;
        let length =
            u64::from(rectangle.height - 1) * stride + u64::from(rectangle.width) * PIXEL_SIZE;
        offset
            .checked_add(length)
            .filter(|end| *end <= backing.length())
            .ok_or(Refusal::Parameter)?;
        let (runs, run) = match rectangle.width == self.width {
            true => (1, rectangle.width as usize * rectangle.height as usize),
            false => (rectangle.height, rectangle.width as usize),
        };
        let mut from = offset;
        let mut to = y_x(self.width, rectangle);
        for _ in 0..runs {
            let pixels = self
                .pixels
                .get_mut(to..to.saturating_add(run))
                .ok_or(Refusal::Parameter)?;
            let mut place = from;
            for band in pixels.chunks_mut(BAND) {
                backing.read(memory, place, band.as_mut_bytes())?;
                format.convert(band);
                place += band.len() as u64 * PIXEL_SIZE;
            }
            from += stride;
            to += self.width as usize;
        }
        Ok(())
    }
}

/// Index of the first pixel of `rectangle` in a picture of this width.
fn y_x(width: u32, rectangle: &Rectangle) -> usize {
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
    pub fn none(&self) -> Self {
        Self::new(self.limit)
    }

    /// All of them, with their numbers.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &Resource)> {
        self.all
            .iter()
            .map(|(number, resource)| (*number, resource))
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
        *self = self.none();
    }

    pub fn get(&self, number: u32) -> Result<&Resource, Refusal> {
        self.all.get(&number).ok_or(Refusal::ResourceId)
    }

    pub fn get_mut(&mut self, number: u32) -> Result<&mut Resource, Refusal> {
        self.all.get_mut(&number).ok_or(Refusal::ResourceId)
    }

    /// Takes note of memory that is about to be used.
    fn charge(&mut self, cost: u64) -> Result<(), Refusal> {
        let used = self.used.saturating_add(cost);
        if used > self.limit {
            return Err(Refusal::OutOfMemory);
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
    fn check_new(&self, number: u32) -> Result<(), Refusal> {
        match number == 0 || self.all.contains_key(&number) {
            true => Err(Refusal::ResourceId),
            false => Ok(()),
        }
    }

    /// RESOURCE_CREATE_2D. The picture is black and transparent at first.
    pub fn create(
        &mut self,
        number: u32,
        format: Format,
        width: u32,
        height: u32,
    ) -> Result<(), Refusal> {
        self.check_new(number)?;
        let count = u64::from(width) * u64::from(height);
        if count == 0 {
            return Err(Refusal::Parameter);
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
        self.all.insert(number, resource);
        Ok(())
    }

    /// RESOURCE_CREATE_3D: has `create` make a resource that takes about `size` bytes of the host.
    pub fn create_rendered(
        &mut self,
        number: u32,
        format: Option<Format>,
        (width, height): (u32, u32),
        size: u64,
        create: impl FnOnce() -> Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        self.check_new(number)?;
        let resource = Resource {
            width,
            height,
            format,
            pixels: Pixels::default(),
            rendered: Some(Rendered { size, unread: true }),
            backing: None,
            uuid: None,
        };
        self.charge(size.saturating_add(OVERHEAD))?;
        create().inspect_err(|_| self.refund(resource.cost()))?;
        self.all.insert(number, resource);
        Ok(())
    }

    /// Makes sure that a resource can be shown: all pixels of one that the renderer has are to be read when it is.
    pub fn prepare(&mut self, number: u32) -> Result<(), Refusal> {
        let resource = self.get(number)?;
        resource.format.ok_or(Refusal::Parameter)?;
        let size = resource.picture_size();
        if resource.is_rendered() && resource.pixels.len() == 0 {
            self.charge(size)?;
            let pixels = Pixels::new(size / PIXEL_SIZE).inspect_err(|_| self.refund(size))?;
            self.get_mut(number)?.pixels = pixels;
        }
        if let Some(rendered) = &mut self.get_mut(number)?.rendered {
            rendered.unread = true;
        }
        Ok(())
    }

    /// The resources that the renderer has, with their numbers.
    pub fn rendered(&self) -> impl Iterator<Item = (u32, &Resource)> {
        self.iter().filter(|(_, resource)| resource.is_rendered())
    }

    /// RESOURCE_UNREF.
    pub fn remove(&mut self, number: u32) -> Result<(), Refusal> {
        let resource = self.all.remove(&number).ok_or(Refusal::ResourceId)?;
        self.refund(resource.cost());
        Ok(())
    }

    /// RESOURCE_ATTACH_BACKING.
    pub fn attach(&mut self, number: u32, backing: Backing) -> Result<(), Refusal> {
        if self.get(number)?.backing.is_some() {
            return Err(Refusal::Unspecified);
        }
        self.charge(backing.cost())?;
        self.get_mut(number)?.backing = Some(backing);
        Ok(())
    }

    /// RESOURCE_DETACH_BACKING.
    pub fn detach(&mut self, number: u32) -> Result<(), Refusal> {
        let backing = self.get_mut(number)?.backing.take();
        let cost = backing.ok_or(Refusal::Unspecified)?.cost();
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
        resources.attach(1, backing).unwrap();
        assert_eq!(resources.used, 40_000 + 4 + 2 * OVERHEAD + 160);
        resources.detach(1).unwrap();
        assert_eq!(resources.detach(1), Err(Refusal::Unspecified));
        resources.remove(1).unwrap();
        resources.remove(2).unwrap();
        assert_eq!(resources.remove(2), Err(Refusal::ResourceId));
        assert_eq!(resources.used, 0);
    }

    #[test]
    fn the_limit_holds_for_pixels_and_backings() {
        let mut resources = Resources::new(1 << 16);
        let huge = resources.create(1, format(), u32::MAX, u32::MAX);
        assert_eq!(huge, Err(Refusal::OutOfMemory));
        resources.create(1, format(), 64, 64).unwrap();
        let mut backing = Backing::default();
        (0..4096).for_each(|_| backing.push(0, 1));
        assert_eq!(resources.attach(1, backing), Err(Refusal::OutOfMemory));
        assert_eq!(
            resources.create(1, format(), 1, 1),
            Err(Refusal::ResourceId)
        );
        assert_eq!(
            resources.create(0, format(), 1, 1),
            Err(Refusal::ResourceId)
        );
        assert_eq!(resources.create(2, format(), 0, 1), Err(Refusal::Parameter));
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
        assert_eq!(transfer(&mut resources, &all, 0), Err(Refusal::Unspecified));
        let mut backing = Backing::default();
        backing.push(0x1000, 400);
        resources.attach(1, backing).unwrap();
        assert_eq!(transfer(&mut resources, &all, 0), Err(Refusal::Unspecified));
        assert_eq!(transfer(&mut resources, &all, 1), Err(Refusal::Parameter));
        assert_eq!(
            transfer(&mut resources, &all, u64::MAX),
            Err(Refusal::Parameter)
        );
        let outside = Rectangle::new(1, 0, 10, 10).unwrap();
        assert_eq!(
            transfer(&mut resources, &outside, 0),
            Err(Refusal::Parameter)
        );
    }
}
