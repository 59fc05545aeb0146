// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A thread that owns some queues: it waits for kicks, lets the device's handler take requests,
//! publishes what was completed, and obeys the session.

mod call_file;
mod head_start;
mod poll;
mod polling;
mod queue;
mod timer;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use thiserror::Error;

use crate::device::QueueHandler;
use crate::file_limit::explained;
use crate::limit::warn_limited;
use crate::memory::GuestMemory;
use crate::program::sandbox::{Role, confine_thread};
pub(crate) use call_file::CallFile;
pub use poll::{EpollPoller, Poller, Token};
pub use polling::Polling;
use polling::Watchfulness;
pub(crate) use queue::BATCH;
pub use queue::{Queue, Queues};
pub use timer::Timer;

/// How long the session waits for a worker before it looks whether that hangs in an eventfd of the front-end.
const HANG: Duration = Duration::from_millis(100);
/// Most looks for requests between two system calls.
const LOOKS: u32 = 16;
/// How long to do nothing when the kernel refuses to wait.
const REFUSED: Duration = Duration::from_millis(1);
/// How long the queues of a thread are served, one after the other, before the session is heard again.
const SLICE: Duration = Duration::from_millis(2);

/// Why a worker did not do what the session asked for.
#[derive(Debug, Error)]
pub enum WorkerError {
    /// The thread, or what it needs, could not be made.
    #[error("cannot start working on a queue: {}", explained(.0))]
    Start(#[source] io::Error),
    /// The kick file cannot be waited on.
    #[error("cannot wait for kicks on the file that the front-end sent: {}", explained(.0))]
    Kick(#[source] io::Error),
    /// The thread has ended.
    #[error("the thread of this queue has ended")]
    Gone,
}

/// What the session asks of a worker.
enum Command {
    Start(Box<Queue>, Option<Arc<OwnedFd>>),
    Stop(u16),
    Base(u16),
    Enable(u16, bool),
    Kick(u16, Option<Arc<OwnedFd>>),
    Call(u16, Option<Arc<CallFile>>),
    Error(u16, Option<Arc<CallFile>>),
    UsedLog(u16, Option<u64>),
    Memory(Arc<GuestMemory>),
    Quit,
}

struct Request {
    command: Command,
    /// Where the ring goes on, for `Stop` and `Base`.
    reply: Sender<Result<Option<u32>, WorkerError>>,
}

/// The session's end of a worker. Dropping it finishes what is held and ends the thread.
#[derive(Debug)]
pub struct Worker {
    requests: Sender<Request>,
    wake: Arc<OwnedFd>,
    /// The front-end's files that the thread may be writing to.
    signalled: Mutex<Vec<Weak<CallFile>>>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts a thread called `name` that works with `handler`.
    ///
    /// # Errors
    /// There are too many threads or open files.
    pub fn start<H: QueueHandler + Send + 'static>(
        name: String,
        mut handler: H,
        polling: Polling,
    ) -> Result<Self, WorkerError> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| WorkerError::Start(errno.into()))?;
        let wake = Arc::new(wake);
        let mut epoll = None;
        if handler.poller().is_none() {
            let epoll = epoll.insert(EpollPoller::new().map_err(WorkerError::Start)?);
            handler.watch(epoll).map_err(WorkerError::Start)?;
        }
        if let Some(poller) = poller(&mut handler, &mut epoll) {
            poller
                .watch(wake.as_fd(), Token::Control)
                .map_err(WorkerError::Start)?;
        }
        let (requests, inbox) = channel();
        let thread = Thread {
            handler,
            epoll,
            queues: Queues::default(),
            first: 0,
            inbox,
            ready: Vec::new(),
            watchfulness: Watchfulness::new(polling),
            _wake: Arc::clone(&wake),
        };
        let thread = std::thread::Builder::new()
            .name(name)
            .spawn(move || {
                confine_thread(Role::Queue);
                thread.run();
            })
            .map_err(WorkerError::Start)?;
        Ok(Self {
            requests,
            wake,
            signalled: Mutex::default(),
            thread: Some(thread),
        })
    }

    /// Asks, and waits until it is done.
    fn ask(&self, command: Command) -> Result<Option<u32>, WorkerError> {
        let (reply, answer) = channel();
        self.requests
            .send(Request { command, reply })
            .map_err(|_| WorkerError::Gone)?;
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        loop {
            match answer.recv_timeout(HANG) {
                Ok(outcome) => return outcome,
                Err(RecvTimeoutError::Disconnected) => return Err(WorkerError::Gone),
                Err(RecvTimeoutError::Timeout) => {
                    let signalled = self.signalled();
                    let files = signalled.iter().filter_map(Weak::upgrade);
                    files.for_each(|file| file.make_room());
                }
            }
        }
    }

    fn signalled(&self) -> MutexGuard<'_, Vec<Weak<CallFile>>> {
        self.signalled
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread may write to these from now on.
    fn may_signal<'a>(&self, files: impl IntoIterator<Item = &'a Arc<CallFile>>) {
        let mut signalled = self.signalled();
        signalled.retain(|file| file.strong_count() > 0);
        for file in files.into_iter().map(Arc::downgrade) {
            if !signalled.iter().any(|known| known.ptr_eq(&file)) {
                signalled.push(file);
            }
        }
    }

    /// Starts working on `queue`, which is kicked by `kick`.
    ///
    /// # Errors
    /// `kick` cannot be waited on.
    pub fn start_queue(&self, queue: Queue, kick: Option<Arc<OwnedFd>>) -> Result<(), WorkerError> {
        self.may_signal(queue.files());
        self.ask(Command::Start(Box::new(queue), kick)).map(drop)
    }

    /// Stops a queue: when this returns, the device holds no request of it and writes no guest memory
    /// for it. Tells where the ring goes on.
    ///
    /// # Errors
    /// The thread has ended.
    pub fn stop_queue(&self, index: u16) -> Result<Option<u32>, WorkerError> {
        self.ask(Command::Stop(index))
    }

    /// Tells where a running queue is, which is past that already if it is enabled.
    ///
    /// # Errors
    /// The thread has ended.
    pub fn queue_base(&self, index: u16) -> Result<Option<u32>, WorkerError> {
        self.ask(Command::Base(index))
    }

    /// Enables or disables a queue (SET_VRING_ENABLE).
    ///
    /// # Errors
    /// The thread has ended.
    pub fn enable_queue(&self, index: u16, enabled: bool) -> Result<(), WorkerError> {
        self.ask(Command::Enable(index, enabled)).map(drop)
    }

    /// Replaces the eventfd that the driver kicks.
    ///
    /// # Errors
    /// It cannot be waited on.
    pub fn set_kick(&self, index: u16, kick: Option<Arc<OwnedFd>>) -> Result<(), WorkerError> {
        self.ask(Command::Kick(index, kick)).map(drop)
    }

    /// Replaces the file that calls the driver, which is called by the new one at once.
    ///
    /// # Errors
    /// The thread has ended.
    pub(crate) fn set_call(
        &self,
        index: u16,
        call: Option<Arc<CallFile>>,
    ) -> Result<(), WorkerError> {
        self.may_signal(&call);
        self.ask(Command::Call(index, call)).map(drop)
    }

    /// Replaces the file that tells the front-end of a corrupt ring.
    ///
    /// # Errors
    /// The thread has ended.
    pub(crate) fn set_error(
        &self,
        index: u16,
        error: Option<Arc<CallFile>>,
    ) -> Result<(), WorkerError> {
        self.may_signal(&error);
        self.ask(Command::Error(index, error)).map(drop)
    }

    /// Has writes to a used ring logged by this guest address, or not any more.
    ///
    /// # Errors
    /// The thread has ended.
    pub fn set_used_log(&self, index: u16, address: Option<u64>) -> Result<(), WorkerError> {
        self.ask(Command::UsedLog(index, address)).map(drop)
    }

    /// Takes all further requests from another table of guest memory. Writes are logged where it says: when this returns, the log of
    /// the one before it is not written to any more.
    ///
    /// # Errors
    /// The thread has ended.
    pub fn set_memory(&self, memory: &GuestMemory) -> Result<(), WorkerError> {
        // Each worker counts its references in a cache line of its own.
        self.ask(Command::Memory(Arc::new(memory.clone())))
            .map(drop)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.ask(Command::Quit);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread of a queue has crashed; please report this");
        }
    }
}

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

