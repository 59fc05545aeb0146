// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What both formats do alike: descriptors are gathered into a chain, whose storage is used again.

use std::sync::Arc;

use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{ByteValued, VolatileMemory, VolatileSlice};

use super::error::RingError;
use super::setup::RingSetup;
use crate::chain::{Chain, Segments, Ticket};
use crate::memory::GuestMemory;

/// Most descriptors of one chain beyond the size of the ring: an indirect table may be longer than
/// the ring is, and Linux makes such tables. QEMU draws the line at the same number.
pub const MAX_INDIRECT_DESCRIPTORS: usize = 1024;

/// Bytes of a descriptor, in either format.
pub(super) const DESCRIPTOR_SIZE: usize = 16;

/// Storage of completed chains that is kept for the next ones.
const KEPT_SEGMENTS: usize = 256;

/// Storage for the halves of chains.
#[derive(Debug, Default)]
pub(super) struct Storage(Vec<Segments>);

impl Storage {
    fn take(&mut self) -> Segments {
        self.0.pop().unwrap_or_default()
    }

    /// Takes the storage of a completed chain back.
    pub(super) fn keep(&mut self, chain: Chain) {
        for segments in chain.into_segments() {
            if self.0.len() < KEPT_SEGMENTS {
                self.0.push(segments.recycle());
            }
        }
    }
}

/// What a descriptor says of its buffer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Buffer {
    pub address: u64,
    pub length: u32,
    pub flags: u16,
}

impl Buffer {
    fn has(&self, flag: u32) -> bool {
        u32::from(self.flags) & flag != 0
    }

    /// Another descriptor of the chain follows.
    pub(super) fn has_next(&self) -> bool {
        self.has(VRING_DESC_F_NEXT)
    }

    /// It is a table of descriptors.
    pub(super) fn is_table(&self) -> bool {
        self.has(VRING_DESC_F_INDIRECT)
    }
}

/// A chain that is being put together.
pub(super) struct Gathering<'a> {
    memory: &'a Arc<GuestMemory>,
    readable: Segments,
    writable: Segments,
    count: usize,
    limit: usize,
}

impl<'a> Gathering<'a> {
    /// Begins a chain of at most `limit` descriptors.
    pub(super) fn new(memory: &'a Arc<GuestMemory>, storage: &mut Storage, limit: usize) -> Self {
        Self {
            memory,
            readable: storage.take(),
            writable: storage.take(),
            count: 0,
            limit,
        }
    }

    /// Adds a buffer that is not a table.
    ///
    /// # Errors
    /// The chain is longer than any may be, or out of order.
    pub(super) fn add(&mut self, buffer: Buffer) -> Result<(), RingError> {
        self.count += 1;
        if self.count > self.limit {
            return Err(RingError::ChainTooLong { limit: self.limit });
        }
        let half = if buffer.has(VRING_DESC_F_WRITE) {
            &mut self.writable
        } else if self.writable.len() > 0 {
            return Err(RingError::ReadableAfterWritable);
        } else {
            &mut self.readable
        };
        let (mut address, mut length) = (buffer.address, buffer.length as usize);
        while length > 0 {
            let Some(slice) = self.memory.slice_up_to(address, length) else {
                half.push_hole(length);
                break;
            };
            half.push(&slice);
            length -= slice.len();
            // The slice ends inside guest memory, so this cannot wrap further than to 0.
            address = address.wrapping_add(slice.len() as u64);
        }
        Ok(())
    }

    /// Goes on in the table that `buffer` is. It may be longer than the ring.
    ///
    /// # Errors
    /// There can be no such table.
    pub(super) fn table(
        &mut self,
        setup: &RingSetup,
        buffer: Buffer,
    ) -> Result<Table<'a>, RingError> {
        if !setup.indirect {
            return Err(RingError::Indirect("the feature was not negotiated"));
        }
        let length = buffer.length as usize;
        if length == 0 || !length.is_multiple_of(DESCRIPTOR_SIZE) {
            return Err(RingError::Indirect("its length is no multiple of 16"));
        }
        self.limit = MAX_INDIRECT_DESCRIPTORS.max(self.limit);
        Ok(Table {
            slice: self.memory.slice(buffer.address, length).ok(),
            memory: self.memory,
            start: buffer.address,
            entries: length / DESCRIPTOR_SIZE,
        })
    }

    /// The chain, which its ring knows by `ticket`.
    pub(super) fn finish(self, ticket: Ticket) -> Chain {
        Chain::new(
            ticket,
            Arc::clone(self.memory),
            self.readable,
            self.writable,
        )
    }
}

/// An indirect table.
pub(super) struct Table<'a> {
    /// `None` if it spans regions of guest memory, or is not in it.
    slice: Option<VolatileSlice<'a>>,
    memory: &'a GuestMemory,
    start: u64,
    entries: usize,
}

impl Table<'_> {
    /// How many descriptors it has.
    pub(super) fn entries(&self) -> usize {
        self.entries
    }

    /// Reads the descriptor at `index`.
    ///
    /// # Errors
    /// It is outside the table, or the table outside guest memory.
    pub(super) fn get<D: ByteValued>(&self, index: usize) -> Result<D, RingError> {
        const { assert!(size_of::<D>() == DESCRIPTOR_SIZE) };
        if index >= self.entries {
            return Err(RingError::DescriptorIndex {
                index,
                size: self.entries,
            });
        }
        let offset = DESCRIPTOR_SIZE * index;
        match &self.slice {
            Some(slice) => slice.get_ref(offset).ok().map(|entry| entry.load()),
            None => self
                .start
                .checked_add(offset as u64)
                .and_then(|address| self.memory.slice(address, DESCRIPTOR_SIZE).ok())
                .and_then(|slice| slice.get_ref(0).ok().map(|entry| entry.load())),
        }
        .ok_or(RingError::Indirect("its table is not in guest memory"))
    }
}
