// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The parts of the demo: one that cannot be shown, or fails, does not keep the others from being shown.

use std::process::ExitCode;

use crate::progress::Progress;

/// How the parts went.
pub struct Parts<'a> {
    progress: &'a Progress,
    left_out: Vec<String>,
    failed: Vec<String>,
}

impl<'a> Parts<'a> {
    pub fn new(progress: &'a Progress) -> Self {
        Self {
            progress,
            left_out: Vec::new(),
            failed: Vec::new(),
        }
    }

    /// Shows a part, unless `possible` says why this host cannot.
    pub fn show(
        &mut self,
        name: &str,
        possible: Result<(), String>,
        part: impl FnOnce() -> Result<(), String>,
    ) {
        if let Err(reason) = possible {
            self.left_out
                .push(format!("this host cannot show the {name}: {reason}"));
        } else if let Err(reason) = part() {
            self.failed.push(format!("the {name} failed: {reason}"));
        } else {
            return;
        }
        self.progress.step(&format!("Going on without the {name}"));
    }

    /// Says what was not shown, and gives the exit status.
    pub fn close(&self) -> ExitCode {
        for reason in &self.left_out {
            self.progress.step(&format!("Left out: {reason}"));
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

    /// What was shown, and the status, if the second of three parts goes so.
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
    fn a_part_that_is_impossible_here_is_left_out_and_no_failure() {
        let reason = Err("no kernel".into());
        assert_eq!(demo(reason, Ok(())), (vec![1, 3], true));
    }

    #[test]
    fn a_part_that_fails_does_not_end_the_demo_but_is_a_failure() {
        let reason = Err("the guest did not boot".into());
        assert_eq!(demo(Ok(()), reason), (vec![1, 3], false));
    }
}
