// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Runs test programs at the same time, as far as the machine has room for them.

use std::collections::VecDeque;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::thread::{self, available_parallelism};
use std::time::{Duration, Instant};

use super::report::Report;
use crate::progress::Progress;
use crate::workspace::target_directory;

/// Interval of the reports on running jobs.
const HEARTBEAT: Duration = Duration::from_secs(30);

/// How much of the machine a test program needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// It mostly waits. Two of them run on one processor.
    Light,
    /// It keeps a processor busy.
    Heavy,
    /// It measures time. Nothing else runs at the same time.
    Alone,
}

/// A test program to run.
pub struct Job {
    pub name: String,
    pub command: Command,
    pub load: Load,
}

/// Returns a job that runs alone.
pub fn command(command: Command, name: &str) -> Job {
    Job {
        name: name.into(),
        command,
        load: Load::Alone,
    }
}

/// The shares of the machine: two for each processor.
struct Room {
    all: usize,
    free: usize,
}

impl Room {
    fn new() -> Self {
        // Not fewer: two of the heavy ones are as many as small machines bear, and one would leave them waiting.
        let processors = available_parallelism().map_or(2, |count| count.get().max(2));
        Self {
            all: processors * 2,
            free: processors * 2,
        }
    }

    fn share(&self, load: Load) -> usize {
        match load {
            Load::Light => 1,
            Load::Heavy => 2,
            Load::Alone => self.all,
        }
    }
}

/// The result of a job.
struct Ended {
    name: String,
    load: Load,
    report: Report,
    log: Vec<String>,
    time: Duration,
}

/// Runs the jobs, in order as far as there is room. Prints a line for each job when it ends, and its output if it failed. Keeps the output
/// in the target directory.
pub fn run(progress: &Progress, jobs: Vec<Job>) -> Report {
    let mut waiting: VecDeque<Job> = jobs.into();
    let mut room = Room::new();
    let mut running: Vec<String> = Vec::new();
    let mut sum = Report::default();
    let (sender, receiver) = channel();
    loop {
        while let Some(index) = waiting
            .iter()
            .position(|job| room.share(job.load) <= room.free)
            && let Some(job) = waiting.remove(index)
        {
            room.free -= room.share(job.load);
            running.push(job.name.clone());
            let sender = sender.clone();
            thread::spawn(move || {
                let _ = sender.send(run_job(job));
            });
        }
        if running.is_empty() {
            return sum;
        }
        let ended: Ended = match receiver.recv_timeout(HEARTBEAT) {
            Ok(ended) => ended,
            Err(_) => {
                progress.step(&format!("  … {}", running.join(", ")));
                continue;
            }
        };
        room.free += room.share(ended.load);
        running.retain(|name| *name != ended.name);
        show(progress, &ended);
        sum.add(ended.report);
    }
}

/// Prints the result of a job.
fn show(progress: &Progress, ended: &Ended) {
    let Ended {
        name,
        report,
        log,
        time,
        ..
    } = ended;
    if !report.failed.is_empty() {
        for line in log {
            println!("{line}");
        }
    }
    // Programs without tests are not listed.
    if *report != Report::default() {
        progress.step(&format!("  {name}: {report} ({:.1} s)", time.as_secs_f64()));
    }
    let directory = target_directory().join("test-logs");
    let file = directory.join(format!("{}.log", name.replace(['/', ' '], "_")));
    let written = fs::create_dir_all(&directory).and_then(|()| fs::write(file, log.join("\n")));
    if let Err(error) = written {
        eprintln!("cannot write the log of {name}: {error}");
    }
}

/// Runs a job until it ends.
fn run_job(mut job: Job) -> Ended {
    let start = Instant::now();
    let log = Arc::new(Mutex::new(Vec::new()));
    let status = job
        .command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .and_then(|mut child| {
            let copies = [
                child.stdout.take().map(|from| copy(from, log.clone())),
                child.stderr.take().map(|from| copy(from, log.clone())),
            ];
            for copy in copies.into_iter().flatten() {
                let _ = copy.join();
            }
            child.wait()
        });
    let mut log = log
        .lock()
        .map(|mut log| std::mem::take(&mut *log))
        .unwrap_or_default();
    if let Err(error) = &status {
        log.push(format!("cannot run it: {error}"));
    }
    let success = status.is_ok_and(|status| status.success());
    Ended {
        report: Report::read(&job.name, &log, success),
        name: job.name,
        load: job.load,
        log,
        time: start.elapsed(),
    }
}

/// Copies lines to the log until the end of the stream.
fn copy(from: impl Read + Send + 'static, log: Arc<Mutex<Vec<String>>>) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        for line in BufReader::new(from).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line)
                .trim_end_matches('\r')
                .to_owned();
            if let Ok(mut log) = log.lock() {
                log.push(line);
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(name: &str, script: &str, load: Load) -> Job {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Job {
            name: name.into(),
            command,
            load,
        }
    }

    #[test]
    fn each_job_is_counted() {
        let good = "echo 'test result: ok. 2 passed; 0 failed; 0 ignored'";
        let skipping =
            "echo 'SKIPPED a: no disk' >&2; echo 'test result: ok. 1 passed; 0 failed; 0 ignored'";
        let jobs = vec![
            job("a unit test of xtask", good, Load::Alone),
            job("another unit test of xtask", skipping, Load::Light),
            job("a third unit test of xtask", "exit 1", Load::Heavy),
        ];
        let report = run(&Progress::start(), jobs);
        assert_eq!(report.to_string(), "2 passed, 1 failed, 1 skipped");
    }

    #[test]
    fn jobs_that_measure_time_run_alone() {
        let directory = tempfile::tempdir().unwrap();
        // Fails if another job runs at the same time.
        let script = format!(
            "cd {} && mkdir busy && sleep 0.2 && rmdir busy && echo 'test result: ok. 1 passed; 0 failed'",
            directory.path().display()
        );
        let jobs = (0..3)
            .map(|n| job(&format!("unit test {n} of time"), &script, Load::Alone))
            .collect();
        assert_eq!(run(&Progress::start(), jobs).passed, 3);
    }
}
