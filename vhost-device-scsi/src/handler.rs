// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Takes requests from the queues of a thread, has them carried out, and gives them back.

mod waiting;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use vhost_device_common::device::{QueueHandler, Watcher};
use vhost_device_common::statistics::Outcome;
use vhost_device_common::warn_limited;
use vhost_device_common::worker::{Poller, Pool, PoolLimits, Queue, Queues, Readiness};
use vhost_device_storage::disk::DiskError;
use vhost_device_storage::engine::{Engine, Engines, Label};

use crate::address::Addressed;
use crate::config::{CONTROL, EVENTS, FIRST_REQUEST};
use crate::control::Functions;
use crate::lun::{Answer, LogicalUnit};
use crate::parked::Parked;
use crate::passing::Passing;
use crate::request::{
    Delivery, EVENT, Fault, Header, Reply, Request, Stage, changes, limited_bytes,
};
use crate::shared::Shared;
use crate::steps::{
    advance, check, command, execute, finish, reply_with, run_procedure, undelivered,
};
use crate::target::TargetView;
use crate::unit::Unit;
use crate::units::Units;

/// The operation code of the command that also uses other logical units than its own.
const EXTENDED_COPY: u8 = 0x83;

/// What the watcher reports: operations of the engine, which has the first token, procedures that have ended, a call of another thread, and
/// commands of devices of the host that have ended.
const PROCEDURES: u32 = 1;
const WAKE: u32 = 2;
const DEVICES: u32 = 3;

/// Bytes that may be moved in the queue's thread before it handles commands of the session. In new memory this takes some milliseconds.
const BUDGET: u64 = 1 << 20;
/// How often to try to get an image that another program has.
const INTERVAL: Duration = Duration::from_millis(5);
/// Procedures that run at a time, and that may wait for that.
const PROCEDURE_LIMITS: PoolLimits = PoolLimits {
    threads: 4,
    items: 256,
};

/// Works on the queues of one thread.
pub struct ScsiHandler {
    shared: Arc<Shared>,
    engine: Engine<Request>,
    procedures: Pool<Request, ()>,
    passing: Passing,
    parked: Parked,
    /// The control queue is one of the thread's.
    functions: Functions,
    /// The request queues of the thread that give requests, and the last sweep that each has taken part in.
    queues: Vec<(u16, u64)>,
    /// Wakes this thread.
    wake: Arc<OwnedFd>,
    /// Dropped after the engine.
    units: Units,
}

impl ScsiHandler {
    /// Creates the handler of a thread.
    ///
    /// # Errors
    /// The limit of open files is reached, or all rings are in use.
    pub fn new(shared: &Arc<Shared>, engines: &Engines, watcher: &Watcher) -> io::Result<Self> {
        let run = |request: &mut Request| {
            run_procedure(request);
            Ok(())
        };
        let mut units = Units::default();
        units.refresh(shared);
        Ok(Self {
            engine: Engine::new(engines, None, watcher)?,
            procedures: Pool::new("procedure", PROCEDURE_LIMITS, watcher, PROCEDURES, run)?,
            passing: Passing::new(shared, watcher, DEVICES)?,
            parked: Parked::default(),
            functions: Functions::default(),
            queues: Vec::new(),
            wake: shared.add_thread(watcher, WAKE)?,
            units,
            shared: Arc::clone(shared),
        })
    }

