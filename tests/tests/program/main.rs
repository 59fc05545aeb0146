// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The program apart from its device: arguments, socket, signals, exit status.
//!
//! The rules are those of QEMU's "Backend program conventions", and what this project adds to them.

#![cfg(test)]

mod arguments;
mod client_sockets;
mod connections;
mod control_socket;
mod ctl;
mod descriptor;
mod file_limit;
mod log;
mod polling;
mod prometheus;
mod race;
mod sockets;
mod statistics;
mod stats_socket;
mod systemd;

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;
use vhost_device_tests::ended::{assert_refused, run};
use vhost_device_tests::front_end::block::{self, Request, RequestArea};
use vhost_device_tests::front_end::{Buffer, FrontEnd};
use vhost_device_tests::process::{self, PATIENCE, Program, option};

const IMAGE_SIZE: u64 = 1 << 20;

/// Time limit for ending after SIGTERM.
const END: Duration = Duration::from_secs(2);

/// A program that the suite runs.
struct Binary {
    name: &'static str,
    /// Its type in QEMU's schema.
    kind: &'static str,
    /// The features that it has on all hosts, in the order of `--print-capabilities`.
    features: &'static [&'static str],
    /// The features that depend on the host, which are printed after them.
    host_features: &'static [&'static str],
    /// The option that names its file, if it has one.
    file_option: Option<&'static str>,
    /// Its own options: name, words in the help, default.
    options: &'static [(&'static str, &'static [&'static str], &'static str)],
    /// Its own options with invalid values.
    bad_values: &'static [(&'static str, &'static [&'static str])],
}

const BLOCK: Binary = Binary {
    name: "vhost-device-block",
    kind: "block",
    features: &["read-only", "blk-file"],
    host_features: &[],
    file_option: Some("blk-file"),
    options: &[
        ("blk-file", &["PATH"], ""),
        ("blk-fd", &["FDNUM"], ""),
        ("read-only", &[], ""),
        ("serial", &["20", "bytes"], ""),
        ("num-queues", &[], "64"),
        ("queue-size", &[], "1024"),
        ("logical-block-size", &["4096", "bytes"], "512"),
        ("physical-block-size", &["65536", "bytes"], ""),
        ("direct", &["O_DIRECT"], ""),
        ("io-engine", &["io_uring", "threads"], "auto"),
        ("discard", &["ignore"], "unmap"),
    ],
    bad_values: &[
        (
            "num-queues",
            &["0", "-1", "many", "65537", "4294967297", ""],
        ),
        (
            "queue-size",
            &["0", "3", "65536", "131072", "-2", "big", ""],
        ),
        (
            "logical-block-size",
            &["0", "511", "1000", "8192", "4k", ""],
        ),
        (
            "physical-block-size",
            &["0", "256", "1000", "131072", "4k", ""],
        ),
        ("io-engine", &["aio", "Auto ", ""]),
        ("discard", &["zero", ""]),
        ("serial", &["twenty-one characters", "zwölf ärgerliche öö"]),
    ],
};

const RNG: Binary = Binary {
    name: "vhost-device-rng",
    kind: "rng",
    features: &[],
    host_features: &[],
    file_option: Some("rng-source"),
    options: &[
        ("rng-source", &["PATH", "getrandom"], ""),
        ("max-bytes", &["N", "--period"], ""),
        ("period", &["MS", "milliseconds", "--max-bytes"], "65536"),
    ],
    bad_values: &[
        (
            "max-bytes",
            &["0", "-1", "1k", "many", "18446744073709551616", ""],
        ),
        ("period", &["0", "-1", "1s", "0.5", "4294967296", ""]),
    ],
};

const GPU: Binary = Binary {
    name: "vhost-device-gpu",
    kind: "gpu",
    features: &[],
    host_features: &["render-node", "virgl"],
    file_option: None,
    options: &[
        ("virgl", &["3D"], ""),
        ("render-node", &["PATH", "GPU"], ""),
        ("max-hostmem", &["SIZE", "bytes", "M"], "256M"),
        ("headless", &[], ""),
    ],
    bad_values: &[(
        "max-hostmem",
        &["0", "-1", "1T", "many", "1.5G", "99999999999G", ""],
    )],
};

