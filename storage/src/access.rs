// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! When a queue thread may carry out requests: when this program has the image, and no operation of a suspended request is in flight.
//!
//! Such an operation continues after its guest has left, or was stopped and started again. The request is carried out again, and that must
//! happen after the operation: otherwise the operation could overwrite what the guest writes next. So a queue thread whose requests were
//! suspended, or that starts, waits until no such operation of this process is in flight. Other threads continue: they do not carry out
//! the suspended requests. Another process waits for the lock on the image, which is released only then.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::lock::{InUse, Lock, Unflushed};

/// The access of a queue thread to the image. Drop it after the engines, which wait for all operations.
#[derive(Debug)]
pub struct Access {
    lock: Arc<Lock>,
    in_use: Option<InUse>,
    is_open: bool,
    /// Operations of suspended requests of this thread that are in flight, including the flush after them.
    abandoned: usize,
    /// Takes the place of `in_use` while that flush is in flight.
    unflushed: Option<Unflushed>,
}

impl Access {
    /// Access that is not open yet.
    pub(crate) fn new(lock: &Arc<Lock>) -> Self {
        Self {
            lock: Arc::clone(lock),
            in_use: None,
            is_open: false,
            abandoned: 0,
            unflushed: None,
        }
    }

    /// Returns whether requests may be carried out.
    #[inline]
    pub fn is_open(&self) -> bool {
        self.is_open
    }

    /// Returns whether locks keep other programs away from the image, as far as is known.
    pub fn is_exclusive(&self) -> bool {
        self.lock.is_effective()
    }

    /// Takes the image, and opens the access. Returns whether another program had the image until now.
    ///
    /// # Errors
    /// Operations of suspended requests are in flight here or in another program ([`io::ErrorKind::WouldBlock`]), or another program uses
    /// the image. Try again later.
    pub fn open(&mut self) -> io::Result<bool> {
        if self.lock.abandoned.load(Ordering::Acquire) > 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let mut in_use = match self.in_use.take() {
            Some(in_use) => in_use,
            None => self.lock.begin()?,
        };
        in_use.resume();
        self.is_open = true;
        Ok(self.in_use.insert(in_use).take_over())
    }

    /// Notes that requests were suspended, and that so many operations of them are in flight.
    pub fn suspended(&mut self, operations: usize) {
        self.is_open = false;
        self.add(operations);
        self.in_use.iter().for_each(InUse::finishing);
    }

    fn add(&mut self, operations: usize) {
        self.abandoned += operations;
        self.lock.abandoned.fetch_add(operations, Ordering::AcqRel);
    }

    /// Notes that one of these operations has ended.
    pub fn ended(&mut self) {
        let Some(left) = self.abandoned.checked_sub(1) else {
            return;
        };
        self.abandoned = left;
        self.lock.abandoned.fetch_sub(1, Ordering::AcqRel);
        if left == 0
            && let Some(unflushed) = self.unflushed.take()
        {
            self.in_use = Some(unflushed.flushed());
        }
    }

    /// Releases the image when all these operations have ended. Call it while no queue of the thread runs. Returns whether to flush the
    /// image first: that flush counts as one more of these operations.
    #[must_use]
    pub fn finish(&mut self) -> bool {
        if self.is_open || self.abandoned > 0 {
            return false;
        }
        self.unflushed = self.in_use.take().and_then(InUse::end);
        let is_due = self.unflushed.is_some();
        self.add(is_due.into());
        is_due
    }

    /// Returns whether none of these operations is in flight.
    pub fn is_idle(&self) -> bool {
        self.abandoned == 0
    }
}

impl Drop for Access {
    fn drop(&mut self) {
        let abandoned = &self.lock.abandoned;
        abandoned.fetch_sub(self.abandoned, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::Syncs;

    #[test]
    fn an_image_that_is_used_again_is_flushed_again() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let lock = |waits| {
            let syncs = Arc::new(Syncs::new(false));
            Arc::new(Lock::new(file.reopen().unwrap(), syncs, false, waits).unwrap())
        };
        let (ours, _theirs) = (lock(false), lock(true));
        let mut access = Access::new(&ours);
        for _ in 0..2 {
            access.open().unwrap();
            access.suspended(0);
            assert!(access.finish(), "a flush is due");
            // It ends after the queue was started again.
            access.ended();
        }
    }
}
