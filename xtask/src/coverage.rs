// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `cargo xtask coverage`: how much of the product's code the tests execute, by the compiler's own counters and LLVM's tools.
//!
//! The suites run the real binaries, which are killed, and may open no file once they are in their sandbox. So their counters are in a
//! file from the start: it is mapped before `main`, which takes relocated counters (`%c` of LLVM), and nothing is written at the end. The
//! sandbox needs no hole for that. Processes of one executable share a file (`%m`).

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

/// Percentage of the lines of each crate that are executed at least.
const LINES: f64 = 90.0;
/// Folders of crates that are no product, and are not counted.
const NOT_COUNTED: [&str; 3] = ["fuzz", "tests", "xtask"];
/// Beginnings of the names of suites that boot something, measure, take long, or install.
const NOT_RUN: [&str; 5] = ["bench", "guest_", "install", "soak", "uml_"];
/// This program takes long to build, and is not needed.
const EXCLUDE_XTASK: [&str; 2] = ["--exclude", "xtask"];
/// The profile of cargo: what is built for this is kept apart.
const PROFILE: &str = "coverage";
/// Where the table is kept.
const DOCUMENT: &str = "docs/coverage.md";

#[derive(Args, Debug)]
pub struct Options {
    /// Write the table to docs/coverage.md too
    #[arg(long)]
    write: bool,

    /// Print the lines that were not executed as well
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
        (percent < LINES)
            .then(|| format!("{name}: {percent:.1} % of its lines, less than {LINES} %"))
    };
    let low: Vec<String> = coverage.crates.iter().filter_map(low).collect();
    low.iter().for_each(|line| println!("FAILED: {line}"));
    if !failures.is_empty() {
        println!("FAILED: tests, so that the numbers may be too low");
    }
    Ok(match low.is_empty() && failures.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

/// Runs the suite of input, which makes devices by uinput: in User-Mode Linux if the host has none.
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
    // QEMU decides for its guests.
    tests.args(["--", "--ignored", "--test-threads=1", "--skip", "guest::"]);
    check("Tests of input", &mut tests);
    Ok(())
}

/// How cargo is run.
struct Build {
    /// Calls the compiler with more options.
    wrapper: PathBuf,
    /// Where the counters of processes are.
    profiles: PathBuf,
}

impl Build {
    fn command(&self, command: &str) -> Command {
        let mut cargo = cargo([command, "--profile", PROFILE]);
        self.count(&mut cargo)
            .env("RUSTC_WORKSPACE_WRAPPER", &self.wrapper);
        cargo
    }

    /// Has a program, and what it starts, keep their counters where they are looked for. Without that they write them into the current
    /// directory when they end, which ends a back-end in its sandbox by SIGSYS.
    fn count<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        command.env("LLVM_PROFILE_FILE", self.profiles.join("%m%c.profraw"))
    }

    fn tests(&self) -> Command {
        let mut tests = self.command("test");
        tests.arg("--no-fail-fast");
        tests
    }

    /// Those of the product's crates.
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

    /// All that run the binaries, but for those that [`NOT_RUN`] names.
    fn suites(&self) -> Result<Command, String> {
        let mut tests = self.tests();
        tests.args(["--package", "vhost-device-tests"]);
        for suite in suites()? {
            tests.args(["--test", &suite]);
        }
        Ok(tests)
    }
}

/// The names of the suites that are run.
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

/// Writes what calls the compiler for the crates of the workspace: what these depend on needs no counters.
fn write_wrapper(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let script = "#!/bin/sh\n\
        exec \"$@\" -C instrument-coverage -C llvm-args=-runtime-counter-relocation\n";
    fs::write(path, script)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
}

/// Builds, and gives the executables of the product.
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

/// LLVM's tools, which must know the format of this compiler.
struct Tools {
    profdata: PathBuf,
    cov: PathBuf,
    /// The compiler's version.
    compiler: String,
}

impl Tools {
    /// Takes those of the toolchain (`rustup component add llvm-tools`), or else Debian's of the same version.
    fn find(progress: &Progress) -> Result<Self, String> {
        let ask = |arguments: &[&str]| {
            let output = Command::new("rustc").args(arguments).output();
            let output = output.map_err(|error| format!("cannot run rustc: {error}"))?;
            Ok::<_, String>(String::from_utf8_lossy(&output.stdout).into_owned())
        };
        let version = ask(&["-vV"])?;
        let field = |name: &str| version.lines().find_map(|line| line.strip_prefix(name));
        let (Some(host), Some(llvm)) = (field("host: "), field("LLVM version: ")) else {
            return Err("rustc -vV says nothing of its host and LLVM".into());
        };
        let mut tools = Path::new(ask(&["--print", "sysroot"])?.trim()).join("lib/rustlib");
        tools.extend([host, "bin"]);
        if !tools.join("llvm-profdata").is_file() {
            let major = llvm.split('.').next().unwrap_or_default();
            // The names last as long as this program.
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

    /// Puts the counters together.
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
        let export = export.map_err(|error| format!("llvm-cov gives no JSON: {error}"))?;
        let root = workspace();
        let mut coverage = counts::read(&export, &root, |file| first_test_line(&root, file));
        // The suites link what is counted too, and the other way round.
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

/// What a program writes, if it goes well.
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

/// Where the tests in a file begin: they are the last of it, or a file of their own.
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

/// The counts of each crate, and of all.
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

/// Prints ranges of lines of each file.
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

/// The page of the docs.
fn document(table: &str, compiler: &str) -> String {
    let date = date();
    format!("\
<!-- SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause -->
# What the tests execute

`cargo xtask coverage --write` wrote this page on {date}, with {compiler}. `--missing` prints the lines that no test executes.

{table}
A crate is called by its folder. The command fails if less than {LINES} % of the lines of one are executed.

- **How**: everything is built with `-C instrument-coverage`, and counted by LLVM's tools. The suites run the real binaries, in their
  sandbox. These are killed, and may open no file, so their counters are in a file that is mapped before `main`
  (`-runtime-counter-relocation`, and `%c` in `LLVM_PROFILE_FILE`); the sandbox is that of every build.
- **Suites**: the unit tests, and all of `tests/tests` that boots no guest and does not measure or install; for input also `uml_input`, in
  User-Mode Linux where the host has no uinput.
- **Not counted**: test modules, `fuzz/`, `tests/` and `xtask/`, which are no product; dependencies.
- **Not run**: guests in QEMU, benchmarks, long runs, fuzzing, and all but the suites of rings on packed rings. They reach more.
- A generic function counts once, as what was executed of any of its instances.
")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_begin_at_their_module_and_may_be_a_file() {
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
