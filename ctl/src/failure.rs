// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Why the program could not do what it was asked for.

/// Why the program could not do what it was asked for.
#[derive(Debug, PartialEq, Eq)]
pub enum Failure {
    /// The command line is wrong. One line.
    Usage(String),
    /// Anything else failed. One line.
    Failed(String),
}