    /// Takes a request from a queue; if `parks`, without carrying it out. Returns the bytes that it moves in this thread, or `None` if
    /// there is none.
    fn take(&mut self, queue: &mut Queue, parks: bool) -> Option<u64> {
        let mut chain = queue.take()?;
        let sizes = self.shared.config.sizes();
        let other = LogicalUnit::COMMANDS.len().saturating_sub(1);
        let header = match Header::read(&mut chain, sizes) {
            Ok(header) => header,
            Err(Fault::NoResponse) => {
                let outcome = Outcome {
                    request: other,
                    failed: true,
                    ..Outcome::default()
                };
                queue.complete_with(chain, 0, outcome);
                return Some(0);
            }
            Err(Fault::Failed) => {
                let reply = Reply::new(chain, other, sizes.sense);
                reply_with(queue, reply, Delivery::Failure, &Answer::good());
                return Some(0);
            }
        };
        let kind = LogicalUnit::kind(header.cdb());
        let mut reply = Reply::new(chain, kind, sizes.sense);
        let addressed = Addressed::decode(header.lun);
        let unit = match addressed {
            Addressed::Unit(address) => self.units.get(address),
            _ => None,
        };
        let Some(unit) = unit.map(Arc::clone) else {
            if let Addressed::Unit(address) = addressed
                && let Some(device) = self.shared.device(address)
            {
                let device = Arc::clone(device);
                self.passing.pass(device, &header, reply, queue);
                return Some(0);
            }
            let (delivery, answer) = self.absent(addressed, header.cdb(), &reply);
            reply_with(queue, reply, delivery, &answer);
            return Some(0);
        };
        let (task, may_start) = unit.tasks.begin(header.tag);
        let stage = match !parks && may_start && self.opens(&unit, header.cdb(), queue) {
            true => check(&unit, header.cdb(), &mut reply),
            false => Stage::Check(header.cdb().into()),
        };
        let request = Request {
            queue: queue.index(),
            unit,
            task,
            stage,
            reply,
            is_abandoned: false,
        };
        if parks {
            self.parked.keep(request);
            return Some(0);
        }
        Some(self.proceed(request, queue))
    }

    /// Returns the answer to a command for a logical unit that does not exist.
    fn absent(&self, addressed: Addressed, cdb: &[u8], reply: &Reply) -> (Delivery, Answer) {
        match addressed.target() {
            Some(target) if self.units.has_target(target) || self.shared.has_devices(target) => {
                let (command, target) =
                    (command(cdb, reply), TargetView::new(&self.shared, target));
                let answer = match addressed {
                    Addressed::ReportLuns(_) => LogicalUnit::report_luns(&command, &target),
                    _ => LogicalUnit::absent(&command, &target),
                };
                (answer.response.into(), answer)
            }
            _ => (Delivery::BadTarget, Answer::good()),
        }
    }

    /// Opens the images that a command of a unit uses, if that has not happened in this thread yet. If another program has one, the worker
    /// calls again soon.
    #[inline]
    fn opens(&mut self, unit: &Arc<Unit>, cdb: &[u8], queue: &mut Queue) -> bool {
        match cdb.first() {
            Some(&EXTENDED_COPY) => {
                let units = self.shared.table.units();
                units.iter().all(|unit| self.opens_one(unit, queue))
            }
            _ => self.opens_one(unit, queue),
        }
    }

    #[inline]
    fn opens_one(&mut self, unit: &Arc<Unit>, queue: &mut Queue) -> bool {
        match self.units.open(unit) {
            Ok(false) => self.takes_reservations(unit, queue),
            Ok(true) => {
                // The program that had the image may have seen it grow.
                if unit.disk.measure(true) {
                    self.shared.update_size(unit);
                }
                self.takes_reservations(unit, queue)
            }
            Err(error) => {
                if error.kind() != io::ErrorKind::WouldBlock {
                    warn_limited(format_args!("{} waits: {error}", unit.address));
                }
                queue.retry_after(INTERVAL);
                false
            }
        }
    }

    #[inline]
    fn takes_reservations(&self, unit: &Unit, queue: &mut Queue) -> bool {
        let takes = unit.take_reservations();
        if !takes {
            queue.retry_after(INTERVAL);
        }
        takes
    }

