// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest memory behind a resource.

use vhost_device_common::memory::GuestMemory;

use crate::protocol::CommandError;

/// Most guest memory entries of one backing: enough for single pages behind an image of 1 GiB.
pub const MAX_ENTRIES: u32 = 1 << 18;

/// A range of guest memory.
#[derive(Clone, Copy, Debug)]
struct Entry {
    address: u64,
    /// Offset of the range in the backing, in bytes.
    start: u64,
}

/// The guest memory behind a resource. It holds guest addresses, because the memory table may change.
#[derive(Debug, Default)]
pub struct Backing {
    entries: Vec<Entry>,
    length: u64,
}

impl Backing {
    /// Creates an empty backing with exactly the capacity for `count` entries, which is what [`Backing::cost`] counts.
    pub fn with_capacity(count: u32) -> Self {
        Self {
            entries: Vec::with_capacity(count as usize),
            length: 0,
        }
    }

    /// Appends an entry.
    pub fn push(&mut self, address: u64, length: u32) {
        let start = self.length;
        self.entries.push(Entry { address, start });
        self.length = start.saturating_add(length.into());
    }

    /// Returns the address and length of each entry.
    pub fn entries(&self) -> impl Iterator<Item = (u64, u64)> {
        let ends = self.entries.iter().skip(1).map(|entry| entry.start);
        let ends = ends.chain(std::iter::once(self.length));
        let pieces = self.entries.iter().zip(ends);
        pieces.map(|(entry, end)| (entry.address, end.saturating_sub(entry.start)))
    }

    /// Returns the size of the entries in host memory, in bytes.
    pub fn cost(&self) -> u64 {
        (self.entries.len() * size_of::<Entry>()) as u64
    }

    /// Returns the length of the backing in bytes.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Copies bytes from `offset` on. The caller checks that the backing is long enough.
    ///
    /// # Errors
    /// Part of the range is not guest memory.
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
