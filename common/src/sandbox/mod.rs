// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The sandbox, entered once resources are open and before the first front-end message.
//!
//! The process gives up its privileges, then access to all files except those that the device uses later, and finally all system calls
//! except those that it needs: the core has a table, and a device adds to it by [`Needs`]. Each kind of thread has its own filter. A
//! disallowed call kills the process by SIGSYS, after a line that names the call.

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
pub use rustix::thread::CapabilitySet;

/// What happens on a violation of the sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Sandbox {
    /// kill the process, after a line that names the system call
    On,
    /// log the system call and allow it; nothing else is restricted
    Log,
    /// restrict nothing
    Off,
}

/// What a device keeps after its start, beside what the core keeps. All else ends the process, or fails.
#[derive(Clone, Debug)]
pub struct Needs {
    /// System calls of the thread that serves the front-end: what the methods of the device do. It may also make the calls of all
    /// other threads.
    pub session: Vec<Call>,
    /// System calls of the control thread: what [`Device::reload`](crate::device::Device::reload) and
    /// [`Device::command`](crate::device::Device::command) do.
    pub control: Vec<Call>,
    /// System calls of the threads that work on queues.
    pub queue: Vec<Call>,
    /// System calls of the threads of a [`Pool`](crate::worker::Pool), if the device has one.
    pub helper: Option<Vec<Call>>,
    /// Files and directories that are used by their names, each with what is done there. A directory stands for all files below it.
    pub files: Vec<(PathBuf, Access)>,
    /// The device connects to abstract unix sockets of other processes.
    pub abstract_sockets: bool,
    /// Linux capabilities that stay effective: none by default.
    pub capabilities: CapabilitySet,
    /// Files that the process has open at a time at most (`RLIMIT_NOFILE`); 0 if the usual hard limit is enough.
    pub open_files: u64,
}

impl Default for Needs {
    fn default() -> Self {
        Self {
            session: Vec::new(),
            control: Vec::new(),
            queue: Vec::new(),
            helper: None,
            files: Vec::new(),
            abstract_sockets: false,
            capabilities: CapabilitySet::empty(),
            open_files: 0,
        }
    }
}

impl Needs {
    fn removes_files(&self) -> bool {
        let removes = |(_, access): &(PathBuf, Access)| access.contains(Access::REMOVE);
        self.files.iter().any(removes)
    }
}

/// Restricts this process, which must have only one thread.
///
/// # Errors
/// The host does not support it.
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
    // The C library looks up the page size once, which can take a file.
    let _ = rustix::param::page_size();
    match sandbox {
        Sandbox::Off => Ok(()),
        Sandbox::Log => watch::install(needs).map_err(|error| refused(&error)),
        Sandbox::On => {
            let missing = privileges::drop_all_but(needs.capabilities);
            let missing = missing.map_err(|errno| refused(&errno))?;
            if !missing.is_empty() {
                log::warn!(
                    "the process does not have all capabilities that the device uses: {} missing; start it as root, or with AmbientCapabilities= in a unit",
                    capability_names(missing)
                );
            }
            match files::restrict(&needs.files, needs.abstract_sockets) {
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

/// Names of capabilities, as capabilities(7) lists them.
fn capability_names(capabilities: CapabilitySet) -> String {
    let names = capabilities.iter_names();
    let names: Vec<_> = names.map(|(name, _)| format!("CAP_{name}")).collect();
    names.join(", ")
}
