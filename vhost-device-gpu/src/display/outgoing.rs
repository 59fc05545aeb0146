// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Messages that are being sent.

use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use zerocopy::IntoBytes;

use super::message::{HEADER_SIZE, Request, dmabuf_scanout, message};
use crate::dmabuf::Dmabuf;
use crate::protocol::Refusal;
use crate::rectangle::Rectangle;
use crate::resource::Resources;

/// Bytes of an UPDATE before its pixels: header, scanout, rectangle.
const UPDATE_HEAD: usize = HEADER_SIZE + 20;
/// Pieces that one system call takes (IOV_MAX).
const MAX_PIECES: usize = 1024;

/// A message on its way.
#[derive(Debug)]
pub enum Outgoing {
    /// One that is complete in itself, but for the file that goes with its first byte.
    Bytes {
        bytes: Vec<u8>,
        sent: usize,
        buffer: Option<Arc<Dmabuf>>,
    },
    /// Pixels of a resource, sent from where they are.
    Update(Update),
}

/// An UPDATE on its way.
#[derive(Debug)]
pub struct Update {
    head: [u8; UPDATE_HEAD],
    resource: u32,
    /// What is sent, in the resource.
    rectangle: Rectangle,
    sent: usize,
}

impl Update {
    /// Shows `rectangle` of a resource at `place` of a scanout; both have the same size.
    pub fn new(scanout: u32, place: &Rectangle, resource: u32, rectangle: Rectangle) -> Self {
        let Rectangle {
            x,
            y,
            width,
            height,
        } = *place;
        let pixels = width.saturating_mul(height);
        let size = 20 + pixels.saturating_mul(4);
        let words = [
            Request::Update as u32,
            0,
            size,
            scanout,
            x,
            y,
            width,
            height,
        ];
        let mut head = [0; UPDATE_HEAD];
        head.copy_from_slice(words.as_bytes());
        Self {
            head,
            resource,
            rectangle,
            sent: 0,
        }
    }

    fn row_size(&self) -> usize {
        self.rectangle.width as usize * 4
    }

    fn size(&self) -> usize {
        UPDATE_HEAD + self.row_size() * self.rectangle.height as usize
    }

    /// What is left to send, or the beginning of it.
    fn pieces<'a>(&'a self, resources: &'a Resources) -> Result<Vec<IoSlice<'a>>, Refusal> {
        let resource = resources.get(self.resource)?;
        let Rectangle {
            x,
            y,
            width,
            height,
        } = self.rectangle;
        let mut pieces = Vec::with_capacity(MAX_PIECES.min(height as usize + 1));
        let head = self.head.get(self.sent..).unwrap_or_default();
        if !head.is_empty() {
            pieces.push(IoSlice::new(head));
        }
        let done = self.sent.saturating_sub(UPDATE_HEAD);
        if width == resource.width {
            let pixels = resource.rows(y, height).as_bytes();
            pieces.push(IoSlice::new(pixels.get(done..).unwrap_or_default()));
            return Ok(pieces);
        }
        let first = done / self.row_size();
        let mut skip = done % self.row_size();
        for row in first..height as usize {
            if pieces.len() == MAX_PIECES {
                break;
            }
            let pixels = resource
                .row(x, y.saturating_add(row as u32), width)
                .as_bytes();
            pieces.push(IoSlice::new(pixels.get(skip..).unwrap_or_default()));
            skip = 0;
        }
        Ok(pieces)
    }
}

impl Outgoing {
    pub fn bytes(bytes: Vec<u8>) -> Self {
        Self::Bytes {
            bytes,
            sent: 0,
            buffer: None,
        }
    }

    /// Shows a rectangle of a buffer on a scanout.
    pub fn scanout(
        scanout: u32,
        rectangle: &Rectangle,
        buffer: &Arc<Dmabuf>,
        features: u64,
    ) -> Self {
        Self::Bytes {
            bytes: dmabuf_scanout(scanout, rectangle, buffer, features),
            sent: 0,
            buffer: Some(Arc::clone(buffer)),
        }
    }

