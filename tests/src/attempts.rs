// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! System calls that code in a compromised thread of a back-end may try, and the required result.

use std::ffi::c_long;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;

use crate::intruder::{self, Intruder, Outcome};
use crate::process::{PATIENCE, Program};

const AT_FDCWD: u64 = libc::AT_FDCWD as u64;
const READ_WRITE_EXECUTE: u64 = (libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC) as u64;
const PRIVATE_MEMORY: u64 = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;

/// A system call that must end the process.
#[derive(Clone, Copy, Debug)]
pub struct Attempt {
    /// Its name, as the process reports it.
    pub name: &'static str,
    number: c_long,
    arguments: [Argument; 6],
}

#[derive(Clone, Copy, Debug)]
enum Argument {
    Number(u64),
    /// A path that does not exist, so that no attempt does harm where it is not refused.
    Nowhere,
    /// The parent process.
    Parent,
}

use Argument::{Nowhere, Number, Parent};

const fn attempt<const N: usize>(
    name: &'static str,
    number: c_long,
    first: [Argument; N],
) -> Attempt {
    let mut arguments = [Number(0); 6];
    let mut index = 0;
    while index < N {
        arguments[index] = first[index];
        index += 1;
    }
    Attempt {
        name,
        number,
        arguments,
    }
}

/// Programs, sockets and io_uring rings, which no thread of any device may create.
pub const PROGRAMS_AND_SOCKETS: &[Attempt] = &[
    attempt("execve", libc::SYS_execve, [Nowhere]),
    attempt("execveat", libc::SYS_execveat, [Number(AT_FDCWD), Nowhere]),
    attempt("clone", libc::SYS_clone, [Number(libc::SIGCHLD as u64)]),
    attempt("fork", libc::SYS_fork, []),
    attempt(
        "socket",
        libc::SYS_socket,
        [
            Number(libc::AF_INET as u64),
            Number(libc::SOCK_STREAM as u64),
        ],
    ),
    attempt(
        "socket",
        libc::SYS_socket,
        [
            Number(libc::AF_UNIX as u64),
            Number(libc::SOCK_STREAM as u64),
        ],
    ),
    // These would allow all of the above, past the filters.
    attempt("io_uring_setup", libc::SYS_io_uring_setup, [Number(1)]),
    attempt(
        "io_uring_register",
        libc::SYS_io_uring_register,
        [Number(u64::MAX)],
    ),
];

/// Other calls that no thread of any device may make.
pub const FORBIDDEN: &[Attempt] = &[
    attempt("connect", libc::SYS_connect, [Number(0)]),
    attempt(
        "sendto",
        libc::SYS_sendto,
        [Number(0), Number(0), Number(0), Number(0), Number(1)],
    ),
    attempt("bind", libc::SYS_bind, [Number(0)]),
    attempt(
        "ptrace",
        libc::SYS_ptrace,
        [Number(libc::PTRACE_ATTACH as u64), Parent],
    ),
    attempt("process_vm_readv", libc::SYS_process_vm_readv, [Parent]),
    attempt("tgkill", libc::SYS_tgkill, [Parent, Parent]),
    attempt("kill", libc::SYS_kill, [Parent]),
    attempt(
        "prctl",
        libc::SYS_prctl,
        [Number(libc::PR_SET_DUMPABLE as u64), Number(1)],
    ),
    attempt(
        "seccomp",
        libc::SYS_seccomp,
        [
            Number(libc::SECCOMP_SET_MODE_FILTER as u64),
            Number(libc::SECCOMP_FILTER_FLAG_NEW_LISTENER),
        ],
    ),
    attempt("ioctl", libc::SYS_ioctl, [Number(0), Number(libc::TIOCSTI)]),
    attempt("mount", libc::SYS_mount, []),
    attempt("chroot", libc::SYS_chroot, [Nowhere]),
    attempt(
        "unshare",
        libc::SYS_unshare,
        [Number(libc::CLONE_NEWUSER as u64)],
    ),
    attempt("setuid", libc::SYS_setuid, []),
    attempt("capset", libc::SYS_capset, []),
    attempt("bpf", libc::SYS_bpf, []),
    attempt("userfaultfd", libc::SYS_userfaultfd, []),
    attempt("open_by_handle_at", libc::SYS_open_by_handle_at, []),
    attempt("rename", libc::SYS_rename, [Nowhere, Nowhere]),
    attempt("symlink", libc::SYS_symlink, [Nowhere, Nowhere]),
    attempt("chmod", libc::SYS_chmod, [Nowhere, Number(0o777)]),
    attempt("truncate", libc::SYS_truncate, [Nowhere]),
];

