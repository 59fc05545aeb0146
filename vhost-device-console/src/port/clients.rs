// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The clients of a port: how they come and go, and which one the guest hears.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use vhost_device_common::worker::{Readiness, Watcher};
use vhost_device_common::{info_limited, warn_limited};

use super::{MAX_CLIENTS, NOTIFIER, Port, SCROLLBACK};
use crate::client::{Client, Kind, Received};
use crate::control::Size;
use crate::endpoint::Endpoint;
use crate::log_file::LogFile;

/// How long a client that is gone keeps its place for bytes that the guest has not read, if others want the place.
const KEPT_TIME: Duration = Duration::from_secs(5);
/// Number of reads at most that discard the bytes of a client at a time.
const MAX_DISCARDS: usize = 256;

impl Port {
    fn token(&self, number: u16) -> u32 {
        self.number << 16 | u32::from(number)
    }

    /// Watches the files of the port.
    ///
    /// # Errors
    /// The limit of open files is reached.
    pub fn watch(&mut self, watcher: &Watcher) -> io::Result<()> {
        self.watcher = Some(watcher.clone());
        if let Some(notifier) = self.endpoint.notifier() {
            watcher.add(notifier, Readiness::READABLE, self.token(NOTIFIER))?;
        }
        let port = self.number << 16;
        for client in &mut self.clients {
            client.watch(watcher, port | u32::from(client.number))?;
        }
        if let Endpoint::Stdio(stdio) = &self.endpoint {
            stdio.enter_raw_mode();
        }
        Ok(())
    }

    /// Ends [`Port::watch`]: the thread that watched the files has ended.
    pub fn unwatch(&mut self) {
        self.watcher = None;
        // The threads that write have ended too.
        self.files.iter_mut().for_each(LogFile::ended);
        if let Endpoint::Stdio(stdio) = &self.endpoint {
            stdio.leave_raw_mode();
        }
    }

    /// Returns where in the history a client begins.
    pub(super) fn first_position(&self) -> u64 {
        if matches!(self.endpoint, Endpoint::File) {
            // There are no clients; what the guest wrote is for the files of this device.
            return self.history.end();
        }
        if !self.is_console() {
            return self.delivered;
        }
        let first = self.history.end().saturating_sub(SCROLLBACK);
        match &self.filter {
            _ if first <= self.begin => self.begin,
            // Not in the middle of a sequence.
            Some(_) => self.history.line_after(first),
            None => first,
        }
    }

    fn add_client(&mut self, file: OwnedFd) {
        let is_free = |number: &u16| self.clients.iter().all(|client| client.number != *number);
        let numbers = (self.last_number..NOTIFIER).chain(0..self.last_number);
        let Some(number) = numbers.skip(1).find(is_free) else {
            return;
        };
        self.last_number = number;
        let token = self.token(number);
        let mut client = Client::new(number, Kind::Connection, file, self.first_position());
        client.is_filtered = self.filter.is_some();
        let watched = self
            .watcher
            .as_ref()
            .map(|watcher| client.watch(watcher, token));
        match watched {
            Some(Err(error)) => warn_limited(format_args!(
                "port {}: cannot wait for a client: {error}; it is disconnected",
                self.number
            )),
            _ => {
                self.clients.push(client);
                info_limited(format_args!(
                    "port {}: a client connected; {} in total",
                    self.number,
                    self.clients.len()
                ));
            }
        }
    }

    fn remove_client(&mut self, index: usize) {
        let mut client = self.clients.remove(index);
        client.miss(&self.history);
        self.counters.missed = self.counters.missed.saturating_add(client.missed);
        self.watcher
            .iter()
            .for_each(|watcher| client.forget(watcher));
        info_limited(format_args!(
            "port {}: a client disconnected; {} in total",
            self.number,
            self.clients.len()
        ));
    }

    /// Returns the client whose bytes the guest receives: the first one that can send any. What was typed in a terminal is read
    /// after it was closed, too.
    pub(super) fn sender(&self) -> Option<usize> {
        let can_send = |client: &Client| client.sends && (client.is_open || client.has_input());
        self.clients.iter().position(can_send)
    }

    /// Returns the client for which the guest waits.
    pub(super) fn receiver(&self) -> Option<&Client> {
        self.clients
            .iter()
            .find(|client| client.is_open && client.receives)
    }

    /// Handles an event of a client.
    pub fn client_ready(&mut self, number: u16, readiness: Readiness) {
        let Some(client) = self
            .clients
            .iter_mut()
            .find(|client| client.number == number)
        else {
            return;
        };
        client.readable |= readiness.contains(Readiness::READABLE);
        client.writable |= readiness.contains(Readiness::WRITABLE);
        if client.kind == Kind::Pty {
            self.look_at_terminal();
        }
        // A client that is gone is ready for everything.
        if readiness.contains(Readiness::READABLE) {
            self.settle();
        }
        self.flush();
    }

    /// Handles an event of the endpoint.
    pub fn notified(&mut self) {
        match &self.endpoint {
            Endpoint::Pty(pty) => {
                pty.read_notifications();
                self.look_at_terminal();
            }
            Endpoint::Stdio(stdio) => {
                if let Some(file) = stdio.resized() {
                    crate::stdio::discard(file);
                }
            }
            Endpoint::Listen(..) => self.may_accept = true,
            Endpoint::Connect(_) | Endpoint::File | Endpoint::Fd => {}
        }
        self.settle();
        self.flush();
    }

