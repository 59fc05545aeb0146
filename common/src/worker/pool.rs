// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Threads for calls that block. A handler hands over an item, such as a request with its chain, and gets the result back on its own
//! thread.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, eventfd};

use super::watcher::{Readiness, Watcher};
use crate::log_limit::warn_limited;
use crate::sandbox::{Role, confine_thread};

/// The limits of a [`Pool`].
#[derive(Clone, Copy, Debug)]
pub struct PoolLimits {
    /// Maximum number of threads. They are started as needed.
    pub threads: usize,
    /// Maximum number of items in the pool, with those whose results were not taken yet.
    pub items: usize,
}

/// An item whose run has ended, with its outcome.
pub type Ended<T, R> = (T, io::Result<R>);

/// Runs a function on items of type `T` in threads of its own, confined as [`Needs::helper`](crate::sandbox::Needs::helper) says. An
/// item comes back with what the function returned, or with an error if it panicked. Items come back in any order.
///
/// A request that is handed over counts as held until its handler completes it, so a queue does not stop before that. Dropping the
/// pool waits for all items.
pub struct Pool<T, R> {
    name: &'static str,
    limits: PoolLimits,
    shared: Arc<Shared<T, R>>,
    threads: Vec<JoinHandle<()>>,
    /// Items that are in the pool, and results that were not taken.
    len: usize,
    /// Results that were fetched together.
    finished: VecDeque<Ended<T, R>>,
    watcher: Watcher,
}

/// What is done with an item.
type Run<T, R> = dyn Fn(&mut T) -> io::Result<R> + Send + Sync;

struct Shared<T, R> {
    run: Box<Run<T, R>>,
    state: Mutex<State<T, R>>,
    /// An item was added, or the pool is dropped.
    work: Condvar,
    /// An eventfd for results.
    done: OwnedFd,
}

struct State<T, R> {
    waiting: VecDeque<T>,
    /// Threads without work.
    idle: usize,
    finished: VecDeque<Ended<T, R>>,
    quit: bool,
}