const SCSI: Binary = Binary {
    name: "vhost-device-scsi",
    kind: "scsi",
    features: &[],
    host_features: &[],
    file_option: None,
    options: &[
        ("disk", &["file=PATH", "target=N", "reservations=PATH"], ""),
        ("passthrough", &["/dev/sgN", "read-only"], ""),
        ("incoming", &["migration"], ""),
        ("num-queues", &["64", "control"], "64"),
        ("queue-size", &["32768"], "1024"),
        ("io-engine", &["io_uring", "threads"], "auto"),
    ],
    bad_values: &[
        (
            "disk",
            &["", "target=1", "file=a,target=256", "file=a,color=b"],
        ),
        ("passthrough", &["", "/dev/sg0,lun=x", "/dev/sg0,serial=S"]),
        ("num-queues", &["0", "-1", "many", "65", ""]),
        ("queue-size", &["0", "3", "65536", "-2", ""]),
        ("io-engine", &["aio", ""]),
    ],
};

impl Binary {
    fn command(&self) -> Command {
        let mut command = process::command(self.name).unwrap();
        // Logging enabled by the caller would add lines.
        command.env_remove("RUST_LOG");
        command
    }
}

/// A directory with an image in it.
struct Setup<'a> {
    binary: &'a Binary,
    directory: TempDir,
}

impl<'a> Setup<'a> {
    fn new(binary: &'a Binary) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let setup = Self { binary, directory };
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

    /// Returns the option that names the image.
    fn file_option(&self) -> Option<OsString> {
        let name = self.binary.file_option?;
        Some(option(name, self.image()))
    }

    /// Returns the program with its image, if it has one, and no option for the socket.
    fn command(&self) -> Command {
        let mut command = self.binary.command();
        command.args(self.file_option());
        command
    }

    /// Returns the same, listening at [`Setup::socket`].
    fn listening(&self) -> Command {
        let mut command = self.command();
        command.arg(option("socket-path", self.socket()));
        command
    }

    /// Starts the program, and waits until it listens.
    fn serve(&self) -> Program {
        Program::serve(&mut self.listening(), &self.socket()).unwrap()
    }
}

/// Runs [`assert_refused`] for a command that was told to listen at `setup`'s socket, and asserts that there is no socket afterwards.
fn assert_refused_without_socket(
    setup: &Setup,
    command: &mut Command,
    code: i32,
    word: impl AsRef<OsStr>,
) {
    assert_refused(command, code, word);
    assert!(!exists(&setup.socket()), "{command:?} left a socket");
}

/// Returns whether anything is at `path`, including a dangling link.
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

/// Reads the reply to GET_FEATURES, and returns the features.
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

/// Creates a request for `length` bytes: of a disk's start, or of a device that only writes.
fn read_request(front_end: &FrontEnd, length: u32) -> Vec<Buffer> {
    let area = RequestArea::new(front_end.memory(), length);
    let read = Request {
        kind: block::IN,
        reply_length: length,
        ..Request::default()
    };
    area.prepare(front_end.memory(), &read).chain
}

/// Turns each function that takes a [`Binary`] into a test for each program that works on a file.
macro_rules! for_each_program_with_a_file {
    ($($test:ident),+ $(,)?) => {
        mod block {
            $(#[test] fn $test() { super::$test(&crate::BLOCK) })+
        }
        mod rng {
            $(#[test] fn $test() { super::$test(&crate::RNG) })+
        }
    };
}
use for_each_program_with_a_file;

/// Turns each function that takes a [`Binary`] into a test for each program.
macro_rules! for_each_program {
    ($($test:ident),+ $(,)?) => {
        mod block {
            $(#[test] fn $test() { super::$test(&crate::BLOCK) })+
        }
        mod gpu {
            $(#[test] fn $test() { super::$test(&crate::GPU) })+
        }
        mod rng {
            $(#[test] fn $test() { super::$test(&crate::RNG) })+
        }
        mod scsi {
            $(#[test] fn $test() { super::$test(&crate::SCSI) })+
        }
    };
}
use for_each_program;
