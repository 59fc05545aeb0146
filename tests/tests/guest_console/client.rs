// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A client of a port, on the host.

use std::fs::OpenOptions;
use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::PATIENCE;

/// A connection to the socket of a port, or the terminal of a port.
pub struct Client {
    file: OwnedFd,
    /// The path of the terminal.
    terminal: Option<PathBuf>,
    /// Bytes that were read and not yet returned.
    received: Vec<u8>,
}

impl Client {
    /// Connects to a socket.
    pub fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        Self::new(stream.into(), None)
    }

    /// Opens a terminal, and makes it raw.
    pub fn open(link: &Path) -> Self {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOCTTY)
            .open(link)
            .unwrap();
        let client = Self::new(file.into(), Some(link.to_owned()));
        client.stty(&["raw", "-echo"]);
        client
    }

    fn new(file: OwnedFd, terminal: Option<PathBuf>) -> Self {
        Self {
            file,
            terminal,
            received: Vec::new(),
        }
    }

    fn stty(&self, settings: &[&str]) {
        let terminal = self.terminal.as_ref().expect("a terminal");
        let mut stty = Command::new("stty");
        stty.arg("-F").arg(terminal).args(settings);
        assert!(stty.status().unwrap().success(), "{stty:?}");
    }

    /// Changes the size of the terminal.
    pub fn resize(&self, rows: u16, columns: u16) {
        let [rows, columns] = [rows, columns].map(|number| number.to_string());
        self.stty(&["rows", &rows, "cols", &columns]);
    }

    /// Sends all bytes.
    pub fn send(&self, bytes: impl AsRef<[u8]>) {
        let mut left = bytes.as_ref();
        while !left.is_empty() {
            match rustix::io::write(&self.file, left) {
                Ok(written) => left = &left[written..],
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => panic!("cannot write to the port: {error}"),
            }
        }
    }

    /// Waits for this many bytes, and returns them.
    #[track_caller]
    pub fn receive(&mut self, count: usize) -> Vec<u8> {
        self.read_until(&format!("{count} bytes"), |received| {
            (received.len() >= count).then_some(count)
        })
    }

    /// Waits for `text`, and returns all bytes up to its end.
    #[track_caller]
    pub fn wait_for(&mut self, text: &str) -> String {
        let mut looked_at = 0;
        let bytes = self.read_until(text, |received| {
            let from = usize::saturating_sub(looked_at, text.len());
            looked_at = received.len();
            let place = received[from..]
                .windows(text.len())
                .position(|part| part == text.as_bytes())?;
            Some(from + place + text.len())
        });
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Ends reading, and returns what was sent before. The device's later writes fail, so that nothing is lost.
    pub fn stop_reading(mut self) -> Vec<u8> {
        let stream = UnixStream::from(self.file);
        stream.shutdown(Shutdown::Read).unwrap();
        io::Read::read_to_end(&mut &stream, &mut self.received).unwrap();
        self.received
    }

    /// Reads until `end` returns how many bytes to return.
    #[track_caller]
    fn read_until(&mut self, what: &str, mut end: impl FnMut(&[u8]) -> Option<usize>) -> Vec<u8> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(count) = end(&self.received) {
                return self.received.drain(..count).collect();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if !self.read(left) {
                let received = String::from_utf8_lossy(&self.received);
                panic!("{what:?} did not arrive, but:\n{received}");
            }
        }
    }

    /// Reads what is there, or waits for it. Returns false at the end, and after the time limit.
    fn read(&mut self, limit: Duration) -> bool {
        let limit = Timespec::try_from(limit).unwrap();
        let mut files = [PollFd::new(&self.file, PollFlags::IN)];
        match poll(&mut files, Some(&limit)) {
            Ok(0) => return false,
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return true,
            Err(error) => panic!("poll: {error}"),
        }
        let mut buffer = [0; 65536];
        match rustix::io::read(&self.file, &mut buffer) {
            Ok(count) => {
                self.received.extend_from_slice(&buffer[..count]);
                count > 0
            }
            Err(rustix::io::Errno::INTR) => true,
            Err(_) => false,
        }
    }
}
