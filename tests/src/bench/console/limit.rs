// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The upper limit for back-ends of this kind: one thread writes buffers to a socket or terminal, or reads them, and a client does the
//! opposite.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::{readv, writev};
use rustix::time::{ClockId, clock_gettime};

use super::Load;
use super::client::Client;
use super::load::{Measured, Schedule};
use crate::bench::histogram::Histogram;

/// Bytes of a call, which are in buffers of the row's size.
const BATCH: usize = 256 << 10;

/// Measures it. This thread acts as the back-end.
pub fn run(load: Load, terminal: bool, size: usize, schedule: Schedule) -> io::Result<Measured> {
    let (ours, theirs) = match terminal {
        true => open_terminal()?,
        false => {
            let (ours, theirs) = UnixStream::pair()?;
            (ours.into(), theirs.into())
        }
    };
    let client = Client::new(theirs)?;
    let (moved, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let mut bytes = vec![b'x'; BATCH];
    let mut call = || match load {
        Load::Receive => {
            let mut parts: Vec<_> = bytes.chunks_mut(size).map(IoSliceMut::new).collect();
            readv(&ours, &mut parts)
        }
        _ => {
            let parts: Vec<_> = bytes.chunks(size).map(IoSlice::new).collect();
            writev(&ours, &parts)
        }
    };
    thread::scope(|scope| {
        let client = scope.spawn(|| match load {
            Load::Receive => client.write_all(&moved, &stop),
            _ => client.read_all(&moved, &stop),
        });
        let mut move_for = |time: Duration| -> io::Result<Measured> {
            let (start, cpu, mut bytes) = (Instant::now(), cpu_time(), 0);
            while start.elapsed() < time {
                bytes += call()? as u64;
            }
            Ok(Measured {
                bytes,
                time: start.elapsed(),
                cpu: cpu_time().saturating_sub(cpu),
                latencies: Histogram::default(),
            })
        };
        let measured = move_for(schedule.warm_up).and_then(|_| move_for(schedule.window));
        stop.store(true, Ordering::Relaxed);
        client.join().expect("the client does not panic")?;
        measured
    })
}

/// Creates a raw terminal, and returns both sides.
fn open_terminal() -> io::Result<(OwnedFd, OwnedFd)> {
    let (mut ours, mut theirs) = (-1, -1);
    // SAFETY: all zeroes are valid settings, which the call below replaces.
    let mut settings: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: the call changes live settings.
    unsafe { libc::cfmakeraw(&mut settings) };
    settings.c_cflag |= libc::CREAD;
    // SAFETY: the call writes two file descriptors to live variables, and reads live settings; null pointers are allowed for the others.
    let result = unsafe {
        libc::openpty(
            &mut ours,
            &mut theirs,
            ptr::null_mut(),
            &settings,
            ptr::null(),
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the file descriptors are new, and belong to nobody else.
    Ok(unsafe { (OwnedFd::from_raw_fd(ours), OwnedFd::from_raw_fd(theirs)) })
}

/// Returns CPU time of this thread.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
