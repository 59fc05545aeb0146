// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `cargo xtask test`: every check, one stage after the other.

use std::io::{BufRead, BufReader};
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use crate::{cargo, fuzz, target_directory, tool, workspace};
use vhost_device_tests::guest::kernel::Flavour;
use vhost_device_tests::guest::libvirt;

use crate::packages::{self, DISPLAY, GUEST, IMAGES, LIBVIRT, PACKAGING, THREE_D, USER_MODE_LINUX};
use crate::progress::Progress;

/// How long each fuzz target runs.
const FUZZ_SECONDS: NonZeroU32 = NonZeroU32::new(20).unwrap();

/// How a stage went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Count {
    passed: u64,
    failed: u64,
}

impl Count {
    fn of(success: bool) -> Self {
        Self {
            passed: success.into(),
            failed: (!success).into(),
        }
    }

    fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

/// The stages that have ended.
struct Stages<'a> {
    progress: &'a Progress,
    ended: Vec<(&'static str, Count, Duration)>,
    /// The names of all that failed.
    failures: Vec<String>,
}

impl Stages<'_> {
    fn run(
        &mut self,
        name: &'static str,
        stage: impl FnOnce(&Progress, &mut Vec<String>) -> Count,
    ) -> bool {
        let start = Instant::now();
        let count = stage(self.progress, &mut self.failures);
        if count.failed > 0 {
            self.progress.step(&format!("{name} FAILED"));
        }
        self.ended.push((name, count, start.elapsed()));
        count.failed == 0
    }

    /// A stage that one quiet command is. Returns whether it went well.
    fn check(&mut self, name: &'static str, command: &mut Command) -> bool {
        self.run(name, |progress, failures| {
            let result = progress.run(name, command);
            if let Err(message) = &result {
                eprintln!("{message}");
                failures.push(name.into());
            }
            Count::of(result.is_ok())
        })
    }

    /// A stage of tests, whose output is shown.
    fn tests(&mut self, name: &'static str, command: &mut Command) {
        self.run(name, |progress, failures| {
            progress.step(name);
            tests(command, failures).unwrap_or_else(|error| {
                eprintln!("{error}");
                failures.push(name.into());
                Count::of(false)
            })
        });
    }

    /// Prints the stages and their sum, which is the last line.
    fn close(&self) -> Count {
        let mut sum = Count::default();
        println!();
        for failure in &self.failures {
            println!("FAILED: {failure}");
        }
        for (name, count, time) in &self.ended {
            let Count { passed, failed } = count;
            let time = time.as_secs_f64();
            println!("{name:20} {passed:5} passed {failed:5} failed {time:8.1} s");
            sum.add(*count);
        }
        println!("{} passed, {} failed", sum.passed, sum.failed);
        sum
    }
}

