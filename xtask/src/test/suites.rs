// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The test programs of the workspace: builds them once, and lists how to run each.
//!
//! They run without cargo, which would build again for each selection of packages, and would run them one after the other.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use super::jobs::{Job, Load};
use super::report::NO_GUEST;
use crate::progress::Progress;
use crate::workspace::cargo;

/// Suites that measure time or processor use. Other programs would affect the result.
const ALONE: &[&str] = &["bench", "program", "rng", "worker"];

/// Suites that keep processors busy.
const HEAVY: &[&str] = &["ring", "soak"];

/// Suites that run a second time on packed rings. The suites ring and soak always use both formats.
const PACKED: &[&str] = &[
    "block",
    "console",
    "rng",
    "gpu",
    "scsi",
    "sound",
    "vsock",
    "dirty_log",
    "protocol",
    "sandbox",
];

/// The variable that selects packed rings.
const RING: (&str, &str) = ("VHOST_DEVICE_RING", "packed");

/// The variables that `--long` sets for tests, and for tests in guests.
const LONG: &[(&str, &str)] = &[
    ("VHOST_DEVICE_CONNECTS", "1000000"),
    ("VHOST_DEVICE_KILLS", "200"),
    ("VHOST_DEVICE_MIGRATIONS", "20"),
];
const LONG_IN_GUESTS: &[(&str, &str)] = &[
    ("VHOST_DEVICE_KILLS", "20"),
    ("VHOST_DEVICE_MIGRATIONS", "10"),
    ("VHOST_DEVICE_TRANSFER_MIB", "1024"),
    ("VHOST_DEVICE_VERIFY_SECONDS", "300"),
];

/// A program with tests.
#[derive(Debug, PartialEq, Eq)]
struct Suite {
    /// The name of the suite, or of the library or program with the tests.
    name: String,
    /// The directory in which cargo would run it.
    directory: PathBuf,
    program: PathBuf,
}

/// All test programs.
pub struct Suites {
    all: Vec<Suite>,
    long: bool,
}

impl Suites {
    /// Builds all programs and tests.
    pub fn build(progress: &Progress, long: bool) -> Result<Self, String> {
        let build = ["build", "--workspace", "--all-targets"];
        progress.run("build", &mut cargo(build))?;
        // Everything is built. This lists the results.
        let mut list = cargo(build);
        list.args(["--message-format=json", "--quiet"])
            .stderr(Stdio::inherit());
        let output = list
            .output()
            .map_err(|error| format!("cannot run cargo: {error}"))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let mut all: Vec<Suite> = text.lines().filter_map(suite).collect();
        all.sort_by(|one, other| one.name.cmp(&other.name));
        match all.as_slice() {
            [] => Err("cargo built no tests".into()),
            _ => Ok(Self { all, long }),
        }
    }

    /// Returns the jobs that need no guest: each suite, and some again on packed rings.
    pub fn jobs(&self) -> Vec<Job> {
        let mut jobs = Vec::new();
        for suite in &self.all {
            let load = suite.load();
            jobs.push(suite.job(load, self.long.then_some(LONG)));
            if PACKED.contains(&suite.name.as_str()) {
                let mut job = suite.job(load, self.long.then_some(LONG));
                job.name.push_str(" on packed rings");
                job.command.env(RING.0, RING.1);
                jobs.push(job);
            }
        }
        // Heavy jobs first, and those that run alone last.
        jobs.sort_by_key(|job| match job.load {
            Load::Heavy => 0,
            Load::Light => 1,
            Load::Alone => 2,
        });
        jobs
    }

    /// Returns the tests of the installation. They run one after the other, because they build and install the same files.
    pub fn installation(&self) -> Vec<Job> {
        let suites = self.all.iter().filter(|suite| suite.name == "install");
        suites
            .map(|suite| {
                let mut job = suite.job(Load::Alone, None);
                job.command.arg("--ignored");
                job
            })
            .collect()
    }

