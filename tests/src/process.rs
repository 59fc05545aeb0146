// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Programs under test: finding, starting and ending them.
//!
//! [`command`] finds a binary of this workspace, [`inherit`] hands it a file descriptor, [`Program::spawn`] starts it. A [`Program`] is
//! killed and reaped when it is dropped; if the test panics, its stdout and stderr are printed.
//! After [`Program::expect_no_leak`], dropping it panics if the program has ended before, or holds more than at first. So each
//! test of a back-end that is malicious also checks what is left behind.

use std::env;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
pub use rustix::process::Signal;
use rustix::process::{Pid, PidfdFlags, kill_process, pidfd_open};
use thiserror::Error;

/// Environment variable that names the directory of the binaries under test, instead of that of this executable.
pub const BIN_DIR: &str = "VHOST_DEVICE_BIN_DIR";

/// Environment variable with the number of kills in tests that kill a program.
pub const KILLS: &str = "VHOST_DEVICE_KILLS";

/// Time limit for operations that normally finish at once; generous, for busy machines.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Polling interval.
const INTERVAL: Duration = Duration::from_millis(2);

/// Growth of a program's anonymous memory that a test tolerates, in bytes: allocators keep some freed memory.
const GROWTH: u64 = 16 << 20;

/// Length of the output of a program that is shown when a test fails: its end, in characters.
const SHOWN: usize = 16 << 10;

/// Flag in `/proc/net/unix` of a socket that listens.
const ACCEPTS_CONNECTIONS: u32 = 1 << 16;

/// Why a program could not be found, started, or did not do what was expected.
#[derive(Debug, Error)]
pub enum ProcessError {
    /// The binary has not been built.
    #[error(
        "{0} does not exist: run `cargo build --workspace --bins`, or name the directory of the binaries in {BIN_DIR}"
    )]
    NotBuilt(PathBuf),
    /// The operating system refused.
    #[error("{0}: {1}")]
    System(&'static str, #[source] io::Error),
    /// The deadline passed.
    #[error("{program} did not {what} within {within:?}; it wrote to stderr:\n{stderr}")]
    Deadline {
        /// The program.
        program: String,
        /// What it was expected to do.
        what: &'static str,
        /// The time limit.
        within: Duration,
        /// Its stderr until then.
        stderr: String,
    },
    /// The program ended too early.
    #[error("{program} ended ({status}) before it could {what}; it wrote to stderr:\n{stderr}")]
    Ended {
        /// The program.
        program: String,
        /// What it was expected to do.
        what: &'static str,
        /// How it ended.
        status: ExitStatus,
        /// Its stderr.
        stderr: String,
    },
    /// The program holds resources that it should have released.
    #[error("{program} had {before:?}, and has {after:?} now")]
    Leak {
        /// The program.
        program: String,
        /// Expected resources.
        before: Resources,
        /// Actual resources.
        after: Resources,
    },
}

fn system(what: &'static str) -> impl FnOnce(io::Error) -> ProcessError {
    move |error| ProcessError::System(what, error)
}

/// Returns the path of the workspace's binary `name`: in the directory that [`BIN_DIR`] names, else in that of this executable.
pub fn binary(name: &str) -> Result<PathBuf, ProcessError> {
    let directory = match env::var_os(BIN_DIR) {
        Some(directory) => PathBuf::from(directory),
        None => {
            let mut directory = env::current_exe().map_err(system("find this executable"))?;
            directory.pop();
            // Cargo puts test executables one level below the binaries.
            if directory.ends_with("deps") {
                directory.pop();
            }
            directory
        }
    };
    let path = directory.join(name);
    if path.is_file() {
        Ok(path)
    } else {
        Err(ProcessError::NotBuilt(path))
    }
}

/// Returns a command that runs the workspace's binary `name`.
pub fn command(name: &str) -> Result<Command, ProcessError> {
    Ok(Command::new(binary(name)?))
}

