// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `cargo xtask bench`: runs the benchmark program on release binaries.

use std::process::ExitCode;

use vhost_device_tests::bench::{console, vsock};

use crate::packages::{self, GPU_PEER, IMAGES};
use crate::progress::Progress;
use crate::workspace::{self, cargo};

pub fn run(progress: &Progress, arguments: &[String]) -> Result<ExitCode, String> {
    let needs = match arguments.first().map(String::as_str) {
        Some("block") => IMAGES,
        Some("gpu") => GPU_PEER,
        // The benchmark program prints the valid arguments.
        _ => &[],
    };
    packages::install(progress, needs)?;
    build(progress)?;
    let mut arguments = arguments.to_vec();
    let peer = match arguments.first().map(String::as_str) {
        Some("console") => Some((console::PROGRAM, console::PEER_VERSION)),
        Some("vsock") => Some((vsock::PROGRAM, vsock::PEER_VERSION)),
        _ => None,
    };
    if let Some((program, version)) = peer
        && !arguments.iter().any(|argument| has_peer(argument))
    {
        let peer = workspace::peer(progress, program, version)?;
        arguments.push(format!("--peer={}", peer.display()));
    }
    program("bench", &arguments)
}

/// Returns whether an argument names the other back-end, or asks for something else than a run.
fn has_peer(argument: &str) -> bool {
    argument.starts_with("--peer") || ["--help", "-h"].contains(&argument)
}

/// Builds the release binaries.
pub fn build(progress: &Progress) -> Result<(), String> {
    progress.run(
        "Building the release binaries",
        &mut cargo([
            "build",
            "--release",
            "--workspace",
            "--exclude",
            "xtask",
            "--bins",
        ]),
    )
}

/// Runs a program of the package of the tests.
pub fn program(name: &str, arguments: &[String]) -> Result<ExitCode, String> {
    let status = cargo(["run", "--release", "--quiet"])
        .args(["--package", "vhost-device-tests", "--bin", name, "--"])
        .args(arguments)
        .status()
        .map_err(|error| format!("cannot run the program {name}: {error}"))?;
    Ok(match status.success() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}
