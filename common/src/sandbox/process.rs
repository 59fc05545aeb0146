// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A process beside this one, for the one thing that a device cannot do in its sandbox.

use std::ffi::c_uint;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::net::UnixStream;

use rustix::process::{Signal, set_parent_process_death_signal};

use super::call::Call;
use super::{filter, violation};
use crate::stderr;

/// The number that the socket has in the other process, where nothing else is open but what stdin, stdout and stderr are.
const SOCKET: RawFd = 3;

/// Starts a process that does `work` with a socket, whose other end this gives, and ends with it. It keeps its privileges, has no file
/// of this one, and makes no system calls but `calls` and what every thread does. To be called while the process has one thread.
///
/// # Errors
/// No process can be started, or no file opened.
pub fn start_process(
    program: &'static str,
    calls: &[Call],
    work: impl FnOnce(UnixStream),
) -> io::Result<UnixStream> {
    let (ours, theirs) = UnixStream::pair()?;
    // SAFETY: there is no other thread whose locks the new process could find taken.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            drop(ours);
            stderr::write_directly();
            if let Ok(socket) = prepare(program, calls, theirs) {
                work(socket);
            }
            // SAFETY: it only ends the process, without what the other one wants to have done at its end.
            unsafe { libc::_exit(0) }
        }
        _ => Ok(ours),
    }
}

fn prepare(program: &'static str, calls: &[Call], socket: UnixStream) -> io::Result<UnixStream> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // SAFETY: nothing of what is closed is used after this: the socket has another number, and all else is the other process's.
    let socket = unsafe {
        if libc::dup2(socket.as_raw_fd(), SOCKET) < 0 {
            return Err(io::Error::last_os_error());
        }
        std::mem::forget(socket);
        libc::syscall(libc::SYS_close_range, SOCKET + 1, c_uint::MAX, 0);
        UnixStream::from_raw_fd(SOCKET)
    };
    violation::name_violations(program)?;
    // A kernel without filters is the concern of the other process.
    if let Err(error) = filter::confine_process(calls) {
        log::debug!("the process that opens files is not confined: {error}");
    }
    Ok(socket)
}
