// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Messages that are being sent.

use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use zerocopy::IntoBytes;

use super::message::Request;
use crate::dmabuf::Dmabuf;
use crate::protocol::CommandError;
use crate::rectangle::Rectangle;
use crate::resource_table::ResourceTable;

/// Size of an UPDATE before its pixels, in bytes: header, scanout, rectangle.
const UPDATE_HEADER_SIZE: usize = size_of::<[[u32; 4]; 2]>();
/// Most buffers in one system call.
const IOV_MAX: usize = 1024;

/// A message that is being sent.
#[derive(Debug)]
pub enum Outgoing {
    /// Encoded bytes. The file of the dma-buf goes with the first of them.
    Bytes {
        bytes: Vec<u8>,
        sent: usize,
        dmabuf: Option<Arc<Dmabuf>>,
    },
    /// Pixels, sent directly from their resource.
    Update(Update),
}

/// An UPDATE that is being sent.
#[derive(Debug)]
pub struct Update {
    header: [[u32; 4]; 2],
    resource: u32,
    /// The rectangle of the resource.
    rectangle: Rectangle,
    sent: usize,
}

impl Update {
    /// Creates an UPDATE that shows `rectangle` of a resource at `place` on the scanout. Both have the same size.
    pub fn new(scanout: u32, place: &Rectangle, resource: u32, rectangle: Rectangle) -> Self {
        let pixels = place.width.saturating_mul(place.height);
        let size = 20 + pixels.saturating_mul(4);
        Self {
            header: [[Request::Update as u32, 0, size, scanout], place.words()],
            resource,
            rectangle,
            sent: 0,
        }
    }

    fn row_size(&self) -> usize {
        self.rectangle.width as usize * 4
    }

    fn size(&self) -> usize {
        UPDATE_HEADER_SIZE + self.row_size() * self.rectangle.height as usize
    }

    /// Returns the rest of the message, or the start of the rest.
    fn io_slices<'a>(
        &'a self,
        resources: &'a ResourceTable,
    ) -> Result<Vec<IoSlice<'a>>, CommandError> {
        let resource = resources.get(self.resource)?;
        let [x, y, width, height] = self.rectangle.words();
        let mut io_slices = Vec::with_capacity(IOV_MAX.min(height as usize + 1));
        let header = self.header.as_bytes();
        let header = header.get(self.sent..).unwrap_or_default();
        if !header.is_empty() {
            io_slices.push(IoSlice::new(header));
        }
        let done = self.sent.saturating_sub(UPDATE_HEADER_SIZE);
        if width == resource.width {
            let pixels = resource.rows(y, height).as_bytes();
            io_slices.push(IoSlice::new(pixels.get(done..).unwrap_or_default()));
            return Ok(io_slices);
        }
        let first = done / self.row_size();
        let mut skip = done % self.row_size();
        for row in first..height as usize {
            if io_slices.len() == IOV_MAX {
                break;
            }
            let pixels = resource
                .row(x, y.saturating_add(row as u32), width)
                .as_bytes();
            io_slices.push(IoSlice::new(pixels.get(skip..).unwrap_or_default()));
            skip = 0;
        }
        Ok(io_slices)
    }
}

impl Outgoing {
    /// Creates a message without a file.
    pub fn bytes(bytes: Vec<u8>) -> Self {
        Self::Bytes {
            bytes,
            sent: 0,
            dmabuf: None,
        }
    }

    /// Creates a message with the file of a dma-buf.
    pub fn with_file(bytes: Vec<u8>, dmabuf: &Arc<Dmabuf>) -> Self {
        Self::Bytes {
            bytes,
            sent: 0,
            dmabuf: Some(Arc::clone(dmabuf)),
        }
    }

    /// Returns the file to send with the next byte.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Bytes { dmabuf, .. } => dmabuf.as_ref().map(|dmabuf| dmabuf.fd.as_fd()),
            Self::Update(_) => None,
        }
    }

    /// Returns the rest of the message, or the start of the rest.
    pub fn io_slices<'a>(
        &'a self,
        resources: &'a ResourceTable,
    ) -> Result<Vec<IoSlice<'a>>, CommandError> {
        match self {
            Self::Bytes { bytes, sent, .. } => {
                Ok(vec![IoSlice::new(bytes.get(*sent..).unwrap_or_default())])
            }
            Self::Update(update) => update.io_slices(resources),
        }
    }

    /// Records that `count` more bytes have been sent. Returns whether the message is complete.
    pub fn advance(&mut self, count: usize) -> bool {
        match self {
            Self::Bytes {
                bytes,
                sent,
                dmabuf,
            } => {
                *dmabuf = None;
                *sent = sent.saturating_add(count);
                *sent >= bytes.len()
            }
            Self::Update(update) => {
                update.sent = update.sent.saturating_add(count);
                update.sent >= update.size()
            }
        }
    }

    /// Copies the rest of the pixels, because the resource with this ID (`None`: any resource) is about to be
    /// destroyed.
    pub fn detach(&mut self, id: Option<u32>, resources: &ResourceTable) {
        if let Self::Update(update) = self
            && id.is_none_or(|id| id == update.resource)
        {
            let left = update.size().saturating_sub(update.sent);
            let mut bytes = Vec::with_capacity(left);
            while bytes.len() < left {
                let Ok(io_slices) = update.io_slices(resources) else {
                    break;
                };
                let before = bytes.len();
                io_slices
                    .iter()
                    .for_each(|slice| bytes.extend_from_slice(slice));
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

    fn resources() -> ResourceTable {
        let mut resources = ResourceTable::new(1 << 20);
        resources
            .create(1, Format::from_number(1).unwrap(), 8, 4000)
            .unwrap();
        resources
    }

    fn sent_in_steps(mut outgoing: Outgoing, resources: &ResourceTable, step: usize) -> Vec<u8> {
        let mut sent = Vec::new();
        loop {
            let io_slices = outgoing.io_slices(resources).unwrap();
            let before = sent.len();
            sent.extend(io_slices.iter().flat_map(|slice| slice.iter()).take(step));
            let count = sent.len() - before;
            assert!(count > 0);
            if outgoing.advance(count) {
                return sent;
            }
        }
    }

    fn assert_same_in_steps(rectangle: Rectangle, steps: &[usize]) {
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
        let mut rest = update();
        rest.advance(123);
        rest.detach(Some(2), &resources);
        assert!(matches!(rest, Outgoing::Update(_)));
        rest.detach(Some(1), &resources);
        assert!(matches!(rest, Outgoing::Bytes { .. }));
        assert_eq!(
            sent_in_steps(rest, &ResourceTable::new(0), 4096),
            whole[123..]
        );
    }

    #[test]
    fn an_update_can_be_sent_in_parts_of_any_size() {
        assert_same_in_steps(Rectangle::new(0, 1, 8, 20).unwrap(), &[1, 7, 100]);
        assert_same_in_steps(Rectangle::new(2, 5, 3, 20).unwrap(), &[1, 7, 100]);
    }

    #[test]
    fn an_update_can_have_more_rows_than_iov_max() {
        assert_same_in_steps(Rectangle::new(2, 5, 3, 3000).unwrap(), &[4096, 20000]);
    }
}
