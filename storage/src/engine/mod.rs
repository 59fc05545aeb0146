// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What carries out operations on the image. This is the one room of this crate with `unsafe`: here
//! the addresses of a chain are handed to the kernel.
//!
//! An engine owns a request while its operation is under way, so what the operation points to (the
//! chain's memory, or a bounce buffer) outlives it.

mod rings;
mod slots;
mod threads;
mod uring;

use std::io;
use std::sync::Arc;

use vhost_device_common::device::{Call, Needs, StartError};
use vhost_device_common::worker::Poller;

use crate::image::Image;
use crate::operation::IoRequest;
use crate::options::IoEngine;
use rings::Rings;
use threads::ThreadsEngine;
use uring::UringEngine;

/// Operations that one thread may have under way.
pub const DEPTH: usize = 256;

/// Most rings of io_uring: they take time at the start, and locked memory.
const MAX_RINGS: usize = 16;

/// A request whose operation has ended, and how: bytes moved, or the error.
pub type Finished<R> = (R, io::Result<u64>);

/// What engines are made of.
pub enum Engines {
    /// Rings, and how many there are.
    IoUring(Arc<Rings>, u16),
    /// Nothing that must be made before.
    Threads,
}

impl Engines {
    /// What the options name, or what `auto` comes to on this host, for so many queues. Nobody gets another engine than the one that
    /// was named.
    ///
    /// # Errors
    /// This host refuses io_uring: why, and what to do.
    pub fn open(image: &Arc<Image>, wanted: IoEngine, queues: u16) -> Result<Self, StartError> {
        if wanted == IoEngine::Threads {
            return Ok(Self::Threads);
        }
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let most = processors.min(MAX_RINGS).min(queues.into()) as u16;
        match (Rings::open(&image.file, &image.syncs, most), wanted) {
            (Ok((rings, count)), _) => Ok(Self::IoUring(rings, count)),
            (Err(error), IoEngine::IoUring) => Err(StartError(format!(
                "this host refuses io_uring: {}; or use --io-engine=auto or --io-engine=threads",
                rings::explain(&error)
            ))),
            (Err(error), _) => {
                log::info!(
                    "this host refuses io_uring: {}; threads do the I/O",
                    rings::explain(&error)
                );
                Ok(Self::Threads)
            }
        }
    }

    /// The thread that works on a queue: queues share those that have rings.
    pub fn thread_of(&self, queue: u16) -> u16 {
        match self {
            Self::IoUring(_, count) => queue % count,
            Self::Threads => queue,
        }
    }

    /// The system calls of an engine, and of what is carried out without one.
    pub fn needs(&self) -> Needs {
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
        match self {
            Self::IoUring(..) => needs.queue.push(Call::new(libc::SYS_io_uring_enter)),
            Self::Threads => needs.helper = Some(operations.to_vec()),
        }
        needs
    }
}

/// Carries operations out, for one thread.
#[allow(clippy::large_enum_variant, reason = "there is one per thread")]
pub enum Engine<R: IoRequest> {
    /// By io_uring.
    IoUring(UringEngine<R>),
    /// By threads.
    Threads(ThreadsEngine<R>),
}

impl<R: IoRequest> Engine<R> {
    /// An engine on `image`, for which `engines` are.
    ///
    /// # Errors
    /// The host is out of files, or all rings are in use.
    pub fn new(engines: &Engines, image: &Arc<Image>) -> io::Result<Self> {
        match engines {
            Engines::IoUring(rings, _) => UringEngine::new(rings).map(Self::IoUring),
            Engines::Threads => ThreadsEngine::new(image).map(Self::Threads),
        }
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

    /// Starts the operation that `request` comes to next. Gives the request back if there is no room.
    #[must_use]
    pub fn submit(&mut self, request: R) -> Option<R> {
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
    pub fn finished(&mut self) -> Option<Finished<R>> {
        match self {
            Self::IoUring(engine) => engine.finished(),
            Self::Threads(engine) => engine.finished(),
        }
    }

    /// Has ended operations that are left show as ready again.
    pub fn look_again(&self) {
        match self {
            // Its way of waiting looks whether any are left.
            Self::IoUring(_) => {}
            Self::Threads(engine) => engine.look_again(),
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
