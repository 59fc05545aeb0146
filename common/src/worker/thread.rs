// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The thread of a worker: it waits, has requests taken and published, and does what the session asks.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use super::busy_poll::{BusyPoll, Polling};
use super::command::{Answer, Command, Request};
use super::error::WorkerError;
use super::handler::QueueHandler;
use super::poller::{EpollPoller, Poller, Token};
use super::queue::{Queue, Queues, Stopped};
use crate::log_limit::warn_limited;

/// Most looks for requests between two system calls.
const LOOKS: u32 = 16;
/// How long to do nothing when the kernel refuses to wait.
const REFUSED: Duration = Duration::from_millis(1);
/// How long the queues of a thread are served, one after the other, before the session is heard again.
const SLICE: Duration = Duration::from_millis(2);

/// What the thread waits with.
fn poller<'a, H: QueueHandler>(
    handler: &'a mut H,
    epoll: &'a mut Option<EpollPoller>,
) -> Option<&'a mut dyn Poller> {
    match epoll {
        Some(epoll) => Some(epoll),
        None => handler.poller(),
    }
}

/// A thread of a worker, with its handler and its queues.
pub struct Thread<H> {
    handler: H,
    epoll: Option<EpollPoller>,
    queues: Queues,
    /// Place among them of the one that is served first: the next after the one that took requests last.
    first: usize,
    inbox: Receiver<Request>,
    ready: Vec<Token>,
    busy_poll: BusyPoll,
    /// Watched for as long as the thread lives.
    _wake: Arc<OwnedFd>,
}

impl<H: QueueHandler> Thread<H> {
    /// Has what `handler` waits for watched, and `wake`, by which `inbox` is announced.
    ///
    /// # Errors
    /// There are too many open files, or one of them cannot be waited on.
    pub fn new(
        mut handler: H,
        inbox: Receiver<Request>,
        wake: Arc<OwnedFd>,
        polling: Polling,
    ) -> io::Result<Self> {
        let mut epoll = None;
        if handler.poller().is_none() {
            let epoll = epoll.insert(EpollPoller::new()?);
            handler.watch(epoll)?;
        }
        if let Some(poller) = poller(&mut handler, &mut epoll) {
            poller.watch(wake.as_fd(), Token::Control)?;
        }
        Ok(Self {
            handler,
            epoll,
            queues: Queues::default(),
            first: 0,
            inbox,
            ready: Vec::new(),
            busy_poll: BusyPoll::new(polling),
            _wake: wake,
        })
    }

    /// Works until the session has it quit.
    pub fn run(mut self) {
        loop {
            let sleeps = !self.look() && !self.spins() && self.rest();
            if self.wait((!sleeps).then_some(Duration::ZERO)) && !self.obey() {
                return;
            }
        }
    }

    /// Looks for requests, several times where it is worth it: a look takes much less than a system call. Returns whether there were any.
    fn look(&mut self) -> bool {
        for _ in 0..LOOKS {
            if self.serve() {
                return true;
            }
            if !self.looks_again() {
                return false;
            }
            std::hint::spin_loop();
        }
        false
    }

    /// Lets the handler take what is available. Returns whether it took anything.
    fn serve(&mut self) -> bool {
        let mut took = false;
        let begin = self.busy_poll.now();
        let count = self.queues.0.len();
        // The handler may have room for one queue only: that is not always the same one.
        let (before, after) = self.queues.0.split_at_mut(self.first.min(count));
        let first = before.len();
        for (turn, queue) in after.iter_mut().chain(before).enumerate() {
            if !queue.is_runnable() {
                continue;
            }
            queue.begin_batch(self.busy_poll.now());
            match queue.is_enabled() {
                true => self.handler.process(queue),
                false => queue.discard(),
            }
            queue.publish();
            if queue.took() {
                took = true;
                self.first = (first + turn + 1) % count;
                if count > 1 && self.busy_poll.tick().saturating_duration_since(begin) > SLICE {
                    break;
                }
            }
        }
        if took {
            self.busy_poll.worked();
            for queue in &mut self.queues.0 {
                queue.end_batch(self.busy_poll.now());
            }
        }
        took
    }

