// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Limits the time of a wait on a socket that has no limit of its own.
//!
//! The `vhost` crate repeats a read that timed out forever, so a limit on the socket does not end
//! its wait. Shutting the socket down does.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

#[derive(Debug, Clone, Copy)]
enum State {
    Idle,
    Until(Instant),
    Ended,
}

type Shared = (Mutex<State>, Condvar);

/// A thread that shuts a socket down when an armed deadline passes.
#[derive(Debug)]
pub(super) struct Watchdog {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    /// Watches `socket`.
    pub(super) fn new(socket: UnixStream) -> Self {
        let shared = Arc::new((Mutex::new(State::Idle), Condvar::new()));
        let theirs = shared.clone();
        let thread = std::thread::spawn(move || watch(&theirs, &socket));
        Watchdog {
            shared,
            thread: Some(thread),
        }
    }

    /// Limits the work that starts now to `limit`, until [`Watchdog::disarm`].
    pub(super) fn arm(&self, limit: Duration) {
        self.set(State::Until(Instant::now() + limit));
    }

    /// Ends the limit.
    pub(super) fn disarm(&self) {
        self.set(State::Idle);
    }

    fn set(&self, state: State) {
        *self.shared.0.lock().expect("no panic under the lock") = state;
        self.shared.1.notify_one();
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.set(State::Ended);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn watch((state, changed): &Shared, socket: &UnixStream) {
    let mut now = state.lock().expect("no panic under the lock");
    loop {
        now = match *now {
            State::Ended => return,
            State::Idle => changed.wait(now).expect("no panic under the lock"),
            State::Until(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    let _ = socket.shutdown(Shutdown::Both);
                    *now = State::Idle;
                }
                changed
                    .wait_timeout(now, left)
                    .expect("no panic under the lock")
                    .0
            }
        };
    }
}
