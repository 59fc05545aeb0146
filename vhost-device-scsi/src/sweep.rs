// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Makes a task management function see what its driver sees: the requests that the driver made available before it, and none that the
//! driver does not know the answer of. The threads of all request queues take what is in their rings, and publish what they have completed.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

use std::sync::{Mutex, MutexGuard};
use vhost_device_common::lock;

/// What a thread has done for a queue since which sweep began.
#[derive(Clone, Copy, Debug)]
struct Done {
    /// It took all requests from the ring.
    emptied: u64,
    /// It published all completed requests.
    published: u64,
}

/// Numbered sweeps of all request queues.
#[derive(Debug, Default)]
pub struct Sweep {
    /// The number of the last sweep.
    last: AtomicU64,
    /// The request queues that give requests.
    queues: Mutex<HashMap<u16, Done>>,
}

impl Sweep {
    fn queues(&self) -> MutexGuard<'_, HashMap<u16, Done>> {
        lock(&self.queues)
    }

    /// Begins a sweep, and returns its number. Wake the threads then.
    pub fn begin(&self) -> u64 {
        self.last.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// Returns the number of the last sweep.
    #[inline]
    pub fn last(&self) -> u64 {
        self.last.load(Ordering::Acquire)
    }

    /// Adds a queue that begins to give requests.
    pub fn add(&self, queue: u16) {
        let last = self.last();
        let done = Done {
            emptied: last,
            published: last,
        };
        self.queues().insert(queue, done);
    }

    /// Removes a queue that gives no more requests.
    pub fn remove(&self, queue: u16) {
        self.queues().remove(&queue);
    }

    /// Notes that what was completed on a queue before sweep `number` is published.
    pub fn note_published(&self, queue: u16, number: u64) {
        if let Some(done) = self.queues().get_mut(&queue) {
            done.published = number;
        }
    }

    /// Notes that the ring of a queue was emptied after sweep `number` had begun.
    pub fn note_emptied(&self, queue: u16, number: u64) {
        if let Some(done) = self.queues().get_mut(&queue) {
            done.emptied = number;
        }
    }

    /// Returns whether all rings were emptied after sweep `number` had begun.
    pub fn has_emptied(&self, number: u64) -> bool {
        self.queues().values().all(|done| done.emptied >= number)
    }

    /// Returns whether all that was completed before sweep `number` is published.
    pub fn has_published(&self, number: u64) -> bool {
        self.queues().values().all(|done| done.published >= number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sweep_waits_for_all_queues_that_give_requests() {
        let sweep = Sweep::default();
        sweep.add(2);
        sweep.add(3);
        assert!(sweep.has_emptied(sweep.last()) && sweep.has_published(sweep.last()));
        let number = sweep.begin();
        sweep.note_published(2, number);
        sweep.note_published(3, number);
        assert!(sweep.has_published(number) && !sweep.has_emptied(number));
        sweep.note_emptied(2, number);
        assert!(!sweep.has_emptied(number));
        sweep.remove(3);
        sweep.note_emptied(3, number);
        assert!(sweep.has_emptied(number));
    }
}