    /// Finds out whether a program has the terminal open.
    fn look_at_terminal(&mut self) {
        let is_opened = |client: &Client| !client.is_open && !client.is_hung_up();
        if self.clients.iter().any(is_opened) {
            let first = self.first_position();
            for client in &mut self.clients {
                (client.readable, client.writable) = (true, true);
                client.next = first;
                client.is_open = true;
            }
        } else {
            for client in &mut self.clients {
                client.is_open &= !client.is_hung_up();
            }
        }
    }

    /// Accepts clients as long as there is room for them; the others wait. Forgets those that are gone.
    pub(super) fn settle(&mut self) {
        self.forget_gone_clients();
        while self.may_accept && self.has_room() {
            match self.endpoint.accept() {
                Ok(Some(file)) => {
                    self.add_client(file);
                    self.forget_gone_clients();
                }
                Ok(None) => self.may_accept = false,
                Err(error) => {
                    warn_limited(format_args!(
                        "port {}: cannot accept a client, trying again: {error}",
                        self.number
                    ));
                    break;
                }
            }
        }
        self.note_open();
    }

    /// Notes for the driver that this side was closed, even if it is open again when the driver is told.
    fn note_open(&mut self) {
        let is_open = self.is_open();
        if self.was_open && !is_open {
            self.driver.closed();
        }
        self.was_open = is_open;
    }

    /// Returns whether another client can be accepted. If clients wait, but all places are taken, forgets one that has left bytes for
    /// the guest: a guest that reads nothing must not keep clients out that want to see why.
    fn has_room(&mut self) -> bool {
        if self.clients.len() < MAX_CLIENTS {
            return true;
        }
        let is_old = |client: &Client| client.gone.is_some_and(|since| since.elapsed() > KEPT_TIME);
        let Some(index) = self.clients.iter().position(is_old) else {
            return false;
        };
        let unread = self.clients.get(index).map_or(0, Client::unread);
        let is_needed = self.endpoint.has_waiting();
        if is_needed {
            warn_limited(format_args!(
                "port {}: the guest does not read; discarding the input of a client that is gone",
                self.number
            ));
            self.counters.discarded = self.counters.discarded.saturating_add(unread);
            self.remove_client(index);
        }
        is_needed
    }

    /// Discards what clients send that are not the first one, and forgets clients that are gone.
    fn forget_gone_clients(&mut self) {
        if let Some(sender) = self.sender() {
            let (first, others) = self.clients.split_at_mut(sender + 1);
            // What a client sends after the one before it has ended is for the guest.
            let is_alone = others.is_empty() || first.last().is_none_or(Client::is_ending);
            for client in others.iter_mut().filter(|client| !is_alone && client.sends) {
                let mut bytes = [0; 4096];
                for _ in 0..MAX_DISCARDS {
                    let Received::Bytes(count) = client.read(&mut bytes) else {
                        break;
                    };
                    self.counters.discarded += count as u64;
                }
            }
        }
        let is_gone = |client: &mut Client| {
            let is_hung_up = client.kind == Kind::Connection && client.is_hung_up();
            if is_hung_up {
                client.gone.get_or_insert_with(Instant::now);
            }
            is_hung_up && (!client.sends || client.unread() == 0)
        };
        while let Some(index) = self.clients.iter_mut().position(is_gone) {
            self.remove_client(index);
        }
        for client in &mut self.clients {
            client.type_ahead();
            if client.kind == Kind::Fixed {
                client.is_open = client.sends || client.receives;
            }
        }
        self.note_open();
    }

    /// Returns whether something must be looked at again and again, because the kernel does not report it.
    pub fn needs_tick(&self) -> bool {
        match &self.endpoint {
            // The socket of the other program.
            Endpoint::Connect(_) => self.clients.is_empty(),
            // How long ago clients left, and whether files can be opened again.
            Endpoint::Listen(..) => self.may_accept,
            // The size of the terminal.
            Endpoint::Pty(_) => self.clients.iter().any(|client| client.is_open),
            _ => false,
        }
    }

    /// Looks at what the kernel does not report.
    pub fn tick(&mut self) {
        match &self.endpoint {
            Endpoint::Connect(_) if self.clients.is_empty() => {
                let Some(Ok(file)) = self.endpoint.connect() else {
                    return;
                };
                self.add_client(file);
            }
            Endpoint::Pty(_) => self.look_at_terminal(),
            Endpoint::Listen(..) => {}
            _ => return,
        }
        self.settle();
        self.flush();
    }

    /// Reads the size of the terminal. Returns the new one if it has changed.
    pub fn new_size(&mut self) -> Option<Size> {
        let client = match &self.endpoint {
            Endpoint::Pty(_) | Endpoint::Stdio(_) => self.clients.first()?,
            _ => return None,
        };
        let size = rustix::termios::tcgetwinsize(client.file()).ok()?;
        let size = Size {
            columns: size.ws_col,
            rows: size.ws_row,
        };
        let is_new = size.columns > 0 && size.rows > 0 && self.terminal_size != Some(size);
        is_new.then(|| {
            self.terminal_size = Some(size);
            size
        })
    }
}
