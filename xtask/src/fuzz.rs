// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `cargo xtask fuzz`: runs libFuzzer, which searches for inputs that break a device or the core.

use std::collections::VecDeque;
use std::fs;
use std::io::{BufRead, BufReader};
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use clap::Args;
use clap::builder::PossibleValuesParser;
use vhost_device_fuzz::TARGETS;

use crate::packages::{self, FUZZING};
use crate::progress::Progress;
use crate::workspace::{cargo, target_directory, workspace};

/// Compiler flags that count the reached edges and report comparisons to the fuzzer. They are the same as those of cargo-fuzz.
const FLAGS: [&str; 9] = [
    "--cfg fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Cllvm-args=-sanitizer-coverage-stack-depth",
    "-Cllvm-args=-simplifycfg-branch-fold-threshold=0",
    "-Cdebug-assertions",
];

/// Interval of the reports on the progress of a target.
const HEARTBEAT: Duration = Duration::from_secs(10);
/// Number of lines of output that are shown for a finding.
const SHOWN: usize = 80;

#[derive(Args, Debug)]
pub struct Options {
    /// How long each target runs, in seconds
    #[arg(long, value_name = "N", default_value = "60")]
    seconds: NonZeroU32,

    /// Use this seed for random numbers, instead of a different one for each run
    #[arg(long, value_name = "N")]
    seed: Option<NonZeroU32>,

    /// Run only this target; can be given several times
    #[arg(long = "target", value_name = "NAME", value_parser = PossibleValuesParser::new(TARGETS))]
    targets: Vec<String>,

    /// Run one input of a target, instead of searching for new ones
    #[arg(long, value_name = "FILE", requires = "targets")]
    input: Option<PathBuf>,
}

/// The result of a target.
pub struct Outcome {
    pub target: String,
    executions: u64,
    /// Number of edges of the program that were reached.
    coverage: u64,
    /// Description of the finding.
    pub finding: Option<String>,
}

pub fn run(progress: &Progress, options: &Options) -> Result<ExitCode, String> {
    let targets: Vec<&str> = match options.targets.as_slice() {
        [] => TARGETS.into(),
        some => some.iter().map(String::as_str).collect(),
    };
    build(progress)?;
    if let Some(input) = &options.input {
        let mut play = program(targets.first().copied().unwrap_or_default());
        let status = play.arg(input).status();
        let status = status.map_err(|error| format!("cannot run the target: {error}"))?;
        return Ok(match status.success() {
            true => ExitCode::SUCCESS,
            false => ExitCode::FAILURE,
        });
    }
    let outcomes = fuzz_all(progress, &targets, options.seconds, options.seed)?;
    let mut is_good = true;
    println!();
    for outcome in &outcomes {
        let Outcome {
            target,
            executions,
            coverage,
            finding,
        } = outcome;
        let found = if finding.is_some() { 1 } else { 0 };
        println!("{target:10} {executions:12} executions {coverage:6} edges {found} findings");
        if let Some(finding) = finding {
            println!("FAILED: {finding}");
            is_good = false;
        }
    }
    Ok(match is_good {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

/// Runs all targets for `cargo xtask test`. The seed is always the same, so that a run that passed passes again; `cargo xtask fuzz` searches
/// further.
pub fn test(progress: &Progress, seconds: NonZeroU32) -> Result<Vec<Outcome>, String> {
    build(progress)?;
    fuzz_all(progress, &TARGETS, seconds, NonZeroU32::new(1))
}

/// Returns the directory for the targets, their corpus and their findings.
fn directory() -> PathBuf {
    target_directory().join("fuzz")
}

/// Builds all targets.
fn build(progress: &Progress) -> Result<(), String> {
    packages::install(progress, FUZZING)?;
    let mut flags = FLAGS.join(" ");
    if has_address_sanitizer() {
        flags.push_str(" -Zsanitizer=address");
    } else {
        progress.step("  without the address sanitizer, which this compiler does not have");
    }
    let mut build = cargo(["build", "--release", "--package", "vhost-device-fuzz"]);
    build
        .args(["--bins", "--features", "libfuzzer"])
        // With a target, build scripts are compiled without the flags.
        .args(["--target", &triple(), "--target-dir"])
        .arg(directory())
        .env("RUSTFLAGS", flags)
        // The flags are allowed only in nightly compilers, but work in all.
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_PROFILE_RELEASE_DEBUG", "line-tables-only")
        // Link-time optimization takes minutes.
        .env("CARGO_PROFILE_RELEASE_LTO", "off");
    progress.run("Building the fuzz targets", &mut build)
}

/// Returns whether the compiler has the runtime library of the address sanitizer.
fn has_address_sanitizer() -> bool {
    let sysroot = Command::new("rustc").args(["--print", "sysroot"]).output();
    let sysroot = sysroot.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    let libraries = Path::new(sysroot.unwrap_or_default().trim())
        .join("lib/rustlib")
        .join(triple())
        .join("lib");
    let is_runtime =
        |file: fs::DirEntry| file.file_name().to_string_lossy().ends_with("_rt.asan.a");
    let mut files = fs::read_dir(libraries).into_iter().flatten().flatten();
    files.any(is_runtime)
}

/// Returns the compiler target. The sanitizer needs an explicit one.
fn triple() -> String {
    format!("{}-unknown-linux-gnu", std::env::consts::ARCH)
}

/// Returns the program of a target with the common options.
fn program(target: &str) -> Command {
    let program = directory().join(triple()).join("release").join(target);
    let mut command = Command::new(program);
    command.args(["-timeout=20", "-rss_limit_mb=2048"]);
    command
}

/// Runs the targets, as many at the same time as there are processors.
fn fuzz_all(
    progress: &Progress,
    targets: &[&str],
    seconds: NonZeroU32,
    seed: Option<NonZeroU32>,
) -> Result<Vec<Outcome>, String> {
    let waiting: Mutex<VecDeque<&str>> = Mutex::new(targets.iter().copied().collect());
    let outcomes = Mutex::new(Vec::new());
    let next = || waiting.lock().ok()?.pop_front();
    let work = || -> Result<(), String> {
        while let Some(target) = next() {
            let outcome = fuzz_one(progress, target, seconds, seed)?;
            outcomes
                .lock()
                .map_err(|error| error.to_string())?
                .push(outcome);
        }
        Ok(())
    };
    let count = available_parallelism().map_or(1, |count| count.get().min(targets.len()));
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..count).map(|_| scope.spawn(work)).collect();
        let mut ended = workers.into_iter().map(|worker| worker.join());
        ended.try_for_each(|result| {
            result.unwrap_or_else(|_| Err("a thread of this program failed".into()))
        })
    })?;
    let mut outcomes = outcomes.into_inner().map_err(|error| error.to_string())?;
    outcomes.sort_by(|one, other| one.target.cmp(&other.target));
    Ok(outcomes)
}

