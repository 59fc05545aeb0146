// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A resource: an image in the format of displays, and its backing in guest memory. For a resource in the renderer, only
//! the pixels that a scanout shows are here.

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
pub const OVERHEAD: u64 = 256;

/// The state of a resource that the renderer holds.
#[derive(Debug)]
struct RendererState {
    /// Estimated host memory in bytes.
    size: u64,
    /// Whether any pixel may have changed since all pixels were read.
    stale: bool,
}

/// A resource.
#[derive(Debug, Default)]
pub struct Resource {
    pub width: u32,
    pub height: u32,
    /// `None` if displays cannot show it.
    pub format: Option<Format>,
    /// Rows of 0xAARRGGBB pixels, top first. Allocated for a resource in the renderer once a scanout shows it.
    pub pixels: Pixels,
    rendered: Option<RendererState>,
    pub backing: Option<Backing>,
    /// The UUID from RESOURCE_ASSIGN_UUID.
    pub uuid: Option<[u8; 16]>,
}

impl Resource {
    /// Creates a 2D resource. The number of pixels must match the size.
    pub fn new(format: Format, width: u32, height: u32, pixels: Pixels) -> Self {
        Self {
            width,
            height,
            format: Some(format),
            pixels,
            ..Self::default()
        }
    }

    /// Creates a resource in the renderer, which uses about `size` bytes of host memory.
    pub fn new_in_renderer(format: Option<Format>, width: u32, height: u32, size: u64) -> Self {
        Self {
            width,
            height,
            format,
            rendered: Some(RendererState { size, stale: true }),
            ..Self::default()
        }
    }

    /// Returns the host memory to charge for the resource, in bytes.
    pub fn cost(&self) -> u64 {
        let backing = self.backing.as_ref().map_or(0, Backing::cost);
        let rendered = self.rendered.as_ref().map_or(0, |rendered| rendered.size);
        OVERHEAD + self.pixels.len() as u64 * PIXEL_SIZE + backing + rendered
    }

    /// Returns whether the renderer holds the resource.
    pub fn is_in_renderer(&self) -> bool {
        self.rendered.is_some()
    }

    /// Marks all pixels of a resource in the renderer as stale.
    pub fn mark_stale(&mut self) {
        if let Some(rendered) = &mut self.rendered {
            rendered.stale = true;
        }
    }

    /// Returns the rectangle of the whole image.
    ///
    /// # Errors
    /// The resource has no pixels, because displays cannot show it.
    pub fn bounds(&self) -> Result<Rectangle, CommandError> {
        Rectangle::new(0, 0, self.width, self.height).ok_or(CommandError::InvalidParameter)
    }

    /// Returns the size of the whole image in bytes.
    pub fn image_size(&self) -> u64 {
        (u64::from(self.width) * u64::from(self.height)).saturating_mul(PIXEL_SIZE)
    }

    /// Calls `read` to fill a rectangle of the pixels of a resource in the renderer, or the whole image if it is stale.
    pub fn read_back(
        &mut self,
        rectangle: &Rectangle,
        read: impl FnOnce(&Rectangle, u32, &mut [u32]) -> Result<(), CommandError>,
    ) -> Result<(), CommandError> {
        let format = self.format.ok_or(CommandError::InvalidParameter)?;
        let whole = self.bounds()?;
        let rendered = self.rendered.as_mut();
        let rendered = rendered.ok_or(CommandError::InvalidParameter)?;
        let rectangle = if rendered.stale { &whole } else { rectangle };
        read(rectangle, self.width, self.pixels.as_mut_slice())?;
        rendered.stale = false;
        for y in rectangle.y..rectangle.bottom() {
            let start = self.position(rectangle.x, y);
            format.convert(self.pixels.get_mut(start, rectangle.width as usize)?);
        }
        Ok(())
    }

    /// Returns whether the rectangle is within the image.
    pub fn contains(&self, rectangle: &Rectangle) -> bool {
        rectangle.is_within(self.width, self.height)
    }

    /// Returns the index of a pixel.
    fn position(&self, x: u32, y: u32) -> usize {
        y as usize * self.width as usize + x as usize
    }

    /// Returns `count` pixels of row `y`, from column `x` on.
    pub fn row(&self, x: u32, y: u32, count: u32) -> &[u32] {
        self.pixels.get(self.position(x, y), count as usize)
    }

    /// Returns whole rows, which are contiguous.
    pub fn rows(&self, y: u32, count: u32) -> &[u32] {
        let (start, count) = (self.position(0, y), self.position(0, count));
        self.pixels.get(start, count)
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
        let mut to = self.position(rectangle.x, rectangle.y);
        for _ in 0..runs {
            let mut position = from;
            for band in self.pixels.get_mut(to, run)?.chunks_mut(CHUNK_PIXELS) {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transfers_without_memory_or_outside_the_image_fail() {
        let format = Format::from_number(2).unwrap();
        let mut resource = Resource::new(format, 10, 10, Pixels::new(100).unwrap());
        let memory = GuestMemory::default();
        let all = Rectangle::new(0, 0, 10, 10).unwrap();
        let transfer = |resource: &mut Resource, rectangle: &Rectangle, offset| {
            resource.transfer(&memory, rectangle, offset)
        };
        assert_eq!(
            transfer(&mut resource, &all, 0),
            Err(CommandError::Unspecified)
        );
        let mut backing = Backing::default();
        backing.push(0x1000, 400);
        resource.backing = Some(backing);
        assert_eq!(
            transfer(&mut resource, &all, 0),
            Err(CommandError::Unspecified)
        );
        assert_eq!(
            transfer(&mut resource, &all, 1),
            Err(CommandError::InvalidParameter)
        );
        assert_eq!(
            transfer(&mut resource, &all, u64::MAX),
            Err(CommandError::InvalidParameter)
        );
        let outside = Rectangle::new(1, 0, 10, 10).unwrap();
        assert_eq!(
            transfer(&mut resource, &outside, 0),
            Err(CommandError::InvalidParameter)
        );
    }
}
