// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Mappings of the front-end's files.
//!
//! A front-end can truncate a file while it is mapped here. The first access beyond the new end raises SIGBUS. The handler then
//! replaces the whole mapping by zeroes, so that the access succeeds, and notifies the session, which ends the connection.

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

/// Most mappings at a time: those of a memory table, of the table that replaces it, and of others that requests still hold.
const PLACES: usize = 4 * MAX_REGIONS;

/// The place of a mapping, for the signal handler.
///
/// Start and length are read as a pair: a pair of two different mappings could cover a third one.
#[derive(Debug)]
struct Place {
    /// The place has an owner, who alone changes the other fields.
    is_taken: AtomicBool,
    /// First address; 0 when there is no mapping.
    start: AtomicUsize,
    length: AtomicUsize,
    /// Odd while the fields change; different after each change.
    version: AtomicUsize,
}

/// The mappings that the signal handler knows. A handler cannot wait for a lock.
static KNOWN: [Place; PLACES] = [const { Place::unused() }; PLACES];

/// The eventfd that the signal handler writes to.
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

    /// Records a mapping in a free place; `None` if there is none.
    fn take(start: usize, length: usize) -> Option<&'static Self> {
        KNOWN.iter().find(|place| place.try_take(start, length))
    }

    /// Records a mapping here, unless the place has an owner. Returns whether it did.
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

    /// Frees the place. Only its owner may call this.
    fn give_back(&self) {
        self.set(0, 0);
        self.is_taken.store(false, Ordering::Release);
    }

    /// Changes the fields. Only the owner of the place may call this.
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

    /// Returns start and length of the mapping; `None` if there is none, or if it is changing.
    fn get(&self) -> Option<(usize, usize)> {
        let version = self.version.load(Ordering::Acquire);
        let start = self.start.load(Ordering::Relaxed);
        let length = self.length.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        let is_pair = version.is_multiple_of(2) && self.version.load(Ordering::Relaxed) == version;
        (is_pair && start != 0).then_some((start, length))
    }

    /// Returns start and length of the mapping that contains this address. It is in use, so it does not change meanwhile.
    fn of(address: usize) -> Option<(usize, usize)> {
        KNOWN.iter().find_map(|place| {
            let (start, length) = place.get()?;
            let into = address.checked_sub(start)?;
            (into < length).then_some((start, length))
        })
    }
}

/// Lets the process survive front-ends that truncate memory that they share.
///
/// # Errors
/// No file can be opened, or the signal cannot be handled.
pub(crate) fn survive_lost_memory() -> io::Result<()> {
    let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    if LOST.set(event).is_err() {
        return Ok(());
    }
    // The handler of the standard library must not be called as well: it restores the default action for a fault that is not a stack
    // overflow.
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

/// Handles SIGBUS: replaces the mapping that was accessed. For any other cause the process ends, as it would without this handler.
extern "C" fn replace_lost(signal: c_int, info: *mut libc::siginfo_t, _context: *mut c_void) {
    // SAFETY: the kernel passes the information that the flags ask for; with this signal it has an address.
    let address = unsafe { (*info).si_addr() }.addr();
    let replaced = Place::of(address).is_some_and(|(start, length)| {
        let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let start = std::ptr::with_exposed_provenance_mut(start);
        // SAFETY: these are the pages of a mapping that is in use by the interrupted access; the new pages can be accessed in the same
        // way.
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
            // SAFETY: raising a signal does not access memory. It is delivered after this handler returns.
            unsafe { libc::raise(signal) };
        }
    }
}

/// Reports memory that was lost since this was created.
#[derive(Debug)]
pub(crate) struct LostMemory(Option<&'static OwnedFd>);

impl LostMemory {
    /// Starts to watch. Losses of earlier connections are forgotten.
    pub fn watch() -> Self {
        let event = LOST.get();
        if let Some(event) = event {
            let _ = rustix::io::read(event, &mut [0; 8]);
        }
        Self(event)
    }

    /// Returns the file that becomes readable; `None` if the process does not handle the loss.
    pub fn event(&self) -> Option<BorrowedFd<'static>> {
        self.0.map(AsFd::as_fd)
    }
}

/// A shared mapping of a file. Unlike the mappings of `vm_memory` it does not keep the file open: a memory table can have more regions
/// than a process may have open files.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<c_void>,
    length: usize,
    place: &'static Place,
}

// SAFETY: the mapping belongs to no thread, and is only accessed by volatile operations or by the kernel.
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
            // SAFETY: nothing refers to the mapping yet.
            unsafe { munmap(start.as_ptr(), length) }?;
            return Err(io::Error::other("too many mappings are in use"));
        };
        Ok(Self {
            start,
            length,
            place,
        })
    }

    /// Returns the address at which the mapping starts.
    pub fn start(&self) -> usize {
        self.start.as_ptr().addr()
    }

    /// Returns a part of the mapping; `None` if it is not inside.
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
        // SAFETY: all users of the memory hold a reference to the mapping, so there are none left.
        let _ = unsafe { munmap(self.start.as_ptr(), self.length) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// With a start and a length of different mappings, the handler would replace other memory.
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
