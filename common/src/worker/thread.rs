// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The thread of a worker: it waits, lets the handler take requests, publishes completions, and carries out the session's commands.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use super::busy_poll::{BusyPoll, Polling};
use super::command::{Answer, Command, Request};
use super::epoll::EpollPoller;
use super::error::WorkerError;
use super::handler::QueueHandler;
use super::poller::{Poller, Token};
use super::queue::{Queue, Queues, Stopped};
use super::watcher::{Readiness, Watcher};
use crate::log_limit::warn_limited;

/// Maximum number of looks for requests between two system calls.
const POLLS: u32 = 16;
/// How long to sleep when the wait system call fails.
const REFUSED: Duration = Duration::from_millis(1);
/// How long the queues of a thread are served, one after the other, before the session's commands are handled.
const SLICE: Duration = Duration::from_millis(2);

/// The poller that the thread waits with: the handler's own, or epoll.
fn poller<'a, H: QueueHandler>(
    handler: &'a mut H,
    epoll: &'a mut EpollPoller,
) -> &'a mut dyn Poller {
    match handler.poller() {
        Some(own) => own,
        None => epoll,
    }
}

/// A thread of a worker, with its handler and its queues.
pub struct Thread<H> {
    handler: H,
    /// Has the handler's watched files. The handler's own poller, if there is one, watches this one.
    epoll: EpollPoller,
    queues: Queues,
    /// Index of the queue that is served first: the one after the last that took requests.
    first: usize,
    inbox: Receiver<Request>,
    ready: Vec<Token>,
    busy_poll: BusyPoll,
    /// Watched for as long as the thread lives.
    _wake: Arc<OwnedFd>,
}

