// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The results of a stage: how many tests passed, which failed, and which were skipped for which reason.

use std::collections::BTreeMap;

use vhost_device_tests::guest::qemu::NOT_FETCHED;
use vhost_device_tests::skip::{MARK, NAMELESS};

/// The beginnings of the reasons for a skip that CI accepts. Any other skip is a failure in CI, so that a host without the needed programs
/// does not seem to pass.
const ACCEPTED: &[&str] = &[
    // Another back-end, which does not support everything that ours support.
    "reference-device does not claim ",
    // Features that these devices do not have.
    "vhost-device-rng does not claim VhostUserProtocolFeatures(CONFIG)",
    "vhost-device-rng does not claim a second queue",
    "vhost-device-console does not claim a second queue",
    "vhost-device-gpu does not claim a second queue",
    "vhost-device-sound does not claim a second queue",
    "vhost-device-block does not claim VIRTIO_F_IN_ORDER",
    "vhost-device-gpu does not claim VIRTIO_F_IN_ORDER",
    "vhost-device-scsi does not claim a second queue",
    "vhost-device-scsi does not claim VIRTIO_F_IN_ORDER",
    "vhost-device-sound does not claim VIRTIO_F_IN_ORDER",
    // Tests of one ring format in a run with the other format.
    "vhost-device-block does not claim that of a packed ring",
    "vhost-device-console does not claim that of a packed ring",
    "vhost-device-gpu does not claim that of a packed ring",
    "vhost-device-rng does not claim that of a packed ring",
    "vhost-device-scsi does not claim that of a packed ring",
    "vhost-device-sound does not claim that of a packed ring",
    // Downloads that need the network.
    NO_ADVISORIES,
    NO_INDEX,
    NO_TOOLCHAIN,
    NO_TARGET,
    NOT_FETCHED,
    // Requested by the user.
    NO_GUEST,
];

/// Reasons of checks that are not tests.
pub const NO_ADVISORIES: &str = "the database of advisories cannot be fetched";
pub const NO_INDEX: &str = "the index of the package registry cannot be fetched";
pub const NO_TOOLCHAIN: &str = "there is no toolchain for Rust ";
pub const NO_TARGET: &str = "there is no standard library for ";
pub const NO_GUEST: &str = "skipped by --no-guest";

/// The results of a stage, or of a part of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    pub passed: usize,
    /// The names of the failed tests.
    pub failed: Vec<String>,
    /// The reasons of the skipped tests.
    pub skipped: Vec<String>,
}

impl Report {
    pub fn passed() -> Self {
        Self {
            passed: 1,
            ..Self::default()
        }
    }

    pub fn failed(what: impl Into<String>) -> Self {
        Self {
            failed: vec![what.into()],
            ..Self::default()
        }
    }

    pub fn skipped(reason: impl Into<String>) -> Self {
        Self {
            skipped: vec![reason.into()],
            ..Self::default()
        }
    }

    pub fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed.extend(other.failed);
        self.skipped.extend(other.skipped);
    }

    /// Turns the skips that CI does not accept into failures.
    pub fn accept_no_other_skips(&mut self) {
        let is_accepted =
            |reason: &String| ACCEPTED.iter().any(|accepted| reason.starts_with(accepted));
        let (accepted, others) = self.skipped.drain(..).partition(is_accepted);
        self.skipped = accepted;
        let others: Vec<String> = others;
        let failure = |reason| format!("skipped, which CI does not accept: {reason}");
        self.failed.extend(others.into_iter().map(failure));
    }

    /// Returns a line for each reason for a skip, with the number of tests.
    pub fn reasons(&self) -> Vec<String> {
        let mut reasons: BTreeMap<&str, usize> = BTreeMap::new();
        for reason in &self.skipped {
            *reasons.entry(reason).or_default() += 1;
        }
        reasons
            .into_iter()
            .map(|(reason, count)| format!("SKIPPED: {count:4} because {reason}"))
            .collect()
    }

    /// Reads the output of the test program `suite`, and whether it succeeded.
    pub fn read(suite: &str, log: &[String], success: bool) -> Self {
        let mut report = Self::default();
        let (mut results, mut failed, mut names) = (0, 0, BTreeMap::new());
        for line in log {
            if let Some((passed, others)) = result_line(line) {
                results += 1;
                report.passed += passed;
                failed += others;
            } else if let Some(test) = failed_test(line) {
                report.failed.push(format!("{suite}: {test}"));
            } else if let Some((test, reason)) = skipped_test(line) {
                match test {
                    // A test that does not know its name prints this once.
                    NAMELESS => report.skipped.push(reason.into()),
                    test => {
                        names.entry(test).or_insert(reason);
                    }
                }
            }
        }
        report
            .skipped
            .extend(names.into_values().map(str::to_owned));
        // The test program counts a skipped test as passed.
        report.passed = report.passed.saturating_sub(report.skipped.len());
        // A crash has no line of its own.
        if report.failed.len() < failed || (report.failed.is_empty() && (!success || results == 0))
        {
            report
                .failed
                .push(format!("{suite}: ended before its tests did"));
        }
        report
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            passed,
            failed,
            skipped,
        } = self;
        let (failed, skipped) = (failed.len(), skipped.len());
        write!(
            formatter,
            "{passed} passed, {failed} failed, {skipped} skipped"
        )
    }
}