    /// Goes on with a request until it is answered, in progress elsewhere, or parked. Returns the bytes that were moved in this thread.
    fn proceed(&mut self, mut request: Request, queue: &mut Queue) -> u64 {
        let mut moved = 0;
        loop {
            if queue.is_suspending() && !matches!(request.stage, Stage::Answered(_) | Stage::None) {
                self.suspend_one(request, queue);
                return moved;
            }
            request.stage = match request.take_stage() {
                Stage::Check(cdb) => {
                    let unit = Arc::clone(&request.unit);
                    if !unit.tasks.is_resetting() && self.opens(&unit, &cdb, queue) {
                        check(&unit, &cdb, &mut request.reply)
                    } else if queue.is_stopping() && !unit.tasks.is_resetting() {
                        // Another program has the image. The request is carried out when the queue starts again.
                        let ended = unit.tasks.end(request.task);
                        if ended.mark.is_none() {
                            queue.suspend(request.reply.chain);
                            return moved;
                        }
                        Stage::Answered(Answer::good())
                    } else {
                        self.parked.add(request, Stage::Check(cdb));
                        return moved;
                    }
                }
                Stage::Limited(action) => match self.limit(&request, limited_bytes(&action), queue)
                {
                    true => Stage::Ready(action),
                    false => {
                        self.parked.add(request, Stage::Limited(action));
                        return moved;
                    }
                },
                Stage::Ready(action) => {
                    if changes(&action) && !request.unit.tasks.enter(request.task) {
                        self.parked.add(request, Stage::Ready(action));
                        return moved;
                    }
                    match request.work(&action) {
                        Ok(Some(work)) => Stage::Working(action, work),
                        Ok(None) => finish(&request, &action, Ok(()), 0),
                        Err(DiskError::Chain(_)) => Stage::Answered(undelivered()),
                        Err(error) => finish(&request, &action, Err(io::Error::other(error)), 0),
                    }
                }
                Stage::Working(action, work) => {
                    let bytes = work.remaining();
                    let is_inline = request.unit.disk.is_inline() && bytes <= BUDGET;
                    request.stage = Stage::Working(action, work);
                    let here = match is_inline {
                        true => Some(request),
                        false => self.engine.submit(request),
                    };
                    match here {
                        None => return moved,
                        Some(inline) if is_inline => {
                            request = inline;
                            let outcome = execute(&request);
                            moved += bytes;
                            advance(&mut request, outcome)
                        }
                        Some(mut refused) => {
                            let stage = refused.take_stage();
                            self.parked.add(refused, stage);
                            return moved;
                        }
                    }
                }
                Stage::LimitedProcedure(procedure) => {
                    let bytes = Some(procedure.bytes()).filter(|bytes| *bytes > 0);
                    if !self.limit(&request, bytes, queue) {
                        self.parked.add(request, Stage::LimitedProcedure(procedure));
                        return moved;
                    }
                    Stage::Excluding(procedure)
                }
                Stage::Excluding(procedure) => {
                    let tasks = &request.unit.tasks;
                    let may_run = match procedure.exclusive() {
                        Some(_) => tasks.exclude(request.task),
                        None => !procedure.changes() || tasks.enter(request.task),
                    };
                    if !may_run {
                        self.parked.add(request, Stage::Excluding(procedure));
                        return moved;
                    }
                    Stage::Procedure(procedure)
                }
                Stage::Procedure(procedure) => {
                    request.stage = Stage::Procedure(procedure);
                    if queue.is_stopping() {
                        self.put_off(request, queue);
                        return moved;
                    }
                    if let Err(mut refused) = self.procedures.submit(request) {
                        let stage = refused.take_stage();
                        self.parked.add(refused, stage);
                    }
                    return moved;
                }
                Stage::Answered(answer) => {
                    self.answer(request, &answer, queue);
                    return moved;
                }
                // A procedure has crashed.
                Stage::None => Stage::Answered(undelivered()),
            };
        }
    }

    /// Returns whether the limits of a disk allow a request that moves so many bytes, `None` for one without limits. Otherwise has the
    /// worker call again when they may.
    fn limit(&self, request: &Request, bytes: Option<u64>, queue: &mut Queue) -> bool {
        let Some(throttle) = &request.unit.throttle else {
            return true;
        };
        let Some(bytes) = bytes.filter(|_| !queue.is_stopping()) else {
            return true;
        };
        if self.parked.has_limited(queue.index(), &request.unit) {
            return false;
        }
        match throttle.start(queue.index(), bytes) {
            Ok(()) => true,
            Err(wait) => {
                queue.retry_after(wait);
                false
            }
        }
    }

    /// Tells the limits of all disks for which a queue has no requests that wait.
    fn leave(&self, queue: u16) {
        for unit in self.units.limited() {
            if let Some(throttle) = &unit.throttle
                && !self.parked.has_limited(queue, unit)
            {
                throttle.leave(queue);
            }
        }
    }

