// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The stages of `cargo xtask test`: each is run, reported and counted.

use std::process::Command;
use std::time::{Duration, Instant};

use super::jobs::{self, Job};
use super::report::Report;
use crate::progress::Progress;

/// Runs stages and collects their results.
pub struct Stages<'a> {
    progress: &'a Progress,
    ended: Vec<(&'static str, Report, Duration)>,
    /// In CI, only the skips on the list are accepted.
    in_ci: bool,
}

impl<'a> Stages<'a> {
    pub fn new(progress: &'a Progress, in_ci: bool) -> Self {
        Self {
            progress,
            ended: Vec::new(),
            in_ci,
        }
    }

    /// Runs a stage. Returns whether nothing failed.
    pub fn run(&mut self, name: &'static str, stage: impl FnOnce(&Progress) -> Report) -> bool {
        let start = Instant::now();
        let mut report = stage(self.progress);
        if self.in_ci {
            report.accept_no_other_skips();
        }
        let time = start.elapsed();
        let is_good = report.failed.is_empty();
        self.progress.step(&format!(
            "{name}: {report} in {:.1} s{}",
            time.as_secs_f64(),
            if is_good { "" } else { ": FAILED" }
        ));
        self.ended.push((name, report, time));
        is_good
    }

    /// Runs a stage that consists of one command.
    pub fn check(&mut self, name: &'static str, command: &mut Command) -> bool {
        self.run(name, |progress| check(progress, name, command))
    }

    /// Runs a stage of test programs.
    pub fn jobs(&mut self, name: &'static str, jobs: Vec<Job>) {
        self.run(name, |progress| {
            progress.step(name);
            jobs::run(progress, jobs)
        });
    }

    /// Prints the skips, the failures, a table of the stages, and the sum in the last line. Returns whether nothing failed.
    pub fn close(self) -> bool {
        println!();
        let mut sum = Report::default();
        let mut table = Vec::new();
        for (name, report, time) in self.ended {
            table.push(format!(
                "{name:26} {:5} passed {:5} failed {:5} skipped {:8.1} s",
                report.passed,
                report.failed.len(),
                report.skipped.len(),
                time.as_secs_f64()
            ));
            sum.add(report);
        }
        for reason in sum.reasons() {
            println!("{reason}");
        }
        for failure in &sum.failed {
            println!("FAILED: {failure}");
        }
        for line in table {
            println!("{line}");
        }
        println!("{sum}");
        sum.failed.is_empty()
    }
}

/// Runs one command. Prints its output only if it fails.
pub fn check(progress: &Progress, name: &str, command: &mut Command) -> Report {
    match progress.run(name, command) {
        Ok(()) => Report::passed(),
        Err(message) => {
            eprintln!("{message}");
            Report::failed(name)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::report::NO_ADVISORIES;
    use super::*;

    #[test]
    fn stages_continue_after_a_failure() {
        let progress = Progress::start();
        let mut stages = Stages::new(&progress, false);
        assert!(!stages.check("false", &mut Command::new("false")));
        assert!(stages.check("true", &mut Command::new("true")));
        assert!(stages.run("none", |_| Report::skipped("no disk")));
        assert!(!stages.close());
    }

    #[test]
    fn a_skip_that_is_not_on_the_list_is_a_failure_in_ci() {
        let progress = Progress::start();
        let mut stages = Stages::new(&progress, true);
        assert!(stages.run("accepted", |_| Report::skipped(NO_ADVISORIES)));
        assert!(!stages.run("not accepted", |_| Report::skipped("no disk")));
        assert!(!stages.close());
    }
}
