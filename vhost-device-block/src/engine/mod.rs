// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What carries out operations on the image. This is the one room of this crate with `unsafe`: here
//! the addresses of a chain are handed to the kernel.
//!
//! An engine owns a request while its operation is under way, so what the operation points to (the
//! chain's memory, or a bounce buffer) outlives it.

mod operation;
mod slots;
mod threads;
mod uring;

use std::fs::File;
use std::io;
use std::sync::Arc;

use vhost_device_common::device::{Call, Needs};
use vhost_device_common::program::sandbox::without_capabilities;
use vhost_device_common::worker::Poller;

use crate::image::Image;
use crate::options::IoEngine;
use crate::request::Request;
pub use operation::{Memory, Operation, Range, execute};
use threads::ThreadsEngine;
use uring::UringEngine;

/// The system calls of an engine, and of what is carried out without one.
pub fn needs(kind: IoEngine) -> Needs {
    let operations = [
        libc::SYS_preadv2,
        libc::SYS_pwritev2,
        libc::SYS_fdatasync,
        libc::SYS_fallocate,
    ]
    .map(Call::new);
    let mut needs = Needs {
        queue: operations.to_vec(),
        ..Needs::default()
    };
    match kind {
        IoEngine::Threads => needs.helper = Some(operations.to_vec()),
        _ => uring::add_needs(&mut needs),
    }
    needs
}

/// Operations that one queue may have under way.
pub const DEPTH: usize = 256;

/// A request whose operation has ended, and how: bytes moved, or the error.
pub type Finished = (Request, io::Result<u64>);

/// Carries out operations of one queue.
#[allow(clippy::large_enum_variant, reason = "there is one per queue")]
pub enum Engine {
    IoUring(UringEngine),
    Threads(ThreadsEngine),
}

impl Engine {
    /// An engine on `image`, of the kind that the options name.
    ///
    /// # Errors
    /// The host refuses io_uring, or is out of files or threads.
    pub fn new(image: &Arc<Image>, kind: IoEngine) -> io::Result<Self> {
        match kind {
            IoEngine::Threads => ThreadsEngine::new(image).map(Self::Threads),
            _ => UringEngine::new(&image.file).map(Self::IoUring),
        }
    }

    /// Whether this host lets the program use io_uring.
    ///
    /// # Errors
    /// It does not.
    pub fn probe_io_uring(file: &File) -> io::Result<()> {
        // What a privilege lets it do now, it could not do later.
        let outcome = without_capabilities(|| UringEngine::new(file).map(drop));
        outcome.unwrap_or(Err(io::ErrorKind::PermissionDenied.into()))
    }

    /// Whether another operation may start.
    pub fn has_room(&self) -> bool {
        match self {
            Self::IoUring(engine) => engine.has_room(),
            Self::Threads(engine) => engine.has_room(),
        }
    }

    /// Operations that have not ended, as far as is known.
    pub fn under_way(&self) -> usize {
        match self {
            Self::IoUring(engine) => engine.under_way(),
            Self::Threads(engine) => engine.under_way(),
        }
    }

    /// Starts the operation that `request` comes to next. There must be room.
    pub fn submit(&mut self, request: Request) {
        match self {
            Self::IoUring(engine) => engine.submit(request),
            Self::Threads(engine) => engine.submit(request),
        }
    }

    /// Has all that was submitted begin now, rather than when the thread waits.
    pub fn begin(&mut self) {
        match self {
            Self::IoUring(engine) => engine.begin(),
            Self::Threads(_) => {}
        }
    }

    /// The next request whose operation has ended.
    pub fn finished(&mut self) -> Option<Finished> {
        match self {
            Self::IoUring(engine) => engine.finished(),
            Self::Threads(engine) => engine.finished(),
        }
    }

    /// What the queue's thread is to wait with, if this engine has a way of its own. Ended operations
    /// show as `Token::Device`.
    pub fn poller(&mut self) -> Option<&mut dyn Poller> {
        match self {
            Self::IoUring(engine) => Some(engine),
            Self::Threads(_) => None,
        }
    }

    /// Has another poller watch for ended operations.
    ///
    /// # Errors
    /// The kernel has no room for one more watch.
    pub fn watch(&self, poller: &mut dyn Poller) -> io::Result<()> {
        match self {
            Self::IoUring(_) => Ok(()),
            Self::Threads(engine) => engine.watch(poller),
        }
    }
}
