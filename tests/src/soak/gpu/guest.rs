// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest's operations on its resources, and the model of the resources.

use super::screen::{Picture, Rectangle};
use super::{Gpu, LIMIT, PAGE, SHOWN};
use crate::front_end::gpu::{number, words};
use crate::soak::link::{Link, MOVING_SIZE};
use crate::soak::loss::Loss;

/// Maximum number of resources, and their maximum width and height.
const RESOURCES: u32 = 24;
const SIDE: u32 = 128;
/// Maximum overhead of a resource, and of each page behind it, beside its pixels.
const OVERHEAD: u64 = 1024;
const PAGE_OVERHEAD: u64 = 64;
/// Blue, green, red, alpha; and the same with an unused byte instead of alpha.
const FORMATS: [u32; 2] = [1, 2];
/// Types and uses of resources of the renderer (virglrenderer), and the origin flag.
const TEXTURE_2D: u32 = 2;
const PICTURE: u32 = 1 << 1 | 1 << 3;
const Y_0_TOP: u32 = 1 << 0;
/// A surface of the renderer.
const SURFACE: u32 = 9;

/// A resource as the guest knows it.
pub struct Resource {
    pub picture: Picture,
    /// Guest addresses of the pages behind it.
    pub pages: Vec<u64>,
    /// Whether it is a resource of the renderer.
    pub is_3d: bool,
}

impl Resource {
    /// Returns bytes of its pixels.
    fn size(&self) -> u64 {
        4 * self.picture.pixels().len() as u64
    }
}

impl Gpu {
    /// Returns a random resource.
    pub(super) fn any(&mut self) -> Option<u32> {
        let numbers: Vec<u32> = self.resources.keys().copied().collect();
        self.random.choice(&numbers).copied()
    }

    pub(super) fn rectangle(&mut self, [x, y, width, height]: Rectangle) -> Rectangle {
        if self.random.u32(..3) == 0 {
            return [x, y, width, height];
        }
        let (left, top) = (self.random.u32(..width), self.random.u32(..height));
        let (w, h) = (
            self.random.u32(1..=width - left),
            self.random.u32(1..=height - top),
        );
        [x + left, y + top, w, h]
    }

    /// Returns the minimum and maximum memory of all resources.
    pub(super) fn cost(&self) -> (u64, u64) {
        let sizes = self.resources.values().map(|resource| {
            let pixels = resource.size();
            let pages = resource.pages.len() as u64;
            (pixels, pixels + OVERHEAD + pages * PAGE_OVERHEAD)
        });
        sizes.fold((0, 0), |(least, most), (pixels, all)| {
            (least + pixels, most + all)
        })
    }

    pub(super) fn create(&mut self) -> Result<(), Loss> {
        let number = self.random.u32(1..=RESOURCES);
        let (width, height) = (self.random.u32(1..=SIDE), self.random.u32(1..=SIDE));
        let format = FORMATS[self.random.usize(..2)];
        let is_3d = self.three_d && self.random.bool();
        let response = match is_3d {
            false => self
                .driver
                .run(number::CREATE_2D, &words(&[number, format, width, height]))?,
            true => {
                let what = [number, TEXTURE_2D, format, PICTURE];
                let shape = [width, height, 1, 1, 0, 0, Y_0_TOP, 0];
                self.driver
                    .run(number::CREATE_3D, &words(&[&what[..], &shape].concat()))?
            }
        };
        let (least, most) = self.cost();
        let size = u64::from(width * height) * 4;
        let right = match response.kind {
            number::INVALID_RESOURCE_ID => self.resources.contains_key(&number),
            number::OK_NODATA => !self.resources.contains_key(&number) && least + size <= LIMIT,
            number::OUT_OF_MEMORY => most + size + OVERHEAD > LIMIT,
            _ => false,
        };
        if !right {
            return Err(Loss(format!(
                "{:#x} for a new resource {number} of {size} bytes beside {least} to {most} of {LIMIT}",
                response.kind
            )));
        }
        if response.kind == number::OK_NODATA {
            let resource = Resource {
                picture: Picture::new(width, height),
                pages: Vec::new(),
                is_3d,
            };
            self.resources.insert(number, resource);
            if is_3d {
                self.draw_3d(number)?;
            }
        }
        Ok(())
    }

