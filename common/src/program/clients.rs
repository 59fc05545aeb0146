// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The clients of a socket that the control thread serves, without waiting for any of them.
//!
//! A client can only hurt itself: the number of clients is limited, and so are the bytes that each sends at a time and leaves unread, and
//! the time that it takes for one exchange.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, accept_with, recvmsg,
};

use super::socket::Listener;
use crate::file_limit::explained;
use crate::log_limit::warn_limited;
use crate::sandbox::Call;

/// Most clients at a time. A newcomer replaces an idle one, or waits if none is idle.
const MOST_CLIENTS: usize = 8;
/// How long an exchange may take, from its first byte (or from accepting a client that must ask at once) until the answer is sent.
const TIME: Duration = Duration::from_secs(5);
/// Most unread bytes of a client, besides the answer to its request. With more it is disconnected.
const MOST_UNREAD: usize = 64 << 10;
/// Most files that a client can pass with one request.
const MOST_FILES: usize = 16;
/// Steps for one client before the others get their turn.
const TURN: usize = 16;
/// How long to wait after a failure to accept a client, for example because too many files are open.
const PAUSE: Duration = Duration::from_millis(100);

/// The protocol of a socket.
pub trait Protocol {
    /// What it stores for each client.
    type State: Default;
    /// Clients can stay connected between requests, until a newcomer needs the place.
    const STAYS: bool;
    /// Clients can pass files.
    const FILES: bool;

    /// Returns what a client receives when it connects.
    fn greeting(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Takes one request from what a client sent, and returns what to do.
    fn answer(&mut self, request: &mut Request, state: &mut Self::State) -> Answer;
}

/// What a client has sent, and was not answered yet.
#[derive(Debug, Default)]
pub struct Request {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// The files that were passed with them.
    pub files: Vec<OwnedFd>,
    /// More files were passed than are accepted.
    pub has_lost_files: bool,
    /// The client sends nothing more.
    pub is_last: bool,
}

impl Request {
    /// Takes the files. Also returns whether more were passed.
    pub fn take_files(&mut self) -> (Vec<OwnedFd>, bool) {
        let files = std::mem::take(&mut self.files);
        (files, std::mem::take(&mut self.has_lost_files))
    }
}

/// What to do for a client.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// Wait for the rest of the request.
    Wait,
    /// Send these bytes.
    Send(Vec<u8>),
    /// Send these bytes, then close the connection.
    Close(Vec<u8>),
}

/// A socket and its clients.
pub struct Clients<P: Protocol> {
    listener: Arc<Listener>,
    protocol: P,
    clients: Vec<Client<P::State>>,
    /// When clients are accepted again after a failure.
    pause: Option<Instant>,
}

impl<P: Protocol> Clients<P> {
    pub fn new(listener: Arc<Listener>, protocol: P) -> Self {
        Self {
            listener,
            protocol,
            clients: Vec::new(),
            pause: None,
        }
    }

    /// Returns the system calls that this makes, besides those of all threads.
    pub fn calls() -> Vec<Call> {
        let mut calls = vec![Call::new(libc::SYS_accept4)];
        if P::FILES {
            calls.push(Call::new(libc::SYS_recvmsg));
        }
        calls
    }

    pub fn protocol(&mut self) -> &mut P {
        &mut self.protocol
    }

    /// Returns the files to wait for.
    pub fn files(&self) -> impl Iterator<Item = (BorrowedFd<'_>, PollFlags)> {
        let accepts = self.pause.is_none() && self.has_room();
        let listener = accepts.then(|| (self.listener.as_fd(), PollFlags::IN));
        listener
            .into_iter()
            .chain(self.clients.iter().map(Client::file))
    }

    /// Returns how long to wait at most.
    pub fn deadline(&self) -> Option<Instant> {
        let times = self.clients.iter().filter_map(Client::deadline::<P>);
        times.chain(self.pause).min()
    }

    /// Serves all clients as far as possible without waiting.
    pub fn advance(&mut self) {
        let now = Instant::now();
        // A client that has sent a request is not idle when a newcomer needs its place.
        self.serve(now);
        self.pause = self.pause.filter(|until| now < *until);
        if self.pause.is_none() && self.has_room() {
            self.accept(now);
            self.serve(now);
        }
    }

    fn serve(&mut self, now: Instant) {
        let protocol = &mut self.protocol;
        self.clients
            .retain_mut(|client| client.advance(protocol, now).is_ok());
    }

    /// Sends `bytes` to all clients for which `wants` is true.
    pub fn broadcast(&mut self, bytes: &[u8], wants: impl Fn(&P::State) -> bool) {
        let now = Instant::now();
        self.clients.retain_mut(|client| {
            !wants(&client.state) || {
                client.note(bytes, now);
                client.flush(now) != Err(Errno::PIPE) && client.unread() <= client.most_unread
            }
        });
    }

    fn has_room(&self) -> bool {
        self.clients.len() < MOST_CLIENTS || self.clients.iter().any(Client::is_idle::<P>)
    }

