// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The engine for hosts without io_uring: a pool of threads that make blocking system calls.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, eventfd};
use vhost_device_common::chain::Chain;
use vhost_device_common::sandbox::confine_helper;
use vhost_device_common::warn_limited;
use vhost_device_common::worker::{Readiness, Watcher};

use super::slots::{Finished, Slots};
use super::slow;
use crate::image::Image;
use crate::operation::{IoRequest, Operation};

/// Threads of one queue. They are started when they are needed.
const MAX_THREADS: usize = 16;

/// An operation on its way to a thread.
struct Job {
    number: u32,
    /// Borrows from the request, which stays in its slot until the job has ended.
    operation: Operation<'static>,
}

// SAFETY: the addresses in the operation are used by the kernel only.
unsafe impl Send for Job {}

/// What the queue's thread and the pool share.
struct Shared {
    image: Arc<Image>,
    state: Mutex<State>,
    /// A job was added, or the pool is to end.
    work: Condvar,
    /// Jobs have ended.
    ended: OwnedFd,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    idle: usize,
    ended: VecDeque<(u32, io::Result<u64>)>,
    quit: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Carries an operation out. A failed sync is noted at once: the kernel does not tell the other threads of it.
    fn execute(&self, operation: Operation<'_>) -> io::Result<u64> {
        if let Some(delay) = slow::delay() {
            std::thread::sleep(delay);
        }
        self.image.syncs.execute(&self.image.file, operation)
    }

    /// Does all jobs that wait, on a thread that is none of the pool's.
    fn work_here(&self) {
        let jobs = std::mem::take(&mut self.lock().jobs);
        for job in jobs {
            let outcome = self.execute(job.operation);
            self.lock().ended.push_back((job.number, outcome));
        }
        let _ = rustix::io::write(&self.ended, &1u64.to_ne_bytes());
    }

    /// What each thread of the pool does.
    fn work(&self) {
        let mut state = self.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                let outcome = self.execute(job.operation);
                state = self.lock();
                let first = state.ended.is_empty();
                state.ended.push_back((job.number, outcome));
                if first {
                    let _ = rustix::io::write(&self.ended, &1u64.to_ne_bytes());
                }
            } else if state.quit {
                return;
            } else {
                state.idle += 1;
                state = self
                    .work
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                state.idle -= 1;
            }
        }
    }
}

/// Carries operations out by blocking system calls in threads of its own.
pub struct ThreadsEngine<R> {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    slots: Slots<R>,
    /// Ended jobs that were fetched together.
    fetched: VecDeque<(u32, io::Result<u64>)>,
}

impl<R: IoRequest> ThreadsEngine<R> {
    pub fn new(image: &Arc<Image>, watcher: &Watcher) -> io::Result<Self> {
        let ended = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        watcher.add(&ended, Readiness::READABLE, 0)?;
        Ok(Self {
            shared: Arc::new(Shared {
                image: Arc::clone(image),
                state: Mutex::default(),
                work: Condvar::new(),
                ended,
            }),
            threads: Vec::new(),
            slots: Slots::new(),
            fetched: VecDeque::new(),
        })
    }

    pub fn has_room(&self) -> bool {
        self.slots.has_room()
    }

    pub fn under_way(&self) -> usize {
        self.slots.len()
    }

    /// Shows ended jobs as ready again.
    pub fn look_again(&self) {
        let _ = rustix::io::write(&self.shared.ended, &1u64.to_ne_bytes());
    }

    /// Gives the request back if there is no room.
    pub fn submit(&mut self, request: R) -> Option<R> {
        let (number, request) = match self.slots.insert(request) {
            Ok(inserted) => inserted,
            Err(request) => return Some(request),
        };
        // SAFETY: the operation borrows from the request. That stays where it is until the job has
        // ended: `finished` alone takes it out, and `drop` waits for all jobs.
        let operation = unsafe {
            std::mem::transmute::<Operation<'_>, Operation<'static>>(request.operation())
        };
        let mut state = self.shared.lock();
        state.jobs.push_back(Job { number, operation });
        if state.idle >= state.jobs.len() {
            self.shared.work.notify_one();
            return None;
        }
        drop(state);
        if self.threads.len() < MAX_THREADS {
            self.start_thread();
        }
        None
    }

    /// As [`super::Engine::suspend`].
    pub fn suspend(&mut self, is_one: impl Fn(&R) -> bool, mut give: impl FnMut(Chain)) -> usize {
        let slots = &mut self.slots;
        self.shared.lock().jobs.retain(|job| {
            let keep = !slots.get(job.number).is_some_and(&is_one);
            if !keep {
                let chain = slots.remove(job.number).and_then(IoRequest::into_chain);
                chain.into_iter().for_each(&mut give);
            }
            keep
        });
        super::abandon(self.slots.iter_mut(), is_one, give)
    }

    fn start_thread(&mut self) {
        let shared = Arc::clone(&self.shared);
        let started = std::thread::Builder::new()
            .name("io".to_owned())
            .spawn(move || {
                confine_helper();
                shared.work();
            });
        match started {
            Ok(thread) => self.threads.push(thread),
            Err(error) if self.threads.is_empty() => {
                warn_limited(format_args!(
                    "cannot start a thread for I/O: {error}; the queue's own thread does it, which is slower"
                ));
                self.shared.work_here();
            }
            Err(error) => log::debug!("no more than {} threads: {error}", self.threads.len()),
        }
    }

    pub fn finished(&mut self) -> Option<Finished<R>> {
        if self.fetched.is_empty() {
            std::mem::swap(&mut self.fetched, &mut self.shared.lock().ended);
        }
        let (number, outcome) = self.fetched.pop_front()?;
        Some((self.slots.remove(number)?, outcome))
    }
}

impl<R> Drop for ThreadsEngine<R> {
    /// All jobs end before the memory that they use goes.
    fn drop(&mut self) {
        self.shared.lock().quit = true;
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
