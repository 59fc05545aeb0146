// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A back-end process that is ended and started again, and its resources when it is idle.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::loss::{Loss, patience};
use super::report::Sample;
use crate::process::{Program, Resources, Signal, command, listens, option};

/// Time limit for ending after SIGTERM. The protocol's conventions say "quickly"; this is what managers wait.
const END: Duration = Duration::from_secs(10);

/// Length of the log that is shown.
const SHOWN: usize = 4 << 10;

/// A back-end.
pub struct BackEnd {
    name: &'static str,
    arguments: Vec<OsString>,
    program: Program,
    socket: PathBuf,
    /// Resources that it may hold without a connection.
    most: Resources,
    /// Resources that the first connection may leave behind: libraries open files and start threads.
    keeps: Resources,
    began: Instant,
    _directory: TempDir,
}

impl BackEnd {
    /// Starts the program `name`. Its first connection may leave `keeps` behind.
    pub fn start(
        name: &'static str,
        arguments: Vec<OsString>,
        keeps: Resources,
    ) -> Result<Self, Loss> {
        let directory = tempfile::tempdir()?;
        let socket = directory.path().join("socket");
        let began = Instant::now();
        let program = spawn(name, &arguments, &socket)?;
        Ok(Self {
            most: sum(program.resources()?, keeps),
            program,
            name,
            arguments,
            socket,
            keeps,
            began,
            _directory: directory,
        })
    }

    /// Returns its socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Returns when the process was started.
    pub fn began(&self) -> Instant {
        self.began
    }

    /// Fails if the process has ended by itself.
    pub fn check(&mut self) -> Result<(), Loss> {
        match self.program.status()? {
            None => Ok(()),
            Some(status) => Err(Loss(format!("{} ended by itself: {status}", self.name))),
        }
    }

    /// Kills the process.
    pub fn kill(&mut self) -> Result<(), Loss> {
        self.check()?;
        self.program.end(Signal::KILL, patience())?;
        Ok(())
    }

    /// Sends SIGTERM; the process must end in time and with status 0.
    pub fn terminate(&mut self) -> Result<(), Loss> {
        self.check()?;
        let status = self.program.end(Signal::TERM, END)?;
        match status.code() {
            Some(0) => Ok(()),
            _ => Err(Loss(format!("{} after SIGTERM: {status}", self.name))),
        }
    }

    /// Starts another process, after this one has ended.
    pub fn start_again(&mut self) -> Result<(), Loss> {
        self.began = Instant::now();
        self.program = spawn(self.name, &self.arguments, &self.socket)?;
        self.most = sum(self.program.resources()?, self.keeps);
        Ok(())
    }

    /// Waits until the process, without a connection, holds no more than when it was new.
    pub fn wait_until_idle(&mut self) -> Result<Sample, Loss> {
        let deadline = Instant::now() + patience();
        let most = self.most;
        loop {
            self.check()?;
            let now = self.program.resources()?;
            let Resources {
                files,
                threads,
                mappings,
            } = now;
            if files <= most.files && threads <= most.threads && mappings <= most.mappings {
                break;
            }
            if Instant::now() >= deadline {
                return Err(Loss(format!(
                    "{} holds {now:?} without a connection; expected at most {most:?}",
                    self.name
                )));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let Resources { files, threads, .. } = self.program.resources()?;
        Ok(Sample {
            age: self.began.elapsed(),
            files,
            threads,
            bytes: self.program.anonymous_bytes()?,
        })
    }

    /// Returns the end of what the process wrote to stderr.
    pub fn log(&self) -> String {
        let log = self.program.stderr();
        let start = log.char_indices().rev().nth(SHOWN);
        log[start.map_or(0, |(index, _)| index)..].to_owned()
    }
}

fn sum(one: Resources, other: Resources) -> Resources {
    Resources {
        files: one.files + other.files,
        threads: one.threads + other.threads,
        mappings: one.mappings + other.mappings,
    }
}

fn spawn(name: &'static str, arguments: &[OsString], socket: &Path) -> Result<Program, Loss> {
    let mut command: Command = command(name)?;
    command
        .env_remove("RUST_LOG")
        .args(arguments)
        .arg(option("socket-path", socket));
    let mut program = Program::spawn(&mut command)?;
    program.wait_until("listen on its socket", patience(), || listens(socket))?;
    Ok(program)
}
