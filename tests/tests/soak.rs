// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The short form of `cargo xtask soak`, and its result for a back-end that loses something.

#![cfg(test)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

use vhost_device_tests::process::{BIN_DIR, binary};

/// Returns the soak program with these arguments.
fn soak(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_soak"));
    command.args(arguments);
    command
}

fn text(output: &Output) -> String {
    let (stdout, stderr) = (&output.stdout, &output.stderr);
    [stdout, stderr]
        .map(|bytes| String::from_utf8_lossy(bytes))
        .concat()
}

#[test]
fn nothing_is_lost_in_a_short_run() {
    let output = soak(&["--seconds=15"]).output().unwrap();
    let text = text(&output);
    println!("{text}");
    assert_eq!(output.status.code(), Some(0));
    assert!(text.trim_end().ends_with(", 0 lost"));
    // Each new driver chooses a format: with so many, each format occurs more than once.
    let starts = text
        .lines()
        .find_map(|line| line.strip_prefix("Rings were started "));
    let counts: Vec<u32> = starts
        .unwrap()
        .split_whitespace()
        .filter_map(|word| word.parse().ok())
        .collect();
    assert!(
        counts.len() == 2 && counts.iter().all(|count| *count > 0),
        "{counts:?}"
    );
}

/// Runs rng with a back-end that always reads from `source`.
fn soak_with_source(source: &Path) -> String {
    let directory = tempfile::tempdir().unwrap();
    let script = format!(
        "#!/bin/sh\nfor option; do :; done\nexec {:?} --rng-source={source:?} \"$option\"\n",
        binary("vhost-device-rng").unwrap()
    );
    let program = directory.path().join("vhost-device-rng");
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = soak(&["--seconds=5", "--patience=1", "--only=rng", "--seed=7"]);
    let output = command.env(BIN_DIR, directory.path()).output().unwrap();
    let text = text(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("seed=7"), "{text}");
    assert!(text.contains("LOST: rng: "), "{text}");
    text
}

#[test]
fn a_wrong_byte_is_a_loss() {
    let text = soak_with_source(Path::new("/dev/urandom"));
    assert!(text.contains("byte 0 of the source is not"), "{text}");
}

#[test]
fn a_request_that_is_not_answered_is_a_loss() {
    let text = soak_with_source(Path::new("/dev/null"));
    assert!(text.contains("is not answered within 1s"), "{text}");
}

#[test]
fn an_unknown_scenario_is_reported_in_one_line() {
    let output = soak(&["--only=nothing"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.starts_with("soak: no scenario matches --only; there are: block io_uring,"));
    assert_eq!(text.lines().count(), 1, "{text}");
}
