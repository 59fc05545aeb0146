// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The socket of the program: a path to listen on, or an inherited socket.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use clap::Args;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::Mode;
use rustix::io::{Errno, FdFlags, fcntl_dupfd_cloexec, fcntl_getfd, fcntl_setfd, retry_on_intr};
use rustix::net::sockopt::{socket_acceptconn, socket_domain, socket_type};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};

use super::arguments::Arguments;
use super::service::ServiceManager;
use super::turn;
use crate::device::StartError;

/// Most connections that wait to be accepted: as many as the kernel allows.
const QUEUE: i32 = i32::MAX;

/// The socket that the arguments name.
pub enum Source {
    /// A connected socket, for one front-end.
    Connected(UnixStream),
    /// A listening socket that another process bound.
    Listening(UnixListener),
    /// A path to bind.
    Path {
        /// The path.
        path: PathBuf,
        /// Permissions of the socket file.
        mode: u32,
    },
}

/// Duplicates an inherited file descriptor, for devices whose options name one. The number stays open.
///
/// # Errors
/// The number is not open.
#[allow(unsafe_code)]
pub fn inherited(number: RawFd) -> io::Result<OwnedFd> {
    // This number must not be borrowed.
    if number == -1 {
        return Err(Errno::BADF.into());
    }
    // SAFETY: the borrow ends with this call; a number that is not open makes it fail.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    Ok(fcntl_dupfd_cloexec(borrowed, 3)?)
}

impl Source {
    /// Finds the socket that the arguments name, or that the service manager passed. Checks an inherited socket, and takes ownership of it.
    pub fn find<O: Args>(
        arguments: &Arguments<O>,
        manager: &ServiceManager,
    ) -> Result<Self, StartError> {
        match (arguments.fd, &arguments.socket_path) {
            (Some(number), _) => Self::inherited(
                number,
                &format!("--fd={number}"),
                "pass the number of an open unix stream socket",
            ),
            (None, Some(path)) => Ok(Self::Path {
                path: path.clone(),
                mode: arguments.socket_mode,
            }),
            (None, None) => Self::inherited(
                manager.socket()?,
                "LISTEN_FDS=1",
                "let ListenStream= of the socket unit be a path",
            ),
        }
    }

    /// Returns the path to bind, if there is one.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Path { path, .. } => Some(path),
            Self::Connected(_) | Self::Listening(_) => None,
        }
    }

    /// Takes ownership of the socket `number`. If it cannot be used, the error names `name`, and says `remedy`.
    #[allow(unsafe_code)]
    fn inherited(number: RawFd, name: &str, remedy: &str) -> Result<Self, StartError> {
        // SAFETY: the borrow ends before anything is opened or closed; a number that is not open
        // makes the system call fail.
        let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
        let refuse = |what: &str| StartError(format!("{name}: {what}; {remedy}"));
        fcntl_getfd(borrowed).map_err(|_| refuse("no such file is open"))?;
        let is_unix_stream = socket_domain(borrowed) == Ok(AddressFamily::UNIX)
            && socket_type(borrowed) == Ok(SocketType::STREAM);
        if !is_unix_stream {
            return Err(refuse("not a unix stream socket"));
        }
        let listens = socket_acceptconn(borrowed).unwrap_or(false);
        if !listens && rustix::net::getpeername(borrowed).is_err() {
            return Err(refuse("neither connected nor listening"));
        }
        // SAFETY: the number is open, and was inherited for us to own: nothing else in this process
        // has opened a file yet.
        let socket = unsafe { OwnedFd::from_raw_fd(number) };
        let prepare = |errno: Errno| refuse(&errno.to_string());
        fcntl_setfd(&socket, FdFlags::CLOEXEC).map_err(prepare)?;
        rustix::io::ioctl_fionbio(&socket, false).map_err(prepare)?;
        Ok(if listens {
            Self::Listening(socket.into())
        } else {
            Self::Connected(socket.into())
        })
    }
}

/// Removes a stale socket at `path`, which `option` names. Anything else there is left alone, and is an error.
fn make_way(path: &Path, kind: SocketType, option: &str) -> Result<(), StartError> {
    let shown = path.display();
    let metadata = match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(StartError(format!("cannot examine {shown}: {error}"))),
        Ok(metadata) => metadata,
    };
    if !metadata.file_type().is_socket() {
        return Err(StartError(format!(
            "{shown} exists and is not a socket; choose another {option} or move it away"
        )));
    }
    match probe(path, kind) {
        Err(Errno::CONNREFUSED) => std::fs::remove_file(path)
            .map_err(|error| StartError(format!("cannot replace the stale {shown}: {error}"))),
        // PROTOTYPE: it listens on a socket of another type.
        Ok(()) | Err(Errno::AGAIN | Errno::PROTOTYPE) => Err(StartError(format!(
            "another program listens on {shown}; stop it or choose another {option}"
        ))),
        Err(errno) => Err(StartError(format!(
            "cannot find out whether {shown} is in use: {errno}"
        ))),
    }
}

