// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The workspace: its folders, its cargo, and the tools that its commands need.

use std::path::{Path, PathBuf};
use std::process::Command;

use vhost_device_tests::cache;
use vhost_device_tests::guest::find_program;

use crate::progress::Progress;

/// Returns a command that runs the current cargo in the root of the workspace.
pub fn cargo<const N: usize>(arguments: [&str; N]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
    command.args(arguments).current_dir(workspace());
    command
}

/// Returns the root of the workspace.
pub fn workspace() -> PathBuf {
    let mut root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    root.pop();
    root
}

/// Returns the target directory of this program.
pub fn target_directory() -> PathBuf {
    let this = std::env::current_exe().unwrap_or_default();
    let target = this.parent().and_then(Path::parent);
    target.unwrap_or(Path::new("target")).to_owned()
}

/// Finds the program of a published crate, or builds it and keeps it in the cache.
pub fn tool(progress: &Progress, name: &str, version: &str) -> Result<PathBuf, String> {
    let tools = cache::directory()
        .join("tools")
        .join(format!("{name}-{version}"));
    let program = find_program(name).unwrap_or_else(|| tools.join("bin").join(name));
    if !program.is_file() {
        // Building takes a third of the time without optimization.
        let mut install = cargo(["install", name, "--locked", "--debug", "--root"]);
        install.arg(&tools).arg(format!("--version=^{version}"));
        progress.run(&format!("Installing {name}"), &mut install)?;
    }
    Ok(program)
}

/// Returns the program of a published crate that ours is compared with. Builds it, optimized, unless it is in the cache. An installed one
/// may be ours, which has the same name.
pub fn peer(progress: &Progress, name: &str, version: &str) -> Result<PathBuf, String> {
    let root = cache::directory()
        .join("peers")
        .join(format!("{name}-{version}"));
    let program = root.join("bin").join(name);
    if !program.is_file() {
        let mut install = cargo(["install", name, "--locked", "--root"]);
        install.arg(&root).arg(format!("--version={version}"));
        progress.run(&format!("Installing {name} of rust-vmm"), &mut install)?;
    }
    Ok(program)
}
