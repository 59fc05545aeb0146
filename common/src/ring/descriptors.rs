// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Gathers descriptors into chains, for both formats, and reuses the storage of completed ones.

use std::sync::Arc;

use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{ByteValued, VolatileMemory, VolatileSlice};

use super::error::RingError;
use super::setup::RingSetup;
use crate::chain::{Chain, Halves, Ticket};
use crate::memory::GuestMemory;

/// Maximum number of descriptors in an indirect table that is longer than its ring. Linux builds such tables; QEMU has the same
/// limit.
pub const MAX_INDIRECT_DESCRIPTORS: usize = 1024;

/// Size of a descriptor in bytes, in either format.
pub(super) const DESCRIPTOR_SIZE: usize = 16;

/// Maximum number of completed chains whose storage is kept.
const KEPT_CHAINS: usize = 128;

/// Storage for the halves of chains. It is boxed because chains have it so: nothing is allocated for a request.
#[derive(Debug, Default)]
#[allow(clippy::vec_box)]
pub(super) struct Storage(Vec<Box<Halves>>);

impl Storage {
    fn take(&mut self) -> Box<Halves> {
        self.0.pop().unwrap_or_default()
    }

    /// Keeps the storage of a completed chain.
    pub(super) fn keep(&mut self, chain: Chain) {
        if self.0.len() < KEPT_CHAINS {
            self.0.push(chain.into_storage());
        }
    }
}

/// The buffer that a descriptor describes.
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

    /// Returns whether another descriptor of the chain follows.
    pub(super) fn has_next(&self) -> bool {
        self.has(VRING_DESC_F_NEXT)
    }

    /// Returns whether it is a table of descriptors.
    pub(super) fn is_table(&self) -> bool {
        self.has(VRING_DESC_F_INDIRECT)
    }
}

/// A chain being gathered.
pub(super) struct Gathering<'a> {
    memory: &'a Arc<GuestMemory>,
    halves: Box<Halves>,
    count: usize,
    limit: usize,
}

impl<'a> Gathering<'a> {
    /// Starts a chain of at most `limit` descriptors.
    pub(super) fn new(memory: &'a Arc<GuestMemory>, storage: &mut Storage, limit: usize) -> Self {
        Self {
            memory,
            halves: storage.take(),
            count: 0,
            limit,
        }
    }

    /// Adds a buffer that is not a table.
    ///
    /// # Errors
    /// The chain is too long, or a readable buffer follows a writable one.
    pub(super) fn add(&mut self, buffer: Buffer) -> Result<(), RingError> {
        self.count += 1;
        if self.count > self.limit {
            return Err(RingError::ChainTooLong { limit: self.limit });
        }
        let half = if buffer.has(VRING_DESC_F_WRITE) {
            &mut self.halves.writable
        } else if self.halves.writable.len() > 0 {
            return Err(RingError::ReadableAfterWritable);
        } else {
            &mut self.halves.readable
        };
        let (mut address, mut length) = (buffer.address, buffer.length as usize);
        while length > 0 {
            let Some(slice) = self.memory.slice_up_to(address, length) else {
                half.push_hole(length);
                break;
            };
            half.push(&slice);
            length -= slice.len();
            // The slice ends inside guest memory, so this can wrap to 0 at most.
            address = address.wrapping_add(slice.len() as u64);
        }
        Ok(())
    }

    /// Continues in the table that `buffer` describes. It may be longer than the ring.
    ///
    /// # Errors
    /// The table is empty, not a multiple of 16 bytes, or not negotiated.
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
            return Err(RingError::Indirect("its length is not a multiple of 16"));
        }
        self.limit = MAX_INDIRECT_DESCRIPTORS.max(self.limit);
        Ok(Table {
            slice: self.memory.slice(buffer.address, length).ok(),
            memory: self.memory,
            start: buffer.address,
            entries: length / DESCRIPTOR_SIZE,
        })
    }

    /// Returns the chain, with the ring's `ticket` for it.
    pub(super) fn finish(self, ticket: Ticket) -> Chain {
        Chain::new(ticket, Arc::clone(self.memory), self.halves)
    }
}

/// An indirect table.
pub(super) struct Table<'a> {
    /// `None` if it spans regions of guest memory or is outside it.
    slice: Option<VolatileSlice<'a>>,
    memory: &'a GuestMemory,
    start: u64,
    entries: usize,
}

impl Table<'_> {
    /// Returns the number of descriptors.
    pub(super) fn entries(&self) -> usize {
        self.entries
    }

    /// Reads the descriptor at `index`.
    ///
    /// # Errors
    /// It is outside the table, or the table is outside guest memory.
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
