// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The commands of a queue thread that devices of the host carry out, in threads that may block.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use vhost_device_common::device::Watcher;
use vhost_device_common::warn_limited;
use vhost_device_common::worker::{Pool, PoolLimits, Queue, Queues};

use crate::passthrough::{Ended, PassRequest, PassThrough};
use crate::request::{Delivery, Header, Reply};
use crate::shared::Shared;

/// Commands that are carried out at a time, and that may wait for that.
const LIMITS: PoolLimits = PoolLimits {
    threads: 16,
    items: 4096,
};

/// Has devices of the host carry out commands.
pub struct Passing {
    pool: Pool<PassRequest, ()>,
    /// Commands that wait for a reset to end. There are no more than the rings have.
    waiting: VecDeque<PassRequest>,
    shared: Arc<Shared>,
}

impl Passing {
    /// Creates the threads when they are needed. When commands have ended, `watcher` reports `token`.
    ///
    /// # Errors
    /// The limit of open files is reached.
    pub fn new(shared: &Arc<Shared>, watcher: &Watcher, token: u32) -> io::Result<Self> {
        let run = |request: &mut PassRequest| {
            request.run();
            Ok(())
        };
        Ok(Self {
            pool: Pool::new("device", LIMITS, watcher, token, run)?,
            waiting: VecDeque::new(),
            shared: Arc::clone(shared),
        })
    }

    /// Hands a command to a device.
    pub fn pass(
        &mut self,
        device: Arc<PassThrough>,
        header: &Header,
        reply: Reply,
        queue: &mut Queue,
    ) {
        let (task, may_start) = device.tasks.begin(header.tag);
        let request = PassRequest {
            queue: queue.index(),
            device,
            task,
            cdb: header.cdb().into(),
            reply,
            // So it stays if the device does not get it.
            ended: Ended::undelivered(Delivery::Busy),
        };
        match may_start {
            true => self.submit(request, queue),
            false => self.waiting.push_back(request),
        }
    }

    fn submit(&mut self, request: PassRequest, queue: &mut Queue) {
        if let Err(request) = self.pool.submit(request) {
            self.answer(request, queue);
        }
    }

    /// Goes on with the commands that waited for a reset.
    pub fn resume(&mut self, queues: &mut Queues) {
        for request in std::mem::take(&mut self.waiting) {
            let Some(queue) = queues.get_mut(request.queue) else {
                continue;
            };
            let tasks = &request.device.tasks;
            if tasks.mark(request.task).is_some() {
                self.answer(request, queue);
            } else if tasks.is_resetting() {
                self.waiting.push_back(request);
            } else {
                self.submit(request, queue);
            }
        }
    }

    /// Ends the commands of a queue that stops, as far as the devices do not have them: a device may take minutes for each. They are
    /// suspended if they can be, otherwise the driver sends them again.
    pub fn drain(&mut self, queue: &mut Queue) {
        let index = queue.index();
        let is_one = |request: &PassRequest| request.queue == index;
        let waiting = std::mem::take(&mut self.waiting).into_iter();
        let (ours, others): (Vec<_>, Vec<_>) = waiting.partition(is_one);
        self.waiting = others.into();
        for request in self.pool.withdraw(is_one).into_iter().chain(ours) {
            let tasks = &request.device.tasks;
            if queue.is_suspending() && tasks.mark(request.task).is_none() {
                tasks.drop(request.task);
                queue.suspend(request.reply.chain);
                self.shared.wake();
            } else {
                self.answer(request, queue);
            }
        }
    }

    /// Answers the commands that have ended.
    pub fn finish(&mut self, queues: &mut Queues) {
        while let Some((mut request, outcome)) = self.pool.finished() {
            if let Err(error) = outcome {
                warn_limited(format_args!("a command failed: {error}"));
                request.ended = Ended::undelivered(Delivery::Failure);
            }
            if let Some(queue) = queues.get_mut(request.queue) {
                self.answer(request, queue);
            }
        }
    }

    fn answer(&self, request: PassRequest, queue: &mut Queue) {
        let PassRequest {
            device,
            task,
            reply,
            ended,
            ..
        } = request;
        let mark = device.tasks.end(task).mark;
        let delivery = mark.map_or(ended.delivery, Delivery::from);
        let (chain, used, outcome) = reply.write_response(delivery, ended.status, &ended.sense);
        queue.complete_with(chain, used, outcome);
        if mark.is_some() {
            // The function is answered after this.
            queue.publish();
            device.tasks.forget(task);
            self.shared.wake();
        }
    }
}
