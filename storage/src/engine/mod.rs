// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Engines carry out operations on images: by io_uring, or by threads that make blocking system calls. An engine moves data and knows
//! neither the device nor the format of the image.
//!
//! A device with one disk opens engines for it; io_uring then has the image as a registered file of each ring. Files can be registered
//! only before the sandbox is entered, and stay open until the process exits. So a device whose disks come and go names the disk in each
//! request ([`IoRequest::disk`]), and io_uring uses its descriptor, which all rings share. The kernel reports lost data once for each open
//! file, and two rings that share one would report it in any order: so syncs of such disks go to threads, which take turns.
//!
//! An engine owns a request while its operation is in flight, so what the operation points to (the memory of a chain, or a buffer)
//! outlives it.

mod probe;
mod request;
mod rings;
mod slots;
pub mod slow;
mod threads;
mod uring;

use std::io;
use std::sync::Arc;

use vhost_device_common::chain::Chain;
use vhost_device_common::device::{Call, Needs, StartError};
use vhost_device_common::worker::{Poller, Watcher};

use crate::disk::Disk;
use crate::options::IoEngine;
pub use request::{IoRequest, Label};
use rings::Rings;
pub use slots::Finished;
use threads::ThreadsEngine;
use uring::UringEngine;

/// The most rings of io_uring. A ring takes time at the start, and locked memory.
const MAX_RINGS: usize = 16;

/// Resources of engines, opened before the sandbox is entered.
pub enum Engines {
    /// The rings of io_uring, and their number.
    IoUring(Arc<Rings>, u16),
    /// Threads, which are started when they are needed.
    Threads,
}

impl Engines {
    /// Opens the engine that the option names, for this number of queues; with `auto`, the one that this host allows. A named engine is
    /// never replaced by another one. Without `disk`, requests name their disks.
    ///
    /// # Errors
    /// This host refuses io_uring. The text says why, and what to do.
    pub fn open(disk: Option<&Disk>, wanted: IoEngine, queues: u16) -> Result<Self, StartError> {
        slow::open();
        if wanted == IoEngine::Threads {
            return Ok(Self::Threads);
        }
        let image = disk.map(|disk| &disk.image);
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let most = processors.min(MAX_RINGS).min(queues.into()) as u16;
        match (probe::open_rings(image, most), wanted) {
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

    /// Returns the thread of a queue. With io_uring, queues share the threads, each of which has a ring.
    pub fn thread_of(&self, queue: u16) -> u16 {
        match self {
            Self::IoUring(_, count) => queue % count,
            Self::Threads => queue,
        }
    }

    /// Returns what engines need of the sandbox, including operations that a queue thread carries out itself.
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
            Self::IoUring(rings, _) => {
                needs.queue.push(Call::new(libc::SYS_io_uring_enter));
                needs.helper = rings.image.is_none().then(|| operations.to_vec());
            }
            Self::Threads => needs.helper = Some(operations.to_vec()),
        }
        needs
    }
}

/// Carries out operations for one thread.
#[allow(clippy::large_enum_variant, reason = "there is one per thread")]
pub enum Engine<R: IoRequest> {
    /// Uses io_uring, and threads for what it does not do: ioctls, and syncs of several disks.
    IoUring(UringEngine<R>, Option<ThreadsEngine<R>>),
    /// Uses threads.
    Threads(ThreadsEngine<R>),
}

impl<R: IoRequest> Engine<R> {
    /// Makes an engine for `disk`, for which `engines` were opened, or for requests that name their disks. When operations have ended, the
    /// handler's [`ready`](vhost_device_common::worker::QueueHandler::ready) is called.
    ///
    /// # Errors
    /// The process has too many open files, or all rings are in use.
    pub fn new(engines: &Engines, disk: Option<&Disk>, watcher: &Watcher) -> io::Result<Self> {
        match engines {
            Engines::IoUring(rings, _) => {
                let threads = disk
                    .is_none_or(Disk::needs_ioctls)
                    .then(|| ThreadsEngine::new(disk, watcher));
                Ok(Self::IoUring(
                    UringEngine::new(rings)?,
                    threads.transpose()?,
                ))
            }
            Engines::Threads => ThreadsEngine::new(disk, watcher).map(Self::Threads),
        }
    }

    /// Returns whether another operation may start.
    pub fn has_room(&self) -> bool {
        match self {
            Self::IoUring(engine, threads) => {
                engine.has_room() && threads.as_ref().is_none_or(ThreadsEngine::has_room)
            }
            Self::Threads(engine) => engine.has_room(),
        }
    }

    /// Returns the number of operations in flight, as far as is known.
    pub fn under_way(&self) -> usize {
        match self {
            Self::IoUring(engine, threads) => {
                engine.under_way() + threads.as_ref().map_or(0, ThreadsEngine::under_way)
            }
            Self::Threads(engine) => engine.under_way(),
        }
    }

    /// Starts the next operation of `request`. Returns the request if there is no room.
    #[must_use]
    pub fn submit(&mut self, request: R) -> Option<R> {
        match self {
            Self::IoUring(_, Some(threads)) if is_for_threads(&request) => threads.submit(request),
            Self::IoUring(engine, _) => engine.submit(request),
            Self::Threads(engine) => engine.submit(request),
        }
    }

    /// Starts everything that was submitted now, not when the thread waits.
    pub fn begin(&mut self) {
        match self {
            Self::IoUring(engine, _) => engine.begin(),
            Self::Threads(_) => {}
        }
    }

    /// Suspends the requests that `is_one` selects. Passes the chain of each to `give` whose operation has not begun, or continues without
    /// the chain ([`IoRequest::abandon`]). Returns how many operations continue so; [`Engine::finished`] returns what is left of their
    /// requests. The other requests stay as they are.
    pub fn suspend(
        &mut self,
        is_one: impl Fn(Label) -> bool,
        mut give: impl FnMut(Chain),
    ) -> usize {
        match self {
            Self::IoUring(engine, threads) => {
                let count = engine.suspend(&is_one, &mut give);
                let threads = threads.as_mut();
                count + threads.map_or(0, |threads| threads.suspend(is_one, give))
            }
            Self::Threads(engine) => engine.suspend(is_one, give),
        }
    }

    /// Takes the next request whose operation has ended.
    pub fn finished(&mut self) -> Option<Finished<R>> {
        match self {
            Self::IoUring(engine, threads) => {
                let threads = || threads.as_mut().and_then(ThreadsEngine::finished);
                engine.finished().or_else(threads)
            }
            Self::Threads(engine) => engine.finished(),
        }
    }

    /// Has operations that have ended and were not taken reported again.
    pub fn report_again(&self) {
        match self {
            // The poller of io_uring checks whether any are left.
            Self::IoUring(_, threads) => threads.iter().for_each(ThreadsEngine::report_again),
            Self::Threads(engine) => engine.report_again(),
        }
    }

    /// Returns the poller that the queue's thread must use, if the engine has one. Operations that have ended show as `Token::Device`.
    pub fn poller(&mut self) -> Option<&mut dyn Poller> {
        match self {
            Self::IoUring(engine, _) => Some(engine),
            Self::Threads(_) => None,
        }
    }
}

/// Returns whether io_uring leaves the next operation to threads.
#[inline]
fn is_for_threads(request: &impl IoRequest) -> bool {
    let operation = request.operation();
    operation.is_ioctl() || request.disk().is_some() && operation.is_sync()
}