    /// Shows a buffer on a scanout no more.
    pub fn no_scanout(scanout: u32) -> Self {
        let words = [scanout, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        Self::bytes(message(Request::DmabufScanout, &words))
    }

    /// The file to send with what is left.
    pub fn file(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Bytes { buffer, .. } => buffer.as_ref().map(|buffer| buffer.file.as_fd()),
            Self::Update(_) => None,
        }
    }

    /// What is left to send, or the beginning of it.
    pub fn pieces<'a>(&'a self, resources: &'a Resources) -> Result<Vec<IoSlice<'a>>, Refusal> {
        match self {
            Self::Bytes { bytes, sent, .. } => {
                Ok(vec![IoSlice::new(bytes.get(*sent..).unwrap_or_default())])
            }
            Self::Update(update) => update.pieces(resources),
        }
    }

    /// Takes note that `count` more bytes are sent. Returns whether that is all.
    pub fn advance(&mut self, count: usize) -> bool {
        match self {
            Self::Bytes {
                bytes,
                sent,
                buffer,
            } => {
                *buffer = None;
                *sent = sent.saturating_add(count);
                *sent >= bytes.len()
            }
            Self::Update(update) => {
                update.sent = update.sent.saturating_add(count);
                update.sent >= update.size()
            }
        }
    }

    /// Takes a copy of what is left, if it comes from this resource (any, without a number), which is about to go.
    pub fn detach(&mut self, number: Option<u32>, resources: &Resources) {
        if let Self::Update(update) = self
            && number.is_none_or(|number| number == update.resource)
        {
            let left = update.size().saturating_sub(update.sent);
            let mut bytes = Vec::with_capacity(left);
            while bytes.len() < left {
                let Ok(pieces) = update.pieces(resources) else {
                    break;
                };
                let before = bytes.len();
                pieces
                    .iter()
                    .for_each(|piece| bytes.extend_from_slice(piece));
                if bytes.len() == before {
                    break;
                }
                update.sent = update.sent.saturating_add(bytes.len() - before);
            }
            bytes.resize(left, 0);
            *self = Self::bytes(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Format;

    fn resources() -> Resources {
        let mut resources = Resources::new(1 << 20);
        resources
            .create(1, Format::from_number(1).unwrap(), 8, 4000)
            .unwrap();
        resources
    }

    fn sent_in_steps(mut outgoing: Outgoing, resources: &Resources, step: usize) -> Vec<u8> {
        let mut sent = Vec::new();
        loop {
            let pieces = outgoing.pieces(resources).unwrap();
            let before = sent.len();
            sent.extend(pieces.iter().flat_map(|piece| piece.iter()).take(step));
            let count = sent.len() - before;
            assert!(count > 0);
            if outgoing.advance(count) {
                return sent;
            }
        }
    }

    fn assert_same_however_cut(rectangle: Rectangle, steps: &[usize]) {
        let resources = resources();
        let place = Rectangle {
            x: 0,
            y: 0,
            ..rectangle
        };
        let update = || Outgoing::Update(Update::new(3, &place, 1, rectangle));
        let whole = sent_in_steps(update(), &resources, usize::MAX);
        let pixels = rectangle.width * rectangle.height;
        assert_eq!(whole.len(), 32 + (pixels * 4) as usize);
        for &step in steps {
            assert_eq!(sent_in_steps(update(), &resources, step), whole);
        }
        let mut cut = update();
        cut.advance(123);
        cut.detach(Some(2), &resources);
        assert!(matches!(cut, Outgoing::Update(_)));
        cut.detach(Some(1), &resources);
        assert!(matches!(cut, Outgoing::Bytes { .. }));
        assert_eq!(sent_in_steps(cut, &Resources::new(0), 4096), whole[123..]);
    }

    #[test]
    fn an_update_is_the_same_however_it_is_cut() {
        assert_same_however_cut(Rectangle::new(0, 1, 8, 20).unwrap(), &[1, 7, 100]);
        assert_same_however_cut(Rectangle::new(2, 5, 3, 20).unwrap(), &[1, 7, 100]);
    }

    #[test]
    fn an_update_of_more_rows_than_one_call_takes_is_whole() {
        assert_same_however_cut(Rectangle::new(2, 5, 3, 3000).unwrap(), &[4096, 20000]);
    }
}
