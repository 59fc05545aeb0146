// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The lock on the image: one writer or several readers, among programs of this project and QEMU's.
//!
//! When a guest migrates, two programs have its image open. The destination is started with `--incoming`: it waits, and locks the image
//! when its guest starts to use the disk. The source releases the image when its guest has stopped, if another program waits. From then
//! on the source waits, because the guest may come back.
//!
//! Operations of suspended requests may be in flight after the guest has stopped. The source keeps the image until they have ended, and the
//! destination carries out nothing before it has the image. So such an operation cannot overwrite later data.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use vhost_device_common::device::Call;
use vhost_device_common::{info_limited, warn_limited};

use crate::operation::Operation;
use crate::sync::Syncs;

/// The bytes of the image that QEMU's programs lock for reading while they write to it, and while they allow no other writer.
const QEMU_WRITES: i64 = 101;
const QEMU_ALLOWS_NO_WRITER: i64 = 201;
/// The byte by which programs of this project exclude each other, and the one that a program locks while it waits for the image.
const OURS: i64 = 300;
const WAITING: i64 = 301;
/// The byte that a program locks while it has only to finish, and the one that it locks if it has lost data that was written.
const FINISHING: i64 = 302;
const LOST: i64 = 303;

/// The lock of this program. It belongs to an open file.
#[derive(Debug)]
pub struct Lock {
    file: File,
    /// Gets the outcome of the flush before the image is handed over.
    syncs: Arc<Syncs>,
    read_only: bool,
    /// The file system has refused a lock, and not because of another lock.
    is_refused: AtomicBool,
    /// Operations of suspended requests that are in flight.
    pub(crate) abandoned: AtomicUsize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    is_held: bool,
    /// Queue threads that use the image.
    users: usize,
    /// How many there have been.
    begun: u64,
}

/// A queue thread's use of the image, which stays locked for as long as there is one.
#[derive(Debug)]
pub struct InUse {
    lock: Arc<Lock>,
    is_taken_over: bool,
    /// The image was flushed when so many uses had begun.
    flushed: Option<u64>,
    is_ended: bool,
}

impl InUse {
    /// Returns, once, whether another program may have had the image until now.
    pub fn take_over(&mut self) -> bool {
        std::mem::take(&mut self.is_taken_over)
    }

    /// Announces that the thread has only to finish, so that a program that needs the image waits instead of giving up.
    pub fn finishing(&self) {
        self.lock.set(libc::F_RDLCK, FINISHING);
    }

    /// Announces that the thread uses the image again, and may write to it.
    pub fn resume(&mut self) {
        self.flushed = None;
        self.lock.set(libc::F_UNLCK, FINISHING);
    }

    /// Ends the use as a drop does, unless the image must be flushed before it is handed over: a drop waits for that flush. Flush then,
    /// and end what [`Unflushed::flushed`] returns.
    pub fn end(mut self) -> Option<Unflushed> {
        let lock = Arc::clone(&self.lock);
        let mut state = lock.state();
        let begun = state.begun;
        let is_flushed = lock.read_only || self.flushed == Some(begun);
        if state.users == 1 && !is_flushed && lock.is_awaited() {
            return Some(Unflushed {
                in_use: self,
                begun,
            });
        }
        self.end_in(&mut state);
        None
    }

    fn end_in(&mut self, state: &mut State) {
        if !std::mem::replace(&mut self.is_ended, true) {
            state.users = state.users.saturating_sub(1);
            if state.users == 0 {
                let is_flushed = self.flushed == Some(state.begun);
                self.lock.hand_over(state, is_flushed);
            }
        }
    }
}

/// A use of an image that must be flushed before it is handed over.
#[derive(Debug)]
pub struct Unflushed {
    in_use: InUse,
    begun: u64,
}

impl Unflushed {
    /// Notes that the flush has ended.
    pub fn flushed(mut self) -> InUse {
        self.in_use.flushed = Some(self.begun);
        self.in_use
    }
}

/// Returns the system calls of a thread that locks or releases an image.
pub fn calls() -> impl Iterator<Item = Call> {
    let fcntl = |command: i32| Call::new(libc::SYS_fcntl).with(1, command as u32);
    [libc::F_OFD_SETLK, libc::F_OFD_GETLK]
        .into_iter()
        .map(fcntl)
}

