// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Scanouts and their cursors, and the changes that the display has not been sent yet.

use std::sync::Arc;

use super::message::{MAX_UPDATE_PIXELS, Request, dmabuf_scanout, message};
use super::outgoing::{Outgoing, Update};
use crate::dmabuf::Dmabuf;
use crate::rectangle::Rectangle;
use crate::resource::Resource;

/// Most pixels in width and height: displays use signed 16-bit coordinates.
const MAX_SCANOUT_SIDE: u32 = i16::MAX as u32;

/// The part of a resource that a scanout shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    pub resource: u32,
    pub rectangle: Rectangle,
}

impl Source {
    /// Returns `None` if the rectangle is not within the resource, or too large for a display.
    pub fn new(id: u32, resource: &Resource, rectangle: Rectangle) -> Option<Self> {
        let is_valid = resource.contains(&rectangle)
            && rectangle.width.max(rectangle.height) <= MAX_SCANOUT_SIDE;
        is_valid.then_some(Self {
            resource: id,
            rectangle,
        })
    }

    /// Returns width and height.
    fn size(self) -> (u32, u32) {
        (self.rectangle.width, self.rectangle.height)
    }

    /// Returns the whole source in coordinates of the scanout.
    fn bounds(&self) -> Rectangle {
        self.rectangle.relative_to(&self.rectangle)
    }
}

/// A cursor.
#[derive(Debug, Default)]
pub struct Cursor {
    pub x: u32,
    pub y: u32,
    pub hot_x: u32,
    pub hot_y: u32,
    pub visible: bool,
    /// 64x64 pixels of 0xAARRGGBB. Empty until the driver sets an image.
    pub image: Vec<u32>,
    pub moved: bool,
    pub image_changed: bool,
}

/// A scanout.
#[derive(Debug, Default)]
pub struct Scanout {
    pub source: Option<Source>,
    /// The dma-buf that the display shows, if the renderer has exported one.
    pub dmabuf: Option<Arc<Dmabuf>>,
    /// Whether the display has been sent a dma-buf.
    dmabuf_sent: bool,
    /// Whether the display must be sent the source before any pixels.
    source_changed: bool,
    /// The changed rectangle, in coordinates of the scanout.
    pub dirty: Option<Rectangle>,
    pub cursor: Cursor,
}

impl Scanout {
    /// Sets the source, and the dma-buf that holds it if there is one.
    pub fn set_source(&mut self, source: Option<Source>, dmabuf: Option<Arc<Dmabuf>>) {
        self.source_changed |= match (&self.dmabuf, &dmabuf) {
            (None, None) => self.source.map(Source::size) != source.map(Source::size),
            (Some(before), Some(dmabuf)) => self.source != source || !Arc::ptr_eq(before, dmabuf),
            _ => true,
        };
        if self.source != source {
            self.dirty = None;
        }
        (self.source, self.dmabuf) = (source, dmabuf);
    }

    /// Marks everything that is shown as changed, for a new display.
    pub fn send_again(&mut self) {
        self.source_changed = self.source.is_some();
        self.dmabuf_sent = false;
        self.dirty = self.source.map(|source| source.bounds());
        let cursor = &mut self.cursor;
        cursor.moved = cursor.visible;
        cursor.image_changed = cursor.visible && !cursor.image.is_empty();
    }

    /// Returns the next message that has no pixels.
    pub fn next_control_message(&mut self, index: u32, features: u64) -> Option<Outgoing> {
        if !std::mem::take(&mut self.source_changed) {
            return self.cursor.next_message(index).map(Outgoing::bytes);
        }
        if let (Some(source), Some(dmabuf)) = (&self.source, &self.dmabuf) {
            self.dmabuf_sent = true;
            let message = dmabuf_scanout(index, &source.rectangle, dmabuf, features);
            return Some(Outgoing::with_file(message, dmabuf));
        }
        if std::mem::take(&mut self.dmabuf_sent) {
            // The new source follows.
            self.source_changed = true;
            let no_image = [index, 0, 0, 0, 0, 0, 0, 0, 0, 0];
            return Some(Outgoing::bytes(message(Request::DmabufScanout, &no_image)));
        }
        let (width, height) = self.source.map_or((0, 0), Source::size);
        let words = [index, width, height];
        Some(Outgoing::bytes(message(Request::Scanout, &words)))
    }

    /// Returns the next part of the changed pixels.
    pub fn next_update(&mut self, index: u32) -> Option<Update> {
        let source = self.source?;
        let dirty = self.dirty.take()?;
        let rows = (MAX_UPDATE_PIXELS / dirty.width).clamp(1, dirty.height);
        self.dirty = Rectangle::new(
            dirty.x,
            dirty.y.saturating_add(rows),
            dirty.width,
            dirty.height - rows,
        );
        let place = Rectangle {
            height: rows,
            ..dirty
        };
        let rectangle = place.absolute_in(&source.rectangle);
        Some(Update::new(index, &place, source.resource, rectangle))
    }
}

impl Cursor {
    fn next_message(&mut self, index: u32) -> Option<Vec<u8>> {
        let position = [index, self.x, self.y];
        if std::mem::take(&mut self.image_changed) {
            self.moved = !self.visible;
            let hot_spot = [self.hot_x, self.hot_y];
            let words = [&position[..], &hot_spot, &self.image].concat();
            return Some(message(Request::CursorUpdate, &words));
        }
        std::mem::take(&mut self.moved).then(|| {
            let request = match self.visible {
                true => Request::CursorPos,
                false => Request::CursorPosHide,
            };
            message(request, &position)
        })
    }
}
