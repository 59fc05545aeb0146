// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The entropy device: one queue of buffers to fill, no features, no config space.

use std::io::{self, ErrorKind};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vhost_device_common::device::{Device, QueueHandler, StartError, StateError, Watcher};
use vhost_device_common::worker::{Queue, Queues, Readiness};
use vhost_device_common::{lock, state};

use crate::options::Options;
use crate::quota::{Quota, Spent};
use crate::source::Source;

/// Token of the source's file in the poller.
const SOURCE: u32 = 0;

/// The device, which is also its queue handler. The supply lasts as long as the process, so a guest that resets the
/// queue gets neither the same bytes again nor a new quota.
#[derive(Clone)]
pub struct Rng(Arc<Mutex<Supply>>);

struct Supply {
    source: Source,
    quota: Quota,
}

impl Supply {
    /// Returns how many bytes are available (at least one), or how long to wait for them.
    fn available(&mut self) -> Result<u64, Duration> {
        let now = Instant::now();
        let remaining = self.quota.remaining(now)?;
        self.source.fill_buffer(now)?;
        Ok(remaining)
    }
}

impl Device for Rng {
    const TYPE: &'static str = "rng";
    const PROGRAM: &'static str = env!("CARGO_PKG_NAME");
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const DESCRIPTION: &'static str = "vhost-user back-end for a virtio entropy device";
    const IN_ORDER: bool = true;
    const STATE_VERSION: u32 = 1;

    type Options = Options;
    type Handler = Self;

    fn open(options: Options) -> Result<Self, StartError> {
        Ok(Self(Arc::new(Mutex::new(Supply {
            source: Source::open(options.rng_source.as_deref())?,
            quota: Quota::new(options.max_bytes, options.period),
        }))))
    }

    fn handler(&self, _thread: u16, watcher: Watcher) -> io::Result<Self> {
        let supply = lock(&self.0);
        match supply
            .source
            .file()
            .map(|file| watcher.add(file, Readiness::READABLE, SOURCE))
        {
            // epoll refuses files that never block.
            Some(Err(error)) if error.kind() != ErrorKind::PermissionDenied => Err(error),
            _ => Ok(self.clone()),
        }
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        state::encode(&lock(&self.0).quota.spent(Instant::now()))
    }

    /// Counts the bytes that another process spent in this period. An invalid state cannot increase the quota.
    fn load(&self, _version: u32, state: &[u8]) -> Result<(), StateError> {
        let spent: Spent = state::decode(state)?;
        lock(&self.0).quota.restore(spent, Instant::now());
        Ok(())
    }
}

impl QueueHandler for Rng {
    /// Leaves requests in the ring until there is a byte for them: VIRTIO 1.3, 5.4.6.2 forbids completing one without
    /// data, and Linux would not send another one.
    fn process(&mut self, queue: &mut Queue) {
        let supply = &mut *lock(&self.0);
        while queue.has_available() {
            let limit = match supply.available() {
                Ok(limit) => limit,
                Err(wait) => return queue.retry_after(wait),
            };
            let Some(mut chain) = queue.take() else {
                return;
            };
            let written = supply.source.fill(&mut chain, limit);
            supply.quota.spend(written);
            queue.complete(chain, written);
        }
    }

    fn ready(&mut self, _token: u32, _readiness: Readiness, _queues: &mut Queues) {
        lock(&self.0).source.retry_now();
    }
}
