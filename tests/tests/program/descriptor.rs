// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What management software queries from the program.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::process::Command;

use serde_json::Value;
use vhost_device_tests::process;

use crate::{Binary, Setup, for_each_program, run};

/// Returns the document with these features, in the layout of QEMU's own programs.
fn capabilities(kind: &str, features: &[&&str]) -> String {
    let lines: Vec<_> = features
        .iter()
        .map(|feature| format!("\n    \"{feature}\""))
        .collect();
    let end = if lines.is_empty() { "" } else { "\n  " };
    let lines = lines.join(",");
    format!("{{\n  \"type\": \"{kind}\",\n  \"features\": [{lines}{end}]\n}}\n")
}

/// Asserts that the output has the layout of QEMU's own programs.
fn assert_prints_capabilities(binary: &Binary, command: &mut Command) {
    let ended = run(command);
    assert_eq!(
        ended.code,
        Some(0),
        "exit code of {command:?}, stderr: {}",
        ended.stderr
    );
    let printed: Value = serde_json::from_str(&ended.stdout).unwrap();
    let has = |feature: &&&str| {
        let features = printed["features"].as_array();
        features.is_some_and(|features| features.iter().any(|name| name == **feature))
    };
    let of_host = binary.host_features.iter().filter(has);
    let features: Vec<_> = binary.features.iter().chain(of_host).collect();
    assert_eq!(
        ended.stdout,
        capabilities(binary.kind, &features),
        "stdout of {command:?}"
    );
    assert_eq!(ended.stderr, "", "stderr of {command:?}");
}

fn capabilities_are_printed(binary: &Binary) {
    assert_prints_capabilities(binary, binary.command().arg("--print-capabilities"));
}

fn capabilities_are_printed_whatever_else_is_asked_for(binary: &Binary) {
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
        &["--socket-mode=9", "--fd", "--print-capabilities"],
    ] {
        assert_prints_capabilities(binary, binary.command().args(arguments));
    }
    assert_prints_capabilities(
        binary,
        binary
            .command()
            .arg(OsStr::from_bytes(b"--socket-path=\xff\xfe"))
            .arg("--print-capabilities"),
    );
}

fn printing_capabilities_does_nothing_else(binary: &Binary) {
    let setup = Setup::new(binary);
    assert_prints_capabilities(binary, setup.listening().arg("--print-capabilities"));
    assert!(!setup.socket().exists());
}

fn the_descriptor_names_this_binary(binary: &Binary) {
    let setup = Setup::new(binary);
    let ended = run(setup.listening().arg("--print-descriptor"));
    assert_eq!(ended.code, Some(0));
    assert_eq!(ended.stderr, "");
    assert!(!setup.socket().exists());
    let descriptor: Value = serde_json::from_str(&ended.stdout).unwrap();
    let mut keys: Vec<_> = descriptor.as_object().unwrap().keys().collect();
    keys.sort();
    assert_eq!(keys, ["binary", "description", "tags", "type"]);
    assert_eq!(descriptor["type"], binary.kind);
    assert!(!descriptor["description"].as_str().unwrap().is_empty());
    assert_eq!(
        descriptor["binary"],
        process::binary(binary.name).unwrap().to_str().unwrap()
    );
    assert!(
        descriptor["tags"]
            .as_array()
            .unwrap()
            .iter()
            .all(Value::is_string)
    );
}

fn the_descriptor_names_an_absolute_path_when_the_program_is_called_by_a_relative_one(
    binary: &Binary,
) {
    let path = process::binary(binary.name).unwrap();
    let mut command = Command::new("sh");
    command
        .args(["-c", "exec ./\"$0\" --print-descriptor", binary.name])
        .current_dir(path.parent().unwrap());
    let descriptor: Value = serde_json::from_str(&run(&mut command).stdout).unwrap();
    assert_eq!(descriptor["binary"], path.to_str().unwrap());
}

for_each_program!(
    capabilities_are_printed,
    capabilities_are_printed_whatever_else_is_asked_for,
    printing_capabilities_does_nothing_else,
    the_descriptor_names_this_binary,
    the_descriptor_names_an_absolute_path_when_the_program_is_called_by_a_relative_one,
);