impl<H: QueueHandler> Thread<H> {
    /// Makes the handler, and waits for `wake`, which announces commands in `inbox`.
    ///
    /// # Errors
    /// `make` fails, the limit of open files is reached, or a file cannot be waited on.
    pub fn new(
        make: impl FnOnce(Watcher) -> io::Result<H>,
        inbox: Receiver<Request>,
        wake: Arc<OwnedFd>,
        polling: Polling,
    ) -> io::Result<Self> {
        let mut epoll = EpollPoller::new()?;
        let mut handler = make(epoll.watcher())?;
        if let Some(own) = handler.poller() {
            own.watch(epoll.as_fd(), Token::Watcher)?;
        }
        poller(&mut handler, &mut epoll).watch(wake.as_fd(), Token::Control)?;
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

    /// Works until the session sends [`Command::Quit`].
    pub fn run(mut self) {
        loop {
            let sleeps = !self.poll_queues() && !self.busy_polls() && self.enable_kicks();
            if self.wait((!sleeps).then_some(Duration::ZERO)) && !self.handle_commands() {
                return;
            }
        }
    }

    /// Looks for requests, repeatedly while busy polling pays: a look costs much less than a system call. Returns whether there were
    /// any.
    fn poll_queues(&mut self) -> bool {
        for _ in 0..POLLS {
            if self.serve() {
                return true;
            }
            if !self.should_poll() {
                return false;
            }
            std::hint::spin_loop();
        }
        false
    }

    /// Lets the handler take available requests. Returns whether it took any.
    fn serve(&mut self) -> bool {
        let mut took = false;
        let begin = self.busy_poll.now();
        let count = self.queues.0.len();
        // The handler may have room for the requests of one queue only: start with another queue each time.
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
                // A clock that is read for each batch of a single queue costs some nanoseconds a request.
                if count > 1
                    && self
                        .busy_poll
                        .update_clock()
                        .saturating_duration_since(begin)
                        > SLICE
                {
                    break;
                }
            }
        }
        if took {
            self.busy_poll.note_work();
            for queue in &mut self.queues.0 {
                queue.end_batch(self.busy_poll.now());
            }
        }
        took
    }

    /// Whether to poll rather than sleep. Not while several requests are in progress, whose completion wakes the thread and gathers
    /// more requests until then; nor while requests wait for a time.
    fn should_poll(&mut self) -> bool {
        let mut held = 0;
        for queue in &self.queues.0 {
            held += u32::from(queue.held());
            if queue.retry_after.is_some() {
                return false;
            }
        }
        held <= 1 && self.busy_poll.should_poll()
    }

    /// Returns whether to poll rather than sleep, after yielding the processor: the driver may be waiting for it.
    fn busy_polls(&mut self) -> bool {
        let polls = self.should_poll();
        if polls {
            std::thread::yield_now();
        }
        polls
    }

    /// Enables kicks of all queues. Returns whether the thread can sleep until there is one.
    fn enable_kicks(&mut self) -> bool {
        let mut idle = true;
        for queue in self.queues.0.iter_mut().filter(|queue| queue.is_runnable()) {
            idle &= queue.enable_kicks();
        }
        idle
    }

    /// Waits for events, and fetches those of watched files.
    fn poll(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        let Self { epoll, ready, .. } = self;
        let Some(own) = self.handler.poller() else {
            return epoll.wait(ready, timeout);
        };
        own.wait(ready, timeout)?;
        if ready.contains(&Token::Watcher) || epoll.has_more() {
            epoll.wait(ready, Some(Duration::ZERO))?;
        }
        Ok(())
    }

    /// Waits, and handles what became ready. Returns whether the session sent a command.
    fn wait(&mut self, timeout: Option<Duration>) -> bool {
        let queues = self.queues.0.iter_mut();
        let next_retry = queues.filter_map(Queue::next_retry).min();
        let timeout = match self.epoll.has_more() {
            true => Some(Duration::ZERO),
            false => timeout.or(next_retry),
        };
        if let Err(error) = self.poll(timeout) {
            warn_limited(format_args!("cannot wait for requests: {error}"));
            std::thread::sleep(REFUSED);
            return true;
        }
        let slept = timeout != Some(Duration::ZERO);
        if slept {
            self.busy_poll.note_poll();
        } else if !self.ready.is_empty() {
            self.busy_poll.update_clock();
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
                    let readiness = Readiness::READABLE;
                    self.handler.ready(token, readiness, &mut self.queues);
                    worked = true;
                }
                Token::Watcher => {
                    while let Some((token, readiness)) = self.epoll.next_file() {
                        self.handler.ready(token, readiness, &mut self.queues);
                        worked = true;
                    }
                }
            }
        }
        for queue in &mut self.queues.0 {
            queue.publish();
            queue.pending |= queue.kick.is_none();
        }
        if worked {
            self.busy_poll.note_work();
        }
        control
    }

    /// Carries out the commands of the session. Returns whether the thread continues.
    fn handle_commands(&mut self) -> bool {
        while let Ok(Request { command, reply }) = self.inbox.try_recv() {
            let quit = matches!(command, Command::Quit);
            let outcome = self.execute(command);
            // The session may have stopped waiting.
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
                    queue.call_initially();
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
        let poller = poller(&mut self.handler, &mut self.epoll);
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

    /// Completes all held requests of a queue and removes it.
    fn stop(&mut self, index: u16) -> Option<Stopped> {
        self.queues.get_mut(index)?.begin_stop();
        let mut recovered = usize::MAX;
        loop {
            self.handler.drain(self.queues.get_mut(index)?);
            while self.queues.get_mut(index)?.held() > 0 {
                self.wait(None);
            }
            // Requests that an earlier device had taken: the available index is past them already.
            let queue = self.queues.get_mut(index)?;
            let begin = self.busy_poll.update_clock();
            let before = std::mem::replace(&mut recovered, queue.begin_recovered(begin));
            if recovered == 0 {
                break;
            }
            if recovered == before {
                // The handler has no room for them until requests of other queues complete.
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
            queue.end_batch(self.busy_poll.update_clock());
        }
        self.let_go(index)
    }

    /// Suspends the requests of a queue and removes it.
    fn suspend(&mut self, index: u16) -> Option<Stopped> {
        let queue = self.queues.get_mut(index)?;
        let stopped = match queue.begin_suspend() {
            false => self.stop(index),
            true => {
                self.handler.suspend(queue);
                while self.queues.get_mut(index)?.held() > 0 {
                    self.wait(None);
                }
                self.let_go(index)
            }
        };
        if self.queues.is_empty() {
            self.handler.suspended();
        }
        stopped
    }

    /// Lets go of a queue for which nothing is held.
    fn let_go(&mut self, index: u16) -> Option<Stopped> {
        let queue = self.queues.get_mut(index)?;
        let stopped = queue.release();
        queue.end_batch(self.busy_poll.update_clock());
        if let Some(kick) = queue.kick.take() {
            let poller = poller(&mut self.handler, &mut self.epoll);
            let _ = poller.forget(kick.as_fd(), Token::Kick(index));
        }
        self.queues.0.retain(|queue| queue.index() != index);
        Some(stopped)
    }
}
