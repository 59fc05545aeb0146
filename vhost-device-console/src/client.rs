// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A client of a port: a file that reads what the guest writes, and whose bytes the guest reads. No call on it blocks.

use std::io::{self, ErrorKind, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, retry_on_intr};
use vhost_device_common::worker::{Readiness, Watcher};

use crate::filter::CAN;
use crate::history::History;

/// Most bytes that are read from a terminal before the guest has buffers for them.
const TYPED_AHEAD: usize = 4 << 10;
/// Ctrl-], which ends the program if it is typed this often within the time.
const ESCAPE: u8 = 0x1d;
const ESCAPES: u32 = 3;
const ESCAPE_TIME: Duration = Duration::from_secs(1);

/// What sort of file a client is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A connection: the client is gone when its other end is closed.
    Connection,
    /// A pseudoterminal, which programs open and close.
    Pty,
    /// A file for as long as the program runs, such as stdin and stdout.
    Fixed,
}

/// The result of reading from a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// So many bytes.
    Bytes(usize),
    /// Nothing at present.
    Nothing,
    /// The end: the client will never send anything again.
    End,
}

/// A client of a port.
#[derive(Debug)]
pub struct Client {
    /// Number among the clients of the port.
    pub number: u16,
    pub kind: Kind,
    /// For both directions, unless there is an `input`.
    file: OwnedFd,
    /// The file to read from, if it is another one.
    input: Option<OwnedFd>,
    /// It can send bytes to the guest. False after its end.
    pub sends: bool,
    /// It receives bytes from the guest.
    pub receives: bool,
    /// A program has opened it.
    pub is_open: bool,
    /// There may be bytes to read, and room to write.
    pub readable: bool,
    pub writable: bool,
    /// Position in the port's history of the next byte to send to it.
    pub next: u64,
    /// Bytes that it missed because it was too slow.
    pub missed: u64,
    /// It receives what a filter has passed: after a gap it begins with a line, as a sequence must not begin in the middle.
    pub is_filtered: bool,
    /// It is to receive CAN, which ends a sequence that it has the beginning of.
    cancels: bool,
    /// When its other end was found closed, although the guest has not read all that it sent.
    pub gone: Option<Instant>,
    /// For a terminal in which Ctrl-] ends the program.
    keys: Option<Keys>,
}

impl Client {
    /// Creates a client for both directions, which is open. `file` does not block.
    pub fn new(number: u16, kind: Kind, file: OwnedFd, next: u64) -> Self {
        Self {
            number,
            kind,
            file,
            input: None,
            sends: true,
            receives: true,
            is_open: true,
            readable: true,
            writable: true,
            next,
            missed: 0,
            is_filtered: false,
            cancels: false,
            gone: None,
            keys: None,
        }
    }

    /// Reads from `input` instead.
    pub fn with_input(mut self, input: OwnedFd) -> Self {
        self.input = Some(input);
        self
    }

    /// Ends the program when Ctrl-] is typed three times within a second.
    pub fn with_escape(mut self) -> Self {
        self.keys = Some(Keys::default());
        self
    }

