// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Shared memory regions of a device (VIRTIO 1.3, 2.10; vhost-user, SHMEM): declarations, requests to the front-end, and replies.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use thiserror::Error;

/// A shared memory region that a device declares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedRegion {
    /// The id (shmid) under which the driver finds it.
    pub id: u8,
    /// Size in bytes: a power of two, and at least one page. QEMU 11 puts all regions of a device into one BAR, and aborts unless the sum
    /// of their sizes is a power of two as well.
    pub size: u64,
}

/// A range of a shared memory region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedRange {
    /// Id of the region.
    pub region: u8,
    /// Offset in the region, a multiple of the page size.
    pub offset: u64,
    /// Length in bytes, a multiple of the page size, and not 0.
    pub length: u64,
}

impl SharedRange {
    /// Returns whether this is a range of whole pages in one of `regions`.
    pub(super) fn is_in(&self, regions: &[SharedRegion]) -> bool {
        let end = self.offset.checked_add(self.length);
        let region = regions.iter().find(|region| region.id == self.region);
        region.is_some_and(|region| end.is_some_and(|end| end <= region.size))
            && self.length > 0
            && is_whole_pages(self.offset)
            && is_whole_pages(self.length)
    }
}

/// Returns whether `bytes` is a multiple of the page size.
pub(super) fn is_whole_pages(bytes: u64) -> bool {
    bytes.is_multiple_of(rustix::param::page_size() as u64)
}

/// A part of a file to map into a region.
#[derive(Clone, Copy, Debug)]
pub struct Mapping<'a> {
    /// The range in which it appears.
    pub range: SharedRange,
    /// The file. It must cover the whole range: access beyond the end of the file can kill the virtual machine.
    pub file: BorrowedFd<'a>,
    /// Offset in the file, a multiple of the page size.
    pub file_offset: u64,
    /// Whether the guest may write to it.
    pub writable: bool,
}

/// Why a request for shared memory failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum SharedMemoryError {
    /// The front-end did not accept SHMEM, BACKEND_REQ and REPLY_ACK.
    #[error("the front-end does not support shared memory, or does not acknowledge requests")]
    Unsupported,
    /// The range is not in a region of the device, or not one of whole pages.
    #[error("the range does not consist of whole pages of a shared memory region")]
    Range,
    /// Too many requests have no reply yet, or the channel is full.
    #[error("the front-end is busy: too many requests without a reply")]
    Busy,
    /// The front-end refused the request: the range overlaps a mapping (map) or is not one (unmap), or the file cannot be mapped.
    #[error("the front-end refused the request")]
    Refused,
    /// A queue stops, and the front-end sends no replies until it has. The range may stay mapped until the front-end has handled the
    /// request; the core then has it unmapped.
    #[error("a queue stops before the front-end replies")]
    Stopped,
    /// The channel failed or was replaced, or the front-end disconnected: no reply will arrive.
    #[error("the channel to the front-end is closed")]
    Closed,
}

/// The reply to one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The number of the request, as the device chose it.
    pub number: u64,
    /// Whether the front-end carried it out.
    pub outcome: Result<(), SharedMemoryError>,
}

/// Collects the replies to the requests of one handler. The handler watches this as a file, and takes the replies when it is ready.
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

    /// Takes all replies that have arrived, oldest first. Never blocks.
    pub fn take(&self) -> Vec<Reply> {
        std::mem::take(&mut self.replies())
    }

    pub(super) fn add(&self, number: u64, outcome: Result<(), SharedMemoryError>) {
        self.replies().push(Reply { number, outcome });
        // This fails only if the counter is full, and then the file is ready.
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
