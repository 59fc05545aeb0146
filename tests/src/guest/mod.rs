// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A real QEMU with a real Linux guest.
//!
//! A [`Machine`] says what the guest has: a shell script, kernel modules, programs of this host, vhost-user devices. [`Machine::start`] builds
//! the initramfs and starts QEMU on a [`kernel`] of Debian's. In the guest, the script runs with `set -e`; its output comes to the host line
//! by line, and a line `@name value` is a marker that [`Guest::wait`] waits for. The kernel's messages go to a port of their own, so that they
//! never cut a marker in two. When the script ends, the guest powers off.
//!
//! The logs of the last run of each machine stay in `guest/logs/NAME` of Cargo's target directory; when a test panics they are printed.

mod initramfs;
pub mod kernel;
mod qmp;

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use thiserror::Error;

pub use self::qmp::Qmp;
use crate::process::{ProcessError, Program};

/// The program that runs guests.
pub const QEMU: &str = "qemu-system-x86_64";

/// Linux in the guest: console on the first serial port, a panic ends the machine, and nothing that only costs time under emulation.
const KERNEL_COMMAND_LINE: &str =
    "console=ttyS0 quiet panic=-1 random.trust_cpu=on mitigations=off tsc=reliable";

/// How often the guest's output is looked at.
const INTERVAL: Duration = Duration::from_millis(10);

/// Why a guest could not be started, or did not do what was waited for.
#[derive(Error)]
pub enum GuestError {
    /// The operating system refused.
    #[error("cannot {0}: {1}")]
    System(String, #[source] io::Error),
    /// A program of the host is missing.
    #[error("{0} is not installed: `cargo xtask test` as root installs what guests need")]
    NotInstalled(String),
    /// A program of the host that prepares something failed.
    #[error("`{command}` failed ({status}):\n{stderr}")]
    Command {
        /// What was run.
        command: String,
        /// How it ended.
        status: std::process::ExitStatus,
        /// What it wrote to stderr.
        stderr: String,
    },
    /// No kernel package can be had.
    #[error("no kernel for the guest: {0}")]
    NoKernel(String),
    /// QEMU could not be started or watched.
    #[error("QEMU: {0}")]
    Qemu(#[from] ProcessError),
    /// The guest did not do what was waited for.
    #[error("the guest {0}")]
    Guest(String),
    /// QEMU refused a QMP command, or its answer made no sense.
    #[error("QMP {command}: {answer}")]
    Qmp {
        /// The command.
        command: String,
        /// What came back.
        answer: String,
    },
}

/// The same as the message, because tests unwrap.
impl std::fmt::Debug for GuestError {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, formatter)
    }
}

fn system(what: impl Into<String>) -> impl FnOnce(io::Error) -> GuestError {
    let what = what.into();
    move |error| GuestError::System(what, error)
}

/// Runs a program of the host to its end and returns its stdout.
pub(crate) fn output(command: &mut Command) -> Result<Vec<u8>, GuestError> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => GuestError::NotInstalled(name.clone()),
            _ => GuestError::System(format!("run {name}"), error),
        })?;
    if !output.status.success() {
        return Err(GuestError::Command {
            command: format!("{command:?}").replace('"', ""),
            status: output.status,
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        });
    }
    Ok(output.stdout)
}

/// Finds a program of the host, also where only root's `PATH` leads.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .map(|directory| directory.join(name))
        .find(|path| path.is_file())
}

/// Where kernels and logs are kept: `guest` in the target directory that this executable was built into.
fn cache_directory() -> Result<PathBuf, GuestError> {
    let executable = std::env::current_exe().map_err(system("find this executable"))?;
    let profile = executable
        .ancestors()
        .skip(1)
        .find(|directory| !directory.ends_with("deps"));
    let target = profile.and_then(Path::parent).unwrap_or(Path::new("/tmp"));
    Ok(target.join("guest"))
}

