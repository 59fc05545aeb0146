// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `cargo xtask coverage`: measures how much of the product's code the tests execute, with the counters of the compiler and LLVM's tools.
//!
//! The suites run the real binaries, which are killed, and which cannot open files in their sandbox. So the counters are in a file that is
//! mapped before `main` (`%c` of LLVM, which needs relocatable counters), and nothing is written at the end. The sandbox is the same as in
//! other builds. Processes of the same executable share a file (`%m`).

mod counts;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use clap::Args;
use serde_json::Value;
use vhost_device_tests::bench::summary::date;

use crate::demo;
use crate::packages::{self, USER_MODE_LINUX};
use crate::progress::Progress;
use crate::workspace::{cargo, target_directory, workspace};
use counts::{Count, Counts, Coverage};

/// Lower limit for the executed lines of each crate, in percent.
const LINES: f64 = 90.0;
/// Folders of crates that are not counted, because they are not a part of the product.
const NOT_COUNTED: [&str; 3] = ["fuzz", "tests", "xtask"];
/// Prefixes of suites that are not run, because they boot guests, measure, take long, or install.
const NOT_RUN: [&str; 5] = ["bench", "guest_", "install", "soak", "uml_"];
/// This package takes long to build, and is not needed.
const EXCLUDE_XTASK: [&str; 2] = ["--exclude", "xtask"];
/// The profile of cargo, which keeps these builds apart from others.
const PROFILE: &str = "coverage";
/// The document with the table.
const DOCUMENT: &str = "docs/coverage.md";

#[derive(Args, Debug)]
pub struct Options {
    /// Also write the table to docs/coverage.md
    #[arg(long)]
    write: bool,

    /// Also print the lines that were not executed
    #[arg(long)]
    missing: bool,
}