    pub(super) fn unref(&mut self, number: u32) -> Result<(), Loss> {
        self.driver.done(number::UNREF, &[number, 0])?;
        self.resources.remove(&number);
        for shown in &mut self.scanouts {
            if shown.is_some_and(|(shown, _)| shown == number) {
                *shown = None;
            }
        }
        Ok(())
    }

    /// Attaches memory to a resource, or detaches it.
    pub(super) fn attach(&mut self, number: u32) -> Result<(), Loss> {
        let resource = &self.resources[&number];
        if !resource.pages.is_empty() {
            if self.random.bool() {
                let again = [number, 0];
                self.driver.done(number::DETACH_BACKING, &again)?;
                if let Some(resource) = self.resources.get_mut(&number) {
                    resource.pages.clear();
                }
            }
            return Ok(());
        }
        let count = resource.size().div_ceil(PAGE);
        let start = match (self.driver.link.moving(), self.random.bool()) {
            (Some(start), true) => start,
            _ => self.pages,
        };
        // Pages are shared: their contents matter only while they are copied.
        let mut pages: Vec<u64> = (0..MOVING_SIZE as u64 / PAGE).collect();
        self.random.shuffle(&mut pages);
        pages.truncate(count as usize);
        pages
            .iter_mut()
            .for_each(|page| *page = start + *page * PAGE);
        let mut body = words(&[number, count as u32]);
        for page in &pages {
            body.extend(page.to_le_bytes());
            body.extend(words(&[PAGE as u32, 0]));
        }
        let (least, most) = self.cost();
        let response = self.driver.run(number::ATTACH_BACKING, &body)?;
        let may_not_fit = most + count * PAGE_OVERHEAD > LIMIT;
        match response.kind {
            number::OK_NODATA => {}
            number::OUT_OF_MEMORY if may_not_fit => return Ok(()),
            // The renderer maps memory at once.
            _ if is_lost(&self.driver.link, &pages) => return Ok(()),
            kind => {
                return Err(Loss(format!(
                    "{kind:#x} for {count} pages behind a resource beside {least} to {most} of {LIMIT}"
                )));
            }
        }
        if let Some(resource) = self.resources.get_mut(&number) {
            resource.pages = pages;
        }
        Ok(())
    }

    /// Draws something new into a part of a resource.
    pub(super) fn draw(&mut self, number: u32) -> Result<(), Loss> {
        let resource = &self.resources[&number];
        if resource.is_3d {
            return self.draw_3d(number);
        }
        if resource.pages.is_empty() {
            return Ok(());
        }
        let lost = is_lost(&self.driver.link, &resource.pages);
        let mut picture = resource.picture.clone();
        let whole = picture.whole();
        let [x, y, w, h] = self.rectangle(whole);
        let colours: Vec<u32> = (0..w * h).map(|_| self.random.u32(..)).collect();
        picture.put([x, y, w, h], &colours);
        if !lost {
            let pages = &self.resources[&number].pages;
            let bytes: Vec<u8> = picture
                .pixels()
                .iter()
                .flat_map(|p| p.to_le_bytes())
                .collect();
            for (page, bytes) in pages.iter().zip(bytes.chunks(PAGE as usize)) {
                self.driver.link.memory().write(*page, bytes);
            }
        }
        let offset = (y * picture.width + x) * 4;
        let body = [x, y, w, h, offset, 0, number, 0];
        let expected = if lost {
            number::UNSPEC
        } else {
            number::OK_NODATA
        };
        self.driver
            .expect(number::TRANSFER_TO_HOST_2D, &body, expected)?;
        if !lost && let Some(resource) = self.resources.get_mut(&number) {
            resource.picture = picture;
        }
        Ok(())
    }

