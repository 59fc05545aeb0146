// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `--stats-socket`: gives statistics to whoever connects, to HTTP clients and to those that just read.
//!
//! A client may do what it likes: what it asks is bounded, and so are the time that it gets and the number of clients, and nobody
//! waits for it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};

use super::socket::Listener;
use crate::file_limit::explained;
use crate::log_limit::warn_limited;
use crate::sandbox::Call;
use crate::statistics::Statistics;

/// Clients at a time. Others wait until one of them is gone.
const MOST_CLIENTS: usize = 8;
/// How long a client may take, from when it is accepted until it has its answer.
const TIME: Duration = Duration::from_secs(5);
/// Bytes of a request.
const MOST_BYTES: usize = 8 << 10;
/// How long nobody is accepted after that failed: too many files are open, say.
const PAUSE: Duration = Duration::from_millis(100);

/// The socket, and who is connected.
pub struct StatsSocket {
    listener: Arc<Listener>,
    statistics: Arc<Statistics>,
    clients: Vec<Client>,
    /// Until when nobody is accepted.
    pause: Option<Instant>,
}

impl StatsSocket {
    pub fn new(listener: Arc<Listener>, statistics: Arc<Statistics>) -> Self {
        Self {
            listener,
            statistics,
            clients: Vec::new(),
            pause: None,
        }
    }

    /// The system calls that it takes, beside those that are made everywhere.
    pub fn calls() -> [Call; 1] {
        [Call::new(libc::SYS_accept4)]
    }

    /// What to wait for.
    pub fn files(&self) -> impl Iterator<Item = (BorrowedFd<'_>, PollFlags)> {
        let accepts = self.pause.is_none() && self.clients.len() < MOST_CLIENTS;
        let listener = accepts.then(|| (self.listener.as_fd(), PollFlags::IN));
        listener
            .into_iter()
            .chain(self.clients.iter().map(Client::file))
    }

    /// Until when to wait at most.
    pub fn deadline(&self) -> Option<Instant> {
        let times = self.clients.iter().map(|client| client.until);
        times.chain(self.pause).min()
    }

    /// Does what can be done without waiting.
    pub fn advance(&mut self) {
        let now = Instant::now();
        self.pause = self.pause.filter(|until| now < *until);
        if self.pause.is_none() && self.clients.len() < MOST_CLIENTS {
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            match accept_with(&self.listener, flags) {
                Ok(socket) => self.clients.push(Client::new(socket, now + TIME)),
                Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => {}
                Err(errno) => {
                    warn_limited(format_args!(
                        "cannot accept a client on {}: {}",
                        self.listener,
                        explained(&errno.into())
                    ));
                    self.pause = Some(now + PAUSE);
                }
            }
        }
        let statistics = &self.statistics;
        self.clients.retain_mut(|client| {
            now < client.until && matches!(client.advance(statistics), Err(Errno::AGAIN))
        });
    }
}

/// Somebody who is connected.
struct Client {
    socket: OwnedFd,
    /// When its time is over.
    until: Instant,
    request: Vec<u8>,
    /// What it is still to get, once it has asked.
    answer: Option<io::Cursor<Vec<u8>>>,
}

impl Client {
    fn new(socket: OwnedFd, until: Instant) -> Self {
        Self {
            socket,
            until,
            request: Vec::new(),
            answer: None,
        }
    }

    fn file(&self) -> (BorrowedFd<'_>, PollFlags) {
        let flags = match self.answer {
            None => PollFlags::IN,
            Some(_) => PollFlags::OUT,
        };
        (self.socket.as_fd(), flags)
    }

    /// Reads what it asks, and answers.
    ///
    /// # Errors
    /// [`Errno::AGAIN`] if it must be waited for; all others end the connection.
    fn advance(&mut self, statistics: &Statistics) -> Result<(), Errno> {
        while self.answer.is_none() {
            let mut bytes = [0; 1024];
            let count = rustix::io::read(&self.socket, &mut bytes)?;
            self.request
                .extend_from_slice(bytes.get(..count).unwrap_or_default());
            if count == 0 || ends(&self.request) || self.request.len() > MOST_BYTES {
                let answer = answer(&self.request, statistics);
                self.answer = Some(io::Cursor::new(answer));
            }
        }
        while let Some(answer) = &mut self.answer {
            let start = usize::try_from(answer.position()).unwrap_or(usize::MAX);
            match answer.get_ref().get(start..) {
                None | Some([]) => break,
                Some(rest) => {
                    let count = rustix::io::write(&self.socket, rest)?;
                    answer.set_position(answer.position().saturating_add(count as u64));
                }
            }
        }
        Ok(())
    }
}

/// Whether a request of HTTP ends here: with an empty line.
fn ends(request: &[u8]) -> bool {
    let has = |end: &[u8]| request.windows(end.len()).any(|bytes| bytes == end);
    has(b"\r\n\r\n") || has(b"\n\n")
}

/// The answer to a request of HTTP, or to none at all.
fn answer(request: &[u8], statistics: &Statistics) -> Vec<u8> {
    if request.is_empty() {
        return statistics.prometheus().into_bytes();
    }
    let refused =
        |status: &str| format!("HTTP/1.0 {status}\r\nContent-Length: 0\r\n\r\n").into_bytes();
    if request.len() > MOST_BYTES {
        return refused("413 Content Too Large");
    }
    if !request.starts_with(b"GET ") {
        return refused("405 Method Not Allowed\r\nAllow: GET");
    }
    let page = statistics.prometheus();
    let head = format!(
        "HTTP/1.0 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {}\r\n\r\n",
        page.len()
    );
    (head + &page).into_bytes()
}
