// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! QEMU's guest agent of Debian, unpacked into the [`cache`]. It is not installed, and uses the host's libraries.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Command;

use rustix::fs::{FlockOperation, flock};

use super::error::{GuestError, system};
use super::host::{find_program, output};
use super::kernel::download;
use crate::cache;

/// The program.
pub const PROGRAM: &str = "qemu-ga";
/// The package.
const PACKAGE: &str = "qemu-guest-agent";

/// Returns the program: an installed one, the one that is kept, or a new one, which apt downloads. Many processes may call this at once; one
/// downloads.
pub fn prepare() -> Result<PathBuf, GuestError> {
    if let Some(installed) = find_program(PROGRAM) {
        return Ok(installed);
    }
    let cache = cache::directory().join(PACKAGE);
    let root = cache.join("root");
    if !root.is_dir() {
        fs::create_dir_all(&cache).map_err(system(format!("create {}", cache.display())))?;
        let lock = cache.join("lock");
        let lock = File::create(&lock).map_err(system(format!("create {}", lock.display())))?;
        flock(&lock, FlockOperation::LockExclusive)
            .map_err(|error| GuestError::System("lock the cache".into(), error.into()))?;
        if !root.is_dir() {
            let work =
                tempfile::tempdir_in(&cache).map_err(system("create a temporary directory"))?;
            let package = download(PACKAGE, work.path())?;
            let unpacked = work.path().join("root");
            output(
                Command::new("dpkg-deb")
                    .arg("--extract")
                    .args([&package, &unpacked]),
            )?;
            fs::rename(unpacked, &root).map_err(system("keep the guest agent"))?;
        }
    }
    Ok(root.join("usr/sbin").join(PROGRAM))
}