pub fn run(progress: &Progress, options: &Options) -> Result<ExitCode, String> {
    let tools = Tools::find(progress)?;
    let directory = target_directory().join(PROFILE).join("counters");
    let fail = |error| format!("cannot prepare {}: {error}", directory.display());
    let _ = fs::remove_dir_all(&directory);
    fs::create_dir_all(directory.join("raw")).map_err(fail)?;
    let wrapper = directory.join("rustc");
    write_wrapper(&wrapper).map_err(fail)?;
    let build = Build {
        wrapper,
        profiles: directory.join("raw"),
    };

    progress.step("Building with counters");
    let mut objects = executables(
        build
            .command("build")
            .args(["--workspace", "--bins"])
            .args(EXCLUDE_XTASK),
    )?;
    objects.extend(executables(build.unit_tests().arg("--no-run"))?);

    let mut failures = Vec::new();
    let mut check = |what, command: &mut Command| {
        failures.extend(progress.run(what, command).err());
    };
    check("Unit tests", &mut build.unit_tests());
    check("Suites", &mut build.suites()?);
    input(progress, &build, &mut check)?;
    for failure in &failures {
        eprintln!("{failure}");
    }

    let coverage = tools.read(&build.profiles, &objects)?;
    let table = table(&coverage.crates);
    println!("\n{table}");
    if options.missing {
        print_missing(&coverage);
    }
    if options.write {
        let path = workspace().join(DOCUMENT);
        let error = |error| format!("cannot write {}: {error}", path.display());
        fs::write(&path, document(&table, &tools.compiler)).map_err(error)?;
    }
    let low = |(name, counts): (&String, &Counts)| {
        let percent = counts.lines.percent();
        (percent < LINES).then(|| {
            format!(
                "{name}: {percent:.1} % of the lines were executed, which is less than {LINES} %"
            )
        })
    };
    let low: Vec<String> = coverage.crates.iter().filter_map(low).collect();
    low.iter().for_each(|line| println!("FAILED: {line}"));
    if !failures.is_empty() {
        println!("FAILED: some tests, so the numbers can be too low");
    }
    Ok(match low.is_empty() && failures.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

/// Runs the suite of input, which needs uinput, in User-Mode Linux if the host does not have uinput.
fn input(
    progress: &Progress,
    build: &Build,
    check: &mut impl FnMut(&'static str, &mut Command),
) -> Result<(), String> {
    let mut tests = build.tests();
    tests.args(["--package", "vhost-device-tests", "--test", "uml_input"]);
    if !demo::input::has_uinput() {
        packages::install(progress, USER_MODE_LINUX)?;
        packages::user_mode_linux(progress)?;
        let program = target_directory().join(PROFILE).join("user-mode-linux");
        progress.run("User-Mode Linux", build.count(&mut Command::new(&program)))?;
        let runner = format!("target.'cfg(all())'.runner = [{program:?}, \"--deadline=3600\"]");
        tests.args(["--config", &runner]);
    }
    // Guests in QEMU choose the ring format themselves.
    tests.args(["--", "--ignored", "--test-threads=1", "--skip", "guest::"]);
    check("Tests of input", &mut tests);
    Ok(())
}

/// Builds with counters.
struct Build {
    /// A script that runs the compiler with additional options.
    wrapper: PathBuf,
    /// The directory for the counters of processes.
    profiles: PathBuf,
}

impl Build {
    fn command(&self, command: &str) -> Command {
        let mut cargo = cargo([command, "--profile", PROFILE]);
        self.count(&mut cargo)
            .env("RUSTC_WORKSPACE_WRAPPER", &self.wrapper);
        cargo
    }

    /// Makes a program and its children keep their counters in [`Self::profiles`]. Otherwise they would write them to the current directory
    /// at exit, which the sandbox does not allow.
    fn count<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        command.env("LLVM_PROFILE_FILE", self.profiles.join("%m%c.profraw"))
    }

    fn tests(&self) -> Command {
        let mut tests = self.command("test");
        tests.arg("--no-fail-fast");
        tests
    }

    /// Returns the command for the unit tests of the product.
    fn unit_tests(&self) -> Command {
        let mut tests = self.tests();
        tests
            .args(["--workspace", "--lib", "--bins", "--tests"])
            .args(EXCLUDE_XTASK);
        for package in [
            "vhost-device-tests",
            "vhost-device-fuzz",
            "stand-in-renderer",
        ] {
            tests.args(["--exclude", package]);
        }
        tests
    }

    /// Returns the command for the suites.
    fn suites(&self) -> Result<Command, String> {
        let mut tests = self.tests();
        tests.args(["--package", "vhost-device-tests"]);
        for suite in suites()? {
            tests.args(["--test", &suite]);
        }
        Ok(tests)
    }
}

/// Returns the names of the suites that are run: all except those in [`NOT_RUN`].
fn suites() -> Result<Vec<String>, String> {
    let directory = workspace().join("tests/tests");
    let fail = |error| format!("cannot read {}: {error}", directory.display());
    let mut suites = Vec::new();
    for entry in fs::read_dir(&directory).map_err(fail)? {
        let path = entry.map_err(fail)?.path();
        let name = path
            .file_stem()
            .and_then(|name| name.to_str())
            .unwrap_or_default();
        let is_file = path.extension().is_some_and(|extension| extension == "rs");
        let is_suite = is_file || path.join("main.rs").is_file();
        if is_suite && !NOT_RUN.iter().any(|not_run| name.starts_with(not_run)) {
            suites.push(name.to_owned());
        }
    }
    Ok(suites)
}

/// Writes the script that runs the compiler for the crates of the workspace. Dependencies need no counters.
fn write_wrapper(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let script = "#!/bin/sh\n\
        exec \"$@\" -C instrument-coverage -C llvm-args=-runtime-counter-relocation\n";
    fs::write(path, script)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
}

/// Runs a build. Returns the executables of the product.
fn executables(build: &mut Command) -> Result<Vec<PathBuf>, String> {
    let output = build
        .arg("--message-format=json-render-diagnostics")
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| format!("cannot run cargo: {error}"))?;
    if !output.status.success() {
        return Err("cannot build with counters".into());
    }
    let messages = String::from_utf8_lossy(&output.stdout);
    let messages = messages
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok());
    Ok(messages
        .filter_map(|message: Value| {
            let text = |name: &str| message.get(name).and_then(Value::as_str);
            let manifest = Path::new(text("manifest_path")?)
                .strip_prefix(workspace())
                .ok()?;
            let is_product = !NOT_COUNTED
                .iter()
                .any(|folder| manifest.starts_with(folder));
            is_product.then_some(text("executable")?.into())
        })
        .collect())
}

