// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How a worker waits: for kicks, for the session, and for what its handler watches.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

/// What became ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Token {
    /// The session sent a command.
    Control,
    /// The driver kicked this queue.
    Kick(u16),
    /// An event of the handler's own poller, by a number of the handler's choice.
    Device(u32),
    /// Files of the [`Watcher`](super::Watcher) are ready.
    Watcher,
}

impl Token {
    const KIND: u64 = 1 << 32;

    /// The token as the user data of epoll or io_uring; below 2^34.
    pub fn to_u64(self) -> u64 {
        match self {
            Self::Device(token) => u64::from(token),
            Self::Kick(queue) => Self::KIND | u64::from(queue),
            Self::Control => Self::KIND * 2,
            Self::Watcher => Self::KIND * 3,
        }
    }

    /// Converts the result of [`Token::to_u64`] back.
    pub fn from_u64(number: u64) -> Self {
        match number >> 32 {
            0 => Self::Device(number as u32),
            1 => Self::Kick(number as u16),
            2 => Self::Control,
            _ => Self::Watcher,
        }
    }
}

/// Waits for file descriptors to become readable, edge-triggered: readiness is reported once when it arises, so an eventfd need not
/// be read.
pub trait Poller {
    /// Watches `fd` until it is forgotten. It must stay open until then.
    ///
    /// # Errors
    /// The kernel cannot wait on such a file, or a limit is reached.
    fn watch(&mut self, fd: BorrowedFd<'_>, token: Token) -> io::Result<()>;

    /// Stops watching `fd`.
    ///
    /// # Errors
    /// `fd` was not watched.
    fn forget(&mut self, fd: BorrowedFd<'_>, token: Token) -> io::Result<()>;

    /// Waits until something is ready, at most for `timeout` (indefinitely without one), and adds it to `ready`.
    ///
    /// # Errors
    /// The wait system call fails.
    fn wait(&mut self, ready: &mut Vec<Token>, timeout: Option<Duration>) -> io::Result<()>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_survive_the_kernel() {
        for token in [
            Token::Control,
            Token::Kick(0),
            Token::Kick(u16::MAX),
            Token::Device(0),
            Token::Device(u32::MAX),
            Token::Watcher,
        ] {
            assert!(token.to_u64() < 1 << 34);
            assert_eq!(Token::from_u64(token.to_u64()), token);
        }
    }
}
