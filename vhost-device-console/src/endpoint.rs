// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where a port leads to, and how clients arrive there.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, connect, socket_with,
};
use vhost_device_common::device::{Access, ListeningSocket, StartError};

use crate::client::{Client, Kind};
use crate::options::Backend;
use crate::pty::Pty;
use crate::stdio::{self, Stdio};

/// Where a port leads to.
#[derive(Debug)]
pub enum Endpoint {
    Pty(Pty),
    /// A socket that clients connect to. The core creates it, and removes its file.
    Listen(PathBuf, Option<OwnedFd>),
    /// A socket of another program, which this one connects to.
    Connect(PathBuf),
    /// Only files of the port: there are no clients.
    File,
    Stdio(Stdio),
    /// The client is an inherited file.
    Fd,
}

impl Endpoint {
    /// Opens what `backend` names. Returns its client too, if there is one from the start.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn open(backend: Backend) -> Result<(Self, Option<Client>), StartError> {
        Ok(match backend {
            Backend::Pty(link) => {
                let (pty, master) = Pty::open(link)?;
                let mut client = Client::new(0, Kind::Pty, master, 0);
                client.is_open = false;
                (Self::Pty(pty), Some(client))
            }
            Backend::Listen(path) => (Self::Listen(path, None), None),
            Backend::Connect(path) => {
                SocketAddrUnix::new(&path).map_err(|errno| {
                    StartError(format!("cannot connect to {}: {errno}", path.display()))
                })?;
                (Self::Connect(path), None)
            }
            Backend::File { .. } => (Self::File, None),
            Backend::Stdio => {
                let (stdio, client) = Stdio::open()?;
                (Self::Stdio(stdio), Some(client))
            }
            Backend::Fd(number) => (Self::Fd, Some(stdio::client(number)?)),
        })
    }

    /// Returns the name of its kind, as in the option --port.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Pty(_) => "pty",
            Self::Listen(..) => "unix",
            Self::Connect(_) => "unix-connect",
            Self::File => "file",
            Self::Stdio(_) => "stdio",
            Self::Fd => "fd",
        }
    }

    /// Returns the path that clients use, or that this program connects to.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Pty(pty) => Some(pty.path()),
            Self::Listen(path, _) | Self::Connect(path) => Some(path),
            Self::File | Self::Stdio(_) | Self::Fd => None,
        }
    }

    /// Returns the file that is readable when something other than a client has an event.
    pub fn notifier(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Pty(pty) => Some(pty.notifications()),
            Self::Listen(_, listener) => listener.as_ref().map(AsFd::as_fd),
            Self::Stdio(stdio) => stdio.resized().map(AsFd::as_fd),
            Self::Connect(_) | Self::File | Self::Fd => None,
        }
    }

    /// Returns the socket that the core creates for it.
    pub fn listening_socket(&self) -> Option<ListeningSocket> {
        match self {
            Self::Listen(path, _) => Some(ListeningSocket {
                path: path.clone(),
                kind: SocketType::STREAM,
                option: "path for the port",
            }),
            _ => None,
        }
    }

    /// Returns where the socket belongs that the core creates for it.
    pub fn listener(&mut self) -> Option<&mut Option<OwnedFd>> {
        match self {
            Self::Listen(_, listener) => Some(listener),
            _ => None,
        }
    }

    /// Returns whether a client waits to be accepted.
    pub fn has_waiting(&self) -> bool {
        let Self::Listen(_, Some(listener)) = self else {
            return false;
        };
        let mut fds = [PollFd::new(listener, PollFlags::IN)];
        let now = Timespec::default();
        retry_on_intr(|| poll(&mut fds, Some(&now))).is_ok_and(|count| count > 0)
    }

    /// Returns a client that waits to be accepted, if there is one.
    ///
    /// # Errors
    /// The limit of open files or of memory is reached. The client waits on.
    pub fn accept(&self) -> io::Result<Option<OwnedFd>> {
        let Self::Listen(_, Some(listener)) = self else {
            return Ok(None);
        };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        match retry_on_intr(|| accept_with(listener, flags)) {
            Ok(file) => Ok(Some(file)),
            Err(Errno::AGAIN) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Connects to the socket of the other program, if this endpoint does that.
    pub fn connect(&self) -> Option<io::Result<OwnedFd>> {
        let Self::Connect(path) = self else {
            return None;
        };
        let connected = || -> Result<OwnedFd, Errno> {
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
            connect(&socket, &SocketAddrUnix::new(path)?)?;
            Ok(socket)
        };
        Some(connected().map_err(io::Error::from))
    }

    /// Returns what it uses by its name after the start.
    pub fn files(&self) -> Option<(PathBuf, Access)> {
        match self {
            Self::Pty(pty) => pty.link().map(|link| (directory(link), Access::REMOVE)),
            Self::Connect(path) => Some((directory(path), Access::CONNECT)),
            Self::Listen(..) | Self::File | Self::Stdio(_) | Self::Fd => None,
        }
    }
}

/// Returns the directory of a file.
pub fn directory(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => ".".into(),
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        if let Self::Pty(pty) = self {
            pty.remove_link();
        }
    }
}
