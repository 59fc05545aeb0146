// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Whether storage keeps what was written. The kernel tells of data that it could not write once for each open file, and has the next
//! flush succeed. So the failure is remembered: a guest must not believe that later flush.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock};

use crate::operation::{Operation, execute};

/// What became of the flushes and write-through writes of an open image.
#[derive(Debug)]
pub struct Syncs {
    failed: AtomicBool,
    /// There is no page cache that could lose what was written before (O_DIRECT).
    is_direct: bool,
    /// Held by a flush, so that none succeeds between the failure of another operation and the note of it.
    flushing: RwLock<()>,
}

impl Syncs {
    /// Nothing has failed so far.
    pub fn new(is_direct: bool) -> Self {
        Self {
            failed: AtomicBool::new(false),
            is_direct,
            flushing: RwLock::new(()),
        }
    }

    /// Carries `operation` out on `file`, which may be open in common with other threads, and waits for it.
    ///
    /// # Errors
    /// That failed, or it was to end on stable storage and one before it failed to.
    pub fn execute(&self, file: &File, operation: Operation<'_>) -> io::Result<u64> {
        let (mut _flush, mut _write) = (None, None);
        match operation {
            Operation::Flush => {
                _flush = Some(
                    self.flushing
                        .write()
                        .unwrap_or_else(PoisonError::into_inner),
                );
            }
            Operation::Write { stable: true, .. } => {
                _write = Some(self.flushing.read().unwrap_or_else(PoisonError::into_inner));
            }
            _ => {}
        }
        self.check(operation, execute(file, operation))
    }

    /// The outcome of `operation`, which has ended with `outcome`: an error too if it was to end on stable storage, and one before it
    /// failed to.
    ///
    /// # Errors
    /// As said.
    pub fn check(&self, operation: Operation<'_>, outcome: io::Result<u64>) -> io::Result<u64> {
        let may_lose = match operation {
            Operation::Flush => true,
            Operation::Write { stable: true, .. } => !self.is_direct,
            _ => return outcome,
        };
        if let Err(error) = &outcome
            && may_lose
            && (matches!(operation, Operation::Flush) || !is_refusal(error))
            && !self.failed.swap(true, Ordering::AcqRel)
        {
            log::error!(
                "what was written to the image could not be written to stable storage: {error}; all flushes and \
                 write-through writes fail from now on: check the storage, then restart this program"
            );
        }
        if self.failed.load(Ordering::Acquire) {
            return outcome.and_then(|_| Err(io::Error::from_raw_os_error(libc::EIO)));
        }
        outcome
    }
}

/// Whether the kernel refuses a write so before it writes anything: for want of room or memory, or for what is asked. Then nothing is
/// lost of what was written before.
fn is_refusal(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::ENOSPC
                | libc::EDQUOT
                | libc::EFBIG
                | libc::ENOMEM
                | libc::EFAULT
                | libc::EINVAL
                | libc::EPERM
                | libc::EAGAIN
        )
    )
}
