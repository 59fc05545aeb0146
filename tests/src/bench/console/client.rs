// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The client of a port: a socket or a terminal.

use std::fs::OpenOptions;
use std::io;
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;

/// Bytes of one read or write.
const CHUNK: usize = 256 << 10;
/// How long a client waits before it looks whether to stop.
const INTERVAL: Duration = Duration::from_millis(20);

/// A non-blocking file.
pub struct Client(OwnedFd);

impl Client {
    /// Connects to a unix socket.
    pub fn unix(path: &Path) -> io::Result<Self> {
        Self::new(UnixStream::connect(path)?.into())
    }

    /// Connects to a TCP port of this host.
    pub fn tcp(port: u16) -> io::Result<Self> {
        let stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_nodelay(true)?;
        Self::new(stream.into())
    }

    /// Opens a terminal, and makes it raw.
    pub fn terminal(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOCTTY)
            .open(path)?;
        let status = Command::new("stty")
            .arg("-F")
            .arg(path)
            .args(["raw", "-echo"])
            .status()?;
        match status.success() {
            true => Self::new(file.into()),
            false => Err(io::Error::other(format!("stty: {status}"))),
        }
    }

    /// Takes one end of a pair.
    pub fn new(file: OwnedFd) -> io::Result<Self> {
        fcntl_setfl(&file, fcntl_getfl(&file)? | OFlags::NONBLOCK)?;
        Ok(Self(file))
    }

    /// Reads and counts until told to stop.
    pub fn read_all(&self, count: &AtomicU64, stop: &AtomicBool) -> io::Result<()> {
        let mut buffer = vec![0; CHUNK];
        while !stop.load(Ordering::Relaxed) {
            if let Some(read) = self.read(&mut buffer, INTERVAL)? {
                count.fetch_add(read as u64, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// Writes and counts until told to stop.
    pub fn write_all(&self, count: &AtomicU64, stop: &AtomicBool) -> io::Result<()> {
        let buffer = vec![b'x'; CHUNK];
        while !stop.load(Ordering::Relaxed) {
            match rustix::io::write(&self.0, &buffer) {
                Ok(written) => {
                    count.fetch_add(written as u64, Ordering::Relaxed);
                }
                Err(Errno::AGAIN) => {
                    self.wait(PollFlags::OUT, INTERVAL)?;
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Writes a few bytes, for which there is room.
    pub fn write(&self, bytes: &[u8]) -> io::Result<()> {
        match rustix::io::write(&self.0, bytes)? {
            written if written == bytes.len() => Ok(()),
            written => Err(io::Error::other(format!("{written} bytes were written"))),
        }
    }

    /// Waits for this many bytes, a few.
    pub fn read_exact(&self, count: usize, limit: Duration) -> io::Result<()> {
        let mut left = vec![0; count];
        while !left.is_empty() {
            match self.read(&mut left, limit)? {
                Some(read) => left.truncate(left.len() - read),
                None => return Err(io::ErrorKind::TimedOut.into()),
            }
        }
        Ok(())
    }

    /// Reads what is there, or waits for it once.
    fn read(&self, buffer: &mut [u8], limit: Duration) -> io::Result<Option<usize>> {
        for wait in [true, false] {
            match rustix::io::read(&self.0, &mut *buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => return Ok(Some(read)),
                Err(Errno::AGAIN) if wait => {
                    self.wait(PollFlags::IN, limit)?;
                }
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(None)
    }

    fn wait(&self, events: PollFlags, limit: Duration) -> io::Result<()> {
        let limit = Timespec::try_from(limit).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(&self.0, events)], Some(&limit)) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}
