// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! User-Mode Linux: a kernel that runs as a process of this host, needs no privileges, and has devices that the host's kernel may lack.
//!
//! [`run`] boots it, runs one program of this host in it, as root, and returns the program's exit status. The program sees the host's files
//! read-only; it can write below the target directory. `/tmp`, `/run` and `/dev` are private and empty.

pub mod front_end;
pub mod kernel;
mod processor;
pub mod vsock_test;

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use crate::cache;
use crate::guest::{GuestError, find_program, system, target_directory};

/// Memory of the machine in MiB: enough for a test with a guest of its own.
const MEMORY: u64 = 1800;

/// The init script around the program. Consoles change their output unless they are told not to; changing their settings
/// at the end waits until all output is sent.
const BEFORE: &str = r#"
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/shm /dev/pts
mount -t tmpfs shm /dev/shm
mount -t devpts pts /dev/pts
mount -t tmpfs run /run
mount -t tmpfs tmp /tmp
mkdir -p "$target"
mount -t hostfs -o "$target" host "$target"
[ -d "$VHOST_DEVICE_CACHE" ] || { mkdir -p "$VHOST_DEVICE_CACHE" && mount -t hostfs -o "$VHOST_DEVICE_CACHE" host "$VHOST_DEVICE_CACHE"; }
stty -F /dev/tty0 raw
stty -F /dev/ttyS0 raw
cd "$directory" 2>/dev/null || cd /
# The consoles understand none of the colours of the terminal that all came from.
unset TERM
"#;
const AFTER: &str = r#"
echo $? > "$status"
stty -F /dev/tty0 sane
stty -F /dev/ttyS0 sane
echo 0 > /proc/sys/kernel/printk
poweroff -f
"#;

/// Runs `program` with `arguments` in this directory and environment. Its stdout and stderr are this process's; its stdin is empty.
/// All ends after `deadline`.
pub fn run(program: &OsStr, arguments: &[OsString], deadline: Duration) -> Result<i32, GuestError> {
    let kernel = kernel::prepare()?;
    let target = target_directory()?;
    let work = work()?;
    let (init, status) = (work.path().join("init"), work.path().join("status"));
    write_init(&init, program, arguments, &target, &status)?;

    let mut command = machine(&kernel, MEMORY, work.path(), &init);
    if room("/dev/shm") < MEMORY << 20 {
        command.env("TMPDIR", work.path());
    }
    Machine::start(&mut command)?.wait(deadline)?;

    let status = fs::read_to_string(status).unwrap_or_default();
    status.trim().parse().map_err(|_| {
        GuestError::Guest("in User-Mode Linux ended before the program in it did".into())
    })
}

/// Creates an empty directory that the machine can write to, unlike the host's directory for temporary files.
pub fn work() -> Result<tempfile::TempDir, GuestError> {
    let place = target_directory()?.join("uml");
    fs::create_dir_all(&place).map_err(system(format!("create {}", place.display())))?;
    tempfile::tempdir_in(place).map_err(system("create a temporary directory"))
}

/// Returns a machine with so many MiB of memory and the host's files, whose own files are in `work` and whose first process is `init`.
fn machine(kernel: &Path, memory: u64, work: &Path, init: &Path) -> Command {
    let mut command = Command::new(kernel);
    command
        .arg(format!("mem={memory}M"))
        .args(["root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro"])
        .args(["con=null", "con0=null,fd:1", "ssl=null", "ssl0=null,fd:2"])
        .args(["quiet", "panic=-1"])
        .arg(argument("uml_dir=", work, "/"))
        .arg(argument("init=", init, ""))
        .stdin(Stdio::null())
        // The kernel makes its output non-blocking, which must not affect other writers.
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// Returns a kernel argument that contains a path.
fn argument(before: &str, path: &Path, after: &str) -> OsString {
    let mut argument = OsString::from(before);
    argument.push(path);
    argument.push(after);
    argument
}

/// Writes the script that is the machine's first process.
fn write_init(
    path: &Path,
    program: &OsStr,
    arguments: &[OsString],
    target: &Path,
    status: &Path,
) -> Result<(), GuestError> {
    let busybox = find_program("busybox").ok_or(GuestError::NotInstalled("busybox".into()))?;
    let mut script = OsString::from("#!");
    script.push(&busybox);
    script.push(" sh\n");
    for (name, value) in std::env::vars_os() {
        let is_plain = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'_';
        if name.as_bytes().iter().all(is_plain) {
            assign(&mut script, "export ", &name, &value);
        }
    }
    script.push("export HOME=/tmp TMPDIR=/tmp\n");
    // Its path depends on another one there.
    assign(&mut script, "export ", cache::CACHE, cache::directory());
    assign(&mut script, "", "target", target);
    assign(&mut script, "", "status", status);
    let directory = std::env::current_dir().unwrap_or_default();
    assign(&mut script, "", "directory", directory);
    // The shell's own programs are BusyBox's: `mount` uses none of the host's.
    for command in ["mount", "mkdir", "stty", "poweroff"] {
        script.push(format!("{command}() {{ "));
        script.push(quoted(&busybox));
        script.push(format!(" {command} \"$@\"; }}\n"));
    }
    script.push(BEFORE);
    script.push(quoted(program));
    for argument in arguments {
        script.push(" ");
        script.push(quoted(argument));
    }
    script.push(" > /dev/tty0 2> /dev/ttyS0");
    script.push(AFTER);
    fs::write(path, script.into_vec())
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(0o755)))
        .map_err(system("write the machine's first program"))
}

