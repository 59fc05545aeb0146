// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One request of the driver: a descriptor chain, as readable bytes and then writable bytes.
//!
//! Each address of the chain was looked up once, when the ring took it. What lies outside guest
//! memory stays in the chain as a hole: its length counts, and whoever touches it gets
//! [`ChainError::NotMemory`]. So one bad address fails one request, by the device's own error path.

mod segments;
mod ticket;

use std::sync::Arc;

use thiserror::Error;
use vm_memory::ByteValued;

use crate::memory::{DirtyLog, GuestMemory};
use crate::statistics::Taken;
pub(crate) use segments::Segments;
pub(crate) use ticket::Ticket;

/// Why a part of a chain could not be used.
#[derive(Debug, Error, Clone, Copy, PartialEq, Eq)]
pub enum ChainError {
    /// The driver named an address that is not guest memory.
    #[error("the request points outside guest memory")]
    NotMemory,
    /// Fewer bytes are there than the device's request layout asks for.
    #[error("the request has {have} bytes where {need} are needed")]
    TooShort {
        /// Bytes that are there.
        have: u64,
        /// Bytes that the device wanted.
        need: u64,
    },
}

/// One request: bytes for the device to read, then bytes for it to write (VIRTIO 1.3, 2.7.4.2).
///
/// How the driver spread them over descriptors makes no difference to the device. Reads and writes
/// take from the front of their half. Give the chain back by completing it on its queue: a chain
/// that is dropped is a request that the driver never gets answered.
#[derive(Debug)]
#[must_use = "a chain that is not completed is never answered"]
pub struct Chain {
    readable: Segments,
    writable: Segments,
    /// How its ring knows it.
    ticket: Ticket,
    /// When its queue took it.
    pub(crate) taken: Taken,
    /// Bytes that were writable when the driver made the request available.
    writable_total: u64,
    /// Keeps mapped what the segments point to, whatever happens to the memory table.
    memory: Arc<GuestMemory>,
}

impl Chain {
    pub(crate) fn new(
        ticket: Ticket,
        memory: Arc<GuestMemory>,
        readable: Segments,
        writable: Segments,
    ) -> Self {
        Self {
            writable_total: writable.len(),
            readable,
            writable,
            ticket,
            taken: Taken::default(),
            memory,
        }
    }

    pub(crate) fn ticket(&self) -> Ticket {
        self.ticket
    }

    /// Notes where its ring noted it as in flight.
    pub(crate) fn set_inflight_entry(&mut self, entry: u16) {
        self.ticket.entry = entry;
    }

    /// The most that the used length of this request may say.
    pub(crate) fn writable_total(&self) -> u64 {
        self.writable_total
    }

    /// Marks all that was writable: what the device wrote is a part of it, but not always the first one.
    pub(crate) fn mark_dirty(&self, log: &DirtyLog) {
        for (pointer, length) in self.writable.pieces() {
            if let Some(address) = self.memory.guest_address(pointer) {
                log.mark(address, length as u64);
            }
        }
    }

    /// The storage of both halves, for the next chain.
    pub(crate) fn into_segments(self) -> [Segments; 2] {
        [self.readable, self.writable]
    }

    /// Makes all of the request readable and writable again: it is to be carried out from its beginning, by another ring too.
    pub(crate) fn rewind(&mut self) {
        self.readable.rewind();
        self.writable.rewind();
        self.ticket.sequence = 0;
    }

    /// All memory of the guest, as it was when the request was taken: for addresses that are data.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Bytes that the device may still read.
    #[inline]
    pub fn readable_len(&self) -> u64 {
        self.readable.len()
    }

    /// Bytes that the device may still write, not counting a tail that was set aside.
    #[inline]
    pub fn writable_len(&self) -> u64 {
        self.writable.len()
    }

    /// Checks that all of the request is guest memory, for devices that do not touch all of it.
    ///
    /// # Errors
    /// It is not.
    #[inline]
    pub fn check(&self) -> Result<(), ChainError> {
        self.readable.iovecs()?;
        self.writable.iovecs()?;
        Ok(())
    }

    /// Reads exactly `bytes.len()` bytes and moves past them.
    ///
    /// # Errors
    /// Fewer are left, or they are not all guest memory.
    pub fn read(&mut self, bytes: &mut [u8]) -> Result<(), ChainError> {
        self.readable.read(bytes)
    }

    /// Reads one value, as it lies in memory, and moves past it.
    ///
    /// # Errors
    /// As [`Chain::read`].
    pub fn read_object<T: ByteValued + Default>(&mut self) -> Result<T, ChainError> {
        let mut object = T::default();
        self.readable.read(object.as_mut_slice())?;
        Ok(object)
    }

    /// Writes all of `bytes` and moves past them.
    ///
    /// # Errors
    /// There is less room left, or it is not all guest memory.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), ChainError> {
        self.writable.write(bytes)
    }

    /// Moves past `length` readable bytes, which the kernel has read.
    ///
    /// # Errors
    /// As [`Chain::read`].
    pub fn skip_readable(&mut self, length: u64) -> Result<(), ChainError> {
        self.readable.skip(length)
    }

    /// Moves past `length` writable bytes, which the kernel has written.
    ///
    /// # Errors
    /// As [`Chain::write`].
    pub fn skip_writable(&mut self, length: u64) -> Result<(), ChainError> {
        self.writable.skip(length)
    }

    /// Sets the last `length` writable bytes aside for [`Chain::write_tail`]: a status that follows
    /// the data, say.
    ///
    /// # Errors
    /// There are fewer.
    pub fn split_tail(&mut self, length: u64) -> Result<(), ChainError> {
        self.writable.split_tail(length)
    }

    /// Writes `bytes` to the front of what [`Chain::split_tail`] set aside.
    ///
    /// # Errors
    /// Less was set aside, or it is not all guest memory.
    pub fn write_tail(&mut self, bytes: &[u8]) -> Result<(), ChainError> {
        self.writable.write_tail(bytes)
    }

    /// What the device may still read, as the kernel wants it for vectored I/O. The addresses stay
    /// good until the chain is completed.
    ///
    /// # Errors
    /// A readable part of the request is not guest memory.
    #[inline]
    pub fn readable_iovecs(&self) -> Result<&[libc::iovec], ChainError> {
        self.readable.iovecs()
    }

    /// What the device may still write, without the tail that was set aside; else as
    /// [`Chain::readable_iovecs`].
    ///
    /// # Errors
    /// A writable part of the request is not guest memory.
    #[inline]
    pub fn writable_iovecs(&self) -> Result<&[libc::iovec], ChainError> {
        self.writable.iovecs()
    }
}
