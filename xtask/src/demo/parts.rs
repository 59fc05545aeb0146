// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The parts of the demo. A part that is not supported or fails does not prevent the others.

use std::process::ExitCode;

use crate::progress::Progress;

/// The results of the parts.
pub struct Parts<'a> {
    progress: &'a Progress,
    skipped: Vec<String>,
    failed: Vec<String>,
}

impl<'a> Parts<'a> {
    pub fn new(progress: &'a Progress) -> Self {
        Self {
            progress,
            skipped: Vec::new(),
            failed: Vec::new(),
        }
    }

    /// Runs a part, unless `possible` contains the reason why the host does not support it.
    pub fn show(
        &mut self,
        name: &str,
        possible: Result<(), String>,
        part: impl FnOnce() -> Result<(), String>,
    ) {
        if let Err(reason) = possible {
            self.skipped
                .push(format!("the host does not support the {name}: {reason}"));
        } else if let Err(reason) = part() {
            self.failed.push(format!("the {name} failed: {reason}"));
        } else {
            return;
        }
        self.progress
            .step(&format!("Continuing without the {name}"));
    }

    /// Prints the parts that were not shown. Returns the exit status.
    pub fn close(&self) -> ExitCode {
        for reason in &self.skipped {
            self.progress.step(&format!("Skipped: {reason}"));
        }
        for reason in &self.failed {
            self.progress.step(&format!("FAILED: {reason}"));
        }
        if !self.failed.is_empty() {
            return ExitCode::FAILURE;
        }
        self.progress.step("Done.");
        ExitCode::SUCCESS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs three parts, of which the second one has this result. Returns the parts that were shown, and whether the demo succeeded.
    fn demo(possible: Result<(), String>, result: Result<(), String>) -> (Vec<u32>, bool) {
        let progress = Progress::start();
        let mut parts = Parts::new(&progress);
        let mut shown = Vec::new();
        parts.show("disk", Ok(()), || {
            shown.push(1);
            Ok(())
        });
        parts.show("screen", possible, || {
            result.map(|()| {
                shown.push(2);
            })
        });
        parts.show("keyboard", Ok(()), || {
            shown.push(3);
            Ok(())
        });
        (shown, parts.close() == ExitCode::SUCCESS)
    }

    #[test]
    fn all_parts_are_shown() {
        assert_eq!(demo(Ok(()), Ok(())), (vec![1, 2, 3], true));
    }

    #[test]
    fn a_part_that_the_host_does_not_support_is_not_a_failure() {
        let reason = Err("no kernel".into());
        assert_eq!(demo(reason, Ok(())), (vec![1, 3], true));
    }

    #[test]
    fn the_demo_continues_after_a_part_that_fails_and_then_fails() {
        let reason = Err("the guest did not boot".into());
        assert_eq!(demo(Ok(()), reason), (vec![1, 3], false));
    }
}