impl<T, R> Shared<T, R> {
    fn lock(&self) -> MutexGuard<'_, State<T, R>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn signal(&self) {
        let _ = rustix::io::write(&self.done, &1u64.to_ne_bytes());
    }

    /// Runs an item. A panic becomes the item's error: a lost item would keep its queue from stopping.
    fn run_one(&self, mut item: T) -> Ended<T, R> {
        let outcome = catch_unwind(AssertUnwindSafe(|| (self.run)(&mut item)));
        let outcome = outcome.unwrap_or_else(|_| {
            log::error!("a blocking call has crashed; please report this");
            Err(io::Error::other("the call has crashed"))
        });
        (item, outcome)
    }

    /// Runs all items that wait, on the calling thread.
    fn run_waiting(&self) {
        let waiting = std::mem::take(&mut self.lock().waiting);
        for item in waiting {
            let result = self.run_one(item);
            self.lock().finished.push_back(result);
        }
        self.signal();
    }

    /// Runs items until the pool is dropped.
    fn work(&self) {
        let mut state = self.lock();
        loop {
            if let Some(item) = state.waiting.pop_front() {
                drop(state);
                let result = self.run_one(item);
                state = self.lock();
                let is_first = state.finished.is_empty();
                state.finished.push_back(result);
                if is_first {
                    self.signal();
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

impl<T: Send + 'static, R: Send + 'static> Pool<T, R> {
    /// Makes a pool whose threads have this name and call `run`. When there are results, `watcher` reports `token`.
    ///
    /// # Errors
    /// The limit of open files is reached.
    pub fn new(
        name: &'static str,
        limits: PoolLimits,
        watcher: &Watcher,
        token: u32,
        run: impl Fn(&mut T) -> io::Result<R> + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let done = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        watcher.add(&done, Readiness::READABLE, token)?;
        Ok(Self {
            name,
            limits,
            shared: Arc::new(Shared {
                run: Box::new(run),
                state: Mutex::new(State {
                    waiting: VecDeque::new(),
                    idle: 0,
                    finished: VecDeque::new(),
                    quit: false,
                }),
                work: Condvar::new(),
                done,
            }),
            threads: Vec::new(),
            len: 0,
            finished: VecDeque::new(),
            watcher: watcher.clone(),
        })
    }

    /// Whether the pool takes another item.
    pub fn has_room(&self) -> bool {
        self.len < self.limits.items
    }

    /// Number of items whose results were not taken.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is in the pool.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Hands an item over. Where no thread can be started, the calling thread runs it.
    ///
    /// # Errors
    /// There is no room; returns the item.
    #[allow(clippy::result_large_err, reason = "the item must not be lost")]
    pub fn submit(&mut self, item: T) -> Result<(), T> {
        if !self.has_room() {
            return Err(item);
        }
        self.len += 1;
        let mut state = self.shared.lock();
        state.waiting.push_back(item);
        if state.idle >= state.waiting.len() {
            self.shared.work.notify_one();
            return Ok(());
        }
        drop(state);
        if self.threads.len() < self.limits.threads {
            self.start_thread();
        }
        if self.threads.is_empty() {
            self.shared.run_waiting();
        }
        Ok(())
    }

    fn start_thread(&mut self) {
        let shared = Arc::clone(&self.shared);
        let started = std::thread::Builder::new()
            .name(self.name.to_owned())
            .spawn(move || {
                confine_thread(Role::Helper);
                shared.work();
            });
        match started {
            Ok(thread) => self.threads.push(thread),
            Err(error) if self.threads.is_empty() => warn_limited(format_args!(
                "cannot start a thread for blocking calls: {error}; the queue's thread makes them itself, which is slower"
            )),
            Err(error) => log::debug!(
                "only {} threads for blocking calls: {error}",
                self.threads.len()
            ),
        }
    }

    /// Takes back the items that `is_one` selects, as far as they have not begun.
    pub fn withdraw(&mut self, is_one: impl Fn(&T) -> bool) -> Vec<T> {
        let mut state = self.shared.lock();
        let items = std::mem::take(&mut state.waiting);
        let (taken, kept) = items.into_iter().partition::<Vec<_>, _>(is_one);
        state.waiting = kept.into();
        self.len -= taken.len();
        taken
    }

    /// Takes the next result.
    pub fn finished(&mut self) -> Option<Ended<T, R>> {
        if self.finished.is_empty() {
            std::mem::swap(&mut self.finished, &mut self.shared.lock().finished);
        }
        let result = self.finished.pop_front()?;
        self.len -= 1;
        Some(result)
    }

    /// Has the watcher report the pool again, for a handler that leaves results for later.
    pub fn report_again(&self) {
        self.shared.signal();
    }
}

impl<T, R> Drop for Pool<T, R> {
    fn drop(&mut self) {
        self.shared.lock().quit = true;
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        self.watcher.remove(&self.shared.done);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc::channel;
    use std::thread::ThreadId;
    use std::time::Duration;

    use super::*;
    use crate::worker::{EpollPoller, Poller};

    const TOKEN: u32 = 5;
    const LIMITS: PoolLimits = PoolLimits {
        threads: 3,
        items: 8,
    };

    /// A pool, and what reports it.
    fn pool<T: Send + 'static, R: Send + 'static>(
        limits: PoolLimits,
        run: impl Fn(&mut T) -> io::Result<R> + Send + Sync + 'static,
    ) -> (Pool<T, R>, EpollPoller) {
        let poller = EpollPoller::new().unwrap();
        let pool = Pool::new("io", limits, &poller.watcher(), TOKEN, run).unwrap();
        (pool, poller)
    }

    fn is_reported(poller: &mut EpollPoller, time: Duration) -> bool {
        poller.wait(&mut Vec::new(), Some(time)).unwrap();
        let reported = poller.next_file();
        assert!(reported.is_none_or(|(token, _)| token == TOKEN));
        reported.is_some()
    }

    #[test]
    fn results_come_to_the_thread_that_handed_the_items_over() {
        let (mut pool, mut poller) = pool(LIMITS, |number: &mut u64| {
            Ok((*number * 2, std::thread::current().id()))
        });
        let mut sum = 0;
        for _ in 0..100 {
            for number in 0..8 {
                pool.submit(number).unwrap();
            }
            while !pool.is_empty() {
                assert!(is_reported(&mut poller, Duration::from_secs(10)));
                while let Some((_, outcome)) = pool.finished() {
                    let (double, thread) = outcome.unwrap();
                    assert_ne!(thread, std::thread::current().id());
                    sum += double;
                }
            }
        }
        assert_eq!(sum, 100 * 56);
    }

    #[test]
    fn items_run_beside_each_other_in_no_more_threads_than_allowed() {
        let (release, released) = channel::<()>();
        let released = Mutex::new(released);
        let (started, starts) = channel();
        let running = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&running);
        let (mut pool, _poller) = pool(LIMITS, move |_: &mut ()| {
            started.send(count.fetch_add(1, Ordering::Relaxed)).unwrap();
            released.lock().unwrap().recv().unwrap();
            Ok(count.fetch_sub(1, Ordering::Relaxed))
        });
        for _ in 0..8 {
            assert!(pool.has_room());
            pool.submit(()).unwrap();
        }
        assert!(!pool.has_room());
        assert_eq!(pool.submit(()), Err(()), "given back");
        for _ in 0..LIMITS.threads {
            starts.recv().unwrap();
        }
        assert!(starts.recv_timeout(Duration::from_millis(20)).is_err());
        assert_eq!(running.load(Ordering::Relaxed), LIMITS.threads);
        for _ in 0..8 {
            release.send(()).unwrap();
        }
        drop(pool);
        assert_eq!(running.load(Ordering::Relaxed), 0, "all have run");
    }

    #[test]
    fn the_calling_thread_does_the_work_where_no_thread_can_be_started() {
        let limits = PoolLimits {
            threads: 0,
            ..LIMITS
        };
        let (mut pool, mut poller) = pool(limits, |_: &mut ()| Ok(std::thread::current().id()));
        pool.submit(()).unwrap();
        assert!(is_reported(&mut poller, Duration::ZERO));
        let thread: ThreadId = pool.finished().unwrap().1.unwrap();
        assert_eq!(thread, std::thread::current().id());
    }

    #[test]
    fn items_that_have_not_begun_can_be_withdrawn() {
        let (release, released) = channel::<()>();
        let released = Mutex::new(released);
        let (started, starts) = channel();
        let limits = PoolLimits {
            threads: 1,
            ..LIMITS
        };
        let (mut pool, mut poller) = pool(limits, move |_: &mut i32| {
            started.send(()).unwrap();
            released.lock().unwrap().recv().unwrap();
            Ok(())
        });
        for number in 0..5 {
            pool.submit(number).unwrap();
        }
        starts.recv().unwrap();
        assert_eq!(pool.withdraw(|number| number % 2 == 0), [2, 4]);
        assert_eq!(pool.len(), 3);
        for number in [0, 1, 3] {
            release.send(()).unwrap();
            assert!(is_reported(&mut poller, Duration::from_secs(10)));
            assert_eq!(pool.finished().unwrap().0, number);
        }
        assert!(pool.is_empty());
    }

    #[test]
    fn results_that_are_left_can_be_reported_again() {
        let (mut pool, mut poller) = pool(LIMITS, |_: &mut ()| Ok(()));
        pool.submit(()).unwrap();
        assert!(is_reported(&mut poller, Duration::from_secs(10)));
        assert!(!is_reported(&mut poller, Duration::ZERO));
        pool.report_again();
        assert!(is_reported(&mut poller, Duration::ZERO));
        assert!(pool.finished().is_some());
        assert!(pool.finished().is_none());
    }

    #[test]
    fn an_item_that_panics_comes_back_with_an_error() {
        for threads in [0, 1] {
            let limits = PoolLimits { threads, ..LIMITS };
            let (mut pool, mut poller) = pool(limits, |number: &mut u32| {
                assert_ne!(*number, 1, "as the test wants");
                Ok(())
            });
            for number in [1, 2] {
                pool.submit(number).unwrap();
                assert!(is_reported(&mut poller, Duration::from_secs(10)));
                let (item, outcome) = pool.finished().unwrap();
                assert_eq!((item, outcome.is_err()), (number, number == 1));
            }
            assert!(pool.is_empty());
        }
    }

    #[test]
    fn a_pool_that_is_gone_is_not_reported() {
        let (mut pool, mut poller) = pool(LIMITS, |_: &mut ()| Ok(()));
        pool.submit(()).unwrap();
        drop(pool);
        assert!(!is_reported(&mut poller, Duration::ZERO));
    }
}
