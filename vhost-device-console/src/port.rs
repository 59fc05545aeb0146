// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A port: what the guest writes to it goes to all clients, what the first client writes goes to the guest.
//!
//! The guest never waits for the clients of a console: a client that is too slow misses bytes. A port with a name is a channel of
//! programs, which must not miss any: the guest waits for the first client, and without one is told that the port is closed.

use std::io;
use std::path::Path;
use std::time::Duration;

use vhost_device_common::chain::Chain;
use vhost_device_common::device::Access;
use vhost_device_common::device::{Call, Needs, StartError};
use vhost_device_common::statistics::Outcome;
use vhost_device_common::worker::{Queue, Readiness, Watcher};
use vhost_device_common::{info_limited, warn_limited};

use crate::client::{Client, Kind, Received};
use crate::control::{Driver, Size};
use crate::endpoint::{Endpoint, directory};
use crate::filter::Filter;
use crate::history::History;
use crate::log_file::{Job, LogFile};
use crate::options::{Backend, PortOption};

/// Bytes that a client of a console may lag behind, before it misses some.
const CONSOLE_HISTORY: usize = 1 << 20;
/// Bytes of a channel that the guest has written and the first client has not received.
pub const CHANNEL_HISTORY: usize = 64 << 10;
/// Bytes of a console that a client receives that arrives late.
pub const SCROLLBACK: u64 = 64 << 10;
/// Bytes that are collected before they are sent to clients.
const FLUSH_SIZE: u64 = 128 << 10;
/// Bytes of one direction of a port that are moved before other queues and the front-end get their turn.
const BUDGET: u64 = 2 << 20;
/// Bytes that are filtered at a time.
const FILTER_SIZE: usize = 4 << 10;
/// Maximum number of clients of a port.
pub const MAX_CLIENTS: usize = 16;
/// Number of reads at most that discard the bytes of a client at a time.
const MAX_DISCARDS: usize = 256;
/// The number in tokens for what is no client.
pub const NOTIFIER: u16 = u16::MAX;

/// Request types of statistics.
pub const RECEIVE: usize = 0;
pub const TRANSMIT: usize = 1;
pub const CONTROL: usize = 2;

/// Bytes that were counted since the start of the program.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    /// Written by the guest.
    pub transmitted: u64,
    /// Written to the guest.
    pub received: u64,
    /// Missed by clients that were too slow and are gone.
    pub missed: u64,
    /// Sent by clients other than the first one.
    pub discarded: u64,
}

/// A port.
#[derive(Debug)]
pub struct Port {
    pub number: u32,
    pub name: Option<String>,
    pub endpoint: Endpoint,
    /// What the driver knows.
    pub driver: Driver,
    /// Size of the console.
    pub size: Option<Size>,
    /// Size of the terminal when it was last read.
    terminal_size: Option<Size>,
    pub counters: Counters,
    history: History,
    /// In the order in which they arrived.
    clients: Vec<Client>,
    files: Vec<LogFile>,
    filter: Option<Filter>,
    /// Bytes that were read from the chain that the queue gives next.
    offset: u64,
    /// Position in the history up to which a channel has been delivered.
    delivered: u64,
    /// Position in the history up to which clients were served.
    flushed: u64,
    /// The state was saved: what a channel has not delivered is for the clients of another device, unless the queue starts again.
    is_saved: bool,
    was_open: bool,
    last_number: u16,
    watcher: Option<Watcher>,
}

impl Port {
    /// Opens a port, and `files` that are written beside it.
    ///
    /// # Errors
    /// Something that the option names cannot be opened.
    pub fn open(
        number: u32,
        option: PortOption,
        mut files: Vec<LogFile>,
        filter: bool,
    ) -> Result<Self, StartError> {
        let PortOption { name, backend } = option;
        if let Backend::File {
            path,
            append,
            rotation,
        } = &backend
        {
            files.push(LogFile::open(path.clone(), *append, *rotation)?);
        }
        let (endpoint, client) = Endpoint::open(backend)?;
        let is_console = number == 0 || name.is_none();
        let port = Self {
            number,
            name,
            endpoint,
            driver: Driver::default(),
            size: None,
            terminal_size: None,
            counters: Counters::default(),
            history: History::new(match is_console {
                true => CONSOLE_HISTORY,
                false => CHANNEL_HISTORY,
            }),
            clients: client.into_iter().collect(),
            files,
            filter: (filter && is_console).then(Filter::default),
            offset: 0,
            delivered: 0,
            flushed: 0,
            is_saved: false,
            was_open: false,
            last_number: 0,
            watcher: None,
        };
        let role = if is_console { "console" } else { "channel" };
        let place = port.endpoint.path().unwrap_or(Path::new("")).display();
        log::info!("port {number}: {role}, {} {place}", port.endpoint.kind());
        Ok(port)
    }

