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

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};

use vhost_device_tests::soak::SoakOptions;

use crate::progress::Progress;

/// See the devices work, test them, measure them, install them.
///
/// demo, test, coverage, bench and deb install the Debian packages that they need and do not find, when they run as root; else they say which these are.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Boot Linux guests in QEMU that use our devices, and show what they see
    ///
    /// Builds the release binaries, makes a file system image of 256 MiB, starts block on it and rng beside it, boots a guest, and prints
    /// the guest's view: size, serial, file system, throughput, random numbers. Then a second guest has a screen by gpu, and the picture on it
    /// is saved in target/demo/screen.png; a third has a keyboard by input. A host without uinput runs that part in User-Mode Linux, which
    /// takes two minutes to build the first time. All else takes less than two minutes after the build. Processors are emulated, so that it works on every machine; the throughput is that of the emulated guest, not of the
    /// back-end (see `cargo xtask bench`).
    ///
    /// A part that this host cannot show is left out, and the reason printed. The exit status is 0 if nothing failed.
    Demo,
    /// The part of the demo that runs in User-Mode Linux
    #[command(hide = true)]
    DemoInput {
        /// Milliseconds since the demo began
        elapsed: u64,
    },
    /// Run every check: format, lints, licences, unit tests, conformance suites, guests
    ///
    /// Goes on after a failure, so that all failures are seen. The last line is `N passed, N failed, N skipped`; fmt, clippy and the like count as one each.
    /// The exit status is 0 if nothing failed. The logs of the guests stay in target/guest/logs.
    ///
    /// A test that cannot run here counts as skipped, and its reason is listed; where CI is set in the environment, only the reasons on a
    /// short list are accepted. What the test programs write stays in target/test-logs.
    Test(test::Options),
    /// Say how much of the product's code the tests execute
    ///
    /// Builds all with counters, runs the unit tests and the suites that need no guest, those of input in User-Mode Linux where the host has
    /// no uinput, and prints a table: lines, functions and regions of each crate. The exit status is 1 if a test fails, or less than 90 % of
    /// the lines of a crate are executed. Takes LLVM's tools of the compiler's version.
    Coverage(coverage::Options),
    /// Measure a device beside other back-ends
    ///
    /// Builds the release binaries and runs the benchmark program. `cargo xtask bench block --help` lists its options.
    Bench {
        /// What to measure, `block` or `gpu`, and options for it
        #[arg(
            required = true,
            num_args = 1..,
            trailing_var_arg = true,
            allow_hyphen_values = true
        )]
        arguments: Vec<String>,
    },
    /// Run all devices for long, under load and with faults, and see that nothing is lost
    ///
    /// Builds the release binaries and runs the soak program: every device carries load whose results are verified, while rings are stopped,
    /// memory changes, front-ends and displays go away, and processes are killed. Prints the progress, and at the end what was carried, which
    /// faults were injected, and what was lost. The exit status is 1 if anything was. A host without uinput runs input in User-Mode Linux.
    Soak(SoakOptions),
    /// Look for inputs of guests, drivers and front-ends that a device or the core does wrong with
    ///
    /// Builds the fuzz targets, and runs libFuzzer on each, as many at a time as there are processors. Prints what was executed, how much of
    /// the program that reached, and what was found: each finding with the file that has the input, and the command that plays it again. The
    /// exit status is 1 if anything was. What is learnt is kept in target/fuzz/corpus.
    Fuzz(fuzz::Options),
    /// Check that no files of a crate import each other in a circle
    ///
    /// In `common` no module may import one above it either. The order of the modules, and what counts as an import, is in
    /// xtask/src/modules.rs. The exit status is 1 if anything was found. `test` runs this check too.
    Modules,
    /// Build the release binaries and install them, with descriptors, manual pages, completions and systemd units
    ///
    /// Programs go to PREFIX/bin, the rest to the conventional places below PREFIX. Each file that is
    /// written is named; one of the same name is replaced. Nothing is started or enabled. `cargo xtask deb` makes a package instead, which
    /// can be removed again.
    Install(install::Options),
    /// Make a Debian package of what `install` installs
    ///
    /// Its prefix is /usr.
    Deb {
        /// File or directory for the package [default: target/debian]
        #[arg(long, value_name = "PATH")]
        output: Option<PathBuf>,
    },
}

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return refuse(&error),
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

/// Prints the help that was asked for, or one line that says what is wrong with the arguments.
fn refuse(error: &clap::Error) -> ExitCode {
    if error.exit_code() == 0 || error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
    {
        error.exit();
    }
    let text = error.render().to_string();
    let message = text.split("\n\n").next().unwrap_or_default();
    let words: Vec<_> = message.split_whitespace().collect();
    eprintln!("{}; see --help", words.join(" "));
    ExitCode::from(2)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::workspace::workspace;

    #[test]
    fn the_lints_of_each_crate_are_those_of_the_workspace() {
        let root = fs::read_to_string(workspace().join("Cargo.toml")).unwrap();
        let members = root
            .lines()
            .find_map(|line| line.strip_prefix("members = "));
        let members: Vec<String> = serde_json::from_str(members.unwrap()).unwrap();
        for member in members {
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
