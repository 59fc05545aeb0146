// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Runs a program in User-Mode Linux. Cargo can use it as the runner of tests that need devices which the host's kernel does not have:
//! `cargo test --config 'target."cfg(all())".runner = "target/debug/user-mode-linux"' …`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use vhost_device_tests::guest::GuestError;
use vhost_device_tests::uml;
use vhost_device_tests::uml::front_end::{self, Device};

/// Run a program of this host in User-Mode Linux, as root
///
/// If necessary, the kernel is built first, which takes two minutes. The program can read the files of the host, and write only below the target
/// directory. The exit status is that of the program, or 125 if it could not be run.
#[derive(Debug, Parser)]
struct Arguments {
    /// Add a device, whose back-end listens on SOCKET, with VIRTIO's number of its type
    #[arg(long, value_name = "SOCKET:TYPE", value_parser = device)]
    device: Vec<(PathBuf, u32)>,
    /// End the run after this many seconds
    #[arg(long, value_name = "N", default_value_t = 900)]
    deadline: u64,
    /// The program and its arguments; without a program, only the kernel is built
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    program: Vec<OsString>,
}

/// Parses a socket and the type of its device.
fn device(text: &str) -> Result<(PathBuf, u32), String> {
    let (socket, id) = text.rsplit_once(':').ok_or("must be SOCKET:TYPE")?;
    let id = id
        .parse()
        .map_err(|_| format!("{id} is not the number of a type"))?;
    Ok((socket.into(), id))
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
    let deadline = Duration::from_secs(arguments.deadline);
    let devices: Vec<_> = arguments
        .device
        .iter()
        .map(|(socket, id)| Device { socket, id: *id })
        .collect();
    let status = match devices.as_slice() {
        [] => uml::run(program, rest, deadline)?,
        devices => front_end::run_program(devices, &arguments.program, deadline)?,
    };
    Ok(ExitCode::from(u8::try_from(status).unwrap_or(125)))
}
