// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Allowed system calls, and the tables of those that the core makes.

use std::ffi::c_long;

use rustix::process::getpid;

/// Most arguments of one call that are checked.
const MAX_CONDITIONS: usize = 2;

/// CLONE_VM, FS, FILES, SIGHAND, THREAD, SYSVSEM, SETTLS, PARENT_SETTID and CHILD_CLEARTID: the flags that create a thread.
const THREAD_FLAGS: u64 = 0x003d_0f00;
/// CLONE_DETACHED, which some C libraries add, and the kernel ignores.
const CLONE_DETACHED: u64 = 0x0040_0000;
/// Argument of `mmap(2)` and `mprotect(2)` for executable memory.
const PROT_EXEC: u64 = libc::PROT_EXEC as u64;
/// PR_SET_VMA, by which some C libraries name memory.
const PR_SET_VMA: u64 = 0x5356_4d41;

/// A value that an argument must have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Condition {
    /// Index of the argument, from 0.
    pub argument: u8,
    /// The bits that are checked.
    pub mask: u64,
    /// The value of these bits.
    pub value: u64,
}

/// A system call that a device may make after its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    number: i64,
    conditions: [Option<Condition>; MAX_CONDITIONS],
}

impl Call {
    /// Allows the call with this number (`libc::SYS_…`) with any arguments.
    pub fn new(number: c_long) -> Self {
        Self {
            number,
            conditions: [None; MAX_CONDITIONS],
        }
    }

    /// Allows the call only if argument `argument`, from 0, has `value` in its lower 32 bits.
    #[must_use]
    pub fn with(self, argument: u8, value: u32) -> Self {
        self.with_bits(argument, u32::MAX.into(), value.into())
    }

    /// Allows the call only if argument `argument`, from 0, is `value` in the bits of `mask`. Two arguments can be checked; a third one is
    /// ignored.
    #[must_use]
    pub fn with_bits(mut self, argument: u8, mask: u64, value: u64) -> Self {
        if let Some(free) = self.conditions.iter_mut().find(|place| place.is_none()) {
            *free = Some(Condition {
                argument,
                mask,
                value,
            });
        }
        self
    }

    /// Returns the calls that start threads.
    pub fn threads() -> Vec<Self> {
        vec![
            Self::new(libc::SYS_clone).with_bits(0, !CLONE_DETACHED, THREAD_FLAGS),
            // A filter cannot read its flags, so it fails with ENOSYS; the C library then uses `clone(2)`.
            Self::new(libc::SYS_clone3),
            Self::new(libc::SYS_rseq),
            Self::new(libc::SYS_set_robust_list),
            // For the filter of the new thread.
            Self::new(libc::SYS_seccomp)
                .with(0, libc::SECCOMP_SET_MODE_FILTER)
                .with(1, 0),
            Self::new(libc::SYS_prctl).with(0, libc::PR_SET_NO_NEW_PRIVS as u32),
        ]
    }

    /// Returns the calls that create unix sockets and connect them.
    pub fn connect_unix() -> Vec<Self> {
        let mut calls = Self::unix_sockets();
        calls.push(Self::new(libc::SYS_connect));
        calls
    }

    /// Returns the calls that create unix sockets, bind them, and accept connections.
    pub fn bind_unix() -> Vec<Self> {
        let mut calls = Self::unix_sockets();
        calls.extend(plain(&[
            libc::SYS_bind,
            libc::SYS_listen,
            libc::SYS_accept4,
        ]));
        calls
    }

    fn unix_sockets() -> Vec<Self> {
        let mut calls = plain(&[libc::SYS_getsockopt, libc::SYS_recvfrom, libc::SYS_shutdown]);
        calls.push(Self::new(libc::SYS_socket).with(0, libc::AF_UNIX as u32));
        calls
    }

    pub(super) fn number(&self) -> i64 {
        self.number
    }

    pub(super) fn conditions(&self) -> impl Iterator<Item = &Condition> {
        self.conditions.iter().flatten()
    }

    /// Returns whether this allows the call `number` with `arguments`.
    pub(super) fn is(&self, number: i64, arguments: &[u64]) -> bool {
        self.number == number
            && self.conditions().all(|condition| {
                let argument = arguments.get(usize::from(condition.argument));
                argument.is_some_and(|value| value & condition.mask == condition.value)
            })
    }
}

fn plain(numbers: &[c_long]) -> Vec<Call> {
    numbers.iter().copied().map(Call::new).collect()
}

