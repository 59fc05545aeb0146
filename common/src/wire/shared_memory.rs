// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Shared memory regions of a device (VIRTIO 1.3, 2.10; vhost-user, SHMEM): what it declares, what it asks for, and the replies.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use thiserror::Error;

/// A region that a device declares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedRegion {
    /// The id (shmid) by which the driver finds it.
    pub id: u8,
    /// Size in bytes: a power of two, and one page at least. QEMU 11 puts all regions of a device into one BAR, and aborts unless their
    /// sum is a power of two as well.
    pub size: u64,
}

/// A part of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedRange {
    /// Id of the region.
    pub region: u8,
    /// First byte in the region, a multiple of the page size.
    pub offset: u64,
    /// Bytes, a multiple of the page size, and not 0.
    pub length: u64,
}

impl SharedRange {
    /// Whether this is a range of whole pages in one of `regions`.
    pub(super) fn is_in(&self, regions: &[SharedRegion]) -> bool {
        let end = self.offset.checked_add(self.length);
        let region = regions.iter().find(|region| region.id == self.region);
        region.is_some_and(|region| end.is_some_and(|end| end <= region.size))
            && self.length > 0
            && is_whole_pages(self.offset)
            && is_whole_pages(self.length)
    }
}

/// Whether `bytes` is a multiple of the page size.
pub(super) fn is_whole_pages(bytes: u64) -> bool {
    bytes.is_multiple_of(rustix::param::page_size() as u64)
}

/// A part of a file to be mapped into a region.
#[derive(Clone, Copy, Debug)]
pub struct Mapping<'a> {
    /// Where it appears.
    pub range: SharedRange,
    /// The file. It must reach to the end of the range: a guest that reads beyond the end of a file ends its virtual machine.
    pub file: BorrowedFd<'a>,
    /// First byte in the file, a multiple of the page size.
    pub file_offset: u64,
    /// Whether the guest may write to it.
    pub writable: bool,
}

/// Why a file was not mapped or unmapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum SharedMemoryError {
    /// The front-end cannot map files.
    #[error("the front-end does not support shared memory, or does not acknowledge requests")]
    Unsupported,
    /// The device declares no such memory.
    #[error("the range is not one of whole pages in a shared memory region of the device")]
    Range,
    /// Too many requests wait for replies, or the channel has no room.
    #[error("the front-end is busy: too many requests wait for its replies")]
    Busy,
    /// The front-end refused: the range overlaps a mapping, or is none, or the file cannot be mapped.
    #[error("the front-end refused the request")]
    Refused,
    /// A queue stops, and the front-end answers nothing until it has. The range is free when the next request is carried out.
    #[error("a queue stops before the front-end replies")]
    Stopped,
    /// The channel failed or was replaced, or the front-end went away: no reply will come.
    #[error("the channel to the front-end is closed")]
    Closed,
}

/// The reply to one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The number that the device gave to the request.
    pub number: u64,
    /// What came of it.
    pub outcome: Result<(), SharedMemoryError>,
}

/// Collects the replies to the requests of one handler, and tells its thread of them: the handler watches this as a file, and takes
/// the replies when it is ready.
#[derive(Clone, Debug)]
pub struct Replies(Arc<Inbox>);

#[derive(Debug)]
struct Inbox {
    event: OwnedFd,
    replies: Mutex<Vec<Reply>>,
}

impl Replies {
    /// Creates an empty collection.
    ///
    /// # Errors
    /// The limit of open files is reached.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(Inbox {
            event: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            replies: Mutex::default(),
        })))
    }

    /// Takes all replies that have come so far, in the order of the requests. Never waits.
    pub fn take(&self) -> Vec<Reply> {
        std::mem::take(&mut self.replies())
    }

    pub(super) fn add(&self, number: u64, outcome: Result<(), SharedMemoryError>) {
        self.replies().push(Reply { number, outcome });
        // It fails only if its counter is full, and then the file is ready.
        let _ = rustix::io::write(&self.0.event, &1u64.to_ne_bytes());
    }

    fn replies(&self) -> MutexGuard<'_, Vec<Reply>> {
        self.0
            .replies
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsFd for Replies {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.event.as_fd()
    }
}
