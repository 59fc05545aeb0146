// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The short form of `cargo xtask soak` for input, on hosts with uinput.

#![cfg(test)]

use std::process::Command;

#[test]
#[ignore = "needs uinput"]
fn nothing_of_input_is_lost_in_a_short_run() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_soak"));
    command.args(["--seconds=15", "--patience=20", "--only=input"]);
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    println!("{text}");
    assert_eq!(output.status.code(), Some(0));
    assert!(text.trim_end().ends_with(", 0 lost"));
}
