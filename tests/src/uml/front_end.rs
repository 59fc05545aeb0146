// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! User-Mode Linux as a guest with its own front-end: its kernel has the drivers, and connects to back-ends of this host.
//!
//! This implementation of the protocol shares no code with others (drivers/um/virtio_uml.c), and boots in a second.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Machine, argument, kernel, machine, quoted, write_init};
use crate::guest::{GuestError, find_program};

/// Memory of the guest in MiB.
const MEMORY: u64 = 128;

/// A device of the guest.
#[derive(Clone, Copy, Debug)]
pub struct Device<'a> {
    /// The socket of its back-end.
    pub socket: &'a Path,
    /// Its type, as numbered by VIRTIO.
    pub id: u32,
}

/// A running guest. Dropping it ends it.
pub struct Guest {
    machine: Machine,
    status: PathBuf,
}

impl Guest {
    /// Boots a guest with these devices and additional arguments of the kernel, which runs `script` in BusyBox's shell; there, `$work` is a
    /// writable directory with the contents of `work`.
    pub fn start(
        devices: &[Device<'_>],
        kernel_arguments: &[&str],
        script: impl Into<OsString>,
        work: &Path,
    ) -> Result<Self, GuestError> {
        let kernel = kernel::prepare()?;
        let busybox = find_program("busybox").ok_or(GuestError::NotInstalled("busybox".into()))?;
        let (init, status) = (work.join("init"), work.join("status"));
        let mut assignment = OsString::from("work=");
        assignment.push(work);
        let shell = busybox.clone().into_os_string();
        let arguments = [
            "env".into(),
            assignment,
            shell,
            "sh".into(),
            "-c".into(),
            script.into(),
        ];
        write_init(&init, busybox.as_os_str(), &arguments, work, &status)?;
        let mut command = machine(&kernel, MEMORY, work, &init);
        command.args(kernel_arguments).env("TMPDIR", work);
        for device in devices {
            let id = format!(":{}", device.id);
            command.arg(argument("virtio_uml.device=", device.socket, &id));
        }
        let machine = Machine::start(&mut command)?;
        Ok(Self { machine, status })
    }

    /// Waits until the guest has powered off, and returns the exit status of the script.
    ///
    /// # Errors
    /// It runs longer than `deadline`, or the script did not end.
    pub fn wait(self, deadline: Duration) -> Result<i32, GuestError> {
        self.machine.wait(deadline)?;
        let status = fs::read_to_string(self.status).unwrap_or_default();
        status
            .trim()
            .parse()
            .map_err(|_| GuestError::Guest("in User-Mode Linux ended before its script did".into()))
    }
}

/// Boots a guest with these devices, and runs `script` in it as [`Guest::start`] does. Returns the script's exit status. The time limit is
/// `deadline`.
pub fn run(
    devices: &[Device<'_>],
    script: impl Into<OsString>,
    work: &Path,
    deadline: Duration,
) -> Result<i32, GuestError> {
    Guest::start(devices, &[], script, work)?.wait(deadline)
}

/// Boots a guest with these devices, and runs a program in it, whose output is this process's. Programs are BusyBox's, or the host's by
/// their path. Returns the exit status. Ends the guest after `deadline`.
pub fn run_program(
    devices: &[Device<'_>],
    words: &[OsString],
    deadline: Duration,
) -> Result<i32, GuestError> {
    let mut script = OsString::new();
    for word in words {
        script.push(quoted(word));
        script.push(" ");
    }
    run(devices, script, super::work()?.path(), deadline)
}
