// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Simulates code of a guest that has taken over a thread of a program: it makes system calls in that thread through ptrace(2).

use std::ffi::{CString, c_long, c_void};
use std::fs::{self, File};
use std::io;
use std::mem;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::ptr::null_mut;
use std::time::Instant;

use crate::process::PATIENCE;

/// Offset below the stack pointer of a thread, outside of what the thread may have stored there.
const BELOW_STACK: u64 = 8 << 10;
/// Bytes of `syscall`.
const SYSCALL: [u8; 2] = [0x0f, 0x05];

/// The result of a system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The call returned this value: the kernel's answer, negative for an error.
    Returned(i64),
    /// The thread received SIGSYS for the call.
    Trapped,
    /// The kernel ended the process.
    Ended,
}

/// A thread that was taken over. Dropping this lets it continue where it was.
#[derive(Debug)]
pub struct Intruder {
    process: i32,
    thread: i32,
    memory: File,
    registers: libc::user_regs_struct,
    left: bool,
}

/// Returns the thread of a process with this name, which may appear soon.
pub fn thread(process: u32, name: &str) -> io::Result<i32> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(thread) = find(process, name)? {
            return Ok(thread);
        }
        if Instant::now() >= deadline {
            let what = format!("process {process} has no thread {name}");
            return Err(io::Error::other(what));
        }
        std::thread::yield_now();
    }
}

fn find(process: u32, name: &str) -> io::Result<Option<i32>> {
    for entry in fs::read_dir(format!("/proc/{process}/task"))? {
        let path: PathBuf = entry?.path();
        // It may have ended since.
        let Ok(comm) = fs::read_to_string(path.join("comm")) else {
            continue;
        };
        let id = path
            .file_name()
            .and_then(|id| id.to_str()?.parse::<i32>().ok());
        if comm.trim_end() == name {
            return Ok(id);
        }
    }
    Ok(None)
}

impl Intruder {
    /// Takes over a thread of `process` while it waits in a system call. This needs the right to trace processes.
    pub fn enter(process: u32, thread: i32) -> io::Result<Self> {
        loop {
            if let Some(intruder) = Self::try_enter(process, thread)? {
                return Ok(intruder);
            }
            std::thread::yield_now();
        }
    }

    /// Does the same, unless the thread is running.
    fn try_enter(process: u32, thread: i32) -> io::Result<Option<Self>> {
        let memory = File::options()
            .read(true)
            .write(true)
            .open(format!("/proc/{process}/mem"))?;
        // SAFETY: these requests take numbers.
        unsafe {
            trace(libc::PTRACE_SEIZE, thread, 0, 0)?;
            trace(libc::PTRACE_INTERRUPT, thread, 0, 0)?;
        }
        // SAFETY: all zeroes is a value of this plain structure.
        let registers = unsafe { mem::zeroed() };
        let mut intruder = Self {
            process: process as i32,
            thread,
            memory,
            registers,
            left: false,
        };
        intruder.wait()?;
        intruder.registers = intruder.read_registers()?;
        let mut code = [0; SYSCALL.len()];
        intruder.read(intruder.call_address(), &mut code)?;
        Ok((code == SYSCALL).then_some(intruder))
    }

    /// Returns the address of the thread's own system call.
    fn call_address(&self) -> u64 {
        self.registers.rip - SYSCALL.len() as u64
    }

    /// Makes a system call.
    pub fn call(&mut self, number: c_long, arguments: &[u64]) -> io::Result<Outcome> {
        let argument = |index: usize| arguments.get(index).copied().unwrap_or(0);
        let mut registers = libc::user_regs_struct {
            rip: self.call_address(),
            rax: number as u64,
            // The thread is not in a system call, so the kernel does not restart one.
            orig_rax: u64::MAX,
            rdi: argument(0),
            rsi: argument(1),
            rdx: argument(2),
            r10: argument(3),
            r8: argument(4),
            r9: argument(5),
            ..self.registers
        };
        // SAFETY: the kernel reads the registers; the other request takes numbers.
        unsafe {
            trace(
                libc::PTRACE_SETREGS,
                self.thread,
                0,
                (&raw mut registers).expose_provenance(),
            )?;
            trace(libc::PTRACE_SINGLESTEP, self.thread, 0, 0)?;
        }
        match self.wait()? {
            Some(libc::SIGTRAP) => {
                let result = self.read_registers()?.rax as i64;
                Ok(Outcome::Returned(result))
            }
            Some(signal) => {
                // The step has ended too; the thread must not receive its signal.
                // SAFETY: the request takes numbers.
                unsafe { trace(libc::PTRACE_CONT, self.thread, 0, signal as usize)? };
                if self.wait()?.is_some() {
                    // SAFETY: as above.
                    unsafe { trace(libc::PTRACE_DETACH, self.thread, 0, 0)? };
                }
                self.left = true;
                Ok(Outcome::Trapped)
            }
            None => {
                self.left = true;
                Ok(Outcome::Ended)
            }
        }
    }

