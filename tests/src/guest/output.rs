// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The output of a guest on its two serial ports: the kernel's messages, and the script's output with its markers.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use super::error::{GuestError, system};
use super::host::target_directory;

/// What the kernel writes, to the first serial port.
pub(super) const CONSOLE_LOG: &str = "console.log";
/// What the script writes, to the second serial port.
pub(super) const SCRIPT_LOG: &str = "script.log";

/// Interval at which the script's output is read.
const INTERVAL: Duration = Duration::from_millis(10);

/// The logs of a running guest. Dropping them prints them if the test panics.
#[derive(Debug)]
pub(super) struct Logs {
    directory: PathBuf,
    deadline: Instant,
    /// Number of lines of the script's output that were read.
    seen: usize,
}

impl Logs {
    /// Creates empty logs of the guest `name`, whose time limit is `lifetime`.
    pub(super) fn create(name: &str, lifetime: Duration) -> Result<Self, GuestError> {
        let directory = target_directory()?.join("guest/logs").join(name);
        fs::create_dir_all(&directory)
            .map_err(system(format!("create {}", directory.display())))?;
        for log in [CONSOLE_LOG, SCRIPT_LOG] {
            let log = directory.join(log);
            fs::write(&log, "").map_err(system(format!("write {}", log.display())))?;
        }
        Ok(Self {
            directory,
            deadline: Instant::now() + lifetime,
            seen: 0,
        })
    }

    /// Returns where they are.
    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Returns how long the guest may still live.
    pub(super) fn left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    /// Waits for the next marker `@name value` and returns its value. `ended` returns how the guest's machine has ended, if it has.
    pub(super) fn wait(
        &mut self,
        name: &str,
        mut ended: impl FnMut() -> Result<Option<String>, GuestError>,
    ) -> Result<String, GuestError> {
        loop {
            // Checked first: the output of an ended machine is complete.
            let ended = ended()?;
            for line in self.lines().split_off(self.seen) {
                self.seen += 1;
                match marker(&line) {
                    Some((found, value)) if found == name => return Ok(value.into()),
                    Some(("end", status)) => {
                        return Err(self.trouble(format!(
                            "ended its script with status {status} and no marker @{name}"
                        )));
                    }
                    _ => (),
                }
            }
            if let Some(how) = ended {
                return Err(self.trouble(format!("was gone before a marker @{name} came; {how}")));
            }
            if self.left().is_zero() {
                return Err(self.trouble(format!("did not write the marker @{name} in time")));
            }
            thread::sleep(INTERVAL);
        }
    }

    /// Waits until the script has ended well.
    pub(super) fn wait_for_end(
        &mut self,
        ended: impl FnMut() -> Result<Option<String>, GuestError>,
    ) -> Result<(), GuestError> {
        match self.wait("end", ended)?.as_str() {
            "0" => Ok(()),
            status => Err(self.trouble(format!("script failed with status {status}"))),
        }
    }

    /// Returns what the script has written.
    pub(super) fn output(&self) -> Output {
        Output(self.lines())
    }

    /// Creates an error of this guest; `what` completes "the guest …".
    pub(super) fn trouble(&self, what: String) -> GuestError {
        GuestError::Guest(format!("{what} (logs: {})", self.directory.display()))
    }

    /// Returns the whole lines that the script has written.
    fn lines(&self) -> Vec<String> {
        let log = fs::read(self.directory.join(SCRIPT_LOG)).unwrap_or_default();
        let text = String::from_utf8_lossy(&log);
        text.split_inclusive('\n')
            .filter_map(|line| line.strip_suffix('\n'))
            .map(|line| line.trim_end_matches('\r').to_owned())
            .collect()
    }
}

impl Drop for Logs {
    fn drop(&mut self) {
        if thread::panicking() {
            for log in [CONSOLE_LOG, SCRIPT_LOG] {
                print(&self.directory.join(log));
            }
        }
    }
}

/// Prints a log of a guest whose test has failed.
pub(super) fn print(log: &Path) {
    let text = fs::read(log).unwrap_or_default();
    eprintln!(
        "--- guest's {}\n{}",
        log.display(),
        String::from_utf8_lossy(&text)
    );
}

fn marker(line: &str) -> Option<(&str, &str)> {
    let line = line.strip_prefix('@')?;
    Some(line.split_once(' ').unwrap_or((line, "")))
}

/// What a guest's script wrote.
#[derive(Clone, Debug)]
pub struct Output(Vec<String>);

impl Output {
    /// Returns the values of all markers `@name value`, in order.
    pub fn values<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        let markers = self.0.iter().filter_map(|line| marker(line));
        markers
            .filter(move |(found, _)| *found == name)
            .map(|(_, value)| value)
    }

    /// Returns the value of the first marker `@name value`.
    pub fn value(&self, name: &str) -> Result<&str, GuestError> {
        let found = self
            .0
            .iter()
            .filter_map(|line| marker(line))
            .find(|(found, _)| *found == name);
        found
            .map(|(_, value)| value)
            .ok_or_else(|| GuestError::Guest(format!("wrote no marker @{name}")))
    }
}
