// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Queries programs for their capabilities. The programs are not trusted: their time and output are limited, and their processes are
//! killed afterwards.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use crate::descriptor::Descriptor;
use crate::problem::{Problem, QueryError};
use crate::root::Root;
use crate::schema::{self, VHostUserBackendCapabilities};

/// Limit for the output of a program, in bytes.
pub const MAX_OUTPUT: usize = 1 << 20;
/// Limit for the part of its stderr that is kept, in bytes.
const MAX_ERRORS: usize = 4 << 10;
/// Limit for the part of its stderr that is shown, in characters.
const MAX_SHOWN: usize = 200;
/// Number of programs that run at the same time.
const PARALLEL: usize = 8;
/// Time after which the user is told what the query waits for.
const SILENCE: Duration = Duration::from_secs(2);

/// Parameters of a query.
#[derive(Clone, Copy, Debug)]
pub struct Query<'a> {
    /// Time limit for each program.
    pub time_limit: Duration,
    /// When this file becomes readable, the query stops and the running programs are killed.
    pub stop: Option<BorrowedFd<'a>>,
}

/// Queries the programs of `descriptors` in parallel. If they take longer than 2 s, calls `waiting` with the number of those that
/// have not answered. Returns an answer for each descriptor, in the same order.
pub fn query(
    root: &Root,
    descriptors: &[Descriptor],
    query: Query,
    mut waiting: impl FnMut(usize),
) -> Vec<Result<VHostUserBackendCapabilities, Problem>> {
    let programs: Vec<_> = descriptors
        .iter()
        .map(|descriptor| descriptor.program(root))
        .collect();
    let mut asked: Vec<_> = programs.iter().map(|_| None).collect();
    let paths: Vec<(usize, &PathBuf)> = programs
        .iter()
        .enumerate()
        .filter_map(|(index, program)| Some((index, program.as_ref().ok()?)))
        .collect();
    let next = AtomicUsize::new(0);
    let (sender, receiver) = mpsc::channel();
    thread::scope(|scope| {
        for _ in 0..paths.len().min(PARALLEL) {
            let (sender, next, paths) = (sender.clone(), &next, &paths);
            scope.spawn(move || {
                while let Some(&(index, path)) = paths.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let _ = sender.send((index, query.ask(path)));
                }
            });
        }
        drop(sender);
        let mut left = paths.len();
        let mut silence = Some(SILENCE);
        loop {
            match receiver.recv_timeout(silence.unwrap_or(Duration::MAX)) {
                Ok((index, answer)) => {
                    left = left.saturating_sub(1);
                    if let Some(place) = asked.get_mut(index) {
                        *place = Some(answer);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    silence = None;
                    waiting(left);
                }
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
    });
    let binaries = descriptors
        .iter()
        .map(|descriptor| &descriptor.backend.binary);
    let answers = programs.into_iter().zip(asked).zip(binaries);
    answers
        .map(|((program, answer), binary)| {
            program?;
            answer
                .unwrap_or(Err(QueryError::Stopped))
                .map_err(|error| Problem::Query(binary.clone(), error))
        })
        .collect()
}

impl Query<'_> {
    /// Queries one program. It runs with an empty stdin in its own process group, which is killed when the program ends or exceeds the
    /// time limit.
    ///
    /// # Errors
    /// Fails if the program does not print its capabilities.
    pub fn ask(self, program: &Path) -> Result<VHostUserBackendCapabilities, QueryError> {
        let child = Command::new(program)
            .arg("--print-capabilities")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .map_err(QueryError::Start)?;
        let mut group = Group {
            child,
            is_reaped: false,
        };
        let (output, errors) = self.listen(&mut group.child)?;
        let status = group.end().map_err(QueryError::System)?;
        if !status.success() {
            return Err(QueryError::Failed(status, first_line(&errors)));
        }
        schema::read(&output).map_err(QueryError::NotCapabilities)
    }

    /// Returns what `child` writes to stdout and stderr until it has ended and no process can write to stdout.
    fn listen(self, child: &mut Child) -> Result<(Vec<u8>, Vec<u8>), QueryError> {
        let system = |error: Errno| QueryError::System(error.into());
        let ended = pidfd_open(Pid::from_child(child), PidfdFlags::empty()).map_err(system)?;
        let mut ended = Some(ended);
        let (mut stdout, mut stderr) = (child.stdout.take(), child.stderr.take());
        let (mut output, mut errors) = (Vec::new(), Vec::new());
        let start = Instant::now();
        while stdout.is_some() || ended.is_some() {
            let left = self.time_limit.saturating_sub(start.elapsed());
            if left.is_zero() {
                return Err(QueryError::Slow(self.time_limit));
            }
            let sources = [
                stdout.as_ref().map(AsFd::as_fd),
                stderr.as_ref().map(AsFd::as_fd),
                ended.as_ref().map(AsFd::as_fd),
                self.stop,
            ];
            let [has_output, has_errors, has_ended, is_stopped] =
                ready(sources, left).map_err(system)?;
            if is_stopped {
                return Err(QueryError::Stopped);
            }
            if has_output && !read(&mut stdout, &mut output).map_err(QueryError::System)? {
                stdout = None;
            }
            if output.len() > MAX_OUTPUT {
                return Err(QueryError::TooMuch);
            }
            if has_errors && !read(&mut stderr, &mut errors).map_err(QueryError::System)? {
                stderr = None;
            }
            errors.truncate(MAX_ERRORS);
            if has_ended {
                ended = None;
            }
        }
        Ok((output, errors))
    }
}

/// Waits until at least one of the files is ready. Returns which ones are.
fn ready<const N: usize>(
    files: [Option<BorrowedFd>; N],
    timeout: Duration,
) -> Result<[bool; N], Errno> {
    let mut fds: Vec<_> = files
        .iter()
        .flatten()
        .map(|file| PollFd::new(file, PollFlags::IN))
        .collect();
    let timeout = Timespec::try_from(timeout).map_err(|_| Errno::INVAL)?;
    retry_on_intr(|| poll(&mut fds, Some(&timeout)))?;
    let mut ready = fds.iter().map(|fd| !fd.revents().is_empty());
    Ok(files.map(|file| file.is_some() && ready.next().unwrap_or(false)))
}

/// Reads what is available. Returns false at the end of the file.
fn read(file: &mut Option<impl Read>, bytes: &mut Vec<u8>) -> io::Result<bool> {
    let mut buffer = [0; 16 << 10];
    let Some(file) = file else {
        return Ok(false);
    };
    match file.read(&mut buffer) {
        Ok(read) => {
            bytes.extend(buffer.iter().take(read));
            Ok(read > 0)
        }
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(true),
        Err(error) => Err(error),
    }
}

/// Returns the first line that is not empty, as the continuation of a sentence.
fn first_line(errors: &[u8]) -> String {
    let errors = String::from_utf8_lossy(errors);
    let line = errors.lines().map(str::trim).find(|line| !line.is_empty());
    line.map_or(String::new(), |line| {
        let shown: String = line.chars().take(MAX_SHOWN).collect();
        format!(": {shown}")
    })
}

/// The process group of a program. It is killed when this is dropped.
struct Group {
    child: Child,
    is_reaped: bool,
}

impl Group {
    /// Kills the processes that are left. Returns the exit status of the program.
    fn end(&mut self) -> io::Result<ExitStatus> {
        // No other process group can get this id before the program is reaped.
        if !self.is_reaped {
            let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
            self.is_reaped = true;
        }
        self.child.wait()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = self.end();
    }
}
