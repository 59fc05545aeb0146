// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The lock on the image: one writer or several readers, among programs of this project and QEMU's.
//!
//! A guest that migrates takes its disk from one program to another, and both have the image open meanwhile. The one that it migrates
//! to is told (`--incoming`): it waits, and locks the image when its guest starts to use the disk. The one that it migrates from lets
//! go of the image when its guest has stopped, if somebody waits; from then on it waits itself, as the guest may come back.

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use vhost_device_common::device::Call;
use vhost_device_common::{info_limited, warn_limited};

use crate::operation::Operation;
use crate::sync::Syncs;

/// Bytes of the image on which QEMU programs say, by read locks, that they write to it, and that
/// they bear no other writer.
const QEMU_WRITES: i64 = 101;
const QEMU_BEARS_NO_WRITER: i64 = 201;
/// Byte by which programs of this project exclude each other, and the one on which those wait that the image is to be handed to.
const OURS: i64 = 300;
const WAITING: i64 = 301;

/// The lock of this program, which belongs to an open file.
#[derive(Debug)]
pub struct Lock {
    file: File,
    /// Told whether the image is on stable storage when it is handed over.
    syncs: Arc<Syncs>,
    read_only: bool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    is_held: bool,
    /// Handlers of queue threads at work on the image.
    users: usize,
}

/// The handler of a queue thread at work on the image, which is locked for as long as there is one.
#[derive(Debug)]
pub struct InUse {
    lock: Arc<Lock>,
    is_taken_over: bool,
}

impl InUse {
    /// The image was another program's until now.
    pub fn is_taken_over(&self) -> bool {
        self.is_taken_over
    }
}

/// What a thread needs to lock, look, and let go.
pub fn calls() -> impl Iterator<Item = Call> {
    let fcntl = |command: i32| Call::new(libc::SYS_fcntl).with(1, command as u32);
    [libc::F_OFD_SETLK, libc::F_OFD_GETLK]
        .into_iter()
        .map(fcntl)
}

impl Lock {
    /// Locks the image, or waits for it.
    ///
    /// # Errors
    /// Another program has it, or waits for it: what to do about that.
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
            state: Mutex::default(),
        };
        if waits {
            lock.wait();
        } else if !lock.take() || lock.is_awaited() {
            return Err(
                "in use by another program that writes to it, or bears no writer; stop that program, \
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

    /// Notes that a handler begins to work on the image.
    ///
    /// # Errors
    /// The image was not locked so far, and another program has it.
    pub fn begin(self: &Arc<Self>) -> io::Result<InUse> {
        let mut state = self.state();
        let is_taken_over = !state.is_held;
        if is_taken_over {
            if !self.take() {
                return Err(io::Error::other("another program uses the image"));
            }
            self.set(libc::F_UNLCK, WAITING);
            state.is_held = true;
            info_limited(format_args!("the image is taken over"));
        }
        state.users += 1;
        Ok(InUse {
            lock: Arc::clone(self),
            is_taken_over,
        })
    }

    /// Lets go of the image, if another program waits for it.
    fn hand_over(&self, state: &mut State) {
        if !self.is_awaited() {
            return;
        }
        // The other program may run on another host, which has what is in storage.
        if !self.read_only
            && let Err(error) = self.syncs.execute(&self.file, Operation::Flush)
        {
            warn_limited(format_args!(
                "flush before the image is handed over failed: {error}"
            ));
        }
        self.wait();
        self.release();
        state.is_held = false;
        info_limited(format_args!("the image is handed over"));
    }

    /// Whether another program waits for the image.
    fn is_awaited(&self) -> bool {
        self.is_locked(libc::F_WRLCK, WAITING)
    }

    fn wait(&self) {
        self.set(libc::F_RDLCK, WAITING);
    }

    /// Takes all locks, or none. A file system without locks has no other program.
    fn take(&self) -> bool {
        let own = match self.read_only {
            true => libc::F_RDLCK,
            false => libc::F_WRLCK,
        };
        let taken = self.set(own, OURS)
            && self.set(libc::F_RDLCK, QEMU_BEARS_NO_WRITER)
            // A writer of QEMU's cannot get the last one any more; look whether one had been there.
            && !self.is_locked(libc::F_WRLCK, QEMU_WRITES);
        if !taken {
            self.release();
        }
        taken
    }

    fn release(&self) {
        self.set(libc::F_UNLCK, QEMU_BEARS_NO_WRITER);
        self.set(libc::F_UNLCK, OURS);
    }

    /// Locks or unlocks a byte. Whether nobody else was in the way.
    fn set(&self, kind: i32, byte: i64) -> bool {
        match fcntl(&self.file, FcntlArg::F_OFD_SETLK(&request(kind, byte))) {
            Ok(_) => true,
            Err(Errno::EAGAIN | Errno::EACCES) => false,
            Err(errno) => {
                warn_limited(format_args!(
                    "the image can not be locked against a second writer: {errno}"
                ));
                true
            }
        }
    }

    /// Whether a lock of another open file is in the way of this one.
    fn is_locked(&self, kind: i32, byte: i64) -> bool {
        let mut lock = request(kind, byte);
        let looked = fcntl(&self.file, FcntlArg::F_OFD_GETLK(&mut lock));
        looked.is_ok() && i32::from(lock.l_type) != libc::F_UNLCK
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        let mut state = self.lock.state();
        state.users = state.users.saturating_sub(1);
        if state.users == 0 {
            self.lock.hand_over(&mut state);
        }
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
