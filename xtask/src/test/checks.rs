// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Checks that do not run our programs: format, lints, documentation, modules, other compilers and targets, licences, packages.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::report::{NO_ADVISORIES, NO_INDEX, NO_TARGET, NO_TOOLCHAIN, Report};
use super::stages::{self, Stages};
use crate::modules;
use crate::progress::Progress;
use crate::workspace::{cargo, target_directory, tool, workspace};

/// What cargo says if it cannot fetch the index.
const NO_NETWORK: &[&str] = &[
    "failed to download from",
    "failed to get successful HTTP response from",
    "attempting to make an HTTP request, but",
];

/// The oldest supported Rust.
const OLDEST_RUST: &str = env!("CARGO_PKG_RUST_VERSION");

/// Crates that are not useful outside this workspace.
const TOOLS: [&str; 4] = [
    "stand-in-renderer",
    "vhost-device-fuzz",
    "vhost-device-tests",
    "xtask",
];

/// Other supported targets: another C library, another architecture.
const TARGETS: [&str; 2] = ["x86_64-unknown-linux-musl", "aarch64-unknown-linux-gnu"];

pub fn run(stages: &mut Stages) {
    stages.check("fmt", &mut cargo(["fmt", "--all", "--check"]));
    let mut clippy = cargo(["clippy", "--workspace", "--all-targets"]);
    stages.check("clippy", clippy.args(["--", "--deny", "warnings"]));
    // Includes private items, because the documentation is for the developers of this workspace.
    let mut doc = cargo([
        "doc",
        "--workspace",
        "--no-deps",
        "--document-private-items",
    ]);
    doc.env(
        "RUSTDOCFLAGS",
        "--deny warnings --allow rustdoc::private_intra_doc_links",
    );
    stages.check("doc", &mut doc);
    stages.run("modules", modules);
    stages.run("oldest Rust", oldest_rust);
    for target in TARGETS {
        stages.run(target, |progress| other_target(progress, target));
    }
    deny(stages);
    crates(stages);
}

/// Checks the imports between modules. Each finding is a failure.
fn modules(progress: &Progress) -> Report {
    progress.step("modules");
    match modules::check() {
        Ok(findings) if findings.is_empty() => Report::passed(),
        Ok(findings) => Report {
            failed: findings,
            ..Report::default()
        },
        Err(message) => Report::failed(message),
    }
}

/// Returns a command that runs `cargo check` of a toolchain of rustup, if that is installed. It has its own target directory.
fn toolchain(name: &str) -> Option<Command> {
    let toolchain = format!("+{name}");
    let output = Command::new("cargo")
        .args([&toolchain, "--version"])
        .output();
    output.is_ok_and(|output| output.status.success()).then(|| {
        let mut cargo = Command::new("cargo");
        cargo
            .arg(toolchain)
            .args(["check", "--workspace", "--target-dir"])
            .arg(target_directory().join("check"))
            .current_dir(workspace());
        cargo
    })
}

/// Checks the workspace with the oldest supported Rust.
fn oldest_rust(progress: &Progress) -> Report {
    match toolchain(OLDEST_RUST) {
        Some(mut check) => stages::check(progress, "oldest Rust", &mut check),
        None => Report::skipped(format!("{NO_TOOLCHAIN}{OLDEST_RUST}")),
    }
}

/// Checks the workspace for another target, with its standard library or the source of it.
fn other_target(progress: &Progress, target: &str) -> Report {
    let directory = |arguments: &[&str]| {
        let output = Command::new("rustc").args(arguments).output().ok()?;
        let path = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        output.status.success().then(|| PathBuf::from(path))
    };
    let libraries = directory(&["--print", "target-libdir", "--target", target]);
    let mut check = if libraries.is_some_and(|libraries| libraries.is_dir()) {
        let mut check = cargo(["check", "--workspace", "--target-dir"]);
        check.arg(target_directory().join("check"));
        check
    } else {
        let nightly = directory(&["+nightly", "--print", "sysroot"]);
        let source = nightly.map(|sysroot| sysroot.join("lib/rustlib/src/rust/library/std"));
        let Some(mut check) = source
            .is_some_and(|source| Path::is_dir(&source))
            .then(|| toolchain("nightly"))
            .flatten()
        else {
            return Report::skipped(format!("{NO_TARGET}{target} (rustup target add {target})"));
        };
        check.arg("-Zbuild-std");
        check
    };
    stages::check(progress, target, check.args(["--target", target]))
}