    /// Writes a path to the thread's memory, and returns its address.
    pub fn path(&self, path: impl AsRef<Path>) -> io::Result<u64> {
        let path = CString::new(path.as_ref().as_os_str().as_bytes())?;
        self.bytes(path.as_bytes_with_nul())
    }

    /// Writes up to 4 KiB to the thread's memory, over earlier bytes, and returns their address.
    pub fn bytes(&self, bytes: &[u8]) -> io::Result<u64> {
        let address = (self.registers.rsp - BELOW_STACK) & !15;
        self.write(address, bytes)?;
        Ok(address)
    }

    /// Writes to the process's memory.
    pub fn write(&self, address: u64, bytes: &[u8]) -> io::Result<()> {
        self.memory.write_all_at(bytes, address)
    }

    /// Reads from the process's memory.
    pub fn read(&self, address: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.memory.read_exact_at(bytes, address)
    }

    fn read_registers(&self) -> io::Result<libc::user_regs_struct> {
        // SAFETY: all zeroes is a value of this plain structure.
        let mut registers: libc::user_regs_struct = unsafe { mem::zeroed() };
        // SAFETY: the kernel writes the registers.
        unsafe {
            trace(
                libc::PTRACE_GETREGS,
                self.thread,
                0,
                (&raw mut registers).expose_provenance(),
            )?;
        }
        Ok(registers)
    }

    /// Waits until the thread has stopped for a signal, or has ended.
    fn wait(&self) -> io::Result<Option<i32>> {
        // The exit status of the process is left for its parent.
        let options = libc::WEXITED | libc::WSTOPPED | libc::WNOWAIT | libc::__WALL;
        // SAFETY: all zeroes is a value of this plain structure, to which the kernel writes.
        let info = unsafe {
            let mut info: libc::siginfo_t = mem::zeroed();
            match libc::waitid(libc::P_PID, self.thread as u32, &raw mut info, options) {
                -1 => return Err(io::Error::last_os_error()),
                _ => info,
            }
        };
        let has_ended = matches!(
            info.si_code,
            libc::CLD_EXITED | libc::CLD_KILLED | libc::CLD_DUMPED
        );
        if has_ended && self.thread != self.process {
            // Nobody else reaps a traced thread; until then its process has not ended.
            // SAFETY: the status is not wanted.
            unsafe { libc::waitpid(self.thread, null_mut(), libc::__WALL) };
        }
        // SAFETY: this information has a status. What is above the signal tells of other events than signals.
        let signal = unsafe { info.si_status() } & 0x7f;
        Ok((!has_ended).then_some(signal))
    }
}

impl Drop for Intruder {
    fn drop(&mut self) {
        if !self.left {
            let registers = (&raw mut self.registers).expose_provenance();
            // SAFETY: the kernel reads the registers; the other request takes numbers. It makes the call again that was interrupted.
            unsafe {
                let _ = trace(libc::PTRACE_SETREGS, self.thread, 0, registers);
                let _ = trace(libc::PTRACE_DETACH, self.thread, 0, 0);
            }
        }
    }
}

/// # Safety
/// `data` must be valid for the request.
unsafe fn trace(request: u32, thread: i32, address: usize, data: usize) -> io::Result<()> {
    let (address, data): (*mut c_void, *mut c_void) = (
        null_mut::<c_void>().with_addr(address),
        std::ptr::with_exposed_provenance_mut(data),
    );
    // SAFETY: the caller's promise.
    match unsafe { libc::ptrace(request, thread, address, data) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
