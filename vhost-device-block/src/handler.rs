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

/// Works on one queue.
pub struct BlockHandler {
    disk: Arc<Disk>,
    engine: Engine,
    /// Ends after the engine has.
    _in_use: InUse,
}

impl BlockHandler {
    pub fn new(disk: Arc<Disk>, engine: Engine, in_use: InUse) -> Self {
        Self {
            disk,
            engine,
            _in_use: in_use,
        }
    }

    /// Goes on with a request until it is done or the engine has it.
    fn step(&mut self, mut next: Next, queue: &mut Queue) {
        loop {
            match next {
                Next::Done(Answer { chain, used }) => return queue.complete(chain, used),
                Next::Operation(request) if self.disk.is_inline() => {
                    let outcome = execute(&self.disk.image.file, request.operation());
                    next = request.advance(outcome);
                }
                Next::Operation(request) => return self.engine.submit(request),
            }
        }
    }
}

impl QueueHandler for BlockHandler {
    fn process(&mut self, queue: &mut Queue) {
        while self.engine.has_room()
            && let Some(chain) = queue.take()
        {
            let next = Request::parse(queue.index(), chain, &self.disk);
            self.step(next, queue);
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