fn cannot_listen(path: &Path, error: &io::Error) -> StartError {
    StartError(format!("cannot listen on {}: {error}", path.display()))
}

/// Connects, to find out whether a program listens. Does not wait if its queue is full.
fn probe(path: &Path, kind: SocketType) -> Result<(), Errno> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, kind, flags, None)?;
    connect(socket, &SocketAddrUnix::new(path)?)
}

/// A listening socket.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    /// The file that was created for it: path, device and inode.
    file: Option<(PathBuf, u64, u64)>,
}

impl Listener {
    /// Uses a socket that already listens.
    pub fn adopt(socket: UnixListener) -> Self {
        Self { socket, file: None }
    }

    /// Creates a socket of type `kind`, and its file at `path`, which `option` names. The file has the permissions `mode` from the start.
    /// No program can connect yet.
    pub fn bind(
        path: PathBuf,
        kind: SocketType,
        mode: u32,
        option: &str,
    ) -> Result<Self, StartError> {
        make_way(&path, kind, option)?;
        let failed = |error| cannot_listen(&path, &error);
        let address = SocketAddrUnix::new(&path).map_err(|errno| failed(errno.into()))?;
        let (family, flags) = (AddressFamily::UNIX, SocketFlags::CLOEXEC);
        let socket =
            socket_with(family, kind, flags, None).map_err(|errno| failed(errno.into()))?;
        let before = rustix::process::umask(Mode::from_raw_mode(!mode & 0o777));
        let bound = bind(&socket, &address);
        rustix::process::umask(before);
        bound.map_err(|errno| failed(errno.into()))?;
        let metadata = std::fs::symlink_metadata(&path).map_err(failed)?;
        let file = Some((path, metadata.dev(), metadata.ino()));
        let socket = socket.into();
        Ok(Self { socket, file })
    }

    /// Returns whether the file that was created is the one at `path`.
    pub fn is_at(&self, path: &Path) -> bool {
        self.file.as_ref().is_some_and(|(_, device, inode)| {
            std::fs::symlink_metadata(path)
                .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == (*device, *inode))
        })
    }

    /// Starts to accept connections on the file that was created.
    pub fn listen(&self) -> Result<(), StartError> {
        match &self.file {
            Some((path, ..)) => {
                listen(&self.socket, QUEUE).map_err(|errno| cannot_listen(path, &errno.into()))
            }
            None => Ok(()),
        }
    }

    /// Waits for a front-end. Returns `None` when the program is to exit.
    pub fn accept(&self, stop: &OwnedFd) -> io::Result<Option<UnixStream>> {
        let mut fds = [
            PollFd::new(&self.socket, PollFlags::IN),
            PollFd::from_borrowed_fd(stop.as_fd(), PollFlags::IN),
        ];
        retry_on_intr(|| poll(&mut fds, None))?;
        let [_, stopped] = &fds;
        if !stopped.revents().is_empty() {
            return Ok(None);
        }
        self.socket.accept().map(|(socket, _)| Some(socket))
    }

    /// Removes the socket file, unless another file has replaced it.
    pub fn remove_file(&self) {
        if let Some((path, ..)) = &self.file
            && self.is_at(path)
            && let Err(error) = std::fs::remove_file(path)
        {
            log::warn!("cannot remove {}: {error}", path.display());
        }
    }

    /// Duplicates the socket, for a device that accepts connections on it.
    pub fn try_clone(&self) -> io::Result<OwnedFd> {
        self.socket.try_clone().map(OwnedFd::from)
    }

    /// Makes `accept(2)` fail if no connection waits.
    pub fn set_nonblocking(&self) -> io::Result<()> {
        self.socket.set_nonblocking(true)
    }

    /// Returns the directory of the file that was created.
    pub fn directory(&self) -> Option<PathBuf> {
        self.file.as_ref().map(|(path, ..)| turn::directory(path))
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl fmt::Display for Listener {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.file {
            Some((path, ..)) => write!(formatter, "{}", path.display()),
            None => write!(formatter, "the inherited socket"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_of_any_type_that_listens_is_in_use_and_a_stale_one_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let kinds = [SocketType::STREAM, SocketType::SEQPACKET];
        for (first, second) in kinds.into_iter().flat_map(|a| kinds.map(|b| (a, b))) {
            let listener = Listener::bind(path.clone(), first, 0o600, "--path").unwrap();
            listener.listen().unwrap();
            assert_eq!(socket_type(&listener), Ok(first));
            let StartError(error) =
                Listener::bind(path.clone(), second, 0o600, "--path").unwrap_err();
            assert!(error.contains("another program listens"), "{error}");
            // The file stays, and is stale.
            drop(listener);
            let next = Listener::bind(path.clone(), first, 0o600, "--path").unwrap();
            next.remove_file();
            assert!(!path.exists());
        }
    }
}
