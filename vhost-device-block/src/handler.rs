// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Takes requests from a queue, has them carried out, and gives them back.

use std::io;
use std::sync::Arc;

use vhost_device_common::device::QueueHandler;
use vhost_device_common::worker::{Poller, Queue, Queues};

use crate::device::Disk;
use crate::engine::{Engine, execute};
use crate::lock::InUse;
use crate::request::{Answer, Next, Request};

/// Large reads that another thread does meanwhile. When they do not end, there is no processor free for them.
const MAX_SHARED: usize = 4;

/// Works on one queue.
pub struct BlockHandler {
    disk: Arc<Disk>,
    engine: Engine,
    /// The last large read was left to another thread.
    shared: bool,
    /// Ends after the engine has.
    _in_use: InUse,
}

impl BlockHandler {
    pub fn new(disk: Arc<Disk>, engine: Engine, in_use: InUse) -> Self {
        Self {
            disk,
            engine,
            shared: false,
            _in_use: in_use,
        }
    }

    /// Goes on with a request until it is done or the engine has it.
    fn step(&mut self, mut next: Next, queue: &mut Queue) {
        loop {
            match next {
                Next::Done(Answer {
                    chain,
                    used,
                    outcome,
                }) => return queue.complete_with(chain, used, outcome),
                Next::Operation(request) if self.disk.is_inline() => {
                    let outcome = execute(&self.disk.image.file, request.operation());
                    next = request.advance(outcome);
                }
                Next::Operation(request) => return self.engine.submit(request),
            }
        }
    }

    /// Whether to leave a large read, when there is more to do, to another thread. To copy it takes far longer than to hand it over.
    /// Writes to one file do not go on beside each other.
    fn shares(&mut self, queue: &mut Queue) -> bool {
        self.shared = !self.shared && self.engine.under_way() < MAX_SHARED && queue.has_available();
        self.shared
    }
}

impl QueueHandler for BlockHandler {
    fn process(&mut self, queue: &mut Queue) {
        while self.engine.has_room()
            && let Some(chain) = queue.take()
        {
            match Request::parse(queue.index(), chain, &self.disk) {
                Next::Operation(request) if request.is_large() && self.disk.is_inline() => {
                    if request.is_read() && self.shares(queue) {
                        self.engine.submit(request);
                        self.engine.begin();
                    } else {
                        self.step(Next::Operation(request), queue);
                        // The driver can go on with this one while the next is copied.
                        return;
                    }
                }
                next => self.step(next, queue),
            }
        }
    }

    fn watch(&mut self, poller: &mut dyn Poller) -> io::Result<()> {
        self.engine.watch(poller)
    }

    fn poller(&mut self) -> Option<&mut dyn Poller> {
        self.engine.poller()
    }

    fn ready(&mut self, _token: u32, queues: &mut Queues) {
        while let Some((request, outcome)) = self.engine.finished() {
            let Some(queue) = queues.get_mut(request.queue) else {
                continue;
            };
            let next = request.advance(outcome);
            self.step(next, queue);
        }
    }
}