pub fn run(progress: &Progress, no_guest: bool) -> Result<ExitCode, String> {
    if !no_guest {
        packages::install(
            progress,
            &[GUEST, DISPLAY, IMAGES, PACKAGING, USER_MODE_LINUX].concat(),
        )?;
        // Not with the others, because QEMU's suite has a newer Mesa and libvirt than the release.
        packages::install(progress, THREE_D)?;
        // Where libvirt can not run, its tests are skipped.
        if libvirt::obstacle().is_none() {
            packages::install(progress, LIBVIRT)?;
        }
        packages::kernel(progress, Flavour::Cloud)?;
        packages::kernel(progress, Flavour::Plain)?;
        packages::user_mode_linux(progress)?;
    }
    let mut stages = Stages {
        progress,
        ended: Vec::new(),
        failures: Vec::new(),
    };
    stages.check("fmt", &mut cargo(["fmt", "--all", "--check"]));
    let clippy = [
        "clippy",
        "--workspace",
        "--all-targets",
        "--",
        "--deny",
        "warnings",
    ];
    stages.check("clippy", &mut cargo(clippy));
    deny(&mut stages);
    // The suites run the binaries, which cargo builds by itself only for tests of their own package.
    stages.check("build", &mut cargo(["build", "--workspace", "--bins"]));
    stages.tests(
        "tests",
        &mut cargo(["test", "--workspace", "--no-fail-fast"]),
    );
    // The suites of rings and soak have both formats; these are the same for both.
    let mut packed = cargo(["test", "--package", "vhost-device-tests", "--no-fail-fast"]);
    packed.env("VHOST_DEVICE_RING", "packed");
    for suite in ["block", "rng", "gpu", "dirty_log", "protocol", "sandbox"] {
        packed.args(["--test", suite]);
    }
    stages.tests("on packed rings", &mut packed);
    fuzz(&mut stages);
    if !no_guest {
        // Builds the release binaries, installs our package where it can, and removes it.
        let mut install = cargo(["test", "--package", "vhost-device-tests", "--no-fail-fast"]);
        install.args(["--test", "install", "--", "--ignored"]);
        stages.tests("install", &mut install);
        let mut guests = cargo(["test", "--package", "vhost-device-tests", "--no-fail-fast"]);
        // A guest keeps a processor busy, so no more of them at a time than small machines have.
        guests.args(["--test", "guest_*", "--", "--ignored", "--test-threads=2"]);
        stages.tests("guests", &mut guests);
        user_mode_linux(&mut stages);
    }
    Ok(match stages.close().failed {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}

/// Fuzzes each target for a short time. Each counts as one.
fn fuzz(stages: &mut Stages) {
    stages.run("fuzz", |progress, failures| {
        let outcomes = match fuzz::test(progress, FUZZ_SECONDS) {
            Ok(outcomes) => outcomes,
            Err(message) => {
                eprintln!("{message}");
                failures.push("the fuzz targets can not be run".into());
                return Count::of(false);
            }
        };
        let mut sum = Count::default();
        for outcome in outcomes {
            sum.add(Count::of(outcome.finding.is_none()));
            failures.extend(outcome.finding);
        }
        sum
    });
}

/// Runs the tests that need devices which this host's kernel may not have, in a kernel that has them. It is built if it is not kept.
fn user_mode_linux(stages: &mut Stages) {
    let program = target_directory().join("debug/user-mode-linux");
    if !stages.check("User-Mode Linux", &mut Command::new(&program)) {
        return;
    }
    // Cargo runs the tests by way of it.
    let runner = format!("target.'cfg(all())'.runner = [{program:?}]");
    let tests = |suite: &str| {
        let mut tests = cargo(["test", "--package", "vhost-device-tests", "--no-fail-fast"]);
        tests.args(["--config", &runner, "--test", suite]);
        // It has one processor.
        tests.args(["--", "--ignored", "--test-threads=1"]);
        tests
    };
    stages.tests("tests in it", &mut tests("uml_*"));
    // QEMU decides for its guests.
    let mut packed = tests("uml_input");
    packed.env("VHOST_DEVICE_RING", "packed");
    stages.tests("on packed rings", packed.args(["--skip", "guest::"]));
}

/// Checks the licences and sources of the dependencies, and, where the list of these can be had, known faults in them.
fn deny(stages: &mut Stages) {
    let mut program = PathBuf::new();
    let is_there = stages.run("cargo-deny", |progress, failures| {
        match tool(progress, "cargo-deny", "^0.20") {
            Ok(path) => {
                program = path;
                Count::default()
            }
            Err(message) => {
                eprintln!("{message}");
                failures.push("cargo-deny can not be installed".into());
                Count::of(false)
            }
        }
    });
    if !is_there {
        return;
    }
    let check = |what: &[&str]| {
        let mut command = Command::new(&program);
        command.args(["--workspace", "check"]).args(what);
        command.current_dir(workspace());
        command
    };
    stages.check("deny", &mut check(&["licenses", "bans", "sources"]));
    stages.run("advisories", |progress, failures| {
        match progress.run("advisories", &mut check(&["advisories"])) {
            Ok(()) => Count::of(true),
            Err(message) if message.contains("failed to fetch advisory database") => {
                progress.step("  skipped: their database can not be fetched");
                Count::default()
            }
            Err(message) => {
                eprintln!("{message}");
                failures.push("advisories".into());
                Count::of(false)
            }
        }
    });
}

/// Runs tests, passes their output on, counts, and adds the names of those that failed.
fn tests(command: &mut Command, failures: &mut Vec<String>) -> Result<Count, String> {
    let error = |error| format!("cannot run the tests: {error}");
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(error)?;
    let mut sum = Count::default();
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).split(b'\n') {
            let line = line.map_err(error)?;
            let line = String::from_utf8_lossy(&line);
            println!("{line}");
            sum.add(result_line(&line).unwrap_or_default());
            failures.extend(failed_test(&line).map(str::to_owned));
        }
    }
    // Tests that can not be built, or that end in a crash, have no line of their own.
    if !child.wait().map_err(error)?.success() && sum.failed == 0 {
        sum.failed = 1;
        failures.push("tests that could not be built, or crashed".into());
    }
    Ok(sum)
}

/// The numbers in a line like `test result: ok. 3 passed; 0 failed; 1 ignored; …`.
fn result_line(line: &str) -> Option<Count> {
    let (_, numbers) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let number = |name: &str| {
        let mut parts = numbers.split("; ");
        parts.find_map(|part| part.strip_suffix(name)?.trim().parse().ok())
    };
    Some(Count {
        passed: number("passed")?,
        failed: number("failed")?,
    })
}

/// The name in a line like `test rings::are_round ... FAILED`.
fn failed_test(line: &str) -> Option<&str> {
    line.strip_prefix("test ")?.strip_suffix(" ... FAILED")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_read_from_the_result_line() {
        let line = "test result: FAILED. 6 passed; 5 failed; 1 ignored; 0 measured; 2 filtered out; finished in 85.82s";
        let expected = Count {
            passed: 6,
            failed: 5,
        };
        assert_eq!(result_line(line), Some(expected));
        assert_eq!(result_line("test a ... ok"), None);
    }

    #[test]
    fn failed_tests_are_named() {
        assert_eq!(failed_test("test a::b ... FAILED"), Some("a::b"));
        assert_eq!(failed_test("test a::b ... ok"), None);
        assert_eq!(failed_test("test result: FAILED. 0 passed"), None);
    }

    #[test]
    fn tests_that_can_not_be_built_count_as_a_failure() {
        let mut failures = Vec::new();
        let count = tests(&mut Command::new("false"), &mut failures).unwrap();
        assert_eq!(count, Count::of(false));
        assert_eq!(failures.len(), 1);
    }
}
