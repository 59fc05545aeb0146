// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Prints the progress: one line for each step, with the time since the start, and the latest line of output of a long step.

use std::io::{BufRead, BufReader, IsTerminal, Read, Write, stdout};
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

/// Interval of the reports on a long step if stdout is not a terminal.
const HEARTBEAT: Duration = Duration::from_secs(10);

/// Prints the progress of a task.
#[derive(Debug)]
pub struct Progress {
    start: Instant,
}

impl Progress {
    /// Starts the clock.
    pub fn start() -> Self {
        Self {
            start: Instant::now(),
        }
    }

    /// Continues the clock of another process, which started it `elapsed` ago.
    pub fn started(elapsed: Duration) -> Self {
        let now = Instant::now();
        Self {
            start: now.checked_sub(elapsed).unwrap_or(now),
        }
    }

    /// Returns the time since the start.
    pub fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    /// Prints the beginning of a step.
    pub fn step(&self, what: &str) {
        println!("[{:6.1} s] {what}", self.elapsed().as_secs_f64());
    }

    /// Runs `command`. Shows only its latest line of output, and returns all output if it fails.
    pub fn run(&self, what: &str, command: &mut Command) -> Result<(), String> {
        self.step(what);
        let name = command.get_program().to_string_lossy().into_owned();
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| format!("cannot run {name}: {error}"))?;
        let (sender, receiver) = channel();
        forward(child.stdout.take(), sender.clone());
        forward(child.stderr.take(), sender);

        let terminal = stdout().is_terminal();
        let mut log: Vec<String> = Vec::new();
        let mut shown = Instant::now();
        // The loop ends when the command closes its output.
        loop {
            match receiver.recv_timeout(HEARTBEAT) {
                Ok(line) => log.push(line),
                Err(RecvTimeoutError::Timeout) => (),
                Err(RecvTimeoutError::Disconnected) => break,
            }
            let last = log.last().map_or("", |line| line.trim());
            if terminal {
                let last: String = last.chars().take(80).collect();
                print!("\r\x1b[K           {last}");
                let _ = stdout().flush();
            } else if shown.elapsed() >= HEARTBEAT {
                shown = Instant::now();
                self.step(&format!("  … {last}"));
            }
        }
        if terminal {
            print!("\r\x1b[K");
        }
        let status = child
            .wait()
            .map_err(|error| format!("cannot wait for {name}: {error}"))?;
        if status.success() {
            Ok(())
        } else {
            Err(format!(
                "{}\n{what}: {name} failed ({status})",
                log.join("\n")
            ))
        }
    }
}

/// Sends each line of `stream`.
fn forward(stream: Option<impl Read + Send + 'static>, sender: Sender<String>) {
    let Some(stream) = stream else { return };
    thread::spawn(move || {
        for line in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
            let _ = sender.send(String::from_utf8_lossy(&line).into_owned());
        }
    });
}
