// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A thread that owns queues. It waits for kicks, lets the device's handler take requests, publishes completions, and carries out the
//! session's commands.

mod busy_poll;
mod call_file;
mod command;
mod early_call;
mod epoll;
mod error;
mod handler;
mod poller;
mod pool;
mod queue;
mod thread;
mod timer;
mod watcher;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};

use crate::memory::GuestMemory;
use crate::sandbox::{Role, confine_thread};
pub use busy_poll::Polling;
pub(crate) use call_file::CallFile;
use command::{Answer, Command, Request};
pub use epoll::EpollPoller;
pub use error::WorkerError;
pub use handler::QueueHandler;
pub use poller::{Poller, Token};
pub use pool::{Pool, PoolLimits};
pub use queue::{Queue, Queues, Stopped};
use thread::Thread;
pub use timer::Timer;
pub use watcher::{Readiness, Watcher};

/// How long the session waits for a worker before it checks whether a full eventfd of the front-end blocks the thread.
const HANG: Duration = Duration::from_millis(100);

/// The session's handle of a worker. Dropping it completes all held requests and ends the thread.
#[derive(Debug)]
pub struct Worker {
    requests: Sender<Request>,
    wake: Arc<OwnedFd>,
    /// Files of the front-end that the thread may be writing to.
    signalled: Mutex<Vec<Weak<CallFile>>>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts a thread called `name` with the handler that `make` returns. The watcher is for that handler.
    ///
    /// # Errors
    /// `make` fails, or the limit of threads or open files is reached.
    pub fn start<H: QueueHandler + Send + 'static>(
        name: String,
        make: impl FnOnce(Watcher) -> io::Result<H>,
        polling: Polling,
    ) -> Result<Self, WorkerError> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| WorkerError::Start(errno.into()))?;
        let wake = Arc::new(wake);
        let (requests, inbox) = channel();
        let thread =
            Thread::new(make, inbox, Arc::clone(&wake), polling).map_err(WorkerError::Start)?;
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

    /// Sends a command, and waits until it is done.
    fn ask(&self, command: Command) -> Result<Answer, WorkerError> {
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

    /// Records files that the thread may write to from now on.
    fn may_signal<'a>(&self, files: impl IntoIterator<Item = &'a Arc<CallFile>>) {
        let mut signalled = self.signalled();
        signalled.retain(|file| file.strong_count() > 0);
        for file in files.into_iter().map(Arc::downgrade) {
            if !signalled.iter().any(|known| known.ptr_eq(&file)) {
                signalled.push(file);
            }
        }
    }

    /// Starts a queue. The driver kicks it by `kick`; without one the worker polls the ring.
    ///
    /// # Errors
    /// `kick` cannot be waited on, or the thread has ended.
    pub fn start_queue(&self, queue: Queue, kick: Option<Arc<OwnedFd>>) -> Result<(), WorkerError> {
        self.may_signal(queue.files());
        self.ask(Command::Start(Box::new(queue), kick)).map(drop)
    }

    /// Stops a queue. When this returns, the device holds no request of the queue and does not write guest memory for it any more.
    /// Returns `None` if the worker has no such queue.
    ///
    /// # Errors
    /// The thread has ended.
    pub fn stop_queue(&self, index: u16) -> Result<Option<Stopped>, WorkerError> {
        self.ask_to_stop(Command::Stop(index))
    }

    fn ask_to_stop(&self, command: Command) -> Result<Option<Stopped>, WorkerError> {
        Ok(match self.ask(command)? {
            Answer::Stopped(stopped) => Some(stopped),
            _ => None,
        })
    }

    /// Stops a queue and suspends its requests, if the front-end has a file of requests in flight and the handler can suspend them. When
    /// this returns, the device does not write guest memory for the queue any more. Returns `None` if the worker has no such queue.
    ///
    /// # Errors
    /// The thread has ended.
    pub fn suspend_queue(&self, index: u16) -> Result<Option<Stopped>, WorkerError> {
        self.ask_to_stop(Command::Suspend(index))
    }

    /// Returns whether the operations of all suspended requests have ended.
    pub fn is_idle(&self) -> bool {
        // A thread that has ended has no operations.
        !matches!(self.ask(Command::IsIdle), Ok(Answer::Idle(false)))
    }

    /// Returns the base of a running queue. If the queue is enabled it may already be past that.
    ///
    /// # Errors
    /// The thread has ended.
    pub fn queue_base(&self, index: u16) -> Result<Option<u32>, WorkerError> {
        Ok(match self.ask(Command::Base(index))? {
            Answer::Base(base) => Some(base),
            _ => None,
        })
    }

    /// Enables or disables a queue (SET_VRING_ENABLE).
    ///
    /// # Errors
    /// The thread has ended.
    pub fn enable_queue(&self, index: u16, enabled: bool) -> Result<(), WorkerError> {
        self.ask(Command::Enable(index, enabled)).map(drop)
    }

    /// Replaces the kick eventfd.
    ///
    /// # Errors
    /// `kick` cannot be waited on, or the thread has ended.
    pub fn set_kick(&self, index: u16, kick: Option<Arc<OwnedFd>>) -> Result<(), WorkerError> {
        self.ask(Command::Kick(index, kick)).map(drop)
    }

    /// Replaces the call file, and signals the new one at once.
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

    /// Replaces the error file, which is signalled when the ring is corrupt.
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

    /// Starts logging writes to the used ring at this guest address, or stops logging them.
    ///
    /// # Errors
    /// The thread has ended.
    pub fn set_used_log(&self, index: u16, address: Option<u64>) -> Result<(), WorkerError> {
        self.ask(Command::UsedLog(index, address)).map(drop)
    }

    /// Replaces the guest memory table, and with it the dirty log. When this returns, nothing is written to the previous log any more.
    ///
    /// # Errors
    /// The thread has ended.
    pub fn set_memory(&self, memory: &GuestMemory) -> Result<(), WorkerError> {
        // A copy for each worker: their reference counts do not share a cache line.
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