    /// Returns the file that is written to.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn source(&self) -> BorrowedFd<'_> {
        self.input.as_ref().unwrap_or(&self.file).as_fd()
    }

    /// Watches its files as `token`.
    ///
    /// # Errors
    /// The limit of open files is reached.
    pub fn watch(&mut self, watcher: &Watcher, token: u32) -> io::Result<()> {
        (self.readable, self.writable) = (true, true);
        let add = |file: BorrowedFd<'_>, readiness| match watcher.add(file, readiness, token) {
            // Regular files are always ready.
            Err(error) if error.kind() == ErrorKind::PermissionDenied => Ok(()),
            outcome => outcome,
        };
        match &self.input {
            Some(input) => {
                add(input.as_fd(), Readiness::READABLE)?;
                add(self.file(), Readiness::WRITABLE)
            }
            None => add(self.file(), Readiness::READABLE | Readiness::WRITABLE),
        }
    }

    /// Stops watching its files.
    pub fn forget(&self, watcher: &Watcher) {
        watcher.remove(self.file());
        self.input.iter().for_each(|input| watcher.remove(input));
    }

    /// Returns whether it is hung up: the other end of a connection, or all programs that had opened the terminal, are gone.
    pub fn is_hung_up(&self) -> bool {
        self.has(PollFlags::HUP)
    }

    /// Returns whether it will send nothing more than what it has sent already.
    pub fn is_ending(&self) -> bool {
        !self.sends || self.has(PollFlags::HUP | PollFlags::RDHUP)
    }

    /// Returns how many bytes that it has sent were not read.
    pub fn unread(&self) -> u64 {
        rustix::io::ioctl_fionread(self.source()).unwrap_or(0)
    }

    fn has(&self, flags: PollFlags) -> bool {
        let mut fds = [PollFd::from_borrowed_fd(self.source(), PollFlags::RDHUP)];
        let now = Timespec::default();
        let polled = retry_on_intr(|| poll(&mut fds, Some(&now)));
        let [polled_fd] = fds;
        polled.is_ok() && polled_fd.revents().intersects(flags)
    }

    /// Returns whether there may be bytes to read.
    pub fn has_input(&self) -> bool {
        let is_typed = |keys: &Keys| !keys.typed.is_empty();
        self.readable || self.keys.as_ref().is_some_and(is_typed)
    }

    /// Reads bytes that it sent.
    pub fn read(&mut self, bytes: &mut [u8]) -> Received {
        if self.keys.is_some() {
            self.type_ahead();
        }
        match &mut self.keys {
            Some(keys) if !keys.typed.is_empty() => Received::Bytes(keys.take(bytes)),
            Some(_) => Received::Nothing,
            None => self.read_file(bytes),
        }
    }

    /// Reads what was typed in a terminal, also if the guest has no buffers for it, so that Ctrl-] works.
    pub fn type_ahead(&mut self) {
        let mut bytes = [0; TYPED_AHEAD];
        while self.readable
            && let Some(keys) = &self.keys
            && let room = TYPED_AHEAD.saturating_sub(keys.typed.len())
            && let Some(room) = bytes.get_mut(..room).filter(|room| !room.is_empty())
        {
            let Received::Bytes(count) = self.read_file(room) else {
                return;
            };
            if let Some(keys) = &mut self.keys {
                keys.add(bytes.get(..count).unwrap_or_default());
            }
        }
    }

    fn read_file(&mut self, bytes: &mut [u8]) -> Received {
        match retry_on_intr(|| rustix::io::read(self.source(), &mut *bytes)) {
            Ok(0) => {}
            Ok(count) => return Received::Bytes(count),
            Err(Errno::AGAIN) => {
                self.readable = false;
                return Received::Nothing;
            }
            // A pseudoterminal that no program has open.
            Err(Errno::IO) if self.kind == Kind::Pty => {
                self.readable = false;
                return Received::Nothing;
            }
            Err(_) => {}
        }
        (self.readable, self.sends) = (false, false);
        Received::End
    }

    /// Sends what it has not received of `history`, as much as it has room for. Returns the number of bytes.
    ///
    /// # Errors
    /// It cannot receive anything any more.
    pub fn write(&mut self, history: &History) -> io::Result<u64> {
        let mut written = 0;
        while self.receives && self.writable && self.next < history.end() {
            self.miss(history);
            let cancel: &[u8] = if self.cancels { &[CAN] } else { &[] };
            let [first, second] = history.after(self.next);
            let parts = [cancel, first, second].map(IoSlice::new);
            match retry_on_intr(|| rustix::io::writev(&self.file, &parts)) {
                Ok(count) => {
                    let count = count.saturating_sub(cancel.len());
                    self.cancels = false;
                    self.next += count as u64;
                    written += count as u64;
                }
                Err(Errno::AGAIN) => self.writable = false,
                Err(Errno::IO) if self.kind == Kind::Pty => self.writable = false,
                Err(errno) => {
                    self.receives = false;
                    return Err(errno.into());
                }
            }
        }
        Ok(written)
    }

    /// Moves past bytes that `history` no longer has.
    pub fn miss(&mut self, history: &History) {
        let mut first = history.start();
        if self.next >= first {
            return;
        }
        if self.is_filtered {
            first = history.line_after(first);
            self.cancels = true;
        }
        self.missed += first - self.next;
        self.next = first;
    }
}

/// What was typed in a terminal and not yet read.
#[derive(Debug, Default)]
struct Keys {
    typed: Vec<u8>,
    /// How often the escape key was typed, and when for the first time.
    escapes: u32,
    first: Option<Instant>,
}

impl Keys {
    fn add(&mut self, bytes: &[u8]) {
        self.typed.extend_from_slice(bytes);
        for byte in bytes {
            if *byte != ESCAPE {
                self.escapes = 0;
                continue;
            }
            let is_late = |first: &Instant| first.elapsed() > ESCAPE_TIME;
            if self.escapes == 0 || self.first.as_ref().is_none_or(is_late) {
                (self.escapes, self.first) = (0, Some(Instant::now()));
            }
            self.escapes += 1;
            if self.escapes == ESCAPES {
                log::info!("Ctrl-] was typed three times; the program ends");
                let _ = signal_hook::low_level::raise(signal_hook::consts::SIGTERM);
            }
        }
    }

    fn take(&mut self, bytes: &mut [u8]) -> usize {
        let count = bytes.len().min(self.typed.len());
        for (place, byte) in bytes.iter_mut().zip(self.typed.drain(..count)) {
            *place = byte;
        }
        count
    }
}
