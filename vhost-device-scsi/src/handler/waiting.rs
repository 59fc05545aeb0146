// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Requests that go on after they have waited, and those that are suspended or put off because their queue stops.

use std::io;

use vhost_device_common::warn_limited;
use vhost_device_common::worker::{Queue, Queues};

use super::{BUDGET, ScsiHandler};
use crate::lun::Answer;
use crate::request::{Delivery, Request};
use crate::shared::wake_one;

impl ScsiHandler {
    /// Goes on with all parked requests.
    pub(super) fn resume(&mut self, queues: &mut Queues) {
        let mut budget = BUDGET;
        for request in self.parked.take() {
            let queue = queues.get_mut(request.queue);
            budget = self.resume_within(budget, request, queue);
        }
    }

    /// Goes on with the parked requests of one queue. Returns what is left of `budget`.
    pub(super) fn resume_queue(&mut self, queue: &mut Queue, mut budget: u64) -> u64 {
        for request in self.parked.take() {
            let is_ours = request.queue == queue.index();
            budget = self.resume_within(budget, request, is_ours.then_some(&mut *queue));
        }
        budget
    }

    /// Goes on with a parked request, unless it has no queue now, or `budget` is used up: then the thread soon goes on. Returns what is
    /// left of the bytes that may be moved in this thread.
    fn resume_within(&mut self, budget: u64, request: Request, queue: Option<&mut Queue>) -> u64 {
        match queue {
            Some(queue) if budget > 0 => {
                return budget.saturating_sub(self.resume_one(request, queue));
            }
            Some(_) => wake_one(&self.wake),
            None => {}
        }
        self.parked.keep(request);
        budget
    }

    /// Returns the bytes that were moved in this thread.
    pub(super) fn resume_one(&mut self, request: Request, queue: &mut Queue) -> u64 {
        match request.unit.tasks.mark(request.task) {
            None => self.proceed(request, queue),
            Some(_) => {
                self.answer(request, &Answer::good(), queue);
                0
            }
        }
    }

    /// Suspends a request without an operation in flight; answers a marked one.
    pub(super) fn suspend_one(&mut self, request: Request, queue: &mut Queue) {
        let Request { unit, task, .. } = &request;
        match unit.tasks.mark(*task) {
            Some(_) => self.answer(request, &Answer::good(), queue),
            None => {
                unit.tasks.drop(*task);
                queue.suspend(request.reply.chain);
                self.shared.wake();
            }
        }
    }

    /// Ends a request that has not begun, because its queue stops. It is suspended if it can be, otherwise the driver sends it again.
    pub(super) fn put_off(&mut self, request: Request, queue: &mut Queue) {
        match queue.is_suspending() {
            true => self.suspend_one(request, queue),
            false => self.end(request, Delivery::Busy, &Answer::good(), queue),
        }
    }

    /// Ends what is left of a suspended request. The request is carried out again, so only the log gets an error.
    pub(super) fn end_abandoned(&mut self, request: &Request, outcome: io::Result<u64>) {
        match request.is_own_flush() {
            true => self.units.flushed(&request.unit),
            false => self.units.ended(),
        }
        request.unit.tasks.drop(request.task);
        self.shared.wake();
        if let Err(error) = outcome {
            let address = request.unit.address;
            warn_limited(format_args!(
                "{address}: an operation of a suspended request failed: {error}"
            ));
        }
    }
}
