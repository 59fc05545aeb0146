// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The files that a handler waits for beside its queues.

use std::io;
use std::ops::BitOr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};

/// What a file is ready for, and what it is watched for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Readiness(EventFlags);

impl Readiness {
    /// Data, a connection or the end of the file can be read.
    pub const READABLE: Self = Self(EventFlags::IN);
    /// There is room to write.
    pub const WRITABLE: Self = Self(EventFlags::OUT);
    /// An exceptional condition (POLLPRI), such as a change of a GPIO line in sysfs or an event of a V4L2 device.
    pub const PRIORITY: Self = Self(EventFlags::PRI);
    /// Nothing: pauses a watch.
    pub const NONE: Self = Self(EventFlags::empty());

    /// Whether all of `other` is included.
    pub fn contains(self, other: Self) -> bool {
        self.0.contains(other.0)
    }

    /// What is reported of `flags`. A file that failed or was hung up is ready for everything: the next call on it tells.
    fn reported(self, flags: EventFlags) -> Self {
        match flags.intersects(EventFlags::ERR | EventFlags::HUP) {
            true => self,
            false => Self(self.0 & flags),
        }
    }
}

impl BitOr for Readiness {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Marks the user data of a watched file. The number of the file is in the lower half, its generation above that.
const FILE: u64 = 1 << 63;
/// Generations wrap around here. A stale event would have to be this many files old.
const GENERATIONS: u32 = 1 << 31;

/// A watched file.
#[derive(Clone, Copy, Debug)]
struct Watched {
    /// Tells its events from those of an earlier file with the same number.
    generation: u32,
    interest: Readiness,
    token: u32,
}

/// The watched files, by their numbers.
#[derive(Debug, Default)]
struct Files {
    watched: Vec<Option<Watched>>,
    last_generation: u32,
}

impl Files {
    /// The entry of a file number; file numbers are small.
    fn entry(&mut self, number: usize) -> Option<&mut Option<Watched>> {
        if self.watched.len() <= number {
            self.watched.resize(number + 1, None);
        }
        self.watched.get_mut(number)
    }
}

#[derive(Debug)]
struct Set {
    epoll: OwnedFd,
    files: Mutex<Files>,
}

/// Has the worker call [`QueueHandler::ready`](super::QueueHandler::ready) when files become ready. Clones share one set of files,
/// and may be used at any time and from any thread.
///
/// Readiness is edge-triggered, also if the handler brings its own poller: it is reported once when a file that is already ready is
/// added or changed, and after that whenever more arises. So an eventfd or timer need not be read; other files are to be read or
/// written until that fails with `EAGAIN`, or the handler remembers what it left, or it has the file reported again by
/// [`Watcher::change`]. A file may be reported though it is not ready any more.
///
/// A file is watched once for both directions for as long as it is open; flow control needs no system call.
#[derive(Clone, Debug)]
pub struct Watcher(Arc<Set>);

impl Watcher {
    /// # Errors
    /// The limit of open files is reached.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(Set {
            epoll: epoll::create(CreateFlags::CLOEXEC)?,
            files: Mutex::default(),
        })))
    }

    /// Watches `file` until it is removed, and reports it as `token`. Several files may have the same token.
    ///
    /// Remove a file before closing it. The watch of a file that was closed ends by itself, unless the file is open elsewhere too.
    ///
    /// # Errors
    /// The file is watched already (`AlreadyExists`), cannot be waited on, such as a regular file (`PermissionDenied`), or a limit
    /// is reached.
    pub fn add(&self, file: impl AsFd, interest: Readiness, token: u32) -> io::Result<()> {
        let file = file.as_fd();
        let mut files = self.files();
        let generation = (files.last_generation + 1) % GENERATIONS;
        epoll::add(
            self,
            file,
            data(file, generation),
            interest.0 | EventFlags::ET,
        )?;
        files.last_generation = generation;
        if let Some(entry) = files.entry(number(file)) {
            *entry = Some(Watched {
                generation,
                interest,
                token,
            });
        }
        Ok(())
    }

    /// Watches a file for something else, or reports it as another token. What the file is ready for is reported again.
    ///
    /// # Errors
    /// The file is not watched (`NotFound`).
    pub fn change(&self, file: impl AsFd, interest: Readiness, token: u32) -> io::Result<()> {
        let file = file.as_fd();
        let mut files = self.files();
        let Some(Some(watched)) = files.watched.get_mut(number(file)) else {
            return Err(io::ErrorKind::NotFound.into());
        };
        let data = data(file, watched.generation);
        epoll::modify(self, file, data, interest.0 | EventFlags::ET)?;
        (watched.interest, watched.token) = (interest, token);
        Ok(())
    }

    /// Stops watching a file. If the handler removes it, no more events of it are reported, not even earlier ones. Does nothing
    /// if the file is not watched.
    pub fn remove(&self, file: impl AsFd) {
        let file = file.as_fd();
        let mut files = self.files();
        if let Some(entry) = files.watched.get_mut(number(file)) {
            *entry = None;
            let _ = epoll::delete(self, file);
        }
    }

    fn files(&self) -> MutexGuard<'_, Files> {
        self.0.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Resolves an event to the token of its file and what to report, unless the file was removed meanwhile.
    pub(super) fn resolve(&self, event: FileEvent) -> Option<(u32, Readiness)> {
        let number = event.data as u32;
        let watched = (*self.files().watched.get(number as usize)?)?;
        let is_current =
            event.data == FILE | u64::from(watched.generation) << 32 | u64::from(number);
        let readiness = watched.interest.reported(event.flags);
        (is_current && readiness != Readiness::NONE).then_some((watched.token, readiness))
    }
}

impl AsFd for Watcher {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.epoll.as_fd()
    }
}

/// An event of a watched file, as the kernel reported it.
#[derive(Clone, Copy, Debug)]
pub(super) struct FileEvent {
    data: u64,
    flags: EventFlags,
}

impl FileEvent {
    /// The event, if it is one of a watched file.
    pub fn of(event: &epoll::Event) -> Option<Self> {
        let (data, flags) = (event.data.u64(), event.flags);
        (data & FILE != 0).then_some(Self { data, flags })
    }
}

fn number(file: BorrowedFd<'_>) -> usize {
    // Open files have no negative numbers.
    file.as_raw_fd() as usize
}

fn data(file: BorrowedFd<'_>, generation: u32) -> EventData {
    EventData::new_u64(FILE | u64::from(generation) << 32 | number(file) as u64)
}