    /// Returns whether it is a console. Otherwise it is a channel of programs.
    pub fn is_console(&self) -> bool {
        self.number == 0 || self.name.is_none()
    }

    /// Returns whether this side is open, as the driver is told.
    pub fn is_open(&self) -> bool {
        let is_file = matches!(self.endpoint, Endpoint::File);
        self.is_console() || is_file || self.clients.iter().any(|client| client.is_open)
    }

    /// Returns the present clients.
    pub fn clients(&self) -> &[Client] {
        &self.clients
    }

    /// Returns the files that are written.
    pub fn files(&self) -> &[LogFile] {
        &self.files
    }

    /// Returns how many bytes are still to be written to one of its files.
    pub fn pending(&self, file: &LogFile) -> u64 {
        self.history.end().saturating_sub(file.done())
    }

    /// Returns how many bytes clients missed because they were too slow.
    pub fn missed(&self) -> u64 {
        let clients = self.clients.iter().map(|client| client.missed);
        clients.fold(self.counters.missed, u64::saturating_add)
    }

    /// Returns what it uses after the start.
    pub fn add_needs(&self, needs: &mut Needs) {
        let call = Call::new;
        let ioctl = |request| call(libc::SYS_ioctl).with(1, request as u32);
        match &self.endpoint {
            Endpoint::Listen(..) => needs
                .queue
                .extend([call(libc::SYS_accept4), ioctl(libc::FIONREAD)]),
            Endpoint::Connect(_) => {
                needs.queue.extend(Call::connect_unix());
                needs.queue.push(ioctl(libc::FIONREAD));
            }
            Endpoint::Stdio(_) => {
                needs.queue.push(ioctl(libc::TIOCGWINSZ));
                needs
                    .session
                    .extend([ioctl(libc::TCSETS), ioctl(libc::TCSETS2)]);
            }
            Endpoint::Pty(_) => {
                needs.queue.push(ioctl(libc::TIOCGWINSZ));
                #[cfg(target_arch = "x86_64")]
                needs.session.push(call(libc::SYS_readlink));
                needs.session.push(call(libc::SYS_readlinkat));
            }
            Endpoint::File | Endpoint::Fd => {}
        }
        needs.files.extend(self.endpoint.files());
        for file in &self.files {
            let helper = needs.helper.get_or_insert_default();
            if file.is_rotated() {
                #[cfg(target_arch = "x86_64")]
                helper.push(call(libc::SYS_rename));
                helper.extend([
                    call(libc::SYS_openat),
                    call(libc::SYS_renameat),
                    call(libc::SYS_renameat2),
                    call(libc::SYS_ftruncate),
                ]);
                let access = Access::MAKE | Access::WRITE | Access::TRUNCATE | Access::REMOVE;
                needs.files.push((directory(file.path()), access));
            }
        }
        needs.open_files += MAX_CLIENTS as u64 + 8;
    }
}

