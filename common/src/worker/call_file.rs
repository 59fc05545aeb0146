// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the front-end is told by (SET_VRING_CALL, SET_VRING_ERR): an eventfd, or a socket or pipe that gets 8 bytes each time.

use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, OFlags, fcntl_getfl, fcntl_setfl, fstat};
use rustix::io::{Errno, ReadWriteFlags, pwritev2, write};
use rustix::net::{SendFlags, send};

/// A file of the front-end that is written to, without ever waiting for room.
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
    /// # Errors
    /// A write to such a file could wait for good, or do harm.
    pub fn new(file: OwnedFd) -> io::Result<Self> {
        let kind = match FileType::from_raw_mode(fstat(&file)?.st_mode) {
            // Files that have no other type are those that the kernel makes without a file system.
            FileType::Unknown => Kind::Eventfd,
            FileType::Socket => Kind::Socket,
            FileType::Fifo => Kind::Pipe,
            _ => {
                let what = "it is no eventfd, socket or pipe";
                return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
            }
        };
        if !matches!(kind, Kind::Socket) {
            unblock(&file)?;
        }
        Ok(Self { file, kind })
    }

    /// Tells the front-end. A full file means that an earlier signal is still unread; a closed one is the front-end's own loss.
    pub fn signal(&self) {
        let one = 1u64.to_ne_bytes();
        let written = match self.kind {
            Kind::Eventfd => write(&self.file, &one),
            Kind::Socket => send(&self.file, &one, SendFlags::DONTWAIT | SendFlags::NOSIGNAL),
            Kind::Pipe => self.write_to_pipe(&one),
        };
        match written {
            Ok(_) | Err(Errno::AGAIN) => {}
            Err(errno) => log::debug!("cannot signal a file of the front-end: {errno}"),
        }
    }

    /// The same for a thread that nobody helps out (see [`CallFile::make_room`]): a full eventfd is not even tried.
    pub fn signal_if_room(&self) {
        if self.has_room() == Ok(true) {
            self.signal();
        }
    }

    /// A front-end can have its pipe block again, whatever was done against it.
    fn write_to_pipe(&self, bytes: &[u8]) -> rustix::io::Result<usize> {
        let here = u64::MAX;
        let slices = [IoSlice::new(bytes)];
        match pwritev2(&self.file, &slices, here, ReadWriteFlags::NOWAIT) {
            // Before Linux 6.4 pipes refuse NOWAIT. If the front-end has its pipe block again, and fills it between the look and the
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

    /// Lets a write to an eventfd go on. Such a write can wait, if the eventfd is full: the front-end can undo that it must not. What
    /// is read is no loss then, since another count follows.
    pub fn make_room(&self) {
        if matches!(self.kind, Kind::Eventfd) && self.has_room() == Ok(false) {
            let _ = unblock(&self.file).and_then(|()| rustix::io::read(&self.file, &mut [0; 8]));
        }
    }
}

fn unblock(file: &OwnedFd) -> rustix::io::Result<()> {
    fcntl_getfl(file).and_then(|flags| fcntl_setfl(file, flags | OFlags::NONBLOCK))
}
