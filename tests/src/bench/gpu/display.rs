// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A display that reads all messages, and answers those that require it.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::pin;

/// Requests of the vhost-user-gpu protocol.
const GET_PROTOCOL_FEATURES: u32 = 1;
/// See `GET_PROTOCOL_FEATURES`.
pub const UPDATE: u32 = 8;
/// Flag of a header: this answers a request.
const REPLY: u32 = 4;
/// Protocol feature without which QEMU's back-end ends when the driver accepts the corresponding feature.
const EDID: u32 = 1;
/// Bytes of an UPDATE between its header and its pixels.
pub const UPDATE_SIZE: u32 = 20;
/// Time limit for reading what was sent.
const PATIENCE: Duration = Duration::from_secs(20);

/// The display.
pub struct Display {
    socket: UnixStream,
    /// Bytes of all pictures that were read.
    shown: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Display {
    /// Makes a display whose thread runs on `cpu`. Returns the other end of its socket too.
    pub fn new(cpu: usize) -> io::Result<(Self, UnixStream)> {
        let (ours, theirs) = UnixStream::pair()?;
        let socket = ours.try_clone()?;
        let shown = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&shown);
        let thread = std::thread::Builder::new().spawn(move || {
            // It ends when either side closes the socket.
            let _ = pin(cpu).and_then(|()| serve(ours, &count));
        })?;
        let display = Self {
            socket,
            shown,
            thread: Some(thread),
        };
        Ok((display, theirs))
    }

    /// Waits until pictures of so many bytes were read.
    pub fn wait_shown(&self, bytes: u64) -> io::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.shown.load(Ordering::Relaxed) {
                shown if shown == bytes => return Ok(()),
                shown if shown > bytes || Instant::now() > deadline => {
                    return Err(io::Error::other(format!(
                        "the display was sent {shown} bytes of pictures instead of {bytes}"
                    )));
                }
                _ => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }
}

impl Drop for Display {
    fn drop(&mut self) {
        let _ = self.socket.shutdown(Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(mut socket: UnixStream, shown: &AtomicU64) -> io::Result<()> {
    let mut payload = Vec::new();
    loop {
        let mut header = [0; 12];
        socket.read_exact(&mut header)?;
        // QEMU leaves the flags between the two uninitialised in an UPDATE.
        let [request, size] =
            [0, 8].map(|at| u32::from_ne_bytes(header[at..at + 4].try_into().expect("4 bytes")));
        if payload.len() < size as usize {
            payload.resize(size as usize, 0);
        }
        socket.read_exact(&mut payload[..size as usize])?;
        match request {
            UPDATE => {
                shown.fetch_add(
                    u64::from(size.saturating_sub(UPDATE_SIZE)),
                    Ordering::Relaxed,
                );
            }
            // Nothing else is requested here.
            GET_PROTOCOL_FEATURES => {
                let words = [request, REPLY, 8, EDID, 0];
                socket.write_all(&words.map(u32::to_ne_bytes).concat())?;
            }
            _ => {}
        }
    }
}
