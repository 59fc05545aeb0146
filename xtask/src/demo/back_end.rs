// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A back-end of the demo.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Command;

use vhost_device_tests::process::{self, Program, Signal};

use crate::progress::Progress;
use crate::workspace::target_directory;

/// The running program of a device. It is killed when this is dropped.
pub struct BackEnd {
    pub program: Program,
    pub socket: PathBuf,
    _directory: tempfile::TempDir,
}

impl BackEnd {
    /// Starts a release binary and waits until it listens.
    pub fn start(progress: &Progress, name: &str, options: &[OsString]) -> Result<Self, String> {
        let directory = tempfile::tempdir()
            .map_err(|error| format!("cannot create a temporary directory: {error}"))?;
        let socket = directory.path().join("socket");
        let mut command = Command::new(target_directory().join("release").join(name));
        command
            .arg(process::option("socket-path", &socket))
            .args(options);
        progress.step(&format!("Starting {}", shown(&command)));
        let mut program = Program::spawn(&mut command).map_err(|error| error.to_string())?;
        program
            .wait_for_listener(&socket)
            .map_err(|error| error.to_string())?;
        Ok(Self {
            program,
            socket,
            _directory: directory,
        })
    }

    /// Ends the program with SIGTERM, and checks its exit status.
    pub fn end(&mut self) -> Result<(), String> {
        let status = self.program.end(Signal::TERM, process::PATIENCE);
        match status {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(format!(
                "a back-end ended: {status}\n{}",
                self.program.stderr()
            )),
            Err(error) => Err(error.to_string()),
        }
    }
}

/// Formats a command as a user would type it.
pub fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
    words.join(" ")
}
