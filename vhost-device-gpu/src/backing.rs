// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest memory behind a resource.

use vhost_device_common::memory::GuestMemory;

use crate::protocol::CommandError;

/// Pieces of guest memory that may back one resource: single pages behind a picture of 1 GiB.
pub const MAX_ENTRIES: u32 = 1 << 18;

/// A piece of guest memory.
#[derive(Clone, Copy, Debug)]
struct Entry {
    address: u64,
    /// Where in the backing it begins.
    start: u64,
}

/// The guest memory behind a resource, as guest addresses: the memory table may change.
#[derive(Debug, Default)]
pub struct Backing {
    entries: Vec<Entry>,
    length: u64,
}

impl Backing {
    /// A backing of no pieces, with room for `count`: no more than is counted.
    pub fn with_capacity(count: u32) -> Self {
        Self {
            entries: Vec::with_capacity(count as usize),
            length: 0,
        }
    }

    /// Adds a piece at the end.
    pub fn push(&mut self, address: u64, length: u32) {
        let start = self.length;
        self.entries.push(Entry { address, start });
        self.length = start.saturating_add(length.into());
    }

    /// Address and length of each piece.
    pub fn entries(&self) -> impl Iterator<Item = (u64, u64)> {
        let ends = self.entries.iter().skip(1).map(|entry| entry.start);
        let ends = ends.chain(std::iter::once(self.length));
        let pieces = self.entries.iter().zip(ends);
        pieces.map(|(entry, end)| (entry.address, end.saturating_sub(entry.start)))
    }

    /// Bytes of host memory that it takes.
    pub fn cost(&self) -> u64 {
        (self.entries.len() * size_of::<Entry>()) as u64
    }

    /// Bytes of guest memory.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Copies from the byte `offset` on. The backing is long enough.
    pub fn read(
        &self,
        memory: &GuestMemory,
        offset: u64,
        bytes: &mut [u8],
    ) -> Result<(), CommandError> {
        let mut rest = bytes;
        let mut offset = offset;
        let mut index = self
            .entries
            .partition_point(|entry| entry.start <= offset)
            .saturating_sub(1);
        while !rest.is_empty() {
            let entry = self
                .entries
                .get(index)
                .ok_or(CommandError::InvalidParameter)?;
            let end = self
                .entries
                .get(index + 1)
                .map_or(self.length, |next| next.start);
            let into = offset.saturating_sub(entry.start);
            let left = usize::try_from(end.saturating_sub(offset)).unwrap_or(usize::MAX);
            if left == 0 {
                index += 1;
                continue;
            }
            let address = entry
                .address
                .checked_add(into)
                .ok_or(CommandError::Unspecified)?;
            let slice = memory
                .slice_up_to(address, left.min(rest.len()))
                .ok_or(CommandError::Unspecified)?;
            let (front, back) = std::mem::take(&mut rest)
                .split_at_mut_checked(slice.len())
                .ok_or(CommandError::Unspecified)?;
            slice.copy_to(front);
            offset = offset.saturating_add(front.len() as u64);
            rest = back;
        }
        Ok(())
    }
}
