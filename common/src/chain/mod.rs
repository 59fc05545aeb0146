// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One request of the driver: a descriptor chain, as readable bytes followed by writable bytes.
//!
//! The ring looks up each address of the chain once, when it takes the chain. Bytes outside guest memory stay in the chain as a hole:
//! their length counts, and access to them fails with [`ChainError::NotMemory`]. So one bad address fails one request, by the device's
//! own error path.

mod segments;
mod ticket;

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use thiserror::Error;
use vm_memory::ByteValued;

use crate::memory::{DirtyLog, GuestMemory};
use crate::statistics::Taken;
pub(crate) use segments::Halves;
use segments::Parts;
pub(crate) use ticket::Ticket;

/// Why a part of a chain could not be used.
#[derive(Debug, Error, Clone, Copy, PartialEq, Eq)]
pub enum ChainError {
    /// The driver used an address that is not guest memory.
    #[error("the request points outside guest memory")]
    NotMemory,
    /// The chain has fewer bytes than the request needs.
    #[error("the request has {have} bytes where {need} are needed")]
    TooShort {
        /// Bytes that the chain has.
        have: u64,
        /// Bytes that the device needs.
        need: u64,
    },
}

/// One request: bytes for the device to read, then bytes for it to write (VIRTIO 1.3, 2.7.4.2).
///
/// The device does not see how the driver distributed them over descriptors. Reads and writes consume bytes from the front of their half.
/// The device gives the chain back by completing it on its queue: if a chain is dropped, the driver never gets an answer.
///
/// The default is an empty request that belongs to no ring.
#[derive(Debug, Default)]
#[must_use = "a chain that is not completed is never answered"]
pub struct Chain {
    /// Apart, and used again by later chains: a chain is moved often, and should be small.
    halves: Box<Halves>,
    /// How its ring identifies it.
    ticket: Ticket,
    /// When its queue took it.
    pub(crate) taken: Taken,
    /// Bytes that were writable when the driver made the request available.
    writable_total: u64,
    /// Keeps the segments mapped, whatever happens to the memory table.
    memory: Arc<GuestMemory>,
}

impl Chain {
    pub(crate) fn new(ticket: Ticket, memory: Arc<GuestMemory>, halves: Box<Halves>) -> Self {
        Self {
            writable_total: halves.writable.len(),
            halves,
            ticket,
            taken: Taken::default(),
            memory,
        }
    }

    pub(crate) fn ticket(&self) -> Ticket {
        self.ticket
    }

    /// Stores the entry in which its ring recorded it as in flight.
    pub(crate) fn set_inflight_entry(&mut self, entry: u16) {
        self.ticket.entry = entry;
    }

    /// Returns the largest used length that this request can have.
    pub(crate) fn writable_total(&self) -> u64 {
        self.writable_total
    }

    /// Marks all writable bytes: the device wrote some of them, not always the first ones.
    pub(crate) fn mark_dirty(&self, log: &DirtyLog) {
        for (pointer, length) in self.halves.writable.pieces() {
            if let Some(address) = self.memory.guest_address(pointer) {
                log.mark(address, length as u64);
            }
        }
    }

    /// Returns the storage of both halves, emptied for the next chain.
    pub(crate) fn into_storage(mut self) -> Box<Halves> {
        self.halves.readable.clear();
        self.halves.writable.clear();
        self.halves
    }

    /// Makes all of the request readable and writable again: it is to be carried out from its beginning, by another ring too.
    pub(crate) fn rewind(&mut self) {
        self.halves.readable.rewind();
        self.halves.writable.rewind();
        self.ticket.sequence = 0;
    }

    /// Returns the guest's memory, as it was when the request was taken: for addresses that are part of the data.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Returns how many bytes the device can still read.
    #[inline]
    pub fn readable_len(&self) -> u64 {
        self.halves.readable.len()
    }

    /// Returns how many bytes the device can still write, without a head and a tail that were split off.
    #[inline]
    pub fn writable_len(&self) -> u64 {
        self.halves.writable.len()
    }

    /// Checks that the whole request is in guest memory, for devices that do not access all of it.
    ///
    /// # Errors
    /// A part of it is not.
    #[inline]
    pub fn check(&self) -> Result<(), ChainError> {
        self.halves.readable.iovecs()?;
        self.halves.writable.iovecs()?;
        Ok(())
    }

    /// Reads exactly `bytes.len()` bytes and moves past them.
    ///
    /// # Errors
    /// Fewer bytes are left, or some are not guest memory.
    pub fn read(&mut self, bytes: &mut [u8]) -> Result<(), ChainError> {
        self.halves.readable.read(bytes)
    }

