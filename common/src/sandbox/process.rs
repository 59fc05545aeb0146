// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A second process, for the one thing that a device cannot do in its sandbox.

use std::ffi::c_uint;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::net::UnixStream;

use rustix::process::{Signal, set_parent_process_death_signal};

use super::call::Call;
use super::{filter, violation};
use crate::stderr;

/// Number of the socket in the second process, which has no other open file except stdin, stdout and stderr.
const SOCKET: RawFd = 3;

/// Starts a process that runs `work` with a socket, and exits after it. Returns the other end of the socket. The new process keeps its
/// privileges, has no open file of this one, and can make only `calls` and the system calls of all threads. Must be called while this
/// process has only one thread.
///
/// # Errors
/// No process can be started, or no file can be opened.
pub fn start_process(
    program: &'static str,
    calls: &[Call],
    work: impl FnOnce(UnixStream),
) -> io::Result<UnixStream> {
    let (ours, theirs) = UnixStream::pair()?;
    // SAFETY: there is no other thread that could hold a lock which the new process needs.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            drop(ours);
            stderr::write_directly();
            if let Ok(socket) = prepare(program, calls, theirs) {
                work(socket);
            }
            // SAFETY: this only exits, without the exit handlers of the other process.
            unsafe { libc::_exit(0) }
        }
        _ => Ok(ours),
    }
}

fn prepare(program: &'static str, calls: &[Call], socket: UnixStream) -> io::Result<UnixStream> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // SAFETY: no closed file is used after this: the socket has another number, and the other files belong to the other process.
    let socket = unsafe {
        if libc::dup2(socket.as_raw_fd(), SOCKET) < 0 {
            return Err(io::Error::last_os_error());
        }
        std::mem::forget(socket);
        libc::syscall(libc::SYS_close_range, SOCKET + 1, c_uint::MAX, 0);
        UnixStream::from_raw_fd(SOCKET)
    };
    violation::name_violations(program)?;
    // The other process reports a kernel without filters.
    if let Err(error) = filter::confine_process(calls) {
        log::debug!("the process that opens files is not confined: {error}");
    }
    Ok(socket)
}