/// Clients.
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
        self.write_files();
        if let Endpoint::Stdio(stdio) = &self.endpoint {
            stdio.leave_raw_mode();
        }
    }

    /// Returns where in the history a client begins.
    fn first_position(&self) -> u64 {
        match self.is_console() {
            true => self.history.end().saturating_sub(SCROLLBACK),
            false => self.delivered,
        }
    }

    fn add_client(&mut self, file: std::os::fd::OwnedFd) {
        let is_free = |number: &u16| self.clients.iter().all(|client| client.number != *number);
        let numbers = (self.last_number..NOTIFIER).chain(0..self.last_number);
        let Some(number) = numbers.skip(1).find(is_free) else {
            return;
        };
        self.last_number = number;
        let token = self.token(number);
        let mut client = Client::new(number, Kind::Connection, file, self.first_position());
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
                    "port {}: a client is connected, {} in all",
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
            "port {}: a client is gone, {} in all",
            self.number,
            self.clients.len()
        ));
    }

    /// Returns the client whose bytes the guest receives: the first one that can send any. What was typed in a terminal is read
    /// after it was closed, too.
    fn sender(&self) -> Option<usize> {
        let can_send = |client: &Client| client.sends && (client.is_open || client.has_input());
        self.clients.iter().position(can_send)
    }

    /// Returns the client for which the guest waits.
    fn receiver(&self) -> Option<&Client> {
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
        self.settle();
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
            Endpoint::Listen(..) | Endpoint::Connect(_) | Endpoint::File | Endpoint::Fd => {}
        }
        self.settle();
        self.flush();
    }

    /// Finds out whether a program has the terminal open.
    fn look_at_terminal(&mut self) {
        let first = self.first_position();
        for client in &mut self.clients {
            let is_open = !client.is_hung_up();
            if is_open && !client.is_open {
                (client.readable, client.writable) = (true, true);
                client.next = first;
            }
            client.is_open = is_open;
        }
    }

    /// Accepts clients as long as there is room for them; the others wait. Forgets those that are gone.
    fn settle(&mut self) {
        self.forget_gone_clients();
        while self.clients.len() < MAX_CLIENTS
            && let Some(file) = self.endpoint.accept()
        {
            self.add_client(file);
            self.forget_gone_clients();
        }
        let is_open = self.is_open();
        if self.was_open && !is_open {
            self.driver.closed();
        }
        self.was_open = is_open;
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
        let is_gone = |client: &Client| {
            client.kind == Kind::Connection
                && client.is_hung_up()
                && (!client.sends || !client.has_unread())
        };
        while let Some(index) = self.clients.iter().position(is_gone) {
            self.remove_client(index);
        }
        for client in &mut self.clients {
            client.type_ahead();
            if client.kind == Kind::Fixed {
                client.is_open = client.sends || client.receives;
            }
        }
    }

    /// Returns whether something must be looked at again and again, because the kernel does not report it.
    pub fn needs_tick(&self) -> bool {
        match &self.endpoint {
            // The socket of the other program.
            Endpoint::Connect(_) => self.clients.is_empty(),
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

/// What the guest writes.
impl Port {
    /// Takes what the guest has written.
    pub fn transmit(&mut self, queue: &mut Queue) {
        self.is_saved = false;
        let mut budget = BUDGET;
        loop {
            let mut outcome = Outcome {
                request: TRANSMIT,
                ..Outcome::default()
            };
            let taken = queue.take_if(|chain| match self.accept(chain, &mut budget) {
                Ok(is_done) => is_done,
                Err(()) => {
                    outcome.failed = true;
                    true
                }
            });
            let Some(chain) = taken else {
                break;
            };
            outcome.bytes = std::mem::take(&mut self.offset);
            queue.complete_with(chain, 0, outcome);
        }
        if budget == 0 {
            queue.retry_after(Duration::ZERO);
        }
        self.flush();
    }

    /// Reads from a chain what there is room for. Returns whether that is all of it.
    fn accept(&mut self, chain: &mut Chain, budget: &mut u64) -> Result<bool, ()> {
        if let Err(error) = chain.readable_iovecs() {
            warn_limited(format_args!("port {}: {error}", self.number));
            return Err(());
        }
        // The driver may have changed the chain since it was last looked at.
        self.offset = self.offset.min(chain.readable_len());
        chain.skip_readable(self.offset).map_err(|_| ())?;
        while chain.readable_len() > 0 {
            if self.room() == 0 {
                self.flush();
            }
            let most = chain.readable_len().min(*budget).min(self.room());
            if most == 0 {
                return Ok(false);
            }
            let count = self.add(chain, most as usize)?;
            *budget -= count;
            self.offset += count;
            self.counters.transmitted += count;
        }
        Ok(true)
    }

    /// Adds up to `most` bytes of a chain to the history. Returns how many were read.
    fn add(&mut self, chain: &mut Chain, most: usize) -> Result<u64, ()> {
        let count = match &mut self.filter {
            None => {
                let space = self.history.space(most);
                let count = space.len();
                chain.read(space).map_err(|_| ())?;
                self.history.added(count);
                count
            }
            Some(filter) => {
                let mut bytes = [0; FILTER_SIZE];
                let bytes = bytes.get_mut(..most.min(FILTER_SIZE)).unwrap_or_default();
                chain.read(bytes).map_err(|_| ())?;
                let mut output = Vec::with_capacity(bytes.len());
                filter.apply(bytes, &mut output);
                self.history.append(&output);
                bytes.len()
            }
        };
        Ok(count as u64)
    }

    /// Returns how many bytes can be added to the history now, before it is flushed.
    fn room(&self) -> u64 {
        let (size, from) = match (&self.endpoint, self.receiver()) {
            // The guest waits for the file that it writes to.
            (Endpoint::File, _) => {
                let file = self.files.last();
                (CHANNEL_HISTORY as u64, file.map_or(0, LogFile::done))
            }
            _ if self.is_console() => (FLUSH_SIZE, self.flushed),
            (_, Some(client)) => (CHANNEL_HISTORY as u64, client.next),
            (_, None) => return 0,
        };
        size.saturating_sub(self.history.end().saturating_sub(from))
    }

    /// Adds a byte for EMERG_WRITE (VIRTIO 1.3, 5.3.4).
    pub fn write_emergency(&mut self, byte: u8) {
        match &mut self.filter {
            Some(filter) => {
                let mut output = Vec::new();
                filter.apply(&[byte], &mut output);
                self.history.append(&output);
            }
            None => self.history.append(&[byte]),
        }
        self.counters.transmitted += 1;
        self.flush();
    }

    fn write_files(&mut self) {
        for file in &mut self.files {
            file.write_all(&self.history);
        }
    }

    /// Returns what a thread is to write to the file `number` of this port, which has the index `index`.
    pub fn next_job(&mut self, index: usize, number: usize) -> Option<Job> {
        let file = self.files.get_mut(number)?;
        file.next_job(&self.history, (index, number))
    }

    /// Notes that a thread has written to the file `number`.
    pub fn job_ended(&mut self, number: usize) {
        if let Some(file) = self.files.get_mut(number) {
            file.ended();
        }
    }

    /// Sends to clients what was added to the history. Without a queue thread, also writes it to files.
    pub fn flush(&mut self) {
        if self.watcher.is_none() {
            self.write_files();
        }
        let is_paused = self.is_saved && !self.is_console();
        let open = self
            .clients
            .iter_mut()
            .filter(|client| client.is_open && !is_paused);
        for client in open {
            if let Err(error) = client.write(&self.history) {
                log::debug!("port {}: cannot write to a client: {error}", self.number);
            }
        }
        if let Some(client) = self.receiver() {
            self.delivered = client.next.max(self.delivered);
        }
        self.flushed = self.history.end();
    }
}

/// What the guest reads.
impl Port {
    /// Fills buffers of the guest with what the first client has sent. `bytes` is room for that.
    pub fn receive(&mut self, queue: &mut Queue, bytes: &mut [u8]) {
        let mut budget = BUDGET;
        while let Some(index) = self.sender()
            && let Some(client) = self.clients.get_mut(index)
            && client.has_input()
        {
            if budget == 0 {
                return queue.retry_after(Duration::ZERO);
            }
            let mut outcome = Outcome {
                request: RECEIVE,
                ..Outcome::default()
            };
            let mut received = Received::Nothing;
            let taken = queue.take_if(|chain| {
                if let Err(error) = chain.check() {
                    warn_limited(format_args!("port {}: {error}", self.number));
                    outcome.failed = true;
                    return true;
                }
                let most = chain.writable_len().min(budget).min(bytes.len() as u64);
                let Some(room) = bytes
                    .get_mut(..most as usize)
                    .filter(|room| !room.is_empty())
                else {
                    return true;
                };
                received = client.read(room);
                let Received::Bytes(count) = received else {
                    return false;
                };
                outcome.failed = chain.write(room.get(..count).unwrap_or_default()).is_err();
                outcome.bytes = count as u64;
                true
            });
            match (taken, received) {
                (Some(chain), _) => {
                    budget -= outcome.bytes;
                    self.counters.received += outcome.bytes;
                    queue.complete_with(chain, outcome.bytes as u32, outcome);
                }
                // Another client may be next.
                (None, Received::End) => self.settle(),
                (None, _) => return,
            }
        }
    }
}

/// What a driver and its successor leave behind.
impl Port {
    /// Forgets the driver.
    pub fn reset(&mut self) {
        self.driver = Driver::default();
        self.offset = 0;
        self.is_saved = false;
    }

    /// Returns the offset in the chain that the queue gives next, and the last bytes that the guest wrote: those of a console that a
    /// client receives that arrives late, and those of a channel that were not delivered.
    pub fn save(&mut self) -> (u64, Vec<u8>) {
        self.is_saved = true;
        let bytes = self.history.after(self.first_position()).concat();
        (self.offset, bytes)
    }

    /// Continues from what [`Port::save`] returned for another device.
    pub fn restore(&mut self, offset: u64, bytes: &[u8]) {
        self.offset = offset;
        self.history.append(bytes);
        self.flush();
    }
}