/// Makes the program that `command` starts inherit `file` as file descriptor `number`.
pub fn inherit(command: &mut Command, file: OwnedFd, number: RawFd) {
    let place = move || {
        let source = file.as_raw_fd();
        let result = if source == number {
            // SAFETY: fcntl on a descriptor that `file` keeps open; it touches no memory.
            unsafe { libc::fcntl(source, libc::F_SETFD, 0) }
        } else {
            // SAFETY: runs in the child alone, between fork and exec; whatever `number` was there is not used again.
            unsafe { libc::dup2(source, number) }
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    };
    // SAFETY: the closure makes async-signal-safe system calls only, and allocates nothing.
    unsafe { command.pre_exec(place) };
}

/// Makes the program that `command` starts run without memory that is both writable and executable, like units with
/// `MemoryDenyWriteExecute=yes`. Fails on kernels that do not support this (before Linux 6.3).
pub fn deny_write_execute(command: &mut Command) -> io::Result<()> {
    /// `PR_SET_MDWE` and `PR_MDWE_REFUSE_EXEC_GAIN` of prctl(2), and `PR_GET_MDWE`.
    const SET: libc::c_int = 65;
    const REFUSE: libc::c_ulong = 1;
    const GET: libc::c_int = 66;
    let check = |outcome: libc::c_int| match outcome {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    };
    // SAFETY: it tells what holds for this process, and touches no memory.
    check(unsafe { libc::prctl(GET, 0, 0, 0, 0) })?;
    // SAFETY: as above, of the child alone.
    let deny = move || check(unsafe { libc::prctl(SET, REFUSE, 0, 0, 0) });
    // SAFETY: the closure makes one system call only, and allocates nothing.
    unsafe { command.pre_exec(deny) };
    Ok(())
}

/// Resources of a process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resources {
    /// Open file descriptors.
    pub files: usize,
    /// Threads.
    pub threads: usize,
    /// Shared mappings: guest memory, requests in flight, and io_uring rings.
    pub mappings: usize,
}

/// A running program, with its output captured.
#[derive(Debug)]
pub struct Program {
    name: String,
    child: Child,
    exit: OwnedFd,
    stdout: File,
    stderr: File,
    /// Its resources and anonymous memory at first, if it must hold no more in the end.
    at_first: Option<(Resources, u64)>,
}

impl Program {
    /// Starts `command`. The command sets its stdin; stdout and stderr are captured.
    pub fn spawn(command: &mut Command) -> Result<Self, ProcessError> {
        let stdout = tempfile::tempfile().map_err(system("create a file for stdout"))?;
        let stderr = tempfile::tempfile().map_err(system("create a file for stderr"))?;
        let child_stdout = stdout.try_clone().map_err(system("duplicate stdout"))?;
        let child_stderr = stderr.try_clone().map_err(system("duplicate stderr"))?;
        command.stdout(child_stdout).stderr(child_stderr);
        let name = Path::new(command.get_program())
            .file_name()
            .unwrap_or(command.get_program())
            .to_string_lossy()
            .into_owned();
        let mut child = command.spawn().map_err(system("start the program"))?;
        match pidfd_open(Pid::from_child(&child), PidfdFlags::empty()) {
            Ok(exit) => Ok(Self {
                name,
                child,
                exit,
                stdout,
                stderr,
                at_first: None,
            }),
            Err(error) => {
                // Not yet in a `Program`, so nothing else would end it.
                let _ = child.kill();
                let _ = child.wait();
                Err(ProcessError::System("watch the program", error.into()))
            }
        }
    }

    /// Returns the process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends `signal`; nothing happens if the program has ended.
    pub fn signal(&mut self, signal: Signal) -> Result<(), ProcessError> {
        self.at_first = None;
        // Reaps it if it has ended, after which the process id may belong to someone else.
        if self.status()?.is_none() {
            kill_process(Pid::from_child(&self.child), signal)
                .map_err(|error| ProcessError::System("send a signal", error.into()))?;
        }
        Ok(())
    }

