// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Whether storage keeps what was written. The kernel tells of data that it could not write once for each open file, and has the next
//! flush succeed. So the failure is remembered: a guest must not believe that later flush.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::engine::{Operation, execute};

/// What became of the flushes and write-through writes of an open image.
#[derive(Debug, Default)]
pub struct Syncs {
    failed: AtomicBool,
}

impl Syncs {
    /// Flushes `file`.
    ///
    /// # Errors
    /// That failed, or one before it did.
    pub fn flush(&self, file: &File) -> io::Result<u64> {
        let flushed = execute(file, Operation::Flush);
        self.check(file, Operation::Flush, flushed)
    }

    /// The outcome of `operation` on `file`, which has ended with `outcome`: an error too if it was to end on stable storage, and one
    /// before it failed to.
    ///
    /// # Errors
    /// As said.
    pub fn check(
        &self,
        file: &File,
        operation: Operation<'_>,
        outcome: io::Result<u64>,
    ) -> io::Result<u64> {
        let is_lost = match operation {
            Operation::Flush => outcome.is_err(),
            Operation::Write { stable: true, .. } => {
                outcome.is_err() && self.is_lost(file, operation)
            }
            _ => return outcome,
        };
        if let Err(error) = &outcome
            && is_lost
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

    /// Whether a write-through write failed for what was written before: then it succeeds when nothing is to be stable. Else the guest
    /// knows of all that is lost.
    fn is_lost(&self, file: &File, operation: Operation<'_>) -> bool {
        let Operation::Write { from, offset, .. } = operation else {
            return false;
        };
        let write = Operation::Write {
            from,
            offset,
            stable: false,
        };
        !self.failed.load(Ordering::Acquire) && execute(file, write).is_ok()
    }
}
