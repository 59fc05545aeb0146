// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Errors of guests.

use std::io;

use thiserror::Error;

use crate::process::ProcessError;

/// Why a guest could not be started, or did not do what was expected.
#[derive(Error)]
pub enum GuestError {
    /// The operating system refused.
    #[error("cannot {0}: {1}")]
    System(String, #[source] io::Error),
    /// A program of the host is missing.
    #[error("{0} is not installed: `cargo xtask test` as root installs what guests need")]
    NotInstalled(String),
    /// A program of the host that prepares something failed.
    #[error("`{command}` failed ({status}):\n{stderr}")]
    Command {
        /// What was run.
        command: String,
        /// How it ended.
        status: std::process::ExitStatus,
        /// What it wrote to stderr.
        stderr: String,
    },
    /// No kernel package is available.
    #[error("no kernel for the guest: {0}")]
    NoKernel(String),
    /// A program that runs the guest could not be started or watched.
    #[error(transparent)]
    Program(#[from] ProcessError),
    /// The guest did not do what was expected.
    #[error("the guest {0}")]
    Guest(String),
    /// QEMU refused a QMP command, or its answer was invalid.
    #[error("QMP {command}: {answer}")]
    Qmp {
        /// The command.
        command: String,
        /// The answer.
        answer: String,
    },
}

/// Prints the message, because tests unwrap.
impl std::fmt::Debug for GuestError {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, formatter)
    }
}

pub(crate) fn system(what: impl Into<String>) -> impl FnOnce(io::Error) -> GuestError {
    let what = what.into();
    move |error| GuestError::System(what, error)
}