    /// Whether to look for more to do rather than sleep. Not while several requests are under way: their
    /// completion wakes the thread, and gathers more of them until then. Nor while requests wait for a time.
    fn looks_again(&mut self) -> bool {
        let mut held = 0;
        for queue in &self.queues.0 {
            held += u32::from(queue.held());
            if queue.look_again.is_some() {
                return false;
            }
        }
        held <= 1 && self.busy_poll.looks_again()
    }

    /// The same, after letting others have the processor: the driver may be waiting for this very one.
    fn spins(&mut self) -> bool {
        let again = self.looks_again();
        if again {
            std::thread::yield_now();
        }
        again
    }

    /// Asks all drivers to kick from now on. Returns whether there is nothing to do until they do.
    fn rest(&mut self) -> bool {
        let mut idle = true;
        for queue in self.queues.0.iter_mut().filter(|queue| queue.is_runnable()) {
            idle &= queue.rest();
        }
        idle
    }

    /// Waits, and deals with what became ready. Returns whether the session has something to say.
    fn wait(&mut self, timeout: Option<Duration>) -> bool {
        let queues = self.queues.0.iter_mut();
        let next_look = queues.filter_map(Queue::next_look).min();
        let timeout = timeout.or(next_look);
        let Some(poller) = poller(&mut self.handler, &mut self.epoll) else {
            return true;
        };
        if let Err(error) = poller.wait(&mut self.ready, timeout) {
            warn_limited(format_args!("cannot wait for requests: {error}"));
            std::thread::sleep(REFUSED);
            return true;
        }
        let slept = timeout != Some(Duration::ZERO);
        if slept {
            self.busy_poll.look();
        } else if !self.ready.is_empty() {
            self.busy_poll.tick();
        }
        for queue in &mut self.queues.0 {
            queue.wake(self.busy_poll.now());
        }
        let (mut control, mut worked) = (false, false);
        for token in self.ready.drain(..) {
            match token {
                Token::Control => control = true,
                Token::Kick(index) => {
                    if let Some(queue) = self.queues.get_mut(index) {
                        queue.kicked();
                    }
                }
                Token::Device(token) => {
                    self.handler.ready(token, &mut self.queues);
                    worked = true;
                }
            }
        }
        for queue in &mut self.queues.0 {
            queue.publish();
            queue.pending |= queue.kick.is_none();
        }
        if worked {
            self.busy_poll.worked();
        }
        control
    }

    /// Does what the session asks. Returns whether the thread goes on.
    fn obey(&mut self) -> bool {
        while let Ok(Request { command, reply }) = self.inbox.try_recv() {
            let quit = matches!(command, Command::Quit);
            let outcome = self.execute(command);
            // The session may have given up waiting.
            let _ = reply.send(outcome);
            if quit {
                return false;
            }
        }
        true
    }

    fn execute(&mut self, command: Command) -> Result<Answer, WorkerError> {
        match command {
            Command::Start(queue, kick) => {
                let index = queue.index();
                self.queues.0.push(*queue);
                if let Err(error) = self.set_kick(index, kick) {
                    self.queues.0.retain(|queue| queue.index() != index);
                    return Err(error);
                }
                if let Some(queue) = self.queues.get_mut(index) {
                    queue.greet();
                    queue.discards = self.handler.discards(index);
                    self.handler.set_enabled(queue, queue.is_enabled());
                    queue.publish();
                }
            }
            Command::Stop(index) => {
                return Ok(self.stop(index).map_or(Answer::Done, Answer::Stopped));
            }
            Command::Suspend(index) => {
                return Ok(self.suspend(index).map_or(Answer::Done, Answer::Stopped));
            }
            Command::IsIdle => {
                return Ok(Answer::Idle(self.handler.is_idle()));
            }
            Command::Base(index) => {
                let base = self.queues.get_mut(index).map(|queue| queue.base());
                return Ok(base.map_or(Answer::Done, Answer::Base));
            }
            Command::Kick(index, kick) => self.set_kick(index, kick)?,
            Command::Enable(index, enabled) => {
                if let Some(queue) = self.queues.get_mut(index) {
                    let was_enabled = queue.is_enabled();
                    queue.set_enabled(enabled);
                    if enabled != was_enabled {
                        self.handler.set_enabled(queue, enabled);
                        queue.publish();
                    }
                }
            }
            Command::Call(index, call) => {
                if let Some(queue) = self.queues.get_mut(index) {
                    queue.set_call(call);
                }
            }
            Command::Error(index, error) => {
                if let Some(queue) = self.queues.get_mut(index) {
                    queue.set_error(error);
                }
            }
            Command::UsedLog(index, address) => {
                if let Some(queue) = self.queues.get_mut(index) {
                    queue.set_used_log(address);
                }
            }
            Command::Memory(memory) => {
                for queue in &mut self.queues.0 {
                    queue.set_memory(Arc::clone(&memory));
                }
                self.handler.memory_changed(&memory);
            }
            Command::Quit => {
                while let Some(index) = self.queues.0.first().map(Queue::index) {
                    self.stop(index);
                }
            }
        }
        Ok(Answer::Done)
    }