/// Checks the licences and sources of the dependencies, and their security advisories if the database can be fetched.
fn deny(stages: &mut Stages) {
    let mut program = None;
    stages.run("cargo-deny", |progress| {
        match tool(progress, "cargo-deny", "0.20") {
            Ok(path) => {
                program = Some(path);
                Report::default()
            }
            Err(message) => {
                eprintln!("{message}");
                Report::failed("cargo-deny cannot be installed")
            }
        }
    });
    let Some(program) = program else { return };
    let check = |what: &[&str]| {
        let mut command = Command::new(&program);
        command.args(["--workspace", "check"]).args(what);
        command.current_dir(workspace());
        command
    };
    stages.check("deny", &mut check(&["licenses", "bans", "sources"]));
    stages.run("advisories", |progress| {
        match progress.run("advisories", &mut check(&["advisories"])) {
            Ok(()) => Report::passed(),
            Err(message) if message.contains("failed to fetch advisory database") => {
                Report::skipped(NO_ADVISORIES)
            }
            Err(message) => {
                eprintln!("{message}");
                Report::failed("advisories")
            }
        }
    });
}

/// Builds the crates from their packages, and runs a dry run of publishing those whose names are free.
fn crates(stages: &mut Stages) {
    stages.run("package", |progress| match package(progress) {
        Ok(()) => Report::passed(),
        Err(message) => {
            eprintln!("{message}");
            Report::failed("package")
        }
    });
    stages.run("publish", |progress| {
        let publish = ["publish", "--workspace", "--dry-run"];
        let mut publish = cargo(publish);
        publish.args(["--no-verify", "--allow-dirty"]);
        match progress.run("publish", &mut publish) {
            Ok(()) => Report::passed(),
            Err(message) if NO_NETWORK.iter().any(|part| message.contains(part)) => {
                Report::skipped(NO_INDEX)
            }
            Err(message) => {
                eprintln!("{message}");
                Report::failed("publish")
            }
        }
    });
}

/// Packs the crates and builds them from their packages, in an empty directory with an empty home of cargo: cargo would reuse the results
/// for an older package with the same version.
fn package(progress: &Progress) -> Result<(), String> {
    let fail = |error| format!("cannot prepare the packages: {error}");
    let directory = tempfile::tempdir_in(target_directory()).map_err(fail)?;
    let home = directory.path().join("home");
    fs::create_dir_all(home.join("registry")).map_err(fail)?;
    let default = || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cargo");
    let users = std::env::var_os("CARGO_HOME").map_or_else(default, PathBuf::from);
    for name in ["registry/index", "registry/cache", "config.toml"] {
        symlink(users.join(name), home.join(name)).map_err(fail)?;
    }
    let mut package = cargo(["package", "--workspace", "--offline", "--allow-dirty"]);
    for tool in TOOLS {
        package.args(["--exclude", tool]);
    }
    package
        .arg("--target-dir")
        .arg(directory.path().join("target"))
        .env("CARGO_HOME", home)
        .env("CARGO_PROFILE_DEV_DEBUG", "false");
    progress.run("package", &mut package)
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[test]
    fn crates_of_the_product_have_metadata_and_licences() {
        let metadata = cargo(["metadata", "--no-deps", "--format-version=1"]).output();
        let metadata: Value = serde_json::from_slice(&metadata.unwrap().stdout).unwrap();
        let packages = metadata["packages"].as_array().unwrap();
        for package in packages {
            let name = package["name"].as_str().unwrap();
            if TOOLS.contains(&name) {
                assert!(package["publish"].is_array(), "{name} can be published");
                continue;
            }
            for key in ["description", "license", "repository", "readme"] {
                assert!(package[key].is_string(), "{name} has no {key}");
            }
            for key in ["keywords", "categories"] {
                assert_ne!(package[key].as_array().unwrap().len(), 0, "{name}: {key}");
            }
            let manifest = Path::new(package["manifest_path"].as_str().unwrap());
            for licence in ["LICENSE-APACHE", "LICENSE-BSD-3-Clause"] {
                let text = |path: &Path| fs::read(path.join(licence)).unwrap_or_default();
                let folder = manifest.parent().unwrap();
                assert_eq!(text(folder), text(&workspace()), "{name}: {licence}");
            }
        }
    }
}
