// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `vhost-device-console` with Linux guests: User-Mode Linux, and QEMU 11's device of any type.

#![cfg(test)]

mod agent;
mod client;
mod qemu;
mod uml;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::TempDir;
use vhost_device_tests::process::{self, Program};

use crate::client::Client;

/// Time limit for a guest to do something.
const PATIENCE: Duration = Duration::from_secs(60);

/// Lines that a guest adds to its log, and one more, the last.
const LINES: usize = 1000;
const LAST_LINE: &str = "the last line of the log";

/// Shell functions for guests. `named NAME` creates the link to the port with this name, as udev does, and waits until the port is there.
const FUNCTIONS: &str = r#"
    await() { until eval "$1"; do sleep 0.05; done; }
    named() {
        mkdir -p /dev/virtio-ports
        until [ -e "/dev/virtio-ports/$1" ]; do
            for port in /sys/class/virtio-ports/*; do
                if [ "$(cat $port/name 2> /dev/null)" = "$1" ]; then
                    ln -s /dev/${port##*/} "/dev/virtio-ports/$1"
                fi
            done
            sleep 0.05
        done
    }
"#;

/// The back-end with its ports. Dropping it ends the back-end and removes the sockets.
struct Console {
    program: Program,
    directory: TempDir,
}

impl Console {
    /// Starts the back-end with these ports, whose paths are in `directory`: `DIR` stands for it.
    fn start(directory: TempDir, ports: &[&str], options: &[&str]) -> Self {
        let socket = directory.path().join("socket");
        let mut command = process::command("vhost-device-console").unwrap();
        command.arg(process::option("socket-path", &socket));
        for port in ports {
            command.arg(process::option("port", located(port, directory.path())));
        }
        for option in options {
            command.arg(located(option, directory.path()));
        }
        let program = Program::serve(&mut command, &socket).unwrap();
        Self { program, directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Connects a client to the socket of a port.
    fn connect(&self, name: &str) -> Client {
        Client::connect(&self.path(name))
    }

    /// Opens the terminal of a port.
    fn open(&self, link: &str) -> Client {
        Client::open(&self.path(link))
    }
}

/// Returns the text with the directory's path for `DIR`.
fn located(text: &str, directory: &Path) -> OsString {
    text.replace("DIR", directory.to_str().unwrap()).into()
}

/// Returns printable bytes that do not repeat.
fn text(count: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(5);
    std::iter::repeat_with(|| random.alphanumeric() as u8)
        .take(count)
        .collect()
}

/// Panics unless a console showed all lines of the guest's log, in order. Linux discards what it has logged before it has found the
/// console, and other programs may write there too.
#[track_caller]
fn assert_complete(output: &str, log: &str) {
    // The first line may have begun before.
    let mut shown = output.lines().skip(1).map(str::trim_end);
    let first = shown.clone().next().expect("a line");
    let (_, expected) = log.split_once(first).expect("the first line");
    let mut lines = 0;
    for line in expected.lines().skip(1) {
        assert!(
            shown.any(|other| other == line),
            "{line:?} is missing:\n{output}"
        );
        lines += 1;
        if line.ends_with(LAST_LINE) {
            break;
        }
    }
    // The console may have been found just before.
    assert!(lines > LINES - 10, "{lines} lines:\n{output}");
}