/// LLVM's tools. They must have the same version as the compiler's LLVM.
struct Tools {
    profdata: PathBuf,
    cov: PathBuf,
    /// The version of the compiler.
    compiler: String,
}

impl Tools {
    /// Finds the tools of the toolchain (`rustup component add llvm-tools`), or Debian's of the same version.
    fn find(progress: &Progress) -> Result<Self, String> {
        let ask = |arguments: &[&str]| {
            let output = Command::new("rustc").args(arguments).output();
            let output = output.map_err(|error| format!("cannot run rustc: {error}"))?;
            Ok::<_, String>(String::from_utf8_lossy(&output.stdout).into_owned())
        };
        let version = ask(&["-vV"])?;
        let field = |name: &str| version.lines().find_map(|line| line.strip_prefix(name));
        let (Some(host), Some(llvm)) = (field("host: "), field("LLVM version: ")) else {
            return Err("rustc -vV does not print its host and the version of LLVM".into());
        };
        let mut tools = Path::new(ask(&["--print", "sysroot"])?.trim()).join("lib/rustlib");
        tools.extend([host, "bin"]);
        if !tools.join("llvm-profdata").is_file() {
            let major = llvm.split('.').next().unwrap_or_default();
            // The names are needed until the program ends.
            let program = format!("llvm-profdata-{major}").leak();
            let package: &str = format!("llvm-{major}").leak();
            packages::install(progress, &[(program, package)])?;
            tools = Path::new("/usr/lib").join(package).join("bin");
        }
        Ok(Self {
            profdata: tools.join("llvm-profdata"),
            cov: tools.join("llvm-cov"),
            compiler: version.lines().next().unwrap_or_default().into(),
        })
    }

    /// Merges the counters and reads the result.
    fn read(&self, profiles: &Path, objects: &[PathBuf]) -> Result<Coverage, String> {
        let merged = profiles.with_file_name("merged.profdata");
        let mut merge = Command::new(&self.profdata);
        merge
            .args(["merge", "--sparse", "--failure-mode=all", "--output"])
            .arg(&merged);
        output(merge.arg(profiles))?;
        let mut export = Command::new(&self.cov);
        export.args(["export", "--instr-profile"]).arg(&merged);
        for object in objects {
            export.arg("--object").arg(object);
        }
        let export = serde_json::from_slice(&output(&mut export)?);
        let export =
            export.map_err(|error| format!("cannot read the output of llvm-cov: {error}"))?;
        let root = workspace();
        let mut coverage = counts::read(&export, &root, |file| first_test_line(&root, file));
        // Executables contain code of crates that are not counted.
        coverage
            .crates
            .retain(|name, _| !NOT_COUNTED.contains(&name.as_str()));
        coverage.missing.retain(|file, _| {
            !NOT_COUNTED
                .iter()
                .any(|name| Path::new(file).starts_with(name))
        });
        Ok(coverage)
    }
}

