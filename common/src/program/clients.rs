// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A socket whose clients are served by the control thread, which waits for none of them.
//!
//! A client can only hurt itself: the number of clients is bounded, and so are what each may send at a time, what it leaves unread, and
//! how long it may take for one exchange.

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

/// Clients at a time. If none of them is idle, others wait.
const MOST_CLIENTS: usize = 8;
/// How long an exchange may take: from its first byte, or from when the client is accepted, until the client has the answer.
const TIME: Duration = Duration::from_secs(5);
/// Most bytes that a client leaves unread before it is dropped, beside the answer to its request.
const MOST_UNREAD: usize = 64 << 10;
/// Most files that come with one request.
const MOST_FILES: usize = 16;
/// Exchanges of one client before others get their turn.
const TURN: usize = 16;
/// How long nobody is accepted after that failed, for example because too many files are open.
const PAUSE: Duration = Duration::from_millis(100);

/// What is said on a socket.
pub trait Protocol {
    /// What it keeps of each client.
    type State: Default;
    /// Clients may stay connected between requests, until a newcomer needs the place.
    const STAYS: bool;
    /// Clients may pass files.
    const FILES: bool;

    /// What a client gets before it asks.
    fn greeting(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Takes one request out of what a client sent, and answers.
    fn answer(&mut self, request: &mut Request, state: &mut Self::State) -> Answer;
}

/// What a client sent that is not answered yet.
#[derive(Debug, Default)]
pub struct Request {
    /// Bytes.
    pub bytes: Vec<u8>,
    /// Files that came with them.
    pub files: Vec<OwnedFd>,
    /// More files came than are taken.
    pub has_lost_files: bool,
    /// Nothing more comes.
    pub is_last: bool,
}

impl Request {
    /// Takes the files, and whether there were more of them.
    pub fn take_files(&mut self) -> (Vec<OwnedFd>, bool) {
        let files = std::mem::take(&mut self.files);
        (files, std::mem::take(&mut self.has_lost_files))
    }
}

/// What to do with a client.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// Wait: the request is not complete.
    Wait,
    /// Send this.
    Send(Vec<u8>),
    /// Send this, then close the connection.
    Close(Vec<u8>),
}

/// A socket and its clients.
pub struct Clients<P: Protocol> {
    listener: Arc<Listener>,
    protocol: P,
    clients: Vec<Client<P::State>>,
    /// Until when nobody is accepted.
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

    /// The system calls that it takes, beside those that are made everywhere.
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

    /// What to wait for.
    pub fn files(&self) -> impl Iterator<Item = (BorrowedFd<'_>, PollFlags)> {
        let accepts = self.pause.is_none() && self.has_room();
        let listener = accepts.then(|| (self.listener.as_fd(), PollFlags::IN));
        listener
            .into_iter()
            .chain(self.clients.iter().map(Client::file))
    }

    /// Until when to wait at most.
    pub fn deadline(&self) -> Option<Instant> {
        let times = self.clients.iter().filter_map(Client::deadline::<P>);
        times.chain(self.pause).min()
    }

    /// Does what can be done without waiting.
    pub fn advance(&mut self) {
        let now = Instant::now();
        self.pause = self.pause.filter(|until| now < *until);
        if self.pause.is_none() && self.has_room() {
            self.accept(now);
        }
        let protocol = &mut self.protocol;
        self.clients
            .retain_mut(|client| client.advance(protocol, now).is_ok());
    }

    /// Sends `bytes` to the clients that `wants` chooses.
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

/// Somebody who is connected.
struct Client<S> {
    socket: OwnedFd,
    request: Request,
    /// Bytes to send, and how many of them are sent.
    output: (Vec<u8>, usize),
    /// How much of the output may be unread.
    most_unread: usize,
    /// The connection is closed when the output is sent.
    closes: bool,
    /// It has had its turn, and there is more to do.
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

    /// Whether neither an unfinished request nor unread output is there.
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

    /// Adds to what the client gets.
    fn note(&mut self, bytes: &[u8], now: Instant) {
        if self.unread() == 0 && self.request.bytes.is_empty() {
            self.since = now;
        }
        self.output.0.extend_from_slice(bytes);
    }

    /// Sends what can be sent without waiting.
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

    /// Serves the client until it must be waited for, or others get their turn.
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

    /// One step: sends, answers or receives. AGAIN means that the client must be waited for.
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
        if self.request.bytes.is_empty() {
            self.since = match P::STAYS {
                true => now,
                false => self.since,
            };
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
