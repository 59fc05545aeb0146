// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the program does apart from being a device: arguments, socket, signals, exit status.
//!
//! The rules are those of QEMU's "Backend program conventions", and what this project adds to them.

#[path = "program/arguments.rs"]
mod arguments;
#[path = "program/connections.rs"]
mod connections;
#[path = "program/descriptor.rs"]
mod descriptor;
#[path = "program/sockets.rs"]
mod sockets;
#[path = "program/systemd.rs"]
mod systemd;

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;
use vhost_device_tests::process::{self, PATIENCE, Program, option};

const BINARY: &str = "vhost-device-block";
const IMAGE_SIZE: u64 = 1 << 20;

/// How long the program may take to end after SIGTERM.
const END: Duration = Duration::from_secs(2);

/// A directory of its own with an image in it.
struct Setup {
    directory: TempDir,
}

impl Setup {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let setup = Self { directory };
        File::create_new(setup.image())
            .unwrap()
            .set_len(IMAGE_SIZE)
            .unwrap();
        setup
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn image(&self) -> PathBuf {
        self.path("image")
    }

    fn socket(&self) -> PathBuf {
        self.path("socket")
    }

    /// The program with its image, and nothing said about its socket.
    fn command(&self) -> Command {
        let mut command = program();
        command.arg(option("blk-file", self.image()));
        command
    }

    /// The program with its image, to listen at [`Setup::socket`].
    fn listening(&self) -> Command {
        let mut command = self.command();
        command.arg(option("socket-path", self.socket()));
        command
    }

    /// The program, listening.
    fn serve(&self) -> Program {
        let mut program = Program::spawn(&mut self.listening()).unwrap();
        program.wait_for_listener(&self.socket()).unwrap();
        program
    }
}

fn program() -> Command {
    let mut command = process::command(BINARY).unwrap();
    // Logging that the caller asked for would come between the lines that are looked at.
    command.env_remove("RUST_LOG");
    command
}

/// What a program that ended by itself left behind.
struct Ended {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

fn run(command: &mut Command) -> Ended {
    let mut program = Program::spawn(command).unwrap();
    let status = program.wait(PATIENCE).unwrap();
    Ended {
        code: status.code(),
        stdout: program.stdout(),
        stderr: program.stderr(),
    }
}

/// Runs a program that must not start: it says so in one line on stderr, in which `word` occurs, and ends with `code`.
fn assert_refused(command: &mut Command, code: i32, word: impl AsRef<OsStr>) {
    let ended = run(command);
    let word = word.as_ref().to_str().unwrap();
    assert_eq!(
        ended.code,
        Some(code),
        "exit code of {command:?}, stderr: {}",
        ended.stderr
    );
    assert_eq!(ended.stdout, "", "stdout of {command:?}");
    assert_eq!(
        ended.stderr.trim_end().lines().count(),
        1,
        "{command:?} should write one line: {}",
        ended.stderr
    );
    assert!(
        ended.stderr.ends_with('\n'),
        "{command:?} should end its line: {:?}",
        ended.stderr
    );
    assert!(
        ended.stderr.contains(word),
        "{command:?} should name {word:?}: {}",
        ended.stderr
    );
    assert!(
        !ended.stderr.contains("panicked"),
        "{command:?}: {}",
        ended.stderr
    );
}

/// [`assert_refused`], for a command that was told to listen at `setup`'s socket: there is none afterwards.
fn assert_refused_without_socket(
    setup: &Setup,
    command: &mut Command,
    code: i32,
    word: impl AsRef<OsStr>,
) {
    assert_refused(command, code, word);
    assert!(!exists(&setup.socket()), "{command:?} left a socket");
}

/// Whether there is anything at `path`, be it a dangling link.
fn exists(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

/// Sends GET_FEATURES.
fn ask(mut stream: &UnixStream) {
    let request: [u32; 3] = [1, 1, 0];
    stream
        .write_all(&request.map(u32::to_ne_bytes).concat())
        .unwrap();
}

/// Reads the reply to GET_FEATURES, and gives the features.
fn answer(mut stream: &UnixStream) -> u64 {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut reply = [0; 20];
    stream.read_exact(&mut reply).unwrap();
    let header: [u32; 3] = [1, 5, 8];
    assert_eq!(reply[..12], header.map(u32::to_ne_bytes).concat());
    u64::from_ne_bytes(reply[12..].try_into().unwrap())
}

/// Asks for the features, which a back-end answers at any time.
fn assert_serves(stream: &UnixStream) {
    const VERSION_1: u64 = 1 << 32;
    ask(stream);
    assert_ne!(answer(stream) & VERSION_1, 0);
}
