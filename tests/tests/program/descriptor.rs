// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What management software asks the program about itself.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::process::Command;

use serde_json::Value;
use vhost_device_tests::process;

use crate::{BINARY, Setup, program, run};

/// As QEMU's own programs print theirs.
const CAPABILITIES: &str = r#"{
  "type": "block",
  "features": [
    "read-only",
    "blk-file"
  ]
}
"#;

fn assert_prints_capabilities(command: &mut Command) {
    let ended = run(command);
    assert_eq!(
        ended.code,
        Some(0),
        "exit code of {command:?}, stderr: {}",
        ended.stderr
    );
    assert_eq!(ended.stdout, CAPABILITIES, "stdout of {command:?}");
    assert_eq!(ended.stderr, "", "stderr of {command:?}");
}

#[test]
fn capabilities_are_printed() {
    assert_prints_capabilities(program().arg("--print-capabilities"));
}

#[test]
fn capabilities_are_printed_whatever_else_is_asked_for() {
    for arguments in [
        &["--print-capabilities", "--no-such-option"][..],
        &["--no-such-option=3", "--print-capabilities"],
        &["stray", "--print-capabilities", "--fd=none"],
        &["--fd=3", "--print-capabilities", "--socket-path=/"],
        &["--help", "--print-capabilities"],
        &["--print-capabilities", "--version"],
        &["--print-descriptor", "--print-capabilities"],
        &["--print-capabilities", "--print-capabilities"],
        &["--", "--print-capabilities"],
        &["--num-queues=0", "--serial", "--print-capabilities"],
    ] {
        assert_prints_capabilities(program().args(arguments));
    }
    assert_prints_capabilities(
        program()
            .arg(OsStr::from_bytes(b"--blk-file=\xff\xfe"))
            .arg("--print-capabilities"),
    );
}

#[test]
fn printing_capabilities_does_nothing_else() {
    let setup = Setup::new();
    assert_prints_capabilities(setup.listening().arg("--print-capabilities"));
    assert!(!setup.socket().exists());
}

#[test]
fn the_descriptor_names_this_binary() {
    let setup = Setup::new();
    let ended = run(setup.listening().arg("--print-descriptor"));
    assert_eq!(ended.code, Some(0));
    assert_eq!(ended.stderr, "");
    assert!(!setup.socket().exists());
    let descriptor: Value = serde_json::from_str(&ended.stdout).unwrap();
    let mut keys: Vec<_> = descriptor.as_object().unwrap().keys().collect();
    keys.sort();
    assert_eq!(keys, ["binary", "description", "tags", "type"]);
    assert_eq!(descriptor["type"], "block");
    assert!(!descriptor["description"].as_str().unwrap().is_empty());
    assert_eq!(
        descriptor["binary"],
        process::binary(BINARY).unwrap().to_str().unwrap()
    );
    assert!(
        descriptor["tags"]
            .as_array()
            .unwrap()
            .iter()
            .all(Value::is_string)
    );
}

#[test]
fn the_descriptor_names_an_absolute_path_when_the_program_is_called_by_a_relative_one() {
    let binary = process::binary(BINARY).unwrap();
    let mut command = Command::new("sh");
    command
        .args(["-c", "exec ./\"$0\" --print-descriptor", BINARY])
        .current_dir(binary.parent().unwrap());
    let descriptor: Value = serde_json::from_str(&run(&mut command).stdout).unwrap();
    assert_eq!(descriptor["binary"], binary.to_str().unwrap());
}
