// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Whether storage keeps what was written. The kernel reports data that it could not write only once for each open file, and the next
//! flush succeeds. So a failure is remembered, and fails later flushes too: the guest must not believe them.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock};

use crate::operation::{Operation, execute};

/// The outcome of all flushes and write-through writes of an open image.
#[derive(Debug)]
pub struct Syncs {
    failed: AtomicBool,
    /// With O_DIRECT there is no page cache that could lose what was written before.
    is_direct: bool,
    /// Held by a flush, so that no flush succeeds between the failure of another operation and the note of it.
    flushing: RwLock<()>,
}

impl Syncs {
    /// Creates a record without failures.
    pub fn new(is_direct: bool) -> Self {
        Self {
            failed: AtomicBool::new(false),
            is_direct,
            flushing: RwLock::new(()),
        }
    }

    /// Returns whether a flush or a write-through write has failed.
    pub fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// Notes that the program that had the image before has lost data: the guest must not believe a flush here either.
    pub fn fail(&self) {
        if !self.failed.swap(true, Ordering::AcqRel) {
            log::error!(
                "the program that had the image before could not write all data to stable storage; all flushes and write-through \
                 writes fail from now on: check the storage, then restart this program"
            );
        }
    }

    /// Carries out `operation` on `file`, which other threads may use too, and waits for it. Returns the bytes that were read or written.
    ///
    /// # Errors
    /// It failed, or it is a flush or a write-through write and an earlier one failed.
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

    /// Notes the `outcome` of `operation`, and returns it.
    ///
    /// # Errors
    /// As for [`Syncs::execute`].
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
                "data of the image could not be written to stable storage: {error}; all flushes and write-through writes \
                 fail from now on; check the storage, then restart this program"
            );
        }
        if self.failed.load(Ordering::Acquire) {
            return outcome.and_then(|_| Err(io::Error::from_raw_os_error(libc::EIO)));
        }
        outcome
    }
}

/// Returns whether the kernel reports this error before it writes anything: there is no space or memory, or the arguments are wrong. Then
/// nothing that was written before is lost.
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