    /// Returns the suites in User-Mode Linux, and each test with a guest in QEMU as a job. Each needs about one processor.
    pub fn guests(&self, user_mode_linux: &Path) -> Result<Vec<Job>, String> {
        let mut jobs = Vec::new();
        for suite in &self.all {
            if suite.name.starts_with("uml_") {
                let run = || {
                    let mut command = Command::new(user_mode_linux);
                    command.arg(&suite.program).current_dir(&suite.directory);
                    command.args(["--ignored", "--test-threads=1"]);
                    Job {
                        name: suite.name.clone(),
                        command,
                        load: Load::Heavy,
                    }
                };
                jobs.push(run());
                if suite.name == "uml_input" {
                    let mut packed = run();
                    packed.name.push_str(" on packed rings");
                    // Guests in QEMU choose the ring format themselves.
                    packed
                        .command
                        .env(RING.0, RING.1)
                        .args(["--skip", "guest::"]);
                    jobs.push(packed);
                }
            }
        }
        for suite in &self.all {
            if !suite.name.starts_with("guest_") {
                continue;
            }
            for test in suite.tests()? {
                let mut job = suite.job(Load::Heavy, self.long.then_some(LONG_IN_GUESTS));
                job.name = format!("{}: {test}", suite.name);
                job.command.args(["--ignored", "--exact", &test]);
                jobs.push(job);
            }
        }
        Ok(jobs)
    }

    /// Returns the reason for the skip of each suite that needs a guest.
    pub fn without_guests(&self) -> Vec<String> {
        let is_left_out = |suite: &&Suite| {
            let name = &suite.name;
            name == "install" || name.starts_with("guest_") || name.starts_with("uml_")
        };
        let suites = self.all.iter().filter(is_left_out);
        suites.map(|_| NO_GUEST.to_owned()).collect()
    }
}

impl Suite {
    fn load(&self) -> Load {
        let is_in = |names: &[&str]| names.contains(&self.name.as_str());
        match (is_in(ALONE), is_in(HEAVY)) {
            (true, _) => Load::Alone,
            (_, true) => Load::Heavy,
            _ => Load::Light,
        }
    }

    fn job(&self, load: Load, environment: Option<&[(&str, &str)]>) -> Job {
        let mut command = Command::new(&self.program);
        command.current_dir(&self.directory);
        for (name, value) in environment.unwrap_or_default() {
            // The environment of the user has priority.
            if std::env::var_os(name).is_none() {
                command.env(name, value);
            }
        }
        Job {
            name: self.name.clone(),
            command,
            load,
        }
    }

    /// Returns the names of the ignored tests.
    fn tests(&self) -> Result<Vec<String>, String> {
        let mut list = self.job(Load::Light, None).command;
        let output = list.args(["--list", "--ignored"]).output();
        let output = output.map_err(|error| format!("cannot run {}: {error}", self.name))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let names = text.lines().filter_map(|line| line.strip_suffix(": test"));
        Ok(names.map(str::to_owned).collect())
    }
}

/// Returns the suite in a message of cargo about a build result.
fn suite(line: &str) -> Option<Suite> {
    let message: Value = serde_json::from_str(line).ok()?;
    let text = |place| message.pointer(place).and_then(Value::as_str);
    let is_test = message.pointer("/profile/test")?.as_bool()?;
    if text("/reason")? != "compiler-artifact" || !is_test {
        return None;
    }
    let mut name = text("/target/name")?.to_owned();
    match text("/target/kind/0")? {
        "test" => {}
        "bin" => name.push_str(" (program)"),
        _ => name.push_str(" (library)"),
    }
    Some(Suite {
        name,
        directory: Path::new(text("/manifest_path")?).parent()?.into(),
        program: text("/executable")?.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_programs_are_found_in_the_messages_of_cargo() {
        let line = r#"{"reason":"compiler-artifact","package_id":"x","manifest_path":"/w/tests/Cargo.toml","target":{"kind":["test"],"name":"ring"},"profile":{"test":true},"executable":"/w/target/debug/deps/ring-1"}"#;
        let expected = Suite {
            name: "ring".into(),
            directory: "/w/tests".into(),
            program: "/w/target/debug/deps/ring-1".into(),
        };
        assert_eq!(suite(line), Some(expected));
        assert_eq!(
            suite(&line.replace("\"test\":true", "\"test\":false")),
            None
        );
        assert_eq!(suite(r#"{"reason":"build-finished","success":true}"#), None);
        assert_eq!(suite("   Compiling ring"), None);
    }

    #[test]
    fn each_listed_suite_exists() {
        let directory = crate::workspace::workspace().join("tests/tests");
        for suite in [ALONE, HEAVY, PACKED].concat() {
            let roots = [format!("{suite}.rs"), format!("{suite}/main.rs")];
            let is_there = roots.iter().any(|root| directory.join(root).is_file());
            assert!(is_there, "{suite}");
        }
    }
}