    /// Returns how the program ended, or `None` while it runs.
    pub fn status(&mut self) -> Result<Option<ExitStatus>, ProcessError> {
        self.child
            .try_wait()
            .map_err(system("ask for the exit status"))
    }

    /// Waits until the program ends.
    pub fn wait(&mut self, within: Duration) -> Result<ExitStatus, ProcessError> {
        let deadline = Instant::now() + within;
        loop {
            if let Some(status) = self.status()? {
                return Ok(status);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self.deadline("end", within));
            }
            let timeout = Timespec {
                tv_sec: left.as_secs() as _,
                tv_nsec: left.subsec_nanos() as _,
            };
            match poll(
                &mut [PollFd::new(&self.exit, PollFlags::IN)],
                Some(&timeout),
            ) {
                Ok(_) | Err(rustix::io::Errno::INTR) => (),
                Err(error) => {
                    return Err(ProcessError::System("wait for the program", error.into()));
                }
            }
        }
    }

    /// Sends `signal` and waits until the program ends.
    pub fn end(&mut self, signal: Signal, within: Duration) -> Result<ExitStatus, ProcessError> {
        self.signal(signal)?;
        self.wait(within)
    }

    /// Starts `command`, and waits until a program listens at `socket`.
    pub fn serve(command: &mut Command, socket: &Path) -> Result<Self, ProcessError> {
        let mut program = Self::spawn(command)?;
        program.wait_for_listener(socket)?;
        Ok(program)
    }

    /// Waits until a program listens at `path`. It does not connect, so the program does not notice.
    pub fn wait_for_listener(&mut self, path: &Path) -> Result<(), ProcessError> {
        self.wait_until("listen on its socket", PATIENCE, || listens(path))
    }

    /// Waits until `condition` holds, as long as the program runs. `what` completes "the program did not …".
    pub fn wait_until(
        &mut self,
        what: &'static str,
        within: Duration,
        mut condition: impl FnMut() -> io::Result<bool>,
    ) -> Result<(), ProcessError> {
        let deadline = Instant::now() + within;
        loop {
            let status = self.status()?;
            if condition().map_err(system(what))? {
                return Ok(());
            }
            if let Some(status) = status {
                return Err(ProcessError::Ended {
                    program: self.name.clone(),
                    what,
                    status,
                    stderr: self.stderr(),
                });
            }
            if Instant::now() >= deadline {
                return Err(self.deadline(what, within));
            }
            thread::sleep(INTERVAL);
        }
    }

    /// Returns what the program has written to stdout.
    pub fn stdout(&self) -> String {
        contents(&self.stdout)
    }

    /// Returns the stderr of the program, including lines that its log thread is about to write.
    pub fn stderr(&self) -> String {
        let deadline = Instant::now() + PATIENCE;
        while has_log_to_write(self.id()) && Instant::now() < deadline {
            thread::sleep(INTERVAL);
        }
        contents(&self.stderr)
    }

    /// Returns the resources of the program.
    pub fn resources(&self) -> Result<Resources, ProcessError> {
        resources(self.id())
    }

    /// Waits until the program holds no more than `most`, which takes a moment after a connection has ended.
    pub fn wait_for_resources(&mut self, most: Resources) -> Result<(), ProcessError> {
        let id = self.id();
        let mut last = most;
        let settled = self.wait_until("release its resources", PATIENCE, || {
            last = resources(id).map_err(io::Error::other)?;
            Ok(last.files <= most.files
                && last.threads <= most.threads
                && last.mappings <= most.mappings)
        });
        match settled {
            Err(ProcessError::Deadline { program, .. }) => Err(ProcessError::Leak {
                program,
                before: most,
                after: last,
            }),
            settled => settled,
        }
    }

    /// From now on the program must not end by itself, and must hold no more than now when this is dropped and all
    /// connections to it are closed; otherwise dropping it panics. A program that was sent a signal is exempt.
    pub fn expect_no_leak(&mut self) -> Result<(), ProcessError> {
        self.at_first = Some((self.resources()?, self.anonymous_bytes()?));
        Ok(())
    }

    /// Reverts [`Program::expect_no_leak`], for a test that ends the program, or makes it do something unusual.
    pub fn expect_anything(&mut self) {
        self.at_first = None;
    }

    /// Returns how a program violates [`Program::expect_no_leak`].
    fn leak(&mut self) -> Option<String> {
        let (before, bytes) = self.at_first.take()?;
        if let Err(error) = self.wait_for_resources(before) {
            return Some(error.to_string());
        }
        match self.anonymous_bytes() {
            Ok(after) if after <= bytes + GROWTH => None,
            Ok(after) => Some(format!("{bytes} bytes of memory became {after}")),
            Err(error) => Some(error.to_string()),
        }
    }

    /// Returns the processor time that the program has taken so far.
    pub fn processor_time(&self) -> Result<Duration, ProcessError> {
        let read = || {
            let stat = fs::read_to_string(format!("/proc/{}/stat", self.id()))?;
            // The name of the program, in parentheses, may contain anything.
            let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
            let times = fields.split_whitespace().skip(11).take(2);
            let ticks = times.map(|field| field.parse::<u64>());
            ticks.sum::<Result<u64, _>>().map_err(io::Error::other)
        };
        let ticks = read().map_err(system("read the program's processor time"))?;
        Ok(Duration::from_secs(1) * ticks as u32 / rustix::param::clock_ticks_per_second() as u32)
    }

    /// Returns the memory that the program occupies now, in bytes.
    pub fn resident_bytes(&self) -> Result<u64, ProcessError> {
        self.memory("VmRSS:")
    }

    /// Returns the most memory that the program has occupied so far, in bytes.
    pub fn peak_resident_bytes(&self) -> Result<u64, ProcessError> {
        self.memory("VmHWM:")
    }

    /// Returns the anonymous memory of the program, in bytes.
    pub fn anonymous_bytes(&self) -> Result<u64, ProcessError> {
        self.memory("RssAnon:")
    }

    /// Returns by how many bytes [`Program::anonymous_bytes`] has grown since it was `before`.
    pub fn anonymous_growth(&self, before: u64) -> Result<u64, ProcessError> {
        Ok(self.anonymous_bytes()?.saturating_sub(before))
    }

    fn memory(&self, field: &str) -> Result<u64, ProcessError> {
        let read = || {
            let status = fs::read_to_string(format!("/proc/{}/status", self.id()))?;
            let line = status.lines().find_map(|line| line.strip_prefix(field));
            let kibibytes =
                line.and_then(|rest| rest.trim().strip_suffix(" kB")?.parse::<u64>().ok());
            kibibytes
                .map(|kibibytes| kibibytes * 1024)
                .ok_or_else(|| io::Error::other(format!("no {field} in its status")))
        };
        read().map_err(system("read the program's memory use"))
    }

    fn deadline(&self, what: &'static str, within: Duration) -> ProcessError {
        ProcessError::Deadline {
            program: self.name.clone(),
            what,
            within,
            stderr: self.stderr(),
        }
    }
}

