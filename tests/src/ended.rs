// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Programs that end by themselves, and those that refuse to start.

use std::ffi::OsStr;
use std::process::Command;
use std::time::Duration;

use crate::process::{PATIENCE, Program};

/// What a program that ended by itself has left behind.
#[derive(Debug)]
pub struct Ended {
    /// Its exit status; `None` if a signal ended it.
    pub code: Option<i32>,
    /// What it wrote to stdout.
    pub stdout: String,
    /// What it wrote to stderr.
    pub stderr: String,
}

impl Ended {
    /// Runs a program. Panics if it cannot be started, or has not ended within `limit`.
    #[track_caller]
    pub fn within(limit: Duration, command: &mut Command) -> Self {
        let mut program = Program::spawn(command).unwrap_or_else(|error| panic!("{error}"));
        let status = program
            .wait(limit)
            .unwrap_or_else(|error| panic!("{error}"));
        Self {
            code: status.code(),
            stdout: program.stdout(),
            stderr: program.stderr(),
        }
    }
}

/// Runs a program that ends by itself soon. Panics if it does not.
#[track_caller]
pub fn run(command: &mut Command) -> Ended {
    Ended::within(PATIENCE, command)
}

/// Runs a program that must not start. Panics unless it ends with `code`, and says why in one line on stderr that contains `word`.
#[track_caller]
pub fn assert_refused(command: &mut Command, code: i32, word: impl AsRef<OsStr>) {
    let Ended {
        code: ended,
        stdout,
        stderr,
    } = run(command);
    let word = word.as_ref().to_str().expect("a word in UTF-8");
    assert_eq!(ended, Some(code), "exit status of {command:?}: {stderr}");
    assert_eq!(stdout, "", "stdout of {command:?}");
    assert_eq!(
        stderr.trim_end().lines().count(),
        1,
        "{command:?} should write one line: {stderr}"
    );
    assert!(
        stderr.ends_with('\n'),
        "{command:?} should end its line: {stderr:?}"
    );
    assert!(
        stderr.contains(word),
        "{command:?} should name {word:?}: {stderr}"
    );
    assert!(!stderr.contains("panicked"), "{command:?}: {stderr}");
}