    /// Reads one value in its memory layout, and moves past it.
    ///
    /// # Errors
    /// As [`Chain::read`].
    pub fn read_object<T: ByteValued + Default>(&mut self) -> Result<T, ChainError> {
        let mut object = T::default();
        self.halves.readable.read(object.as_mut_slice())?;
        Ok(object)
    }

    /// Writes all of `bytes` and moves past them.
    ///
    /// # Errors
    /// Fewer bytes are left, or some are not guest memory.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), ChainError> {
        self.halves.writable.write(bytes)
    }

    /// Moves past `length` readable bytes that the kernel has read.
    ///
    /// # Errors
    /// As [`Chain::read`].
    pub fn skip_readable(&mut self, length: u64) -> Result<(), ChainError> {
        self.halves.readable.skip(length)
    }

    /// Moves past `length` writable bytes that the kernel has written.
    ///
    /// # Errors
    /// As [`Chain::write`].
    pub fn skip_writable(&mut self, length: u64) -> Result<(), ChainError> {
        self.halves.writable.skip(length)
    }

    /// Writes the next readable bytes, at most `most`, to `file` by one `writev(2)`, and moves past those that were written. Returns how
    /// many they are: fewer than `most` if the file takes no more, or if they are in very many parts.
    ///
    /// # Errors
    /// That of the system call, or `InvalidInput` if a readable part of the request is not guest memory.
    pub fn write_to(&mut self, file: impl AsFd, most: u64) -> io::Result<usize> {
        self.halves.readable.write_to(file.as_fd(), most)
    }

    /// Reads from `file` into the next writable bytes, at most `most`, by one `readv(2)`, and moves past those that were read. Returns how
    /// many they are. The sandbox allows `readv(2)` to devices that ask for it.
    ///
    /// # Errors
    /// As [`Chain::write_to`].
    pub fn read_from(&mut self, file: impl AsFd, most: u64) -> io::Result<usize> {
        self.halves.writable.read_from(file.as_fd(), most)
    }

    /// Reads from `file` like [`Chain::read_from`], into all of `chains`, one after the other. Returns the number of bytes: fewer than
    /// `most` if the file has no more, or if the chains have very many parts.
    ///
    /// # Errors
    /// As [`Chain::read_from`].
    pub fn read_many(chains: &mut [Self], file: impl AsFd, most: u64) -> io::Result<usize> {
        let mut parts = Parts::new(most);
        for chain in chains.iter() {
            let added = parts.add(&chain.halves.writable);
            added.map_err(|_| io::ErrorKind::InvalidInput)?;
        }
        let count = parts.read(file.as_fd())?;
        let mut left = count as u64;
        for chain in chains {
            let here = left.min(chain.writable_len());
            // The chain has as many, so this cannot fail.
            let _ = chain.skip_writable(here);
            left -= here;
        }
        Ok(count)
    }

    /// Splits off the last `length` writable bytes for [`Chain::write_tail`], for example a status after the data.
    ///
    /// # Errors
    /// Fewer bytes are left.
    pub fn split_tail(&mut self, length: u64) -> Result<(), ChainError> {
        self.halves.writable.split_tail(length)
    }

    /// Writes `bytes` to the start of what [`Chain::split_tail`] split off.
    ///
    /// # Errors
    /// Fewer bytes were split off, or some are not guest memory.
    pub fn write_tail(&mut self, bytes: &[u8]) -> Result<(), ChainError> {
        self.halves.writable.write_tail(bytes)
    }

    /// Splits off the next `length` writable bytes for [`Chain::write_head`], for example a response before the data. They replace an
    /// earlier head.
    ///
    /// # Errors
    /// Fewer bytes are left.
    pub fn split_head(&mut self, length: u64) -> Result<(), ChainError> {
        self.halves.writable.split_head(length)
    }

    /// Writes `bytes` to the start of what [`Chain::split_head`] split off.
    ///
    /// # Errors
    /// Fewer bytes were split off, or some are not guest memory.
    pub fn write_head(&mut self, bytes: &[u8]) -> Result<(), ChainError> {
        self.halves.writable.write_head(bytes)
    }

    /// Returns what the device can still read, as iovecs for vectored I/O. The addresses stay valid until the chain is completed.
    ///
    /// # Errors
    /// A readable part of the request is not guest memory.
    #[inline]
    pub fn readable_iovecs(&self) -> Result<&[libc::iovec], ChainError> {
        self.halves.readable.iovecs()
    }

    /// Returns what the device can still write, without the head and the tail that were split off; otherwise like
    /// [`Chain::readable_iovecs`].
    ///
    /// # Errors
    /// A writable part of the request is not guest memory.
    #[inline]
    pub fn writable_iovecs(&self) -> Result<&[libc::iovec], ChainError> {
        self.halves.writable.iovecs()
    }
}
