// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Mappings of the front-end's files.
//!
//! A front-end can make a file shorter while it is mapped here. The first access to what is gone raises SIGBUS. The handler
//! then puts zeroes in the place of the whole mapping, so that whoever touched it can go on, and tells the session, which ends
//! the connection.

use std::ffi::{c_int, c_void};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{NonNull, null_mut};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};

use rustix::event::{EventfdFlags, eventfd};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use vm_memory::VolatileSlice;

use super::MAX_REGIONS;

/// Mappings that can be there at a time: those of a table, of the one that replaces it, and of some that requests still hold.
const PLACES: usize = 4 * MAX_REGIONS;

/// Where a mapping is, for the signal handler.
///
/// Both fields are read as a pair: one that was put together of two mappings could reach into a third.
#[derive(Debug)]
struct Place {
    /// Somebody owns the place, and nobody else changes what follows.
    is_taken: AtomicBool,
    /// First address; 0 when there is no mapping.
    start: AtomicUsize,
    length: AtomicUsize,
    /// Odd while the fields change, and another number after that.
    version: AtomicUsize,
}

/// What the signal handler knows of. A handler cannot wait for a lock.
static KNOWN: [Place; PLACES] = [const { Place::unused() }; PLACES];

/// Written to by the signal handler.
static LOST: OnceLock<OwnedFd> = OnceLock::new();

impl Place {
    const fn unused() -> Self {
        Self {
            is_taken: AtomicBool::new(false),
            start: AtomicUsize::new(0),
            length: AtomicUsize::new(0),
            version: AtomicUsize::new(0),
        }
    }

    /// Notes where a mapping is; `None` if there are too many.
    fn take(start: usize, length: usize) -> Option<&'static Self> {
        KNOWN.iter().find(|place| place.try_take(start, length))
    }

    /// Notes a mapping here, if nobody owns the place. Returns whether it is ours now.
    fn try_take(&self, start: usize, length: usize) -> bool {
        let is_ours = self
            .is_taken
            .compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed)
            .is_ok();
        if is_ours {
            self.set(start, length);
        }
        is_ours
    }

    /// Leaves the place to whoever takes it next. Only its owner may do so.
    fn give_back(&self) {
        self.set(0, 0);
        self.is_taken.store(false, Ordering::Release);
    }

    /// Changes what only the owner of the place may change.
    fn set(&self, start: usize, length: usize) {
        let version = self.version.load(Ordering::Relaxed);
        self.version
            .store(version.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        self.length.store(length, Ordering::Relaxed);
        self.start.store(start, Ordering::Release);
        self.version
            .store(version.wrapping_add(2), Ordering::Release);
    }

    /// Where the mapping starts, and its length; `None` if there is none, or if it comes or goes just now.
    fn get(&self) -> Option<(usize, usize)> {
        let version = self.version.load(Ordering::Acquire);
        let start = self.start.load(Ordering::Relaxed);
        let length = self.length.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        let is_pair = version.is_multiple_of(2) && self.version.load(Ordering::Relaxed) == version;
        (is_pair && start != 0).then_some((start, length))
    }

    /// The mapping that has this address: where it starts, and its length. It is in use, so that it neither comes nor goes meanwhile.
    fn of(address: usize) -> Option<(usize, usize)> {
        KNOWN.iter().find_map(|place| {
            let (start, length) = place.get()?;
            let into = address.checked_sub(start)?;
            (into < length).then_some((start, length))
        })
    }
}

/// Has the process survive front-ends that take away memory which they have shared.
///
/// # Errors
/// No more files may be opened, or the signal cannot be handled.
pub(crate) fn survive_lost_memory() -> io::Result<()> {
    let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    if LOST.set(event).is_err() {
        return Ok(());
    }
    // Another handler must not be called too: that of the standard library restores the default action when it sees a fault that is
    // no overflow of a stack.
    let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = replace_lost;
    // SAFETY: all zeroes is a value of this plain structure.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    set_action(&action)
}

