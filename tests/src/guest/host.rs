// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Programs and directories of the host.

use std::io;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use super::error::{GuestError, system};
use crate::cache;

/// Runs a program of the host to its end and returns its stdout.
pub(crate) fn output(command: &mut Command) -> Result<Vec<u8>, GuestError> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => GuestError::NotInstalled(name.clone()),
            _ => GuestError::System(format!("run {name}"), error),
        })?;
    if !output.status.success() {
        return Err(GuestError::Command {
            command: format!("{command:?}").replace('"', ""),
            status: output.status,
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        });
    }
    Ok(output.stdout)
}

/// Finds a program of the host, also in directories that are only in root's `PATH`.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .map(|directory| directory.join(name))
        .find(|path| path.is_file())
}

/// Returns the target directory that this executable was built into.
pub(crate) fn target_directory() -> Result<PathBuf, GuestError> {
    cache::target_directory().map_err(system("find this executable"))
}
