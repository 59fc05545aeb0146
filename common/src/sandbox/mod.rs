// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The sandbox, entered once resources are open and before the first front-end message.
//!
//! It gives up its privileges, then all files but those that its device opens later, and at last all system
//! calls but those that it needs: the core has a table of its own, and [`Needs`] is what a device adds. Each kind of thread has
//! a filter, and a call that this does not let through ends the process by SIGSYS, after a line that names it.

mod call;
mod files;
mod filter;
mod privileges;
#[allow(unsafe_code)]
mod process;
#[allow(unsafe_code)]
mod violation;
#[allow(unsafe_code)]
mod watch;

use std::path::PathBuf;

use clap::ValueEnum;

use crate::error::StartError;
pub use call::Call;
pub use files::Access;
pub(crate) use filter::{Role, confine_thread};
pub use process::start_process;

/// What a violation of the sandbox leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Sandbox {
    /// the program is ended, after a line that names the system call
    On,
    /// the system call is named in the log and let through; nothing else is restricted
    Log,
    /// nothing is restricted
    Off,
}

/// What a device does after its start, beside what the core does.
#[derive(Clone, Debug, Default)]
pub struct Needs {
    /// System calls of the thread that serves the front-end: what the methods of the device do. It may do all that the others may.
    pub session: Vec<Call>,
    /// System calls of the thread that hears signals: what [`Device::reload`](crate::device::Device::reload) does.
    pub control: Vec<Call>,
    /// System calls of the threads that work on queues.
    pub queue: Vec<Call>,
    /// System calls of threads that those start, if they do. Such a thread calls [`confine_helper`] first.
    pub helper: Option<Vec<Call>>,
    /// Files that are opened, and directories in which files are.
    pub files: Vec<(PathBuf, Access)>,
}

impl Needs {
    fn removes_files(&self) -> bool {
        self.files
            .iter()
            .any(|(_, access)| *access == Access::Remove)
    }
}

/// Leaves the calling thread, which a queue's thread has started, only the calls of its kind ([`Needs::helper`]).
pub fn confine_helper() {
    confine_thread(Role::Helper);
}

/// Restricts this process, which has one thread.
///
/// # Errors
/// This host cannot do it.
pub(crate) fn enter(
    program: &'static str,
    sandbox: Sandbox,
    needs: &Needs,
) -> Result<(), StartError> {
    let refused = |error: &dyn std::fmt::Display| {
        StartError(format!(
            "the sandbox is not supported on this host: {error}; start with --sandbox=off to do without"
        ))
    };
    // What is looked up only once is looked up now: that can take a file.
    let _ = rustix::param::page_size();
    match sandbox {
        Sandbox::Off => Ok(()),
        Sandbox::Log => watch::install(needs).map_err(|error| refused(&error)),
        Sandbox::On => {
            privileges::drop_all().map_err(|errno| refused(&errno))?;
            match files::restrict(&needs.files) {
                Ok(true) => {}
                Ok(false) => log::warn!(
                    "this kernel has no landlock: system calls are restricted, but not which files they may name"
                ),
                Err(error) => return Err(refused(&error)),
            }
            violation::name_violations(program).map_err(|error| refused(&error))?;
            filter::install(needs).map_err(|error| refused(&error))
        }
    }
}
