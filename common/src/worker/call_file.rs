// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The files that signal the front-end (SET_VRING_CALL, SET_VRING_ERR): an eventfd, or a socket or pipe that receives 8 bytes for each
//! signal.

use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, OFlags, fcntl_getfl, fcntl_setfl, fstat};
use rustix::io::{Errno, ReadWriteFlags, pwritev2, write};
use rustix::net::{SendFlags, send};

/// A file of the front-end that is signalled without ever waiting for room.
#[derive(Debug)]
pub(crate) struct CallFile {
    file: OwnedFd,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Eventfd,
    Socket,
    Pipe,
}

impl CallFile {
    /// Takes a file of the front-end and makes it non-blocking.
    ///
    /// # Errors
    /// The file is of another kind, where a write could block or do damage.
    pub fn new(file: OwnedFd) -> io::Result<Self> {
        let kind = match FileType::from_raw_mode(fstat(&file)?.st_mode) {
            // Anonymous inodes, such as eventfds, have no file type.
            FileType::Unknown => Kind::Eventfd,
            FileType::Socket => Kind::Socket,
            FileType::Fifo => Kind::Pipe,
            _ => {
                let what = "it is not an eventfd, socket or pipe";
                return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
            }
        };
        if !matches!(kind, Kind::Socket) {
            unblock(&file)?;
        }
        Ok(Self { file, kind })
    }

    /// Signals the front-end. If the file is full, an earlier signal is still unread. If its other end is closed, the signal is lost.
    pub fn signal(&self) {
        let one = 1u64.to_ne_bytes();
        let written = match self.kind {
            Kind::Eventfd => write(&self.file, &one),
            Kind::Socket => send(&self.file, &one, SendFlags::DONTWAIT | SendFlags::NOSIGNAL),
            Kind::Pipe => self.write_to_pipe(&one),
        };
        match written {
            Ok(_) | Err(Errno::AGAIN) => {}
            Err(errno) => log::debug!("cannot signal the front-end: {errno}"),
        }
    }

    /// Signals the front-end if there is room: for a thread that [`CallFile::make_room`] cannot rescue.
    pub fn signal_if_room(&self) {
        if self.has_room() == Ok(true) {
            self.signal();
        }
    }

    /// Writes to a pipe. The front-end can make it blocking again at any time, so the write itself must not block.
    fn write_to_pipe(&self, bytes: &[u8]) -> rustix::io::Result<usize> {
        let here = u64::MAX;
        let slices = [IoSlice::new(bytes)];
        match pwritev2(&self.file, &slices, here, ReadWriteFlags::NOWAIT) {
            // Before Linux 6.4 pipes refuse NOWAIT. If the front-end makes the pipe blocking and fills it between the check and the
            // write, this thread waits until the front-end reads.
            Err(Errno::OPNOTSUPP) if self.has_room()? => write(&self.file, bytes),
            Err(Errno::OPNOTSUPP) => Err(Errno::AGAIN),
            outcome => outcome,
        }
    }

    fn has_room(&self) -> rustix::io::Result<bool> {
        let mut fds = [PollFd::new(&self.file, PollFlags::OUT)];
        poll(&mut fds, Some(&Timespec::default())).map(|count| count > 0)
    }

    /// Unblocks a write to a full eventfd: the front-end can make its eventfd blocking again. The count that is read is no loss, since
    /// the blocked write adds another.
    pub fn make_room(&self) {
        if matches!(self.kind, Kind::Eventfd) && self.has_room() == Ok(false) {
            let _ = unblock(&self.file).and_then(|()| rustix::io::read(&self.file, &mut [0; 8]));
        }
    }
}

fn unblock(file: &OwnedFd) -> rustix::io::Result<()> {
    fcntl_getfl(file).and_then(|flags| fcntl_setfl(file, flags | OFlags::NONBLOCK))
}
