// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A port: what the guest writes to it goes to all clients, what the first client writes goes to the guest.
//!
//! The guest never waits for the clients of a console: a client that is too slow misses bytes. A port with a name is a channel of
//! programs, which must not miss any: the guest waits for the first client, and without one is told that the port is closed.

mod clients;
mod transfer;

use std::path::Path;

use vhost_device_common::device::{Access, Call, Needs, StartError};
use vhost_device_common::worker::Watcher;

use crate::client::Client;
use crate::control::{Driver, Size};
use crate::endpoint::{Endpoint, directory};
use crate::filter::Filter;
use crate::history::History;
use crate::log_file::LogFile;
use crate::options::{Backend, PortOption};

/// Bytes that a client of a console may lag behind, before it misses some.
const CONSOLE_HISTORY: usize = 1 << 20;
/// Bytes of a channel that the guest has written and the first client has not received.
pub const CHANNEL_HISTORY: usize = 64 << 10;
/// Bytes of a console that a client receives that arrives late.
pub const SCROLLBACK: u64 = 64 << 10;
/// Maximum number of clients of a port.
pub const MAX_CLIENTS: usize = 16;
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
    /// Position in the history at which late clients of a console begin at the earliest.
    begin: u64,
    /// Position in the history up to which a channel has been delivered.
    delivered: u64,
    /// Position in the history up to which clients were served.
    flushed: u64,
    /// The state was saved: what a channel has not delivered is for the clients of another device, unless the queue starts again.
    is_saved: bool,
    /// Clients may wait to be accepted.
    may_accept: bool,
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
        let (endpoint, mut client) = Endpoint::open(backend)?;
        let is_console = number == 0 || name.is_none();
        let filter = (filter && is_console).then(Filter::default);
        let is_filtered = filter.is_some();
        client
            .iter_mut()
            .for_each(|client| client.is_filtered = is_filtered);
        files
            .iter_mut()
            .for_each(|file| file.is_filtered = is_filtered);
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
            filter,
            offset: 0,
            begin: 0,
            delivered: 0,
            flushed: 0,
            is_saved: false,
            may_accept: false,
            was_open: false,
            last_number: 0,
            watcher: None,
        };
        let role = if is_console { "console" } else { "channel" };
        let place = port.endpoint.path().unwrap_or(Path::new("")).display();
        log::info!("port {number}: {role}, {} {place}", port.endpoint.kind());
        Ok(port)
    }

    /// Makes the files that the option names its own: it empties them, and places links. No other device uses them now.
    ///
    /// # Errors
    /// A file cannot be emptied, or a link cannot be created.
    pub fn claim(&mut self) -> Result<(), StartError> {
        self.files.iter().try_for_each(LogFile::claim)?;
        match &self.endpoint {
            Endpoint::Pty(pty) => pty.place_link(),
            _ => Ok(()),
        }
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

    /// Returns whether a thread serves it.
    pub fn is_served(&self) -> bool {
        self.watcher.is_some()
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

    /// Continues from what [`Port::save`] returned for another device, in place of what this one has.
    pub fn restore(&mut self, offset: u64, bytes: &[u8]) {
        self.is_saved = false;
        self.flush();
        self.offset = offset;
        self.begin = self.history.end();
        self.delivered = self.history.end();
        match &self.filter {
            Some(_) => {
                let mut output = Vec::new();
                // They may begin in the middle of a sequence, or come from a device without a filter.
                Filter::default().apply(bytes, &mut output);
                self.history.append(&output);
            }
            None => self.history.append(bytes),
        }
        for file in &mut self.files {
            file.skip(self.begin, &self.history);
        }
        self.flush();
    }
}