    /// Answers a request; a marked one as aborted.
    fn answer(&mut self, request: Request, answer: &Answer, queue: &mut Queue) {
        self.end(request, answer.response.into(), answer, queue);
    }

    fn end(&self, request: Request, delivery: Delivery, answer: &Answer, queue: &mut Queue) {
        let Request {
            unit, task, reply, ..
        } = request;
        let ended = unit.tasks.end(task);
        match ended.mark {
            None => reply_with(queue, reply, delivery, answer),
            Some(mark) => {
                reply_with(queue, reply, mark.into(), &Answer::good());
                // The function is answered after this.
                queue.publish();
                unit.tasks.forget(task);
            }
        }
        // The image of a removed disk is closed after its last request.
        if ended.mark.is_some() || ended.frees_others || self.units.has_removed() {
            self.shared.wake();
        }
    }

    /// Releases the images when all operations of suspended requests have ended, and flushes them first.
    fn finish(&mut self) {
        let Self { units, engine, .. } = self;
        units.finish(|unit| {
            let Some(flush) = engine.submit(Request::flush(unit)) else {
                return false;
            };
            if let Err(error) = execute(&flush) {
                warn_limited(format_args!("{}: flush failed: {error}", unit.address));
            }
            unit.tasks.drop(flush.task);
            true
        });
    }

    /// Works on a request queue.
    fn process_requests(&mut self, queue: &mut Queue) {
        let index = queue.index();
        let sweep = self.shared.sweep.last();
        let mut entries = self.queues.iter_mut();
        let swept = entries.find(|(number, _)| *number == index);
        let sweeps = match swept {
            Some((_, last)) => std::mem::replace(last, sweep) != sweep,
            None => false,
        };
        if sweeps {
            self.shared.sweep.note_published(index, sweep);
        }
        self.units.refresh(&self.shared);
        let mut budget = BUDGET;
        // During a sweep nothing is carried out, so that it takes no longer than the ring is read.
        if !sweeps && !self.parked.is_empty() {
            budget = self.resume_queue(queue, budget);
        }
        let mut took = false;
        while budget > 0
            && (sweeps || self.engine.has_room())
            && let Some(moved) = self.take(queue, sweeps)
        {
            budget = budget.saturating_sub(moved);
            took = true;
        }
        self.leave(index);
        if sweeps {
            match took {
                // There may be more: take part again.
                true => self.forget_sweep(index),
                false => self.shared.sweep.note_emptied(index, sweep),
            }
            self.shared.wake();
        }
    }

    fn forget_sweep(&mut self, index: u16) {
        let mut entries = self.queues.iter_mut();
        if let Some((_, last)) = entries.find(|(number, _)| *number == index) {
            *last = 0;
        }
    }

    /// Gives events to the driver.
    fn process_events(&mut self, queue: &mut Queue) {
        self.shared.events().deliver(queue, |queue, chain, used| {
            let outcome = Outcome {
                request: EVENT,
                bytes: used.into(),
                failed: used == 0,
            };
            queue.complete_with(chain, used, outcome);
        });
    }

    /// Does what another thread has woken this one for.
    fn wake(&mut self, queues: &mut Queues) {
        self.units.refresh(&self.shared);
        self.units.prune();
        self.passing.resume(queues);
        self.resume(queues);
        if let Some(queue) = queues.get_mut(CONTROL)
            && !self.functions.is_empty()
        {
            self.functions.advance(queue, &self.shared);
        }
        if let Some(queue) = queues.get_mut(EVENTS)
            && self.shared.events().is_due()
        {
            queue.retry_after(Duration::ZERO);
        }
        let sweep = self.shared.sweep.last();
        let mut is_left_out = false;
        for (index, last) in &mut self.queues {
            if *last == sweep {
                continue;
            }
            match queues.get_mut(*index) {
                Some(queue) if queue.is_usable() => queue.retry_after(Duration::ZERO),
                // It gives no requests.
                _ => {
                    *last = sweep;
                    self.shared.sweep.note_published(*index, sweep);
                    self.shared.sweep.note_emptied(*index, sweep);
                    is_left_out = true;
                }
            }
        }
        if is_left_out {
            self.shared.wake();
        }
    }
}