/// Returns the calls of all threads: memory, locks, time, waiting for files, log lines, signals, exit.
pub(super) fn everywhere() -> Vec<Call> {
    let mut calls = plain(&[
        libc::SYS_read,
        libc::SYS_write,
        libc::SYS_writev,
        libc::SYS_close,
        libc::SYS_munmap,
        libc::SYS_mremap,
        libc::SYS_madvise,
        libc::SYS_brk,
        libc::SYS_futex,
        libc::SYS_ppoll,
        libc::SYS_sched_yield,
        libc::SYS_sched_getaffinity,
        libc::SYS_membarrier,
        libc::SYS_getpid,
        libc::SYS_gettid,
        libc::SYS_getrandom,
        libc::SYS_clock_gettime,
        libc::SYS_clock_nanosleep,
        libc::SYS_nanosleep,
        libc::SYS_restart_syscall,
        libc::SYS_rt_sigaction,
        libc::SYS_rt_sigprocmask,
        libc::SYS_rt_sigreturn,
        libc::SYS_sigaltstack,
        libc::SYS_exit,
        libc::SYS_exit_group,
    ]);
    #[cfg(target_arch = "x86_64")]
    calls.extend(plain(&[
        libc::SYS_poll,
        libc::SYS_gettimeofday,
        libc::SYS_time,
    ]));
    calls.extend(
        [libc::SYS_mmap, libc::SYS_mprotect].map(|call| Call::new(call).with_bits(2, PROT_EXEC, 0)),
    );
    // Without an address: for signal handlers, which may run in any thread, and for call files that are sockets.
    calls.push(Call::new(libc::SYS_sendto).with_bits(4, u64::MAX, 0));
    // Debug builds check that a file that they close is open.
    calls.push(Call::new(libc::SYS_fcntl).with(1, libc::F_GETFD as u32));
    let names = [libc::PR_SET_NAME as u32, libc::PR_GET_NAME as u32];
    calls.extend(names.map(|name| Call::new(libc::SYS_prctl).with(0, name)));
    calls.push(Call::new(libc::SYS_prctl).with_bits(0, u64::MAX, PR_SET_VMA));
    // Only for this process: abort(3) uses it.
    let this = getpid().as_raw_pid() as u32;
    calls.push(Call::new(libc::SYS_tgkill).with(0, this));
    #[cfg(target_env = "musl")]
    calls.push(Call::new(libc::SYS_tkill));
    #[cfg(debug_assertions)]
    calls.push(Call::new(libc::SYS_kill).with(0, this));
    calls
}

/// Returns the calls by which a queue thread waits and notifies.
pub(super) fn queue() -> Vec<Call> {
    #[cfg(target_arch = "x86_64")]
    let mut calls = plain(&[libc::SYS_epoll_wait]);
    #[cfg(not(target_arch = "x86_64"))]
    let mut calls = Vec::new();
    calls.extend(plain(&[
        libc::SYS_epoll_pwait,
        libc::SYS_epoll_ctl,
        libc::SYS_pwritev2,
        libc::SYS_timerfd_settime,
    ]));
    calls
}

/// Returns the calls that serve the front-end: its connection, its files, the queue threads.
pub(super) fn session() -> Vec<Call> {
    let mut calls = plain(&[
        libc::SYS_listen,
        libc::SYS_accept4,
        libc::SYS_recvmsg,
        libc::SYS_recvfrom,
        libc::SYS_sendmsg,
        libc::SYS_getsockopt,
        libc::SYS_setsockopt,
        libc::SYS_shutdown,
        libc::SYS_epoll_create1,
        libc::SYS_eventfd2,
        libc::SYS_timerfd_create,
        libc::SYS_memfd_create,
        libc::SYS_ftruncate,
        libc::SYS_fstat,
        libc::SYS_lseek,
    ]);
    let commands = [
        libc::F_GETFL,
        libc::F_SETFL,
        libc::F_SETFD,
        libc::F_DUPFD_CLOEXEC,
        libc::F_ADD_SEALS,
        libc::F_GET_SEALS,
    ];
    calls.extend(commands.map(|command| Call::new(libc::SYS_fcntl).with(1, command as u32)));
    calls.push(Call::new(libc::SYS_ioctl).with(1, libc::FIONBIO as u32));
    calls.extend(Call::threads());
    calls
}

/// Returns the calls that check whether a socket file is still the same one, and remove it.
pub(super) fn removal() -> Vec<Call> {
    #[cfg(target_arch = "x86_64")]
    let mut calls = plain(&[libc::SYS_unlink, libc::SYS_lstat, libc::SYS_stat]);
    #[cfg(not(target_arch = "x86_64"))]
    let mut calls = Vec::new();
    calls.extend(plain(&[
        libc::SYS_unlinkat,
        libc::SYS_statx,
        libc::SYS_newfstatat,
    ]));
    calls
}