/// Runs one target.
fn fuzz_one(
    progress: &Progress,
    target: &str,
    seconds: NonZeroU32,
    seed: Option<NonZeroU32>,
) -> Result<Outcome, String> {
    let fail = |error: std::io::Error| format!("cannot fuzz {target}: {error}");
    // libFuzzer adds to the first directory of the corpus and only reads the second one, which is in the repository.
    let corpus = directory().join("corpus").join(target);
    let findings = directory().join("findings").join(target);
    for path in [&corpus, &findings] {
        fs::create_dir_all(path).map_err(fail)?;
    }
    progress.step(&format!("Fuzzing {target} for {seconds} s"));
    let mut child = program(target)
        .arg(format!("-max_total_time={seconds}"))
        .args(seed.map(|seed| format!("-seed={seed}")))
        .arg(format!("-artifact_prefix={}/", findings.display()))
        .args(["-max_len=4096", "-len_control=0", "-print_final_stats=1"])
        .arg(&corpus)
        .arg(workspace().join("fuzz/seeds").join(target))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(fail)?;
    let mut outcome = Outcome {
        target: target.to_owned(),
        executions: 0,
        coverage: 0,
        finding: None,
    };
    let mut log = Vec::new();
    let mut found = None;
    let mut shown = Instant::now();
    let lines = child
        .stderr
        .take()
        .into_iter()
        .flat_map(|stderr| BufReader::new(stderr).split(b'\n'));
    for line in lines {
        let line = line.map_err(fail)?;
        let line = String::from_utf8_lossy(&line).into_owned();
        outcome.read(&line);
        found = found.or_else(|| written_to(&line));
        if shown.elapsed() >= HEARTBEAT {
            shown = Instant::now();
            let Outcome {
                executions,
                coverage,
                ..
            } = outcome;
            progress.step(&format!(
                "  {target}: {executions} executions, {coverage} edges"
            ));
        }
        // Lines on the progress are not shown for a finding.
        if !line.starts_with('#') && log.len() < SHOWN {
            log.push(line);
        }
    }
    let status = child.wait().map_err(fail)?;
    if !status.success() {
        for line in &log {
            eprintln!("{line}");
        }
        outcome.finding = Some(match found {
            Some(input) => format!(
                "{target} fails on the input {input}; to run it again: cargo xtask fuzz --target={target} --input={input}"
            ),
            None => format!("{target} ended: {status}"),
        });
    }
    Ok(outcome)
}

impl Outcome {
    /// Updates the counts from a line of output of libFuzzer.
    fn read(&mut self, line: &str) {
        let number = |text: &str| text.parse::<u64>().ok();
        let mut words = line.split_whitespace();
        if let Some(all) = line.strip_prefix("stat::number_of_executed_units:") {
            self.executions = number(all.trim()).unwrap_or(self.executions);
        }
        if let Some(first) = words.next()
            && let Some(executions) = first.strip_prefix('#').and_then(number)
        {
            self.executions = executions;
            let mut words = words.skip_while(|word| *word != "cov:");
            if let Some(coverage) = words.nth(1).and_then(number) {
                self.coverage = coverage;
            }
        }
    }
}

/// Returns the file in a line such as `artifact_prefix='…'; Test unit written to PATH`.
fn written_to(line: &str) -> Option<String> {
    let (_, path) = line.split_once("Test unit written to ")?;
    Some(path.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_output_of_libfuzzer_is_parsed() {
        let mut outcome = Outcome {
            target: "ring".into(),
            executions: 0,
            coverage: 0,
            finding: None,
        };
        outcome.read("INFO: Seed: 42");
        outcome
            .read("#9071\tNEW    cov: 929 ft: 1838 corp: 129/1997b lim: 25 exec/s: 477 rss: 357Mb");
        assert_eq!((outcome.executions, outcome.coverage), (9071, 929));
        outcome.read("#9100\tpulse  ft: 1838 corp: 129/1997b");
        assert_eq!((outcome.executions, outcome.coverage), (9100, 929));
        outcome.read("stat::number_of_executed_units: 9200");
        assert_eq!(outcome.executions, 9200);
        let line = "artifact_prefix='/a/'; Test unit written to /a/crash-00ff";
        assert_eq!(written_to(line), Some("/a/crash-00ff".into()));
        assert_eq!(written_to("Done 11810 runs in 21 second(s)"), None);
    }
}
