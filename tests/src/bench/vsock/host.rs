// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The programs of the host that the guest connects to.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};

/// Bytes of a read or a write.
pub const CHUNK: usize = 64 << 10;
/// Bytes of a message.
pub const MESSAGE: usize = 64;

/// What the program does with a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Service {
    /// Reads to the end of the stream.
    Sink,
    /// Writes until the connection ends.
    Source,
    /// Writes what it reads.
    Echo,
    /// Reads a message, writes it, and closes the connection.
    Greet,
}

/// A running program, with one thread for all connections. Dropping it waits for the end of the connection that it serves.
#[derive(Debug)]
pub struct Host {
    path: PathBuf,
    received: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Host {
    /// Listens at `path`.
    pub fn start(path: &Path, service: Service) -> io::Result<Self> {
        let listener = UnixListener::bind(path)?;
        let received = Arc::new(AtomicU64::new(0));
        let stop = Arc::new(AtomicBool::new(false));
        let (counter, stopped) = (received.clone(), stop.clone());
        let thread = thread::spawn(move || {
            let mut buffer = vec![0; CHUNK];
            for stream in listener.incoming() {
                if stopped.load(Ordering::Relaxed) {
                    break;
                }
                // A connection ends by an error when its back-end ends.
                let _ = stream.and_then(|stream| serve(stream, service, &mut buffer, &counter));
            }
        });
        Ok(Host {
            path: path.to_owned(),
            received,
            stop,
            thread: Some(thread),
        })
    }

    /// Returns how many bytes have arrived.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }
}

fn serve(
    mut stream: UnixStream,
    service: Service,
    buffer: &mut [u8],
    received: &AtomicU64,
) -> io::Result<()> {
    if service == Service::Greet {
        let message = &mut buffer[..MESSAGE];
        stream.read_exact(message)?;
        return stream.write_all(message);
    }
    loop {
        if service == Service::Source {
            stream.write_all(buffer)?;
            continue;
        }
        let count = stream.read(buffer)?;
        if count == 0 {
            return Ok(());
        }
        received.fetch_add(count as u64, Ordering::Relaxed);
        if service == Service::Echo {
            stream.write_all(&buffer[..count])?;
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // Wakes the thread.
        let _ = UnixStream::connect(&self.path);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let _ = std::fs::remove_file(&self.path);
    }
}