/// Returns the numbers of passed and failed tests in a line such as `test result: ok. 3 passed; 0 failed; 1 ignored; …`.
fn result_line(line: &str) -> Option<(usize, usize)> {
    let (_, numbers) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let number = |name: &str| {
        let mut parts = numbers.split("; ");
        parts.find_map(|part| part.strip_suffix(name)?.trim().parse().ok())
    };
    Some((number("passed")?, number("failed")?))
}

/// Returns the name in a line such as `test rings::are_round ... FAILED`.
fn failed_test(line: &str) -> Option<&str> {
    line.strip_prefix("test ")?.strip_suffix(" ... FAILED")
}

/// Returns the test and the reason in a line of [`vhost_device_tests::skip`].
fn skipped_test(line: &str) -> Option<(&str, &str)> {
    line.strip_prefix(MARK)?.split_once(": ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str, success: bool) -> Report {
        let log: Vec<String> = text.lines().map(str::to_owned).collect();
        Report::read("ring", &log, success)
    }

    #[test]
    fn counts_are_read_from_the_result_line() {
        let line = "test result: FAILED. 6 passed; 5 failed; 1 ignored; 0 measured; 2 filtered out; finished in 85.82s";
        assert_eq!(result_line(line), Some((6, 5)));
        assert_eq!(result_line("test a ... ok"), None);
    }

    #[test]
    fn failed_tests_are_named() {
        let report = read(
            "test a ... ok\ntest a::b ... FAILED\n\
             test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out",
            false,
        );
        let expected = Report {
            passed: 1,
            ..Report::failed("ring: a::b")
        };
        assert_eq!(report, expected);
    }

    #[test]
    fn a_skipped_test_is_not_a_passed_one() {
        let report = read(
            "SKIPPED rings::a: there is no disk\nSKIPPED rings::a: nor is there another\ntest rings::a ... ok\n\
             SKIPPED a test: not root\ntest b ... ok\nSKIPPED a test: not root\ntest c ... ok\ntest d ... ok\n\
             test result: ok. 4 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out",
            true,
        );
        assert_eq!((report.passed, report.failed.len()), (1, 0));
        assert_eq!(
            report.reasons(),
            [
                "SKIPPED:    2 because not root",
                "SKIPPED:    1 because there is no disk"
            ]
        );
        assert_eq!(report.to_string(), "1 passed, 0 failed, 3 skipped");
    }

    #[test]
    fn a_crash_and_a_missing_result_are_failures() {
        assert_eq!(read("running 3 tests", false).failed.len(), 1);
        assert_eq!(read("", true).failed.len(), 1);
        let one_name = "test a ... FAILED\ntest result: FAILED. 0 passed; 2 failed; 0 ignored";
        assert_eq!(read(one_name, false).failed.len(), 2);
    }

    #[test]
    fn ci_accepts_only_the_skips_on_the_list() {
        let mut report = Report {
            skipped: vec![
                "reference-device does not claim NoLeak".into(),
                "qemu-img is not installed".into(),
            ],
            ..Report::passed()
        };
        report.accept_no_other_skips();
        assert_eq!(report.to_string(), "1 passed, 1 failed, 1 skipped");
        assert!(report.failed[0].ends_with("qemu-img is not installed"));
    }
}
