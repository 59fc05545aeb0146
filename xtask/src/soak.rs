// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `cargo xtask soak`: the soak program of the tests, on release binaries.

use std::process::ExitCode;

use crate::bench;
use crate::progress::Progress;

pub fn run(progress: &Progress, arguments: &[String]) -> Result<ExitCode, String> {
    bench::build(progress)?;
    bench::program("soak", arguments)
}
