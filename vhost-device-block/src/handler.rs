// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Takes requests from a queue, has them carried out, and gives them back.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use vhost_device_common::device::QueueHandler;
use vhost_device_common::warn_limited;
use vhost_device_common::worker::{Poller, Queue, Queues, Readiness};
use vhost_device_storage::access::Access;
use vhost_device_storage::engine::{Engine, IoRequest, Label};
use vhost_device_storage::throttle::Throttle;

use crate::request::{Header, Next, Request, Status};
use crate::shared::Shared;

/// Large reads that another thread does meanwhile. When they do not end, there is no processor free for them.
const MAX_LEFT: usize = 4;
/// Bytes that may be moved in the queue's thread before it handles commands of the session. In new memory this takes some milliseconds.
const BUDGET: u64 = 1 << 20;

/// How often a queue thread without access tries again.
const INTERVAL: Duration = Duration::from_millis(5);

/// Works on the queues of one thread.
pub struct BlockHandler {
    shared: Arc<Shared>,
    engine: Engine<Request>,
    /// Whether the last large read was left to another thread.
    left_read: bool,
    throttle: Option<Arc<Throttle>>,
    /// Dropped after the engine.
    access: Access,
}

impl BlockHandler {
    /// Creates the handler of a thread.
    pub fn new(
        shared: Arc<Shared>,
        engine: Engine<Request>,
        throttle: Option<Arc<Throttle>>,
        access: Access,
    ) -> Self {
        Self {
            shared,
            engine,
            left_read: false,
            throttle,
            access,
        }
    }

    /// Returns whether to carry a request out at once: what moves more than the budget would take too long.
    fn is_inline(&self, request: &Request) -> bool {
        self.shared.disk.is_inline() && request.remaining() <= BUDGET
    }

    /// Goes on with a request until it is done or the engine has it.
    fn step(&mut self, mut next: Next, queue: &mut Queue) {
        loop {
            match next {
                Next::Done(answer) => {
                    return queue.complete_with(answer.chain, answer.used, answer.outcome);
                }
                Next::Operation(request) if queue.is_suspending() => {
                    let chain = request.into_chain();
                    return chain.into_iter().for_each(|chain| queue.suspend(chain));
                }
                Next::Operation(request) => {
                    let here = match self.is_inline(&request) {
                        true => Some(request),
                        false => self.engine.submit(request),
                    };
                    let Some(request) = here else { return };
                    let outcome = self.shared.disk.execute(request.operation());
                    next = request.advance(outcome, &self.shared);
                }
            }
        }
    }

    /// Returns whether to leave a large read to another thread, because there is more to do. Copying the data takes far longer than passing
    /// on the request. Writes are not left to other threads: the kernel carries out those to one file one after the other.
    fn leaves_read(&mut self, queue: &mut Queue) -> bool {
        self.left_read =
            !self.left_read && self.engine.under_way() < MAX_LEFT && queue.has_available();
        self.left_read
    }

    /// Takes a request that the engine has room for, and that the limits allow. The rest stays in the queue: it can stop at any time.
    fn take(&self, queue: &mut Queue) -> Option<Next> {
        if !self.engine.has_room() {
            self.leave(queue);
            return None;
        }
        let index = queue.index();
        // What another process had taken, and is to be carried out before the queue stops, does not wait.
        let throttle = self.throttle.as_ref().filter(|_| !queue.is_stopping());
        let mut header = Err(Status::IoError);
        let mut start = Ok(());
        let taken = queue.take_if(|chain| {
            // The driver may change it afterwards, so it is read once.
            header = Header::read(chain);
            if let Some(throttle) = throttle {
                let bytes = header.ok().and_then(|read| read.bytes(chain, &self.shared));
                start = bytes.map_or(Ok(()), |bytes| throttle.start(index, bytes));
            }
            start.is_ok()
        });
        match (taken, start) {
            (Some(chain), _) => return Some(Request::parse(header, index, chain, &self.shared)),
            (None, Ok(())) => self.leave(queue),
            (None, Err(wait)) => queue.retry_after(wait),
        }
        None
    }

    /// Opens the access if that is possible; otherwise has the worker call again soon.
    #[cold]
    fn open(&mut self, queue: &mut Queue) {
        if let Err(error) = self.shared.open(&mut self.access) {
            if error.kind() != io::ErrorKind::WouldBlock {
                warn_limited(format_args!("queue {} waits: {error}", queue.index()));
            }
            queue.retry_after(INTERVAL);
        }
    }

    /// Ends what is left of a suspended request. The request is carried out again, so only the log gets an error.
    fn end_abandoned(&mut self, request: &Request, outcome: io::Result<u64>) {
        self.access.ended();
        if let Err(error) = outcome {
            warn_limited(format_args!("{request} failed: {error}"));
        }
    }

    /// Releases the image when all operations of suspended requests have ended, and flushes it first.
    fn finish(&mut self) {
        while self.access.finish()
            && let Some(flush) = self.engine.submit(Request::flush())
        {
            let outcome = self.shared.disk.execute(flush.operation());
            self.end_abandoned(&flush, outcome);
        }
    }

    /// The queue has nothing more to do for now that counts.
    fn leave(&self, queue: &Queue) {
        if let Some(throttle) = &self.throttle {
            throttle.leave(queue.index());
        }
    }
}

impl QueueHandler for BlockHandler {
    fn process(&mut self, queue: &mut Queue) {
        if !self.access.is_open() {
            self.open(queue);
            if !self.access.is_open() {
                return;
            }
        }
        let mut budget = BUDGET;
        while budget > 0
            && let Some(next) = self.take(queue)
        {
            budget = budget.saturating_sub(next.bytes());
            match next {
                Next::Operation(request) if request.is_large_read() && self.is_inline(&request) => {
                    let here = match self.leaves_read(queue) {
                        true => self.engine.submit(request),
                        false => Some(request),
                    };
                    if let Some(request) = here {
                        self.step(Next::Operation(request), queue);
                        // What was left to the other thread may have ended too.
                        return;
                    }
                    self.engine.begin();
                }
                next => self.step(next, queue),
            }
        }
    }

    fn poller(&mut self) -> Option<&mut dyn Poller> {
        self.engine.poller()
    }

    fn ready(&mut self, _token: u32, _readiness: Readiness, queues: &mut Queues) {
        let mut budget = BUDGET;
        while budget > 0 {
            let Some((request, outcome)) = self.engine.finished() else {
                if queues.is_empty() {
                    self.finish();
                }
                return;
            };
            if request.is_abandoned() {
                self.end_abandoned(&request, outcome);
                continue;
            }
            let Some(queue) = queues.get_mut(request.queue) else {
                continue;
            };
            let next = request.advance(outcome, &self.shared);
            budget = budget.saturating_sub(next.bytes());
            self.step(next, queue);
        }
        self.engine.report_again();
    }

    fn drain(&mut self, queue: &mut Queue) {
        self.leave(queue);
    }

    fn suspend(&mut self, queue: &mut Queue) {
        self.leave(queue);
        let index = queue.index();
        // Without locks, an operation could overwrite what another program writes next.
        let is_locked = self.access.is_exclusive();
        let is_one = |label: Label| label.queue == index && (is_locked || !label.is_change);
        let operations = self.engine.suspend(is_one, |chain| queue.suspend(chain));
        self.access.suspended(operations);
    }

    fn suspended(&mut self) {
        self.finish();
    }

    fn is_idle(&self) -> bool {
        self.access.is_idle()
    }
}