/// Runs a program. Returns its output if it succeeds.
fn output(command: &mut Command) -> Result<Vec<u8>, String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command
        .output()
        .map_err(|error| format!("cannot run {name}: {error}"))?;
    match output.status.success() {
        true => Ok(output.stdout),
        false => Err(format!(
            "{name} failed: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        )),
    }
}

/// Returns the first line of the tests in a file. They are at its end, or in a file of their own.
fn first_test_line(root: &Path, file: &str) -> u64 {
    if file.ends_with("/tests.rs") || file.contains("/tests/") {
        return 0;
    }
    let text = fs::read_to_string(root.join(file)).unwrap_or_default();
    let mut lines = (1..)
        .zip(text.lines())
        .skip_while(|(_, line)| *line != "#[cfg(test)]");
    match (lines.next(), lines.next()) {
        (Some((number, _)), Some((_, module))) if module.starts_with("mod ") => number,
        _ => u64::MAX,
    }
}

/// Formats the counts of each crate, and their sum.
fn table(crates: &BTreeMap<String, Counts>) -> String {
    let cell = |count: Count| format!("{:5.1} % of {:5}", count.percent(), count.all);
    let row = |name: &str, counts: &Counts| {
        let Counts {
            lines,
            functions,
            regions,
        } = *counts;
        format!(
            "| {name:20} | {} | {} | {} |\n",
            cell(lines),
            cell(functions),
            cell(regions)
        )
    };
    let mut table = format!(
        "| {:20} | {:16} | {:16} | {:16} |\n",
        "crate", "lines", "functions", "regions"
    );
    table += "|---|---|---|---|\n";
    table.extend(crates.iter().map(|(name, counts)| row(name, counts)));
    let sum = crates
        .values()
        .copied()
        .fold(Counts::default(), Counts::sum);
    table + &row("all", &sum)
}

/// Prints the lines of each file that were not executed, as ranges.
fn print_missing(coverage: &Coverage) {
    for (file, lines) in &coverage.missing {
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for line in lines {
            match ranges.last_mut() {
                Some((_, last)) if *last + 1 == *line => *last = *line,
                _ => ranges.push((*line, *line)),
            }
        }
        let ranges: Vec<String> = ranges
            .iter()
            .map(|(first, last)| match first == last {
                true => first.to_string(),
                false => format!("{first}-{last}"),
            })
            .collect();
        if !ranges.is_empty() {
            println!("{file}: {}", ranges.join(" "));
        }
    }
}

/// Returns the text of the document.
fn document(table: &str, compiler: &str) -> String {
    let date = date();
    format!("\
<!-- SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause -->
# What the tests execute

`cargo xtask coverage --write` wrote this page on {date}, with {compiler}. `--missing` prints the lines that no test executes.

{table}
Each crate is listed by its folder. The command fails if less than {LINES} % of the lines of a crate are executed.

- **Method**: everything is built with `-C instrument-coverage`, and LLVM's tools count. The suites run the real binaries in their sandbox.
  The binaries are killed and cannot open files, so their counters are in a file that is mapped before `main`
  (`-runtime-counter-relocation`, and `%c` in `LLVM_PROFILE_FILE`). The sandbox is the same as in other builds.
- **Run**: the unit tests, and all suites in `tests/tests` that do not boot guests, measure or install; for input also `uml_input`, in
  User-Mode Linux if the host does not have uinput.
- **Not counted**: test modules; `fuzz/`, `tests/` and `xtask/`, which are not a part of the product; dependencies.
- **Not run**: guests in QEMU, benchmarks, long runs, fuzzing, and the suites other than those of rings on packed rings. They execute more.
- A generic function counts once: a line counts as executed if any instance executes it.
")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_are_a_module_at_the_end_of_a_file_or_a_file() {
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            fs::write(directory.path().join(name), text).unwrap();
            first_test_line(directory.path(), name)
        };
        assert_eq!(
            file("a.rs", "fn a() {}\n\n#[cfg(test)]\nmod tests {\n}\n"),
            3
        );
        assert_eq!(file("b.rs", "#[cfg(test)]\nuse a;\nfn b() {}\n"), u64::MAX);
        assert_eq!(first_test_line(directory.path(), "c/tests.rs"), 0);
    }

    #[test]
    fn suites_that_are_a_file_or_a_folder_are_run() {
        let suites = suites().unwrap();
        let has = |name: &str| suites.iter().any(|suite| suite == name);
        assert!(has("worker") && has("block"), "{suites:?}");
        assert!(!has("soak") && !has("guest_block"), "{suites:?}");
    }

    #[test]
    fn the_table_has_a_row_for_each_crate_and_their_sum() {
        let half = Count { covered: 1, all: 2 };
        let counts = Counts {
            lines: half,
            ..Counts::default()
        };
        let table = table(&[("one".into(), counts), ("two".into(), counts)].into());
        let rows: Vec<&str> = table.lines().skip(2).collect();
        assert!(
            rows[0].starts_with("| one                  |  50.0 % of     2 | 100.0 % of     0 |"),
            "{table}"
        );
        assert!(
            rows[2].starts_with("| all                  |  50.0 % of     4 |"),
            "{table}"
        );
    }
}
