// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The poller of handlers that bring none, and the place where watched files become ready for all others.

use std::collections::VecDeque;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;

use super::poller::{Poller, Token};
use super::watcher::{FileEvent, Readiness, Watcher};

/// Events that are fetched by one system call. The session is heard before the next ones.
const BATCH: usize = 64;
/// What fits the millisecond count of `epoll_pwait`.
const LONGEST: Duration = Duration::from_millis(i32::MAX as u64);

/// Waits by epoll.
#[derive(Debug)]
pub struct EpollPoller {
    watcher: Watcher,
    /// Events of watched files that are not delivered yet.
    files: VecDeque<FileEvent>,
    /// The last call may have left events.
    has_more: bool,
}

impl EpollPoller {
    /// # Errors
    /// The limit of open files is reached.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            watcher: Watcher::new()?,
            files: VecDeque::new(),
            has_more: false,
        })
    }

    /// A handle by which a handler has files watched.
    pub fn watcher(&self) -> Watcher {
        self.watcher.clone()
    }

    /// Takes the next watched file that became ready, by its token ([`Token::Watcher`]).
    pub fn next_file(&mut self) -> Option<(u32, Readiness)> {
        loop {
            let file = self.files.pop_front()?;
            if let Some(ready) = self.watcher.resolve(file) {
                return Some(ready);
            }
        }
    }

    /// Whether the last wait may have left events of watched files in the kernel. The poller that watches this one's file
    /// descriptor does not hear of those again.
    pub(super) fn has_more(&self) -> bool {
        self.has_more
    }
}

impl AsFd for EpollPoller {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.watcher.as_fd()
    }
}

impl Poller for EpollPoller {
    fn watch(&mut self, fd: BorrowedFd<'_>, token: Token) -> io::Result<()> {
        let data = EventData::new_u64(token.to_u64());
        Ok(epoll::add(self, fd, data, EventFlags::IN | EventFlags::ET)?)
    }

    fn forget(&mut self, fd: BorrowedFd<'_>, _token: Token) -> io::Result<()> {
        Ok(epoll::delete(self, fd)?)
    }

    fn wait(&mut self, ready: &mut Vec<Token>, timeout: Option<Duration>) -> io::Result<()> {
        // The kernel counts milliseconds, rounded up: to wake up early is to spin until it is time.
        let timeout = timeout.and_then(|timeout| timeout.min(LONGEST).try_into().ok());
        let mut room = [MaybeUninit::uninit(); BATCH];
        let events = match epoll::wait(&self.watcher, &mut room, timeout.as_ref()) {
            Ok((events, _)) => events,
            Err(Errno::INTR) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        };
        self.has_more = events.len() == BATCH;
        for event in events {
            match FileEvent::of(event) {
                Some(file) => self.files.push_back(file),
                None => ready.push(Token::from_u64(event.data.u64())),
            }
        }
        if !self.files.is_empty() {
            ready.push(Token::Watcher);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    #[test]
    fn an_unread_eventfd_is_reported_once_per_write() {
        let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let mut poller = EpollPoller::new().unwrap();
        poller.watch(event.as_fd(), Token::Kick(3)).unwrap();
        for _ in 0..3 {
            let mut ready = Vec::new();
            rustix::io::write(&event, &1u64.to_ne_bytes()).unwrap();
            poller.wait(&mut ready, None).unwrap();
            assert_eq!(ready, [Token::Kick(3)]);
            poller.wait(&mut ready, Some(Duration::ZERO)).unwrap();
            assert_eq!(ready.len(), 1);
        }
    }
}
