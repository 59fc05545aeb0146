// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the program prints, and what it refuses.

use std::fs;
use std::os::unix::fs::symlink;
use std::process::Command;

use serde_json::{Value, json};
use vhost_device_tests::ended::{assert_refused, run};
use vhost_device_tests::process;

const USAGE: i32 = 2;
const FAILURE: i32 = 1;

fn program(arguments: &[&str]) -> Command {
    let mut command = process::command("vhost-device-sound").unwrap();
    command.env_remove("RUST_LOG").args(arguments);
    command
}

#[test]
fn the_type_is_sound() {
    let ended = run(&mut program(&["--print-capabilities", "stray"]));
    assert_eq!(ended.code, Some(0));
    let printed: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(printed, json!({"type": "sound", "features": []}));
    let ended = run(&mut program(&["--print-descriptor"]));
    let printed: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(printed["type"], "sound");
}

#[test]
fn help_explains_the_options() {
    let ended = run(&mut program(&["--help"]));
    assert_eq!(ended.code, Some(0));
    for words in [
        "--backend <BACKEND>",
        "--playback-file <PATH>",
        "--capture-file <PATH>",
        "--file-clock <CLOCK>",
        "--streams <STREAM>",
        "--controls",
        "channels=1-8",
    ] {
        assert!(ended.stdout.contains(words), "{words}: {}", ended.stdout);
    }
}

#[test]
fn impossible_streams_are_usage_errors() {
    for (stream, word) in [
        ("", "output"),
        ("sideways", "output"),
        ("output,channels=9", "from 1 to 8"),
        ("output,formats=mp3", "s24-3"),
        ("output,rates=1", "48000"),
        ("output,colour=red", "colour=red"),
    ] {
        let mut command = program(&["--socket-path=/nonexistent/socket"]);
        command.arg(process::option("streams", stream));
        assert_refused(&mut command, USAGE, word);
    }
    let mut command = program(&["--socket-path=/nonexistent/socket"]);
    command.args(vec!["--streams=output"; 65]);
    assert_refused(&mut command, FAILURE, "64 times at most");
}

#[test]
fn files_that_cannot_be_used_are_failures() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    fs::create_dir(path("directory")).unwrap();
    symlink("/dev/null", path("device")).unwrap();
    fs::write(
        path("text.wav"),
        "not a WAV file, but long enough for a header",
    )
    .unwrap();
    fs::write(path("sound"), "").unwrap();
    for (option, name, word) in [
        ("playback-file", "directory", "not a regular file"),
        ("playback-file", "device", "not a regular file"),
        ("playback-file", "none/played.wav", "No such file"),
        ("capture-file", "directory", "not a regular file"),
        ("capture-file", "device", "not a regular file"),
        ("capture-file", "missing", "No such file"),
        ("capture-file", "text.wav", "not a WAV file"),
    ] {
        let mut command = program(&["--socket-path=/nonexistent/socket", "--backend=file"]);
        command.arg(process::option(option, path(name)));
        assert_refused(&mut command, FAILURE, word);
    }
    let mut command = program(&["--socket-path=/nonexistent/socket", "--backend=file"]);
    command.args([
        process::option("capture-file", path("sound")),
        process::option("capture-file", path("sound")),
    ]);
    assert_refused(&mut command, FAILURE, "no stream for --capture-file");
}