fn set_action(action: &libc::sigaction) -> io::Result<()> {
    // SAFETY: the action is the default one, or our handler, which has the signature that its flags announce; it makes system
    // calls, reads atomics, and nothing else.
    match unsafe { libc::sigaction(libc::SIGBUS, action, null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Handles SIGBUS: replaces the mapping that was touched. Any other cause ends the process, as it would have without us.
extern "C" fn replace_lost(signal: c_int, info: *mut libc::siginfo_t, _context: *mut c_void) {
    // SAFETY: the kernel passes the information that the flags ask for; with this signal it has an address.
    let address = unsafe { (*info).si_addr() }.addr();
    let replaced = Place::of(address).is_some_and(|(start, length)| {
        let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let start = std::ptr::with_exposed_provenance_mut(start);
        // SAFETY: these are the pages of the mapping, which is in use by whoever touched it; what takes their place can be
        // accessed in the same way.
        unsafe { mmap_anonymous(start, length, protection, flags) }.is_ok()
    });
    match LOST.get() {
        Some(event) if replaced => {
            let _ = rustix::io::write(event, &1u64.to_ne_bytes());
        }
        _ => {
            // SAFETY: all zeroes is a value of this plain structure: the default action.
            let default: libc::sigaction = unsafe { std::mem::zeroed() };
            let _ = set_action(&default);
            // SAFETY: it has no memory to do with. The signal comes when this one has been handled.
            unsafe { libc::raise(signal) };
        }
    }
}

/// Tells of memory that was taken away since this was made.
#[derive(Debug)]
pub(crate) struct LostMemory(Option<&'static OwnedFd>);

impl LostMemory {
    /// What happened to earlier connections is forgotten.
    pub fn watch() -> Self {
        let event = LOST.get();
        if let Some(event) = event {
            let _ = rustix::io::read(event, &mut [0; 8]);
        }
        Self(event)
    }

    /// What becomes readable, unless the process does not survive the loss anyway.
    pub fn event(&self) -> Option<BorrowedFd<'static>> {
        self.0.map(AsFd::as_fd)
    }
}

/// A shared mapping of a file. Unlike `vm_memory`'s own it does not keep the file open: a table can
/// have more regions than a process may have open files.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<c_void>,
    length: usize,
    place: &'static Place,
}

// SAFETY: the mapping belongs to no thread, and all access to it is volatile or by the kernel.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    pub fn new(file: &OwnedFd, offset: u64, length: usize) -> io::Result<Self> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: the kernel chooses an address where nothing is mapped.
        let start = unsafe { mmap(null_mut(), length, protection, flags, file, offset) }?;
        let start = NonNull::new(start).ok_or(io::ErrorKind::AddrNotAvailable)?;
        let Some(place) = Place::take(start.as_ptr().expose_provenance(), length) else {
            // SAFETY: nobody knows of the mapping yet.
            unsafe { munmap(start.as_ptr(), length) }?;
            return Err(io::Error::other("too many mappings are in use"));
        };
        Ok(Self {
            start,
            length,
            place,
        })
    }

    /// Where the mapping begins.
    pub fn start(&self) -> usize {
        self.start.as_ptr().addr()
    }

    /// A part of the mapping; `None` if it is not inside.
    #[inline]
    pub fn slice(&self, offset: usize, length: usize) -> Option<VolatileSlice<'_>> {
        // SAFETY: start and length are those of the mapping, which lives as long as the borrow.
        let whole = unsafe { VolatileSlice::new(self.start.as_ptr().cast(), self.length) };
        whole.subslice(offset, length).ok()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.place.give_back();
        // SAFETY: all who use the memory hold a reference to the mapping.
        let _ = unsafe { munmap(self.start.as_ptr(), self.length) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A start and a length that were never those of one mapping would have the handler map over what is beside it.
    #[test]
    fn start_and_length_of_a_mapping_are_read_as_a_pair() {
        const ROUNDS: usize = 100_000;
        let mappings = [
            (0x1000, 0x1000),
            (0x10_0000, 0x10_0000),
            (0x100_0000, 0x100_0000),
        ];
        let place = Place::unused();
        let is_done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                while !is_done.load(Ordering::Relaxed) {
                    if let Some(mapping) = place.get() {
                        assert!(mappings.contains(&mapping), "{mapping:x?}");
                    }
                }
            });
            let takers = mappings.map(|(start, length)| {
                let place = &place;
                scope.spawn(move || {
                    for _ in 0..ROUNDS {
                        if place.try_take(start, length) {
                            assert_eq!(place.get(), Some((start, length)), "taken by two");
                            place.give_back();
                        }
                    }
                })
            });
            takers.into_iter().for_each(|taker| taker.join().unwrap());
            is_done.store(true, Ordering::Relaxed);
            reader.join().unwrap();
        });
        assert_eq!(place.get(), None);
    }
}
