// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The project's own commands: `cargo xtask demo`, `test`, `bench`, `coverage`, `fuzz`, `install` and `deb`.

mod bench;
mod coverage;
mod deb;
mod demo;
#[cfg(test)]
mod documents;
mod fuzz;
mod install;
mod manual;
mod modules;
mod packages;
mod programs;
mod progress;
mod soak;
mod test;
mod workspace;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};

use vhost_device_tests::arguments;
use vhost_device_tests::soak::SoakOptions;

use crate::progress::Progress;

/// Show, test, measure and install the devices
///
/// demo, test, coverage, bench, fuzz and deb need Debian packages. They install the missing ones if they run as root; otherwise they print
/// which packages to install.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Boot Linux guests in QEMU with our devices, and print what the guests see
    ///
    /// Builds the release binaries, creates a file system image of 256 MiB, starts block, rng and vsock, boots a guest, and prints what the guest
    /// sees: size, serial number, file system, throughput, random numbers. Then boots a second guest with a GPU and saves its screen in
    /// target/demo/screen.png, and a third guest with a keyboard. A host without uinput runs the third part in User-Mode Linux, which
    /// takes two minutes to build once. The rest takes less than two minutes after the build. The processors of the guests are emulated,
    /// so KVM is not needed; the throughput is limited by the emulation (see `cargo xtask bench`).
    ///
    /// Skips a part that this host does not support, and prints the reason. The exit status is 0 if nothing failed.
    Demo,
    /// The part of the demo that runs in User-Mode Linux
    #[command(hide = true)]
    DemoInput {
        /// Milliseconds since the start of the demo
        elapsed: u64,
    },
    /// Run every check: format, lints, licences, unit tests, conformance suites, guests
    ///
    /// Continues after a failure, so that it reports all failures. The last line is `N passed, N failed, N skipped`; each of fmt, clippy
    /// and the other checks counts as one. The exit status is 0 if nothing failed.
    ///
    /// A test that cannot run on this host counts as skipped, and its reason is listed. If CI is set in the environment, a skip whose
    /// reason is not on a short list is a failure. The logs of guests are in target/guest/logs, those of test programs in
    /// target/test-logs.
    Test(test::Options),
    /// Measure how much of the product's code the tests execute
    ///
    /// Builds everything with counters, runs the unit tests and the suites that need no guest, and prints a table of the lines, functions
    /// and regions of each crate. A host without uinput runs the suite of input in User-Mode Linux. The exit status is 1 if a test fails, or
    /// if less than 90 % of the lines of a crate are executed. Needs LLVM's tools of the version that the compiler uses.
    Coverage(coverage::Options),
    /// Compare the speed of a device with other back-ends
    ///
    /// Builds the release binaries and runs the benchmark program. `cargo xtask bench block --help` lists its options.
    Bench {
        /// The device, `block`, `console`, `gpu` or `vsock`, and options for it
        #[arg(
            required = true,
            num_args = 1..,
            trailing_var_arg = true,
            allow_hyphen_values = true
        )]
        arguments: Vec<String>,
    },
    /// Run all devices for a long time under load and with faults, and check that nothing is lost
    ///
    /// Builds the release binaries and runs the soak program: it verifies the results of every request, while it stops rings, changes the
    /// memory, disconnects front-ends and displays, and kills processes. Prints the progress, and at the end the load, the injected faults
    /// and what was lost. The exit status is 1 if anything was lost. A host without uinput runs input in User-Mode Linux.
    Soak(SoakOptions),
    /// Search for inputs of guests, drivers and front-ends that break a device or the core
    ///
    /// Builds the fuzz targets and runs libFuzzer on each, as many at the same time as there are processors. Prints the number of executions,
    /// the coverage, and each finding with the file of its input and the command that runs it again. The exit status is 1 if there is a
    /// finding. The corpus is kept in target/fuzz/corpus.
    Fuzz(fuzz::Options),
    /// Check that no files of a crate import each other in a circle
    ///
    /// In `common` and `storage` no module may import one above it either. The order of the modules, and what counts as an import, is in
    /// xtask/src/modules.rs. The exit status is 1 if anything was found. `test` runs this check too.
    Modules,
    /// Build the release binaries and install them, with descriptors, manual pages, completions and systemd units
    ///
    /// Installs programs in PREFIX/bin, and the rest in the conventional directories below PREFIX. Prints the path of each file that it
    /// writes, and replaces existing files. Starts and enables nothing. `cargo xtask deb` builds a package instead, which can be removed.
    Install(install::Options),
    /// Build a Debian package of what `install` installs
    ///
    /// Uses the prefix /usr.
    Deb {
        /// File or directory for the package [default: target/debian]
        #[arg(long, value_name = "PATH")]
        output: Option<PathBuf>,
    },
}

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return arguments::refuse(&error),
    };
    let progress = Progress::start();
    let result = match arguments.command {
        Task::Demo => demo::run(&progress),
        Task::DemoInput { elapsed } => {
            let progress = Progress::started(Duration::from_millis(elapsed));
            demo::input::here(&progress).map(|()| ExitCode::SUCCESS)
        }
        Task::Test(options) => test::run(&progress, options),
        Task::Coverage(options) => coverage::run(&progress, &options),
        Task::Bench { arguments } => bench::run(&progress, &arguments),
        Task::Fuzz(options) => fuzz::run(&progress, &options),
        Task::Soak(options) => soak::run(&progress, &options),
        Task::Modules => modules::run(),
        Task::Install(options) => install::run(&progress, &options).map(|()| ExitCode::SUCCESS),
        Task::Deb { output } => deb::run(&progress, output).map(|()| ExitCode::SUCCESS),
    };
    result.unwrap_or_else(|error| {
        eprintln!("{error}");
        ExitCode::FAILURE
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::workspace::workspace;

    #[test]
    fn the_lints_of_each_crate_are_those_of_the_workspace() {
        let root = fs::read_to_string(workspace().join("Cargo.toml")).unwrap();
        let (_, members) = root.split_once("members = [").unwrap();
        let (members, _) = members.split_once(']').unwrap();
        for member in members.split('"').skip(1).step_by(2) {
            let member = workspace().join(member);
            let manifest = fs::read_to_string(member.join("Cargo.toml")).unwrap();
            assert!(
                manifest.contains("\n[lints]\nworkspace = true\n"),
                "{member:?}"
            );
            for file in ["src/lib.rs", "src/main.rs"] {
                let source = fs::read_to_string(member.join(file)).unwrap_or_default();
                for header in ["#![deny", "#![warn", "#![forbid", "#![cfg_attr"] {
                    let found = source.lines().find(|line| line.starts_with(header));
                    assert_eq!(found, None, "{member:?}/{file}");
                }
            }
        }
    }
}
