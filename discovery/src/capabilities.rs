// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Asking programs what they can do. They are not trusted: each has a time limit, its output a bound,
//! and nothing of it is left running afterwards.

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

/// Most that a program may print, in bytes.
pub const MAX_OUTPUT: usize = 1 << 20;
/// Most of its errors that is kept, in bytes.
const MAX_ERRORS: usize = 4 << 10;
/// Most characters of its errors that are shown.
const MAX_SHOWN: usize = 200;
/// How many programs run at a time.
const PARALLEL: usize = 8;
/// After this time somebody who waits wants to know why.
const SILENCE: Duration = Duration::from_secs(2);

/// How to ask.
#[derive(Clone, Copy, Debug)]
pub struct Query<'a> {
    /// How long a program may take.
    pub time_limit: Duration,
    /// When this becomes readable, the programs that run are ended.
    pub stop: Option<BorrowedFd<'a>>,
}

/// Asks the programs of `descriptors`, several at a time. Calls `waiting` with the number of programs
/// that have not answered, should that take long.
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
    /// Asks one program. It runs with an empty stdin in a process group of its own, which is killed
    /// when the program has ended, or when it takes too long.
    ///
    /// # Errors
    /// It does not answer, or not as it should.
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

    /// What `child` writes to stdout and stderr until it has ended and nobody can write more.
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

/// Waits until one of the files is ready, and tells which are.
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

/// Reads what there is. Returns false at the end.
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

/// The first line that says something, as a continuation of a sentence.
fn first_line(errors: &[u8]) -> String {
    let errors = String::from_utf8_lossy(errors);
    let line = errors.lines().map(str::trim).find(|line| !line.is_empty());
    line.map_or(String::new(), |line| {
        let shown: String = line.chars().take(MAX_SHOWN).collect();
        format!(": {shown}")
    })
}

/// A program and all that it started in its process group; killed when it is dropped.
struct Group {
    child: Child,
    is_reaped: bool,
}

impl Group {
    /// Kills what is left, and tells how the program ended.
    fn end(&mut self) -> io::Result<ExitStatus> {
        // Until the program is reaped, nobody else can get the number of its group.
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
