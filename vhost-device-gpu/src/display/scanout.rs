// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Scanouts and their cursors, and what the display has yet to learn of them.

use std::sync::Arc;

use super::message::{MAX_UPDATE_PIXELS, Request, cursor_update, message};
use super::outgoing::{Outgoing, Update};
use crate::dmabuf::Dmabuf;
use crate::rectangle::Rectangle;
use crate::resource::Resource;

/// Width and height of a scanout at most: displays count in 16 bits, with a sign.
const MAX_SCANOUT_SIDE: u32 = i16::MAX as u32;

/// What of a resource a scanout shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    pub resource: u32,
    pub rectangle: Rectangle,
}

impl Source {
    /// `None` if the rectangle is not within the resource, or too large for a display.
    pub fn new(id: u32, resource: &Resource, rectangle: Rectangle) -> Option<Self> {
        let is_valid = resource.contains(&rectangle)
            && rectangle.width.max(rectangle.height) <= MAX_SCANOUT_SIDE;
        is_valid.then_some(Self {
            resource: id,
            rectangle,
        })
    }

    /// The whole source, in coordinates of the scanout.
    pub fn bounds(&self) -> Rectangle {
        self.rectangle.relative_to(&self.rectangle)
    }
}

/// A cursor, and what the display has yet to learn of it.
#[derive(Debug, Default)]
pub struct Cursor {
    pub x: u32,
    pub y: u32,
    pub hot_x: u32,
    pub hot_y: u32,
    pub visible: bool,
    /// Empty until the driver has set one.
    pub image: Vec<u32>,
    pub moved: bool,
    pub image_changed: bool,
}

/// One scanout, and what the display has yet to learn of it.
#[derive(Debug, Default)]
pub struct Scanout {
    pub source: Option<Source>,
    /// What the display takes the picture from, where the renderer has given that out.
    pub dmabuf: Option<Arc<Dmabuf>>,
    /// The display was told of a buffer.
    pub dmabuf_sent: bool,
    /// What is shown is to be told before anything else.
    pub source_changed: bool,
    /// What is to be shown anew, in coordinates of the scanout.
    pub dirty: Option<Rectangle>,
    pub cursor: Cursor,
}

impl Scanout {
    /// Shows something else, from a buffer where there is one.
    pub fn set_source(&mut self, source: Option<Source>, dmabuf: Option<Arc<Dmabuf>>) {
        let size = |source: &Option<Source>| {
            source.map(|source| (source.rectangle.width, source.rectangle.height))
        };
        self.source_changed |= match (&self.dmabuf, &dmabuf) {
            (None, None) => size(&self.source) != size(&source),
            (Some(before), Some(dmabuf)) => self.source != source || !Arc::ptr_eq(before, dmabuf),
            _ => true,
        };
        if self.source != source {
            self.dirty = None;
        }
        (self.source, self.dmabuf) = (source, dmabuf);
    }

    /// The next message that is no picture.
    pub fn next_control_message(&mut self, index: u32, features: u64) -> Option<Outgoing> {
        if !std::mem::take(&mut self.source_changed) {
            return self.cursor.next_message(index).map(Outgoing::bytes);
        }
        if let (Some(source), Some(dmabuf)) = (&self.source, &self.dmabuf) {
            self.dmabuf_sent = true;
            let message = Outgoing::scanout(index, &source.rectangle, dmabuf, features);
            return Some(message);
        }
        if std::mem::take(&mut self.dmabuf_sent) {
            // Before what takes its place.
            self.source_changed = true;
            return Some(Outgoing::disable_scanout(index));
        }
        let (width, height) = self.source.map_or((0, 0), |source| {
            (source.rectangle.width, source.rectangle.height)
        });
        let words = [index, width, height];
        Some(Outgoing::bytes(message(Request::Scanout, &words)))
    }

    /// The next piece of the picture.
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
            return Some(cursor_update(
                position,
                [self.hot_x, self.hot_y],
                &self.image,
            ));
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