    /// Makes the renderer fill a resource with one colour.
    pub(super) fn draw_3d(&mut self, number: u32) -> Result<(), Loss> {
        if !self.has_context {
            let mut body = words(&[4, 0]);
            body.extend(b"soak");
            body.resize(72, 0);
            let kind = self.driver.run(number::CTX_CREATE, &body)?.kind;
            if kind != number::OK_NODATA {
                return Err(Loss(format!("{kind:#x} for a context")));
            }
            self.has_context = true;
        }
        self.driver
            .done(number::CTX_ATTACH_RESOURCE, &[number, 0])?;
        let head = |kind: u32, object: u32, length: u32| kind | object << 8 | length << 16;
        let colour = [0; 3].map(|_: u32| self.random.u32(..2));
        let [red, green, blue] = colour.map(|part| (part as f32).to_bits());
        let surface = [head(1, 8, 5), SURFACE, number, 2, 0, 0];
        let frame_buffer = [head(5, 0, 3), 1, 0, SURFACE];
        let alpha = 1f32.to_bits();
        let clear = [head(7, 0, 8), 1 << 2, red, green, blue, alpha, 0, 0, 0];
        let forget = [head(3, 8, 1), SURFACE];
        let stream = [&surface[..], &frame_buffer, &clear, &forget].concat();
        let body = [&[stream.len() as u32 * 4, 0][..], &stream].concat();
        self.driver.done(number::SUBMIT_3D, &body)?;
        self.driver
            .done(number::CTX_DETACH_RESOURCE, &[number, 0])?;
        let pixel = colour
            .iter()
            .fold(0, |pixel, part| (pixel << 8) | (part * 0xff));
        if let Some(Resource { picture, .. }) = self.resources.get_mut(&number) {
            let count = (picture.width * picture.height) as usize;
            picture.put(picture.whole(), &vec![pixel; count]);
        }
        Ok(())
    }

    pub(super) fn set_scanout(&mut self, number: u32) -> Result<(), Loss> {
        let scanout = self.random.usize(..SHOWN);
        if self.random.u32(..8) == 0 {
            self.driver
                .done(number::SET_SCANOUT, &[0, 0, 0, 0, scanout as u32, 0])?;
            self.scanouts[scanout] = None;
            return Ok(());
        }
        let whole = self.resources[&number].picture.whole();
        let rectangle = self.rectangle(whole);
        let body = [&rectangle[..], &[scanout as u32, number]].concat();
        self.driver.done(number::SET_SCANOUT, &body)?;
        self.scanouts[scanout] = Some((number, rectangle));
        Ok(())
    }

    /// Moves or hides a cursor.
    pub(super) fn move_cursor(&mut self) -> Result<(), Loss> {
        let scanout = self.random.usize(..SHOWN);
        let position = (self.random.u32(..500), self.random.u32(..500));
        let (kind, shown) = match self.random.u32(..4) {
            0 => (number::UPDATE_CURSOR, None),
            _ => (number::MOVE_CURSOR, Some(position)),
        };
        // A cursor can be moved only where there is one, and is hidden without a resource.
        let (x, y) = position;
        let resource = u32::from(shown.is_some());
        self.driver
            .send_cursor(kind, &[scanout as u32, x, y, 0, resource, 0, 0, 0])?;
        self.cursors[scanout] = shown;
        Ok(())
    }
}

/// Returns whether pages are in memory that was removed.
fn is_lost(link: &Link, pages: &[u64]) -> bool {
    let regions = link.memory().regions();
    !pages.iter().all(|page| {
        regions.iter().any(|region| {
            let start = region.guest_address();
            (start..start + region.size()).contains(page)
        })
    })
}
