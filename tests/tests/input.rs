// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What `vhost-device-input` prints and refuses, on a host without input devices. The suite `uml_input` tests it with
//! devices; rings, reports and unplugging have unit tests.

#![cfg(test)]

use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::{Value, json};
use tempfile::TempDir;
use vhost_device_tests::ended::{self, run};
use vhost_device_tests::process::{self, option};

const BINARY: &str = "vhost-device-input";
const USAGE: i32 = 2;
const FAILURE: i32 = 1;

/// The user `nobody`.
const NOBODY: u32 = 65534;

fn program() -> Command {
    let mut command = process::command(BINARY).unwrap();
    // Logging enabled by the caller would add lines.
    command.env_remove("RUST_LOG");
    command
}

/// Runs the program, which must fail with one line that contains `word`, and leave no socket.
fn assert_refused(command: &mut Command, code: i32, word: impl AsRef<OsStr>) {
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), Permissions::from_mode(0o777)).unwrap();
    let socket = directory.path().join("socket");
    ended::assert_refused(command.arg(option("socket-path", &socket)), code, word);
    assert!(socket.symlink_metadata().is_err(), "{command:?}: a socket");
}

fn assert_path_refused(path: &Path) {
    for no_grab in [&[][..], &["--no-grab"]] {
        let mut command = program();
        command.arg(option("evdev-path", path)).args(no_grab);
        assert_refused(&mut command, FAILURE, path);
    }
}

/// Returns a path in a new directory.
fn path(name: &str) -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(name);
    (directory, path)
}

#[test]
fn capabilities_are_the_options_that_the_schema_names() {
    for arguments in [
        &["--print-capabilities"][..],
        &["--print-capabilities", "--evdev-path=/nonexistent", "stray"],
    ] {
        let ended = run(program().args(arguments));
        assert_eq!(ended.code, Some(0));
        assert_eq!(ended.stderr, "");
        let expected = json!({"type": "input", "features": ["evdev-path", "no-grab"]});
        let printed: Value = serde_json::from_str(&ended.stdout).unwrap();
        assert_eq!(printed, expected);
    }
}

#[test]
fn the_descriptor_is_of_this_type_and_binary() {
    let ended = run(program().arg("--print-descriptor"));
    assert_eq!(ended.code, Some(0));
    let printed: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(printed["type"], "input");
    let binary = process::binary(BINARY).unwrap().canonicalize().unwrap();
    assert_eq!(printed["binary"], binary.to_str().unwrap());
}

#[test]
fn help_explains_the_options() {
    let ended = run(program().arg("--help"));
    assert_eq!(ended.code, Some(0));
    for words in [
        "--evdev-path <PATH>",
        "/dev/input/event",
        "--no-grab",
        "--socket-path <PATH>",
        "--fd <FDNUM>",
    ] {
        assert!(ended.stdout.contains(words), "{words}: {}", ended.stdout);
    }
}

#[test]
fn no_device_is_a_usage_error() {
    assert_refused(&mut program(), USAGE, "--evdev-path");
    assert_refused(program().arg("--no-grab"), USAGE, "--evdev-path");
}

#[test]
fn a_device_that_is_not_there_is_a_failure() {
    let (directory, path) = path("event0");
    assert_path_refused(&path);
    assert_path_refused(&path.join("below"));
    symlink("nothing", &path).unwrap();
    assert_path_refused(&path);
    let circle = directory.path().join("circle");
    symlink(&circle, &circle).unwrap();
    assert_path_refused(&circle);
}

#[test]
fn a_file_that_is_no_evdev_node_is_a_failure() {
    let (directory, file) = path("file");
    File::create_new(&file).unwrap();
    let fifo = directory.path().join("fifo");
    mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    let socket = directory.path().join("socket");
    let _listener = UnixListener::bind(&socket).unwrap();
    let link = directory.path().join("link");
    symlink("/dev/null", &link).unwrap();
    for path in [&file, &fifo, &socket, &link, &directory.path().to_owned()] {
        assert_path_refused(path);
    }
    for path in ["/dev/null", "/dev/zero", "/dev/urandom"] {
        assert_path_refused(Path::new(path));
    }
}

#[test]
fn a_device_without_rights_is_a_failure() {
    let (directory, binary) = path(BINARY);
    // The binary may be in a directory that only its owner can enter. `cp` copies: a file that this process has written could still
    // be open in the child of another test, and could not be executed.
    let source = process::binary(BINARY).unwrap();
    let copied = Command::new("cp").arg(source).arg(&binary).status();
    assert!(copied.unwrap().success());
    fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
    let closed = directory.path().join("closed");
    fs::create_dir(&closed).unwrap();
    symlink("/dev/null", closed.join("event0")).unwrap();
    fs::set_permissions(&closed, Permissions::from_mode(0o000)).unwrap();
    let mut command = Command::new(binary);
    command.env_remove("RUST_LOG");
    command.arg(option("evdev-path", closed.join("event0")));
    if rustix::process::geteuid().is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    assert_refused(&mut command, FAILURE, "Permission denied");
    fs::set_permissions(&closed, Permissions::from_mode(0o755)).unwrap();
}