/// Returns whether a back-end's log thread is running, or may not have set its name yet.
fn has_log_to_write(id: u32) -> bool {
    let is_at_work = |task: io::Result<fs::DirEntry>| {
        let stat = fs::read_to_string(task.ok()?.path().join("stat")).ok()?;
        let (number, _) = stat.split_once(' ')?;
        let is_nameless = stat.contains("(vhost-device-") && number.parse() != Ok(id);
        let works = |state: &str| state.starts_with(['R', 'D']);
        let log = stat.split_once(" (log) ");
        Some(is_nameless || log.is_some_and(|(_, state)| works(state)))
    };
    let tasks = fs::read_dir(format!("/proc/{id}/task"));
    tasks.is_ok_and(|mut tasks| tasks.any(|task| is_at_work(task) == Some(true)))
}

/// Returns the resources of a process.
fn resources(id: u32) -> Result<Resources, ProcessError> {
    let count = |list: &str| -> io::Result<usize> {
        let mut entries = fs::read_dir(format!("/proc/{id}/{list}"))?;
        entries.try_fold(0, |count, entry| entry.map(|_| count + 1))
    };
    let maps = fs::read_to_string(format!("/proc/{id}/maps")).map_err(system("read mappings"))?;
    let is_shared = |line: &&str| {
        let permissions = line.split_whitespace().nth(1);
        permissions.is_some_and(|permissions| permissions.ends_with('s'))
    };
    Ok(Resources {
        files: count("fd").map_err(system("count file descriptors"))?,
        threads: count("task").map_err(system("count threads"))?,
        mappings: maps.lines().filter(is_shared).count(),
    })
}

