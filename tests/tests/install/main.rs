// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The results of `cargo xtask install` and `cargo xtask deb` on a host.

#![cfg(test)]

mod package;
mod tree;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;
use vhost_device_tests::process;
use vhost_user_discovery::schema::VHostUserBackendType;

const DEVICES: &[&str] = &[
    "block", "console", "gpu", "input", "rng", "scsi", "sound", "vsock",
];
const DISCOVER: &str = "vhost-user-discover";
const TOOLS: [&str; 2] = ["vhost-device-ctl", DISCOVER];
const SUBCOMMANDS: &[&str] = &["check", "find", "list"];

/// Returns the devices with a descriptor. libvirt would not accept one of a type that QEMU's schema does not have.
fn described() -> impl Iterator<Item = &'static str> {
    let devices = DEVICES.iter().copied();
    devices.filter(|device| VHostUserBackendType::from_name(device).is_some())
}

/// Files by their path below the root directory, with their mode.
type Files = BTreeMap<PathBuf, u32>;

/// Returns the expected files below `prefix`, with completions for zsh in its directory `zsh`.
fn expected(prefix: &str, zsh: &str) -> Files {
    let mut files = Files::new();
    let mut add = |path: String, mode| {
        files.insert(Path::new(prefix).join(path), mode);
    };
    let devices: Vec<_> = DEVICES
        .iter()
        .map(|device| format!("vhost-device-{device}"))
        .collect();
    for name in &devices {
        add(format!("bin/{name}"), 0o755);
        add(format!("lib/systemd/system/{name}@.service"), 0o644);
        add(format!("lib/systemd/system/{name}@.socket"), 0o644);
    }
    for device in described() {
        let path = format!("share/qemu/vhost-user/50-vhost-device-{device}.json");
        add(path, 0o644);
    }
    for name in TOOLS {
        add(format!("bin/{name}"), 0o755);
    }
    for name in devices.iter().map(String::as_str).chain(TOOLS) {
        add(format!("share/man/man1/{name}.1"), 0o644);
        add(format!("share/bash-completion/completions/{name}"), 0o644);
        add(format!("{zsh}/_{name}"), 0o644);
        add(
            format!("share/fish/vendor_completions.d/{name}.fish"),
            0o644,
        );
    }
    for name in SUBCOMMANDS {
        add(format!("share/man/man1/{DISCOVER}-{name}.1"), 0o644);
    }
    add("share/man/man7/vhost-device-control.7".to_owned(), 0o644);
    for name in ["LICENSE-APACHE", "LICENSE-BSD-3-Clause"] {
        add(format!("share/doc/vhost-device/{name}"), 0o644);
    }
    files
}

/// Returns the files below `root`. Everyone can read its directories.
fn files(root: &Path) -> Files {
    let mut files = Files::new();
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let entry = entry.unwrap();
            let metadata = entry.metadata().unwrap();
            let mode = metadata.permissions().mode() & 0o7777;
            if metadata.is_dir() {
                assert_eq!(mode, 0o755, "mode of {}", entry.path().display());
                directories.push(entry.path());
            } else {
                assert!(metadata.is_file(), "{}", entry.path().display());
                let path = entry.path();
                files.insert(Path::new("/").join(path.strip_prefix(root).unwrap()), mode);
            }
        }
    }
    files
}

fn xtask() -> Command {
    process::command("xtask").unwrap()
}

fn run(command: &mut Command) -> Output {
    command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"))
}

/// Runs a command that must succeed, and returns its stdout.
fn succeed(command: &mut Command) -> String {
    let output = run(command);
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Runs a command that must succeed without output.
fn assert_silent(command: &mut Command) {
    let output = run(command);
    let said = [output.stdout, output.stderr].concat();
    assert!(
        output.status.success() && said.is_empty(),
        "{command:?}: {}\n{}",
        output.status,
        String::from_utf8_lossy(&said)
    );
}

/// Installs a tree of all files with the prefix /usr.
fn install() -> TempDir {
    let tree = tempfile::tempdir().unwrap();
    succeed(
        xtask()
            .args(["install", "--prefix=/usr", "--destdir"])
            .arg(tree.path()),
    );
    tree
}