    fn accept(&mut self, now: Instant) {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        match accept_with(&self.listener, flags) {
            Ok(socket) => {
                if self.clients.len() >= MOST_CLIENTS {
                    self.drop_longest_idle();
                }
                let mut client = Client::new(socket, now);
                client.note(&self.protocol.greeting(), now);
                self.clients.push(client);
            }
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

    fn drop_longest_idle(&mut self) {
        let clients = self.clients.iter().enumerate();
        let idle = clients.filter(|(_, client)| client.is_idle::<P>());
        if let Some((place, _)) = idle.min_by_key(|(_, client)| client.since) {
            self.clients.remove(place);
        }
    }
}

/// A connected client.
struct Client<S> {
    socket: OwnedFd,
    request: Request,
    /// Bytes to send, and how many of them have been sent.
    output: (Vec<u8>, usize),
    /// Most bytes of the output that may be unsent.
    most_unread: usize,
    /// The connection is closed once the output is sent.
    closes: bool,
    /// There is more to do when its next turn comes.
    waits_for_turn: bool,
    /// When the present exchange began, or the last one ended.
    since: Instant,
    state: S,
}

impl<S: Default> Client<S> {
    fn new(socket: OwnedFd, now: Instant) -> Self {
        Self {
            socket,
            request: Request::default(),
            output: (Vec::new(), 0),
            most_unread: MOST_UNREAD,
            closes: false,
            waits_for_turn: false,
            since: now,
            state: S::default(),
        }
    }

    fn unread(&self) -> usize {
        self.output.0.len().saturating_sub(self.output.1)
    }

    /// Returns whether there is neither a partial request nor unsent output.
    fn is_idle<P: Protocol>(&self) -> bool {
        P::STAYS && self.request.bytes.is_empty() && self.unread() == 0
    }

    fn file(&self) -> (BorrowedFd<'_>, PollFlags) {
        let flags = match self.unread() {
            0 => PollFlags::IN,
            _ => PollFlags::OUT,
        };
        (self.socket.as_fd(), flags)
    }

    fn deadline<P: Protocol>(&self) -> Option<Instant> {
        match (self.waits_for_turn, self.is_idle::<P>()) {
            (true, _) => Some(self.since),
            (false, true) => None,
            (false, false) => Some(self.since + TIME),
        }
    }

    /// Adds bytes to the output.
    fn note(&mut self, bytes: &[u8], now: Instant) {
        if self.unread() == 0 && self.request.bytes.is_empty() {
            self.since = now;
        }
        self.output.0.extend_from_slice(bytes);
    }

    /// Sends output as far as possible without waiting.
    fn flush(&mut self, now: Instant) -> Result<(), Errno> {
        loop {
            let (output, sent) = &mut self.output;
            match output.get(*sent..) {
                None | Some([]) => break,
                Some(rest) => {
                    let count = rustix::io::write(&self.socket, rest)?;
                    *sent = sent.saturating_add(count);
                }
            }
        }
        if !self.output.0.is_empty() {
            self.output = (Vec::new(), 0);
            self.most_unread = MOST_UNREAD;
            self.since = now;
        }
        Ok(())
    }

    /// Serves the client until it must be waited for, or its turn is over.
    ///
    /// # Errors
    /// The connection is over.
    fn advance<P: Protocol<State = S>>(
        &mut self,
        protocol: &mut P,
        now: Instant,
    ) -> Result<(), Errno> {
        self.waits_for_turn = false;
        if !self.is_idle::<P>() && now >= self.since + TIME {
            return Err(Errno::TIMEDOUT);
        }
        for _ in 0..TURN {
            match self.exchange(protocol, now) {
                Ok(()) => {}
                Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
                Err(errno) => return Err(errno),
            }
        }
        self.waits_for_turn = true;
        Ok(())
    }

    /// Makes one step: sends, answers or receives. AGAIN means that the client must be waited for.
    fn exchange<P: Protocol<State = S>>(
        &mut self,
        protocol: &mut P,
        now: Instant,
    ) -> Result<(), Errno> {
        self.flush(now)?;
        if self.closes {
            return Err(Errno::SHUTDOWN);
        }
        match protocol.answer(&mut self.request, &mut self.state) {
            Answer::Wait if self.request.is_last => return Err(Errno::SHUTDOWN),
            Answer::Wait => return self.receive::<P>(now),
            Answer::Send(bytes) => self.output.0.extend(bytes),
            Answer::Close(bytes) => {
                self.output.0.extend(bytes);
                self.closes = true;
            }
        }
        self.most_unread = self.unread().saturating_add(MOST_UNREAD);
        Ok(())
    }

    fn receive<P: Protocol>(&mut self, now: Instant) -> Result<(), Errno> {
        let mut bytes = [0; 4096];
        let count = match P::FILES {
            true => self.receive_with_files(&mut bytes)?,
            false => rustix::io::read(&self.socket, &mut bytes)?,
        };
        if P::STAYS && self.request.bytes.is_empty() {
            self.since = now;
        }
        self.request.is_last = count == 0;
        let received = bytes.get(..count).unwrap_or_default();
        self.request.bytes.extend_from_slice(received);
        Ok(())
    }

    fn receive_with_files(&mut self, bytes: &mut [u8]) -> Result<usize, Errno> {
        let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FILES))];
        let mut control = RecvAncillaryBuffer::new(&mut room);
        let flags = RecvFlags::CMSG_CLOEXEC;
        let pieces = &mut [IoSliceMut::new(bytes)];
        let received = recvmsg(&self.socket, pieces, &mut control, flags)?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(files) = message {
                self.request.files.extend(files);
            }
        }
        let is_cut = received.flags.contains(rustix::net::ReturnFlags::CTRUNC);
        self.request.has_lost_files |= is_cut || self.request.files.len() > MOST_FILES;
        self.request.files.truncate(MOST_FILES);
        Ok(received.bytes)
    }
}