/// A virtual machine that is yet to start.
#[derive(Debug)]
pub struct Machine {
    name: String,
    script: String,
    modules: Vec<String>,
    programs: Vec<String>,
    arguments: Vec<OsString>,
    memory: u32,
    memory_slots: &'static str,
    reboots: bool,
    deadline: Duration,
}

impl Machine {
    /// A machine with one processor and 512 MiB that runs `script`. Its logs are kept under `name`, which no other machine may have.
    pub fn new(name: &str, script: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            script: script.into(),
            modules: Vec::new(),
            programs: Vec::new(),
            arguments: Vec::new(),
            memory: 512,
            memory_slots: "",
            reboots: false,
            deadline: Duration::from_secs(240),
        }
    }

    /// Loads the kernel module `name`, and all that it needs, before the script starts.
    pub fn module(mut self, name: &str) -> Self {
        self.modules.push(name.into());
        self
    }

    /// Copies this host's program `name` with its libraries into the guest, to `/programs`. BusyBox is always there, and its shell
    /// prefers its own programs: one that it has too must be called by its path.
    pub fn program(mut self, name: &str) -> Self {
        self.programs.push(name.into());
        self
    }

    /// Adds a device of the type and properties `device`, whose back-end listens at `socket`.
    pub fn vhost_user(self, device: &str, socket: &Path) -> Self {
        let id = format!("vhost{}", self.arguments.len());
        let mut chardev = OsString::from(format!("socket,id={id},path="));
        chardev.push(socket);
        self.argument("-chardev")
            .argument(chardev)
            .argument("-device")
            .argument(format!("{device},chardev={id}"))
    }

    /// Adds an argument to QEMU's command line.
    pub fn argument(mut self, argument: impl Into<OsString>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// Gives the machine `mebibytes` of memory.
    pub fn memory(mut self, mebibytes: u32) -> Self {
        self.memory = mebibytes;
        self
    }

    /// Leaves room for memory to be plugged in while the guest runs: two slots, 2 GiB in all.
    pub fn memory_slots(mut self) -> Self {
        self.memory_slots = ",slots=2,maxmem=2G";
        self
    }

    /// Lets the guest reboot, instead of ending the machine when it does.
    pub fn reboots(mut self) -> Self {
        self.reboots = true;
        self
    }

    /// How long the guest may live, instead of four minutes.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Starts the machine.
    pub fn start(self) -> Result<Guest, GuestError> {
        let kernel = kernel::Kernel::prepare()?;
        let logs = cache_directory()?.join("logs").join(&self.name);
        fs::create_dir_all(&logs).map_err(system(format!("create {}", logs.display())))?;
        let files = tempfile::tempdir().map_err(system("create a temporary directory"))?;
        let initramfs = files.path().join("initramfs");
        initramfs::write(
            &initramfs,
            &kernel,
            &self.modules,
            &self.programs,
            &self.script,
        )?;

        let memory = self.memory;
        let qmp = files.path().join("qmp");
        let mut command = Command::new(QEMU);
        command
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            // Emulated processors run everywhere; KVM is not there, or does not work, on many machines that run tests.
            .args(["-machine", "q35,accel=tcg"])
            .args(["-cpu", "max"])
            .args(["-m", &format!("{memory}{}", self.memory_slots)])
            // vhost-user back-ends map the guest's memory, so it must be shareable.
            .arg("-object")
            .arg(format!(
                "memory-backend-memfd,id=memory,size={memory}M,share=on"
            ))
            .args(["-machine", "memory-backend=memory"])
            .arg("-kernel")
            .arg(&kernel.image)
            .arg("-initrd")
            .arg(&initramfs)
            .args(["-append", KERNEL_COMMAND_LINE])
            .arg("-qmp")
            .arg(joined("unix:", &qmp, ",server=on,wait=off"));
        for log in [CONSOLE_LOG, SCRIPT_LOG] {
            let log = logs.join(log);
            fs::write(&log, "").map_err(system(format!("write {}", log.display())))?;
            command.arg("-serial").arg(joined("file:", &log, ""));
        }
        if !self.reboots {
            command.arg("-no-reboot");
        }
        command.args(&self.arguments).stdin(Stdio::null());
        if find_program(QEMU).is_none() {
            return Err(GuestError::NotInstalled(QEMU.into()));
        }
        let qemu = Program::spawn(&mut command)?;
        Ok(Guest {
            qemu,
            qmp,
            logs,
            deadline: Instant::now() + self.deadline,
            seen: 0,
            _files: files,
        })
    }
}

