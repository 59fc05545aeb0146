// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A timer for handlers.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use crate::log_limit::warn_limited;

/// A one-shot timer (timerfd, CLOCK_MONOTONIC). Once [added](super::Watcher::add) to a watcher, it is reported once each time that it
/// expires; it need not be read.
#[derive(Debug)]
pub struct Timer(OwnedFd);

impl Timer {
    /// Creates a timer that is not set.
    ///
    /// # Errors
    /// The limit of open files is reached.
    pub fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        Ok(Self(timerfd_create(TimerfdClockId::Monotonic, flags)?))
    }

    /// Sets the timer to expire after `time`. This replaces any earlier setting.
    pub fn set(&self, time: Duration) {
        // Zero would disarm the timer.
        let time = time.max(Duration::from_nanos(1));
        let once = Itimerspec {
            it_interval: Timespec::default(),
            it_value: Timespec::try_from(time).unwrap_or(Timespec {
                tv_sec: i64::MAX,
                tv_nsec: 0,
            }),
        };
        if let Err(errno) = timerfd_settime(&self.0, TimerfdTimerFlags::empty(), &once) {
            warn_limited(format_args!("cannot set a timer to {time:?}: {errno}"));
        }
    }
}

impl AsFd for Timer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::worker::{EpollPoller, Poller, Token};

    #[test]
    fn a_timer_is_ready_once_after_each_time_that_it_is_set() {
        let timer = Timer::new().unwrap();
        let mut poller = EpollPoller::new().unwrap();
        poller.watch(timer.as_fd(), Token::Device(7)).unwrap();
        for milliseconds in [20, 0, 5] {
            let time = Duration::from_millis(milliseconds);
            let start = Instant::now();
            timer.set(time);
            let mut ready = Vec::new();
            poller.wait(&mut ready, None).unwrap();
            assert_eq!(ready, [Token::Device(7)]);
            assert!(start.elapsed() >= time);
            poller.wait(&mut ready, Some(Duration::ZERO)).unwrap();
            assert_eq!(ready.len(), 1, "not ready again");
        }
    }

    #[test]
    fn the_last_setting_of_a_timer_counts() {
        let timer = Timer::new().unwrap();
        let mut poller = EpollPoller::new().unwrap();
        poller.watch(timer.as_fd(), Token::Device(7)).unwrap();
        timer.set(Duration::ZERO);
        timer.set(Duration::MAX);
        let mut ready = Vec::new();
        poller.wait(&mut ready, Some(Duration::ZERO)).unwrap();
        assert_eq!(ready, []);
    }
}
