// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The project's own commands: `cargo xtask demo`, `cargo xtask test`, `cargo xtask bench`.

mod bench;
mod demo;
mod packages;
mod progress;
mod test;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use clap::{Parser, Subcommand};

use crate::progress::Progress;

/// See the devices work, test them, measure them.
///
/// Each command installs the Debian packages that it needs and does not find, when it runs as root; else it says which they are.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Boot a Linux guest in QEMU that uses vhost-device-block, and show what it sees
    ///
    /// Builds the release binary, makes a file system image of 256 MiB, starts the back-end on it, boots a guest, and prints the guest's
    /// view: size, serial, file system, throughput. Takes less than a minute after the build. Processors are emulated, so that it works on
    /// every machine; the throughput is that of the emulated guest, not of the back-end (see `cargo xtask bench`).
    Demo,
    /// Run every check: format, lints, licences, unit tests, conformance suites, guests
    ///
    /// Goes on after a failure, so that all failures are seen. The last line is `N passed, N failed`; fmt, clippy and deny count as one each.
    /// The exit status is 0 if nothing failed. The logs of the guests stay in target/guest/logs.
    Test {
        /// Leave out what boots a guest in QEMU, and install nothing
        #[arg(long)]
        no_guest: bool,
    },
    /// Measure a device beside other back-ends
    ///
    /// Builds the release binaries and runs the benchmark program. `cargo xtask bench block --help` lists its options.
    Bench {
        /// What to measure, like `block`, and options for it
        #[arg(
            required = true,
            num_args = 1..,
            trailing_var_arg = true,
            allow_hyphen_values = true
        )]
        arguments: Vec<String>,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let progress = Progress::start();
    let result = match arguments.command {
        Task::Demo => demo::run(&progress).map(|()| ExitCode::SUCCESS),
        Task::Test { no_guest } => test::run(&progress, no_guest),
        Task::Bench { arguments } => bench::run(&progress, &arguments),
    };
    result.unwrap_or_else(|error| {
        eprintln!("{error}");
        ExitCode::FAILURE
    })
}

/// The cargo that runs this, in the root of the workspace.
fn cargo<const N: usize>(arguments: [&str; N]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
    command.args(arguments).current_dir(workspace());
    command
}

fn workspace() -> PathBuf {
    let mut root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    root.pop();
    root
}

/// The target directory that this program was built into.
fn target_directory() -> PathBuf {
    let this = std::env::current_exe().unwrap_or_default();
    let target = this.parent().and_then(Path::parent);
    target.unwrap_or(Path::new("target")).to_owned()
}