const CONSOLE_LOG: &str = "console.log";
const SCRIPT_LOG: &str = "script.log";

fn joined(before: &str, path: &Path, after: &str) -> OsString {
    let mut joined = OsString::from(before);
    joined.push(path);
    joined.push(after);
    joined
}

/// A virtual machine that runs. Dropping it ends it.
#[derive(Debug)]
pub struct Guest {
    qemu: Program,
    qmp: PathBuf,
    logs: PathBuf,
    deadline: Instant,
    /// How many lines of the script's output have been looked at.
    seen: usize,
    _files: TempDir,
}

impl Guest {
    /// Waits for the next marker `@name value` and returns its value, which may be empty.
    pub fn wait(&mut self, name: &str) -> Result<String, GuestError> {
        loop {
            // Asked for first: what an ended QEMU has written is all there.
            let ended = self.qemu.status()?;
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
            if let Some(status) = ended {
                return Err(self.trouble(format!(
                    "was gone before a marker @{name} came; QEMU: {status}"
                )));
            }
            if Instant::now() >= self.deadline {
                return Err(self.trouble(format!("did not write the marker @{name} in time")));
            }
            thread::sleep(INTERVAL);
        }
    }

    /// Waits until the script has ended well and the guest has powered off, and returns what the script wrote.
    pub fn finish(&mut self) -> Result<Output, GuestError> {
        let status = self.wait("end")?;
        if status != "0" {
            return Err(self.trouble(format!("script failed with status {status}")));
        }
        let left = self.deadline.saturating_duration_since(Instant::now());
        let status = self.qemu.wait(left)?;
        if !status.success() {
            return Err(self.trouble(format!("powered off, but QEMU: {status}")));
        }
        Ok(Output(self.lines()))
    }

    /// Connects to QEMU's control socket.
    pub fn qmp(&self) -> Result<Qmp, GuestError> {
        Qmp::connect(&self.qmp)
    }

    /// What QEMU has written to stderr.
    pub fn qemu_stderr(&self) -> String {
        self.qemu.stderr()
    }

    fn trouble(&self, what: String) -> GuestError {
        GuestError::Guest(format!("{what} (logs: {})", self.logs.display()))
    }

    /// The whole lines that the script has written.
    fn lines(&self) -> Vec<String> {
        let log = fs::read(self.logs.join(SCRIPT_LOG)).unwrap_or_default();
        let text = String::from_utf8_lossy(&log);
        text.split_inclusive('\n')
            .filter_map(|line| line.strip_suffix('\n'))
            .map(|line| line.trim_end_matches('\r').to_owned())
            .collect()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if thread::panicking() {
            for log in [CONSOLE_LOG, SCRIPT_LOG] {
                let log = self.logs.join(log);
                let text = fs::read(&log).unwrap_or_default();
                eprintln!(
                    "--- guest's {}\n{}",
                    log.display(),
                    String::from_utf8_lossy(&text)
                );
            }
        }
    }
}

fn marker(line: &str) -> Option<(&str, &str)> {
    let line = line.strip_prefix('@')?;
    Some(line.split_once(' ').unwrap_or((line, "")))
}

/// What a guest's script wrote.
#[derive(Clone, Debug)]
pub struct Output(Vec<String>);

impl Output {
    /// The values of all markers `@name value`, in the order in which they came.
    pub fn values<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        let markers = self.0.iter().filter_map(|line| marker(line));
        markers
            .filter(move |(found, _)| *found == name)
            .map(|(_, value)| value)
    }

    /// The value of the first marker `@name value`.
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