impl QueueHandler for ScsiHandler {
    fn process(&mut self, queue: &mut Queue) {
        match queue.index() {
            CONTROL => self.functions.process(queue, &self.shared),
            EVENTS => self.process_events(queue),
            _ => self.process_requests(queue),
        }
    }

    fn poller(&mut self) -> Option<&mut dyn Poller> {
        self.engine.poller()
    }

    fn ready(&mut self, token: u32, _readiness: Readiness, queues: &mut Queues) {
        match token {
            WAKE => return self.wake(queues),
            DEVICES => return self.passing.finish(queues),
            PROCEDURES => {
                while let Some((mut request, outcome)) = self.procedures.finished() {
                    if let Err(error) = outcome {
                        warn_limited(format_args!("a command failed: {error}"));
                        request.stage = Stage::None;
                    }
                    self.continue_one(request, queues);
                }
            }
            _ => {
                let mut budget = BUDGET;
                while budget > 0 {
                    let Some((mut request, outcome)) = self.engine.finished() else {
                        break;
                    };
                    if request.is_abandoned {
                        self.end_abandoned(&request, outcome);
                        continue;
                    }
                    request.stage = advance(&mut request, outcome);
                    let moved = self.continue_one(request, queues);
                    budget = budget.saturating_sub(moved);
                }
                if budget == 0 {
                    self.engine.report_again();
                } else if queues.is_empty() {
                    self.finish();
                }
            }
        }
        // There is room again.
        if !self.parked.is_empty() {
            self.resume(queues);
        }
    }

    fn set_enabled(&mut self, queue: &mut Queue, enabled: bool) {
        let index = queue.index();
        if index < FIRST_REQUEST {
            return;
        }
        self.remove_queue(index);
        if enabled {
            self.shared.sweep.add(index);
            self.queues.push((index, self.shared.sweep.last()));
        }
    }

    fn drain(&mut self, queue: &mut Queue) {
        match queue.index() {
            CONTROL => self.functions.advance(queue, &self.shared),
            EVENTS => {}
            index => {
                self.remove_queue(index);
                // A procedure may take long, so those that have not begun are not waited for.
                for request in self.procedures.withdraw(|request| request.queue == index) {
                    self.put_off(request, queue);
                }
                self.passing.drain(queue);
                self.resume_queue(queue, BUDGET);
                self.leave(index);
            }
        }
    }

    fn suspend(&mut self, queue: &mut Queue) {
        // Requests that wait are suspended.
        self.drain(queue);
        let index = queue.index();
        if index < FIRST_REQUEST {
            return;
        }
        // Without locks, an operation could overwrite what another program writes next.
        let is_locked = self.units.are_exclusive();
        let is_one = |label: Label| label.queue == index && (is_locked || !label.is_change);
        let operations = self.engine.suspend(is_one, |chain| queue.suspend(chain));
        self.units.suspended(operations);
        self.shared.wake();
    }

    fn suspended(&mut self) {
        self.finish();
    }

    fn is_idle(&self) -> bool {
        self.units.are_idle()
    }
}

impl ScsiHandler {
    /// Goes on with a request that was in progress elsewhere.
    fn continue_one(&mut self, request: Request, queues: &mut Queues) -> u64 {
        match queues.get_mut(request.queue) {
            Some(queue) if matches!(request.stage, Stage::Working(..)) => {
                let bytes = match &request.stage {
                    Stage::Working(_, work) => work.remaining(),
                    _ => 0,
                };
                self.resume_one(request, queue);
                bytes.min(BUDGET)
            }
            Some(queue) => self.proceed(request, queue),
            // A queue does not stop before its requests have ended.
            None => 0,
        }
    }

    /// Notes that a queue gives no more requests.
    fn remove_queue(&mut self, index: u16) {
        self.shared.sweep.remove(index);
        self.queues.retain(|(number, _)| *number != index);
        // A function may have waited for it.
        self.shared.wake();
    }
}
