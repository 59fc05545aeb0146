// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Runs a program in User-Mode Linux. Cargo can use it as the runner of tests that need devices which the host's kernel does not have:
//! `cargo test --config 'target."cfg(all())".runner = "target/debug/user-mode-linux"' …`.

use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use vhost_device_tests::guest::GuestError;
use vhost_device_tests::uml;

/// Run a program of this host in User-Mode Linux, as root
///
/// If necessary, the kernel is built first, which takes two minutes. The program can read the files of the host, and write only below the target
/// directory. The exit status is that of the program, or 125 if it could not be run.
#[derive(Debug, Parser)]
struct Arguments {
    /// End the run after this many seconds
    #[arg(long, value_name = "N", default_value_t = 900)]
    deadline: u64,
    /// The program and its arguments; without a program, only the kernel is built
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    program: Vec<OsString>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    run(&arguments).unwrap_or_else(|error| {
        eprintln!("user-mode-linux: {error}");
        ExitCode::from(125)
    })
}

fn run(arguments: &Arguments) -> Result<ExitCode, GuestError> {
    let Some((program, rest)) = arguments.program.split_first() else {
        uml::kernel::prepare()?;
        return Ok(ExitCode::SUCCESS);
    };
    let status = uml::run(program, rest, Duration::from_secs(arguments.deadline))?;
    Ok(ExitCode::from(u8::try_from(status).unwrap_or(125)))
}
