// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The kernel's own tests of AF_VSOCK (`tools/testing/vsock`), built from the source package of User-Mode Linux's [`kernel`]
//! and kept in the same directory. Two programs run them together, a server and a client.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::kernel;
use crate::guest::{GuestError, output, system};

/// The control channel between the two programs.
const CONTROL: &str = include_str!("control-address.c");

/// Parts of the source that the build needs.
const PARTS: [&str; 3] = [
    "*/tools/testing/vsock/*",
    "*/tools/include/*",
    "*/include/uapi/linux/vm_sockets.h",
];

/// Warnings of other compilers than the kernel's do not matter.
const FLAGS: &str = "-O2 -w -I. -I../../include -I../../../include/uapi/chosen -D_GNU_SOURCE -U_FORTIFY_SOURCE \
                     -fno-strict-overflow -fno-strict-aliasing -fno-common";

/// Returns the program. If it is not cached, it is built, which takes half a minute.
pub fn prepare() -> Result<PathBuf, GuestError> {
    let mut hash = DefaultHasher::new();
    (CONTROL, FLAGS).hash(&mut hash);
    let name = format!("vsock_test-{}-{:016x}", kernel::PACKAGE, hash.finish());
    let program = kernel::kept(&name);
    if program.is_file() {
        return Ok(program);
    }
    let _lock = kernel::lock()?;
    if !program.is_file() {
        let package = kernel::download_source()?;
        let work = kernel::work()?;
        let source = kernel::unpack(&package, &work, |tar| {
            tar.arg("--wildcards").args(PARTS);
        })?;
        fs::rename(build(&source)?, &program).map_err(system("keep vsock_test"))?;
        kernel::remove(&work)?;
    }
    Ok(program)
}

fn build(source: &Path) -> Result<PathBuf, GuestError> {
    // Only this header of the kernel: the others are those of the C library's kernel.
    let uapi = source.join("include/uapi");
    let chosen = uapi.join("chosen/linux");
    fs::create_dir_all(&chosen)
        .and_then(|()| fs::rename(uapi.join("linux/vm_sockets.h"), chosen.join("vm_sockets.h")))
        .map_err(system("choose headers"))?;
    let directory = source.join("tools/testing/vsock");
    fs::write(directory.join("control-address.c"), CONTROL).map_err(system("write a source"))?;
    output(
        Command::new("make")
            .current_dir(&directory)
            // The settings of an outer make are not for this one.
            .env_remove("MAKEFLAGS")
            .arg(format!("CFLAGS={FLAGS}"))
            .arg("LDLIBS=control-address.c -pthread")
            .arg("vsock_test"),
    )?;
    Ok(directory.join("vsock_test"))
}