/// Calls that only a device that compiles code may make.
pub const EXECUTABLE: &[Attempt] = &[
    attempt(
        "mmap",
        libc::SYS_mmap,
        [
            Number(0),
            Number(4096),
            Number(READ_WRITE_EXECUTE),
            Number(PRIVATE_MEMORY),
        ],
    ),
    attempt(
        "mprotect",
        libc::SYS_mprotect,
        [Number(0), Number(4096), Number(READ_WRITE_EXECUTE)],
    ),
];

/// Calls that only the thread that serves the front-end makes.
pub const SESSION: &[Attempt] = &[
    attempt("accept4", libc::SYS_accept4, [Number(u64::MAX)]),
    attempt("recvmsg", libc::SYS_recvmsg, [Number(u64::MAX)]),
];

/// Opens a new file to write.
pub const CREATE: Attempt = attempt(
    "openat",
    libc::SYS_openat,
    [
        Number(AT_FDCWD),
        Nowhere,
        Number((libc::O_WRONLY | libc::O_CREAT) as u64),
    ],
);

impl Attempt {
    /// Makes the call.
    ///
    /// # Errors
    /// The thread can no longer be used.
    pub fn make(&self, intruder: &mut Intruder) -> io::Result<Outcome> {
        let path = intruder.path("/nonexistent/file")?;
        let arguments = self.arguments.map(|argument| match argument {
            Number(number) => number,
            Nowhere => path,
            Parent => std::process::id().into(),
        });
        intruder.call(self.number, &arguments)
    }

    /// Makes the call in the thread of `program` with this name. It must end the process, and the process must report the call.
    pub fn assert_ends(&self, program: &mut Program, thread: &str) {
        let id = intruder::thread(program.id(), thread).unwrap();
        wait_until_confined(program, id);
        let mut intruder = Intruder::enter(program.id(), id).unwrap();
        let outcome = self.make(&mut intruder).unwrap();
        assert_eq!(
            outcome,
            Outcome::Trapped,
            "{} in thread {thread}",
            self.name
        );
        let status = program.wait(PATIENCE).unwrap();
        let stderr = program.stderr();
        assert_eq!(
            status.signal(),
            Some(libc::SIGSYS),
            "{} in thread {thread}: {stderr}",
            self.name
        );
        let line = format!(
            "its thread {thread} asked for the system call {}(",
            self.name
        );
        assert!(stderr.contains(&line), "no {line:?} in {stderr}");
    }
}

/// Waits until a thread that may have just started has one filter more than the thread that started it.
fn wait_until_confined(program: &mut Program, thread: i32) {
    let process = program.id();
    let filters = |thread: i32| -> io::Result<Option<u32>> {
        let status = std::fs::read_to_string(format!("/proc/{process}/task/{thread}/status"))?;
        let count = |line: &str| line.strip_prefix("Seccomp_filters:")?.trim().parse().ok();
        Ok(status.lines().find_map(count))
    };
    let first = process as i32;
    if thread == first {
        return;
    }
    let is_confined = || {
        // Kernels before 5.9 do not report this.
        Ok(filters(first)?.is_none_or(|first| {
            let own = filters(thread).ok().flatten();
            own.is_some_and(|own| own > first)
        }))
    };
    program
        .wait_until("confine its thread", PATIENCE, is_confined)
        .unwrap();
}

/// Asserts that reading a file fails in this thread, and nothing else happens.
pub fn assert_cannot_read(intruder: &mut Intruder, path: &Path) {
    assert_eq!(
        open(intruder, path, libc::O_RDONLY),
        -i64::from(libc::EACCES),
        "{}",
        path.display()
    );
}

/// Opens a file in this thread, and closes it. Returns the answer of the kernel.
pub fn open(intruder: &mut Intruder, path: &Path, flags: i32) -> i64 {
    let path = intruder.path(path).unwrap();
    let outcome = intruder.call(libc::SYS_openat, &[AT_FDCWD, path, flags as u64, 0o600]);
    let Ok(Outcome::Returned(result)) = outcome else {
        panic!("openat: {outcome:?}");
    };
    if result >= 0 {
        intruder.call(libc::SYS_close, &[result as u64]).unwrap();
    }
    result
}