struct Thread<H> {
    handler: H,
    epoll: Option<EpollPoller>,
    queues: Queues,
    /// Place among them of the one that is served first: the next after the one that took requests last.
    first: usize,
    inbox: Receiver<Request>,
    ready: Vec<Token>,
    watchfulness: Watchfulness,
    /// Watched for as long as the thread lives.
    _wake: Arc<OwnedFd>,
}

impl<H: QueueHandler> Thread<H> {
    fn run(mut self) {
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
        let begin = self.watchfulness.now();
        let count = self.queues.0.len();
        // The handler may have room for one queue only: that is not always the same one.
        let (before, after) = self.queues.0.split_at_mut(self.first.min(count));
        let first = before.len();
        for (turn, queue) in after.iter_mut().chain(before).enumerate() {
            if !queue.is_runnable() {
                continue;
            }
            queue.begin_batch(self.watchfulness.now());
            self.handler.process(queue);
            queue.publish();
            if queue.took() {
                took = true;
                self.first = (first + turn + 1) % count;
                if count > 1 && self.watchfulness.tick().saturating_duration_since(begin) > SLICE {
                    break;
                }
            }
        }
        if took {
            self.watchfulness.worked();
            for queue in &mut self.queues.0 {
                queue.end_batch(self.watchfulness.now());
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
        held <= 1 && self.watchfulness.looks_again()
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
            self.watchfulness.look();
        } else if !self.ready.is_empty() {
            self.watchfulness.tick();
        }
        for queue in &mut self.queues.0 {
            queue.wake(self.watchfulness.now());
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
            self.watchfulness.worked();
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

    fn execute(&mut self, command: Command) -> Result<Option<u32>, WorkerError> {
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
                }
            }
            Command::Stop(index) => return Ok(self.stop(index)),
            Command::Base(index) => {
                return Ok(self.queues.get_mut(index).map(|queue| queue.base()));
            }
            Command::Kick(index, kick) => self.set_kick(index, kick)?,
            Command::Enable(index, enabled) => {
                if let Some(queue) = self.queues.get_mut(index) {
                    queue.set_enabled(enabled);
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
        Ok(None)
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
    fn stop(&mut self, index: u16) -> Option<u32> {
        let mut recovered = usize::MAX;
        loop {
            self.handler.drain(self.queues.get_mut(index)?);
            while self.queues.get_mut(index)?.held() > 0 {
                self.wait(None);
            }
            // The available index counts these among those that are done with.
            let queue = self.queues.get_mut(index)?;
            let begin = self.watchfulness.tick();
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
            self.handler.process(queue);
            queue.end_batch(self.watchfulness.tick());
        }
        let queue = self.queues.get_mut(index)?;
        let base = queue.release();
        queue.end_batch(self.watchfulness.tick());
        if let Some(kick) = queue.kick.take()
            && let Some(poller) = poller(&mut self.handler, &mut self.epoll)
        {
            let _ = poller.forget(kick.as_fd(), Token::Kick(index));
        }
        self.queues.0.retain(|queue| queue.index() != index);
        Some(base)
    }
}