impl Lock {
    /// Locks the image; if `waits`, waits for it instead.
    ///
    /// # Errors
    /// Another program has the image, or waits for it; what to do.
    pub fn new(
        file: File,
        syncs: Arc<Syncs>,
        read_only: bool,
        waits: bool,
    ) -> Result<Self, &'static str> {
        let lock = Self {
            file,
            syncs,
            read_only,
            is_refused: AtomicBool::new(false),
            abandoned: AtomicUsize::new(0),
            state: Mutex::default(),
        };
        if waits {
            lock.wait();
        } else if !lock.take() || lock.is_awaited() {
            return Err(
                "in use by another program that writes to it, or allows no writer; stop that program, \
                 make a copy, or add --incoming if this is the destination of a live migration from that program",
            );
        } else {
            lock.state().is_held = true;
        }
        Ok(lock)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a queue thread begins to use the image, and locks it if it is not locked yet.
    ///
    /// # Errors
    /// Another program has the image. If that program has only to finish, the error is [`io::ErrorKind::WouldBlock`].
    pub fn begin(self: &Arc<Self>) -> io::Result<InUse> {
        let mut state = self.state();
        let is_taken_over = !state.is_held;
        if is_taken_over {
            if !self.take() {
                if self.is_locked(libc::F_WRLCK, FINISHING) {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                // It may have released the image in between.
                if !self.take() {
                    return Err(io::Error::other("another program uses the image"));
                }
            }
            self.set(libc::F_UNLCK, WAITING);
            if self.is_locked(libc::F_WRLCK, LOST) {
                self.syncs.fail();
            }
            state.is_held = true;
            info_limited(format_args!("the image is taken over"));
        }
        state.users += 1;
        state.begun += 1;
        Ok(InUse {
            lock: Arc::clone(self),
            is_taken_over,
            flushed: None,
            is_ended: false,
        })
    }

    /// Returns whether this program has the image.
    pub fn is_held(&self) -> bool {
        self.state().is_held
    }

    /// Returns whether locks keep other programs away, as far as is known.
    pub fn is_effective(&self) -> bool {
        !self.is_refused.load(Ordering::Relaxed)
    }

    /// Releases the image if another program waits for it.
    fn hand_over(&self, state: &mut State, is_flushed: bool) {
        if !self.is_awaited() {
            return self.set_finished();
        }
        // The other program may run on another host, which sees only what is on stable storage.
        if !self.read_only
            && !is_flushed
            && let Err(error) = self.syncs.execute(&self.file, Operation::Flush)
        {
            warn_limited(format_args!(
                "flush before the image is handed over failed: {error}"
            ));
        }
        if self.syncs.has_failed() {
            self.set(libc::F_RDLCK, LOST);
        }
        self.wait();
        self.release();
        self.set_finished();
        state.is_held = false;
        info_limited(format_args!("the image is handed over"));
    }

    fn set_finished(&self) {
        self.set(libc::F_UNLCK, FINISHING);
    }

    /// Returns whether another program waits for the image.
    fn is_awaited(&self) -> bool {
        self.is_locked(libc::F_WRLCK, WAITING)
    }

    fn wait(&self) {
        self.set(libc::F_RDLCK, WAITING);
    }

    /// Takes all locks, or none. On a file system without locks it succeeds.
    fn take(&self) -> bool {
        let own = match self.read_only {
            true => libc::F_RDLCK,
            false => libc::F_WRLCK,
        };
        let taken = self.set(own, OURS)
            && self.set(libc::F_RDLCK, QEMU_ALLOWS_NO_WRITER)
            // From here on no writer of QEMU's can lock the image; check whether one had before.
            && !self.is_locked(libc::F_WRLCK, QEMU_WRITES);
        if !taken {
            self.release();
        }
        taken
    }

    fn release(&self) {
        self.set(libc::F_UNLCK, QEMU_ALLOWS_NO_WRITER);
        self.set(libc::F_UNLCK, OURS);
    }

    /// Locks or unlocks a byte. Returns whether no other program has it.
    fn set(&self, kind: i32, byte: i64) -> bool {
        match fcntl(&self.file, FcntlArg::F_OFD_SETLK(&request(kind, byte))) {
            Ok(_) => true,
            Err(Errno::EAGAIN | Errno::EACCES) => false,
            Err(errno) => {
                warn_limited(format_args!(
                    "cannot lock the image against a second writer: {errno}"
                ));
                self.is_refused.store(true, Ordering::Relaxed);
                true
            }
        }
    }

    /// Returns whether another open file has a lock that conflicts with this one.
    fn is_locked(&self, kind: i32, byte: i64) -> bool {
        let mut lock = request(kind, byte);
        let looked = fcntl(&self.file, FcntlArg::F_OFD_GETLK(&mut lock));
        looked.is_ok() && i32::from(lock.l_type) != libc::F_UNLCK
    }
}

impl Drop for Lock {
    /// A client that passed the file may keep it open, and the locks belong to the open file.
    fn drop(&mut self) {
        if self.is_effective() {
            for byte in [WAITING, FINISHING, LOST] {
                self.set(libc::F_UNLCK, byte);
            }
            self.release();
        }
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        let lock = Arc::clone(&self.lock);
        self.end_in(&mut lock.state());
    }
}

fn request(kind: i32, byte: i64) -> libc::flock {
    libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_released_though_another_has_its_open_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let lock = |file: File| Lock::new(file, Arc::new(Syncs::new(false)), false, false);
        let passed = file.reopen().unwrap();
        let ours = lock(passed.try_clone().unwrap()).unwrap();
        let other = || lock(file.reopen().unwrap());
        assert!(other().is_err());
        drop(ours);
        assert!(other().is_ok());
        drop(passed);
    }
}
