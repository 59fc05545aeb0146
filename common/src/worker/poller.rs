// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How a worker waits: for kicks, for the session, and for what its handler watches.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::time::Duration;

/// What became ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Token {
    /// The session has something to say.
    Control,
    /// The driver kicked this queue.
    Kick(u16),
    /// Something that the device's handler watches, by a number of its own.
    Device(u32),
}

impl Token {
    const KIND: u64 = 1 << 32;

    /// The token as the user data of epoll or io_uring; below 2^34.
    pub fn to_u64(self) -> u64 {
        match self {
            Self::Device(token) => u64::from(token),
            Self::Kick(queue) => Self::KIND | u64::from(queue),
            Self::Control => Self::KIND << 1,
        }
    }

    /// The token that [`Token::to_u64`] made this number of.
    pub fn from_u64(number: u64) -> Self {
        match number >> 32 {
            0 => Self::Device(number as u32),
            1 => Self::Kick(number as u16),
            _ => Self::Control,
        }
    }
}

/// Waits for file descriptors to become readable.
///
/// Readiness is reported when it arises, and not again while it lasts: eventfds need not be read.
pub trait Poller {
    /// Watches `fd` until it is forgotten. It must stay open until then.
    ///
    /// # Errors
    /// The kernel cannot wait on such a file, or has no room for one more.
    fn watch(&mut self, fd: BorrowedFd<'_>, token: Token) -> io::Result<()>;

    /// Ends a watch.
    ///
    /// # Errors
    /// `fd` was not watched.
    fn forget(&mut self, fd: BorrowedFd<'_>, token: Token) -> io::Result<()>;

    /// Waits until something is ready, for `timeout` at most (for ever without one), and adds it to
    /// `ready`.
    ///
    /// # Errors
    /// The kernel refuses to wait.
    fn wait(&mut self, ready: &mut Vec<Token>, timeout: Option<Duration>) -> io::Result<()>;
}

/// The poller of handlers that bring none.
#[derive(Debug)]
pub struct EpollPoller {
    epoll: RawFd,
}

impl EpollPoller {
    /// # Errors
    /// No more files may be opened.
    pub fn new() -> io::Result<Self> {
        epoll::create(true).map(|epoll| Self { epoll })
    }

    fn control(
        &self,
        operation: epoll::ControlOptions,
        fd: BorrowedFd<'_>,
        token: Token,
    ) -> io::Result<()> {
        let events = epoll::Events::EPOLLIN | epoll::Events::EPOLLET;
        let event = epoll::Event::new(events, token.to_u64());
        epoll::ctl(self.epoll, operation, fd.as_raw_fd(), event)
    }
}

impl Drop for EpollPoller {
    fn drop(&mut self) {
        let _ = epoll::close(self.epoll);
    }
}

impl Poller for EpollPoller {
    fn watch(&mut self, fd: BorrowedFd<'_>, token: Token) -> io::Result<()> {
        self.control(epoll::ControlOptions::EPOLL_CTL_ADD, fd, token)
    }

    fn forget(&mut self, fd: BorrowedFd<'_>, token: Token) -> io::Result<()> {
        self.control(epoll::ControlOptions::EPOLL_CTL_DEL, fd, token)
    }

    fn wait(&mut self, ready: &mut Vec<Token>, timeout: Option<Duration>) -> io::Result<()> {
        let mut events = [epoll::Event::new(epoll::Events::empty(), 0); 64];
        let milliseconds = timeout.map_or(-1, |timeout| {
            // Rounded up: to wake too early is to spin until it is time.
            i32::try_from(timeout.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX)
        });
        let count = match epoll::wait(self.epoll, milliseconds, &mut events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            result => result?,
        };
        ready.extend(
            events
                .iter()
                .take(count)
                .map(|event| Token::from_u64(event.data)),
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    #[test]
    fn tokens_survive_the_kernel() {
        for token in [
            Token::Control,
            Token::Kick(0),
            Token::Kick(u16::MAX),
            Token::Device(0),
            Token::Device(u32::MAX),
        ] {
            assert_eq!(Token::from_u64(token.to_u64()), token);
        }
    }

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