fn assign(script: &mut OsString, before: &str, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) {
    script.push(before);
    script.push(name);
    script.push("=");
    script.push(quoted(value));
    script.push("\n");
}

/// Quotes a word for the shell.
fn quoted(word: impl AsRef<OsStr>) -> OsString {
    let mut quoted = vec![b'\''];
    for byte in word.as_ref().as_bytes() {
        match byte {
            b'\'' => quoted.extend(br"'\''"),
            byte => quoted.push(*byte),
        }
    }
    quoted.push(b'\'');
    OsString::from_vec(quoted)
}

/// Returns the free space of a file system in bytes.
fn room(path: &str) -> u64 {
    rustix::fs::statvfs(path).map_or(0, |system| system.f_bavail * system.f_frsize)
}

/// A running kernel. Its processes are a group, which is killed when this is dropped.
struct Machine {
    child: Child,
    copies: Vec<JoinHandle<()>>,
}

impl Machine {
    fn start(command: &mut Command) -> Result<Self, GuestError> {
        let end_with_parent = || {
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
                .map_err(io::Error::from)
        };
        // SAFETY: the closure makes one system call, and allocates nothing.
        unsafe { command.pre_exec(end_with_parent) };
        let mut child = command
            .process_group(0)
            .spawn()
            .map_err(system("start User-Mode Linux"))?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        Ok(Self {
            child,
            copies: [
                stdout.map(|from| copy(from, io::stdout())),
                stderr.map(|from| copy(from, io::stderr())),
            ]
            .into_iter()
            .flatten()
            .collect(),
        })
    }

    /// Waits until it ends.
    fn wait(mut self, deadline: Duration) -> Result<(), GuestError> {
        let id = Pid::from_child(&self.child);
        let exit = pidfd_open(id, PidfdFlags::empty())
            .map_err(|error| GuestError::System("watch User-Mode Linux".into(), error.into()))?;
        let end = std::time::Instant::now() + deadline;
        loop {
            let left = end.saturating_duration_since(std::time::Instant::now());
            let timeout = Timespec::try_from(left).unwrap_or_default();
            match poll(&mut [PollFd::new(&exit, PollFlags::IN)], Some(&timeout)) {
                Ok(0) => {
                    let what = format!("in User-Mode Linux did not end within {deadline:?}");
                    return Err(GuestError::Guest(what));
                }
                Ok(_) => break,
                Err(rustix::io::Errno::INTR) => (),
                Err(error) => {
                    let what = "wait for User-Mode Linux".into();
                    return Err(GuestError::System(what, error.into()));
                }
            }
        }
        self.end();
        Ok(())
    }

    /// Kills the remaining processes, after which there is no more output.
    fn end(&mut self) {
        // Before the child is reaped: afterwards the number may belong to another group.
        let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
        let _ = self.child.wait();
        for copy in self.copies.drain(..) {
            let _ = copy.join();
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.end();
    }
}

/// Copies until no more is available, without waiting.
fn copy(
    mut from: impl Read + Send + 'static,
    mut to: impl Write + Send + 'static,
) -> JoinHandle<()> {
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(read @ 1..) = from.read(&mut buffer) {
            let _ = to.write_all(&buffer[..read]).and_then(|()| to.flush());
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_come_out_of_the_shell_as_they_were() {
        let words = ["", "a b", "it's", "'", "$HOME `id` \\ \"x\" *", "new\nline"];
        for word in words {
            let mut command = OsString::from("printf %s ");
            command.push(quoted(word));
            let output = Command::new("sh").arg("-c").arg(command).output().unwrap();
            assert_eq!(String::from_utf8(output.stdout).unwrap(), word);
        }
    }
}
