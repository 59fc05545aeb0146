// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `--sandbox=log`: the kernel reports each call that would be a violation to a thread outside the sandbox, which allows and logs it.

use std::collections::HashSet;
use std::ffi::c_uint;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::mpsc::{Receiver, channel};

use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};
use rustix::process::getpid;
use seccompiler::{BpfProgram, SeccompAction};

use super::Needs;
use super::call::Call;
use super::filter::{Role, allowed, compile};
use super::violation::Description;

/// The last instruction of a filter: BPF_RET with a constant.
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
const RECEIVE: Opcode = opcode::read_write::<libc::seccomp_notif>(b'!', 0);
const SEND: Opcode = opcode::read_write::<libc::seccomp_notif_resp>(b'!', 1);

/// Starts to watch the calls of this thread, and of the threads that it starts.
pub(super) fn install(needs: &Needs) -> io::Result<()> {
    let session = allowed(Role::Session, needs);
    let control = allowed(Role::Control, needs);
    let mut queue = allowed(Role::Queue, needs);
    // The calls of a thread before it has a name.
    queue.extend(Call::threads());
    let mut program =
        compile(&queue, SeccompAction::Allow, SeccompAction::Log).map_err(io::Error::other)?;
    for instruction in &mut program {
        if (instruction.code, instruction.k) == (RETURN, libc::SECCOMP_RET_LOG) {
            instruction.k = libc::SECCOMP_RET_USER_NOTIF;
        }
    }
    let (sender, receiver) = channel();
    std::thread::Builder::new()
        .name("sandbox".to_owned())
        .spawn(move || watch(&receiver, &session, &control))?;
    let listener = listen(&mut program)?;
    let _ = sender.send(listener);
    Ok(())
}

/// Installs the filter of this thread. Returns the file that reports disallowed calls.
fn listen(program: &mut BpfProgram) -> io::Result<OwnedFd> {
    rustix::thread::set_no_new_privs(true)?;
    let filter = libc::sock_fprog {
        len: u16::try_from(program.len()).map_err(io::Error::other)?,
        filter: program.as_mut_ptr().cast(),
    };
    // SAFETY: the kernel copies the program, whose instructions have the same layout in both crates.
    let listener = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &raw const filter,
        )
    };
    match i32::try_from(listener) {
        // SAFETY: the kernel has just opened it, for us.
        Ok(number @ 0..) => Ok(unsafe { OwnedFd::from_raw_fd(number) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Allows all calls, and logs each one that would be a violation, once per name of a thread.
fn watch(listener: &Receiver<OwnedFd>, session: &[Call], control: &[Call]) {
    let Ok(listener) = listener.recv() else {
        return;
    };
    let mut known = HashSet::new();
    loop {
        let call = match receive(&listener) {
            Ok(call) => call,
            // The thread has exited.
            Err(Errno::INTR | Errno::NOENT) => continue,
            Err(errno) => return log::warn!("cannot watch system calls any longer: {errno}"),
        };
        let thread = thread_name(call.pid);
        let number = i64::from(call.data.nr);
        let may = match thread.as_str() {
            "control" => control,
            _ if call.pid == getpid().as_raw_pid() as u32 => session,
            _ => &[],
        };
        let [first, second, third, ..] = call.data.args;
        let described = Description {
            number,
            arguments: [first, second, third],
        };
        if !may.iter().any(|may| may.is(number, &call.data.args))
            && known.insert((thread.clone(), number))
        {
            log::warn!(
                "the sandbox would end this program: its thread {thread} asked for the system call {described}"
            );
        }
    }
}

/// Waits for the next call, and allows it before anything else: its thread may hold a lock that is needed here.
fn receive(listener: &OwnedFd) -> rustix::io::Result<libc::seccomp_notif> {
    // SAFETY: all zeroes is a value of this plain structure, and the kernel requires it.
    let mut call: libc::seccomp_notif = unsafe { std::mem::zeroed() };
    // SAFETY: this ioctl writes such a structure.
    unsafe { ioctl(listener, Updater::<RECEIVE, _>::new(&mut call)) }?;
    let mut answer = libc::seccomp_notif_resp {
        id: call.id,
        val: 0,
        error: 0,
        flags: libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as c_uint,
    };
    // SAFETY: this ioctl reads such a structure.
    unsafe { ioctl(listener, Updater::<SEND, _>::new(&mut answer)) }?;
    Ok(call)
}

fn thread_name(id: u32) -> String {
    let name = std::fs::read_to_string(format!("/proc/self/task/{id}/comm")).unwrap_or_default();
    name.trim_end().to_owned()
}