    fn set_kick(&mut self, index: u16, kick: Option<Arc<OwnedFd>>) -> Result<(), WorkerError> {
        let Some(queue) = self.queues.get_mut(index) else {
            return Ok(());
        };
        let Some(poller) = poller(&mut self.handler, &mut self.epoll) else {
            return Err(WorkerError::Gone);
        };
        if let Some(old) = queue.kick.take() {
            let _ = poller.forget(old.as_fd(), Token::Kick(index));
        }
        if let Some(kick) = &kick {
            poller
                .watch(kick.as_fd(), Token::Kick(index))
                .map_err(WorkerError::Kick)?;
        }
        queue.kick = kick;
        queue.pending = true;
        Ok(())
    }

    /// Finishes what is held for a queue and lets go of it.
    fn stop(&mut self, index: u16) -> Option<Stopped> {
        self.queues.get_mut(index)?.begin_stop();
        let mut recovered = usize::MAX;
        loop {
            self.handler.drain(self.queues.get_mut(index)?);
            while self.queues.get_mut(index)?.held() > 0 {
                self.wait(None);
            }
            // The available index counts these among those that are done with.
            let queue = self.queues.get_mut(index)?;
            let begin = self.busy_poll.tick();
            let before = std::mem::replace(&mut recovered, queue.begin_recovered(begin));
            if recovered == 0 {
                break;
            }
            if recovered == before {
                // The handler has no room for them until requests of other queues are done.
                if self.queues.0.iter().all(|queue| queue.held() == 0) {
                    break;
                }
                self.wait(None);
            }
            let queue = self.queues.get_mut(index)?;
            match queue.is_enabled() || !queue.discards {
                true => self.handler.process(queue),
                false => queue.discard(),
            }
            queue.end_batch(self.busy_poll.tick());
        }
        self.let_go(index)
    }

    /// Suspends the requests of a queue, and lets go of the queue.
    fn suspend(&mut self, index: u16) -> Option<Stopped> {
        let queue = self.queues.get_mut(index)?;
        if !queue.begin_suspend() {
            return self.stop(index);
        }
        self.handler.suspend(queue);
        while self.queues.get_mut(index)?.held() > 0 {
            self.wait(None);
        }
        let stopped = self.let_go(index);
        if self.queues.is_empty() {
            self.handler.suspended();
        }
        stopped
    }

    /// Lets go of a queue for which nothing is held.
    fn let_go(&mut self, index: u16) -> Option<Stopped> {
        let queue = self.queues.get_mut(index)?;
        let stopped = queue.release();
        queue.end_batch(self.busy_poll.tick());
        if let Some(kick) = queue.kick.take()
            && let Some(poller) = poller(&mut self.handler, &mut self.epoll)
        {
            let _ = poller.forget(kick.as_fd(), Token::Kick(index));
        }
        self.queues.0.retain(|queue| queue.index() != index);
        Some(stopped)
    }
}
