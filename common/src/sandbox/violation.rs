// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What happens on a disallowed system call: the process logs it, and is killed.
//!
//! The kernel does not execute the call; it raises SIGSYS in the thread. The handler can neither be replaced nor blocked: an attempt is a
//! violation too, for which the kernel kills the process. The handler ends the process in the same way.

use std::ffi::{c_int, c_void};
use std::fmt::{self, Write};
use std::io;
use std::ptr::null_mut;
use std::sync::OnceLock;

use syscalls::Sysno;

/// How long the handler waits for a stderr that accepts nothing, in milliseconds.
const PATIENCE: c_int = 100;

/// Name of the program, for the handler.
static PROGRAM: OnceLock<&str> = OnceLock::new();

/// A system call, as a log line describes it.
pub(super) struct Description {
    /// Its number.
    pub number: i64,
    /// Its first arguments.
    pub arguments: [u64; 3],
}

impl fmt::Display for Description {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let known = usize::try_from(self.number).ok().and_then(Sysno::new);
        match known {
            Some(known) => formatter.write_str(known.name())?,
            None => write!(formatter, "number {}", self.number)?,
        }
        let [first, second, third] = self.arguments;
        write!(formatter, "({first:#x}, {second:#x}, {third:#x}, ...)")
    }
}

/// Makes violations log a line before they kill the process.
///
/// # Errors
/// The signal cannot be handled.
pub(super) fn name_violations(program: &'static str) -> io::Result<()> {
    let _ = PROGRAM.set(program);
    let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = end;
    // SAFETY: all zeroes is a value of this plain structure.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the handler has the signature that the flags announce; it makes system calls, formats without allocating, and does not
    // return.
    match unsafe { libc::sigaction(libc::SIGSYS, &action, null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Logs the system call, and ends the process.
extern "C" fn end(_signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes the information that the flags ask for, which with this signal has a system call, and the context.
    let (number, context) = unsafe { ((*info).si_syscall(), &*context.cast::<libc::ucontext_t>()) };
    let called = Description {
        number: number.into(),
        arguments: arguments(context),
    };
    let mut name = [0u8; 16];
    // SAFETY: the kernel writes 16 bytes.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    let name = name.split(|&byte| byte == 0).next().unwrap_or_default();
    let mut line = Line {
        bytes: [0; 512],
        length: 0,
    };
    let _ = writeln!(
        line,
        "{}: error: the sandbox ends this program: its thread {} asked for the system call {}, which is not allowed; if you trust \
         the guest, please report this, and use --sandbox=log until it is fixed",
        PROGRAM.get().copied().unwrap_or_default(),
        str::from_utf8(name).unwrap_or("?"),
        called,
    );
    let text = line.bytes.get(..line.length).unwrap_or_default();
    let mut stderr = libc::pollfd {
        fd: libc::STDERR_FILENO,
        events: libc::POLLOUT,
        revents: 0,
    };
    // SAFETY: there is one file to poll, and the text has this length: a pipe that is writable takes that much. Then the kernel is asked
    // for what it ends the process for, and in case it does not, for an end.
    unsafe {
        if libc::poll(&raw mut stderr, 1, PATIENCE) > 0 {
            libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), text.len());
        }
        libc::sigaction(libc::SIGSYS, std::ptr::null(), null_mut());
        libc::_exit(128 + libc::SIGSYS);
    }
}

#[cfg(target_arch = "x86_64")]
fn arguments(context: &libc::ucontext_t) -> [u64; 3] {
    let registers = &context.uc_mcontext.gregs;
    [libc::REG_RDI, libc::REG_RSI, libc::REG_RDX].map(|number| {
        registers
            .get(number as usize)
            .map_or(0, |value| *value as u64)
    })
}

#[cfg(target_arch = "aarch64")]
fn arguments(context: &libc::ucontext_t) -> [u64; 3] {
    let registers = &context.uc_mcontext.regs;
    [0, 1, 2].map(|number| registers.get(number).copied().unwrap_or_default())
}

/// A line that does not allocate memory.
struct Line {
    bytes: [u8; 512],
    length: usize,
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = self.bytes.get_mut(self.length..).unwrap_or_default();
        let length = room.len().min(text.len());
        for (to, from) in room.iter_mut().zip(text.bytes()) {
            *to = from;
        }
        self.length += length;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn description(number: i64) -> String {
        let arguments = [2, 0x801, 0];
        Description { number, arguments }.to_string()
    }

    #[test]
    fn calls_are_described_by_name_where_they_have_one() {
        assert_eq!(
            description(libc::SYS_socket),
            "socket(0x2, 0x801, 0x0, ...)"
        );
        assert_eq!(description(4095), "number 4095(0x2, 0x801, 0x0, ...)");
        assert_eq!(description(-1), "number -1(0x2, 0x801, 0x0, ...)");
    }

    #[test]
    fn a_line_that_is_too_long_is_cut() {
        let mut line = Line {
            bytes: [0; 512],
            length: 0,
        };
        for _ in 0..100 {
            line.write_str("0123456789").unwrap();
        }
        assert_eq!(line.length, 512);
        assert_eq!(&line.bytes[508..], b"8901");
    }
}
