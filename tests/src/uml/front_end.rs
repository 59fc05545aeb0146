// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! User-Mode Linux as a guest and its own front-end: its kernel has the drivers, and speaks vhost-user to back-ends of this host.
//!
//! It is an implementation of the protocol that shares nothing with others (drivers/um/virtio_uml.c), and boots in a second.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::{Machine, kernel, write_init};
use crate::guest::{GuestError, find_program, system, target_directory};

/// Memory of the guest in MiB.
const MEMORY: u64 = 128;

/// A device of the guest.
#[derive(Clone, Copy, Debug)]
pub struct Device<'a> {
    /// Where its back-end listens.
    pub socket: &'a Path,
    /// Its type, as VIRTIO numbers them.
    pub id: u32,
}

/// Boots a guest that has these devices, and runs `script` in it, in BusyBox's shell; there, `$work` is a directory with what is in
/// `work`, which can be written. Gives the script's exit status. All ends after `deadline`.
pub fn run(
    devices: &[Device<'_>],
    script: &str,
    work: &Path,
    deadline: Duration,
) -> Result<i32, GuestError> {
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
    let path = |before: &str, path: &Path, after: &str| {
        let mut argument = OsString::from(before);
        argument.push(path);
        argument.push(OsStr::new(after));
        argument
    };
    let mut command = Command::new(kernel);
    command
        .arg(format!("mem={MEMORY}M"))
        .args(["root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro"])
        .args(["con=null", "con0=null,fd:1", "ssl=null", "ssl0=null,fd:2"])
        .args(["quiet", "panic=-1"])
        .arg(path("uml_dir=", work, "/"))
        .arg(path("init=", &init, ""))
        .env("TMPDIR", work)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    for device in devices {
        let id = format!(":{}", device.id);
        command.arg(path("virtio_uml.device=", device.socket, &id));
    }
    Machine::start(&mut command)?.wait(deadline)?;
    let status = fs::read_to_string(status).unwrap_or_default();
    status
        .trim()
        .parse()
        .map_err(|_| GuestError::Guest("in User-Mode Linux ended before its script did".into()))
}

/// A directory that the guest can write to, unlike the host's own for temporary files.
pub fn work() -> Result<tempfile::TempDir, GuestError> {
    let place = target_directory()?.join("uml");
    fs::create_dir_all(&place).map_err(system(format!("create {}", place.display())))?;
    tempfile::tempdir_in(place).map_err(system("create a temporary directory"))
}
