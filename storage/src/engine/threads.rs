// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The engine for hosts without io_uring: a pool of threads that make blocking system calls.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use vhost_device_common::chain::Chain;
use vhost_device_common::worker::{Pool, PoolLimits, Watcher};

use super::request::{IoRequest, Label};
use super::slots::{DEPTH, Finished};
use super::slow;
use crate::disk::Disk;

/// The limits for one queue.
const LIMITS: PoolLimits = PoolLimits {
    threads: 16,
    items: DEPTH,
};

/// A request in the pool, and the number of its chain, if the chain stays here.
type Item<R> = (Option<u64>, R);

/// Carries out operations in a pool.
pub struct ThreadsEngine<R> {
    pool: Pool<Item<R>, u64>,
    /// Chains that the operations of their requests do not use, so that the requests can be suspended.
    chains: HashMap<u64, (Label, Chain)>,
    /// The number of the last chain that stayed here.
    last: u64,
}

impl<R: IoRequest> ThreadsEngine<R> {
    pub fn new(disk: Option<&Disk>, watcher: &Watcher) -> io::Result<Self> {
        let own = disk.map(|disk| Arc::clone(&disk.image));
        let run = move |(_, request): &mut Item<R>| {
            if let Some(delay) = slow::delay() {
                std::thread::sleep(delay);
            }
            // Records a failed sync at once: the kernel does not report it to the other threads.
            match (request.disk(), &own) {
                (Some(disk), _) => disk.image.execute(request.operation()),
                (None, Some(image)) => image.execute(request.operation()),
                (None, None) => Err(io::ErrorKind::NotFound.into()),
            }
        };
        Ok(Self {
            pool: Pool::new("io", LIMITS, watcher, 0, run)?,
            chains: HashMap::new(),
            last: 0,
        })
    }

    pub fn has_room(&self) -> bool {
        self.pool.has_room()
    }

    pub fn under_way(&self) -> usize {
        self.pool.len()
    }

    /// Has the watcher report operations that have ended again.
    pub fn report_again(&self) {
        self.pool.report_again();
    }

    /// Returns the request if there is no room.
    pub fn submit(&mut self, mut request: R) -> Option<R> {
        if !self.has_room() {
            return Some(request);
        }
        let label = request.label();
        let number = request.abandon().map(|chain| {
            self.last += 1;
            self.chains.insert(self.last, (label, chain));
            self.last
        });
        self.pool
            .submit((number, request))
            .err()
            .map(|(_, request)| request)
    }

    /// As [`super::Engine::suspend`].
    pub fn suspend(
        &mut self,
        is_one: impl Fn(Label) -> bool,
        mut give: impl FnMut(Chain),
    ) -> usize {
        let chains = &mut self.chains;
        // What is left of a request that was suspended before must still be carried out.
        let is_held = |number: &Option<u64>, label: Label| match number {
            Some(number) => chains.contains_key(number),
            None => !label.is_abandoned,
        };
        let withdrawn = self.pool.withdraw(|(number, request)| {
            let label = request.label();
            is_held(number, label) && is_one(label)
        });
        for (number, request) in withdrawn {
            let kept = number.and_then(|number| chains.remove(&number));
            let chain = kept.map(|(_, chain)| chain);
            chain
                .or_else(|| request.into_chain())
                .into_iter()
                .for_each(&mut give);
        }
        let continued = chains.extract_if(|_, (label, _)| is_one(*label));
        continued.map(|(_, (_, chain))| give(chain)).count()
    }

    pub fn finished(&mut self) -> Option<Finished<R>> {
        let ((number, mut request), outcome) = self.pool.finished()?;
        if let Some((_, chain)) = number.and_then(|number| self.chains.remove(&number)) {
            request.restore(chain);
        }
        Some((request, outcome))
    }
}