impl Drop for Program {
    fn drop(&mut self) {
        let leak = match thread::panicking() {
            true => None,
            false => self.leak(),
        };
        let status = self.status();
        if !matches!(status, Ok(Some(_))) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        if thread::panicking() || leak.is_some() {
            let state = match status {
                Ok(Some(status)) => status.to_string(),
                _ => "still running, killed now".to_owned(),
            };
            let (stdout, stderr) = (self.stdout(), self.stderr());
            let (stdout, stderr) = (end_of(&stdout), end_of(&stderr));
            eprintln!(
                "--- {} ({state})\n--- stdout\n{stdout}--- stderr\n{stderr}---",
                self.name
            );
        }
        if let Some(leak) = leak {
            panic!("{}: {leak}", self.name);
        }
    }
}

/// Returns whether a program listens at the socket `path`, which must be the path that was bound.
pub fn listens(path: &Path) -> io::Result<bool> {
    let mut table = Vec::new();
    File::open("/proc/net/unix")?.read_to_end(&mut table)?;
    Ok(table.split(|&byte| byte == b'\n').any(|line| {
        // Columns: number, references, protocol, flags, type, state, inode, path.
        let columns = line
            .strip_suffix(path.as_os_str().as_bytes())
            .and_then(|line| str::from_utf8(line).ok());
        let flags = columns
            .and_then(|columns| u32::from_str_radix(columns.split_whitespace().nth(3)?, 16).ok());
        flags.is_some_and(|flags| flags & ACCEPTS_CONNECTIONS != 0)
    }))
}

/// Returns how often a test kills its program: `few` times, or as often as [`KILLS`] says.
pub fn kills(few: u64) -> u64 {
    let kills = env::var(KILLS).ok();
    kills.map_or(few, |kills| {
        kills
            .parse()
            .unwrap_or_else(|_| panic!("{KILLS}={kills} is no number"))
    })
}

/// Returns `--NAME=VALUE`, for a value that need not be UTF-8.
pub fn option(name: &str, value: impl AsRef<std::ffi::OsStr>) -> OsString {
    let mut option = OsString::from(format!("--{name}="));
    option.push(value);
    option
}

fn end_of(output: &str) -> &str {
    let start = output.char_indices().rev().nth(SHOWN);
    &output[start.map_or(0, |(index, _)| index)..]
}

/// Reads from the start, without moving the position at which the program writes.
fn contents(file: &File) -> String {
    let mut bytes = vec![
        0;
        file.metadata()
            .map_or(0, |metadata| metadata.len() as usize)
    ];
    let read = file.read_at(&mut bytes, 0).unwrap_or(0);
    bytes.truncate(read);
    String::from_utf8_lossy(&bytes).into_owned()
}
