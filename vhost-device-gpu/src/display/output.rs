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
    pub fn new(number: u32, resource: &Resource, rectangle: Rectangle) -> Option<Self> {
        let is_valid =
            resource.has(&rectangle) && rectangle.width.max(rectangle.height) <= MAX_SCANOUT_SIDE;
        is_valid.then_some(Self {
            resource: number,
            rectangle,
        })
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
    pub changed: bool,
}

/// One scanout, and what the display has yet to learn of it.
#[derive(Debug, Default)]
pub struct Output {
    pub source: Option<Source>,
    /// What the display takes the picture from, where the renderer has given that out.
    pub buffer: Option<Arc<Dmabuf>>,
    /// The display was told of a buffer.
    pub has_buffer: bool,
    /// What is shown is to be told before anything else.
    pub announce: bool,
    /// What is to be shown anew, in coordinates of the scanout.
    pub dirty: Option<Rectangle>,
    pub cursor: Cursor,
}

impl Output {
    /// Shows something else, from a buffer where there is one.
    pub fn show(&mut self, source: Option<Source>, buffer: Option<Arc<Dmabuf>>) {
        let size = |source: &Option<Source>| {
            source.map(|source| (source.rectangle.width, source.rectangle.height))
        };
        self.announce |= match (&self.buffer, &buffer) {
            (None, None) => size(&self.source) != size(&source),
            (Some(before), Some(buffer)) => self.source != source || !Arc::ptr_eq(before, buffer),
            _ => true,
        };
        if self.source != source {
            self.dirty = None;
        }
        (self.source, self.buffer) = (source, buffer);
    }

    /// The next message that is no picture.
    pub fn next_small(&mut self, number: u32, features: u64) -> Option<Outgoing> {
        if !std::mem::take(&mut self.announce) {
            return self.cursor.next_message(number).map(Outgoing::bytes);
        }
        if let (Some(source), Some(buffer)) = (&self.source, &self.buffer) {
            self.has_buffer = true;
            let message = Outgoing::scanout(number, &source.rectangle, buffer, features);
            return Some(message);
        }
        if std::mem::take(&mut self.has_buffer) {
            // Before what takes its place.
            self.announce = true;
            return Some(Outgoing::no_scanout(number));
        }
        let (width, height) = self.source.map_or((0, 0), |source| {
            (source.rectangle.width, source.rectangle.height)
        });
        let words = [number, width, height];
        Some(Outgoing::bytes(message(Request::Scanout, &words)))
    }

    /// The next piece of the picture.
    pub fn next_update(&mut self, number: u32) -> Option<Update> {
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
        let rectangle = place.moved_into(&source.rectangle);
        Some(Update::new(number, &place, source.resource, rectangle))
    }
}

impl Cursor {
    fn next_message(&mut self, number: u32) -> Option<Vec<u8>> {
        let position = [number, self.x, self.y];
        if std::mem::take(&mut self.changed) {
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

/// All of what a scanout shows, in its coordinates.
pub fn whole(source: &Source) -> Rectangle {
    source.rectangle.relative_to(&source.rectangle)
}
