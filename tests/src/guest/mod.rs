// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A real QEMU with a Linux guest.
//!
//! A [`Machine`] specifies a guest: a shell script, kernel modules, programs of this host, vhost-user devices. [`Machine::start`] builds
//! the initramfs and starts QEMU with a [`kernel`] of Debian. In the guest, the script runs with `set -e`; the host receives its output line
//! by line, and a line `@name value` is a marker that [`Guest::wait`] waits for. The kernel's messages use another port, so that they
//! never split a marker. When the script ends, the guest powers off.
//!
//! The logs of the last run of each machine stay in `guest/logs/NAME` of Cargo's target directory; they are printed when a test panics.

pub mod agent;
pub mod dbus;
mod error;
mod host;
mod initramfs;
pub mod kernel;
pub mod libvirt;
mod output;
pub mod picture;
pub mod qemu;
mod qmp;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

pub use self::error::GuestError;
pub(crate) use self::error::system;
pub use self::host::find_program;
pub(crate) use self::host::{output, target_directory};
use self::kernel::Flavour;
pub use self::output::Output;
use self::output::{CONSOLE_LOG, Logs, SCRIPT_LOG};
use self::qemu::NewQemu;
pub use self::qmp::Qmp;
use crate::process::{Program, listens};

/// The program that runs guests.
pub const QEMU: &str = "qemu-system-x86_64";

/// Interval at which the state of a migration is queried.
const MIGRATION_INTERVAL: Duration = Duration::from_millis(50);

/// Kernel command line: console on the first serial port, a panic ends the machine, and no features that only cost time under emulation.
const KERNEL_COMMAND_LINE: &str =
    "console=ttyS0 quiet panic=-1 random.trust_cpu=on mitigations=off tsc=reliable";

/// The configuration of a virtual machine.
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
    flavour: Flavour,
    qemu: Option<NewQemu>,
    deadline: Duration,
}

impl Machine {
    /// Creates a machine with one processor and 512 MiB that runs `script`. Its logs are kept under `name`, which must be unique.
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
            flavour: Flavour::Cloud,
            qemu: None,
            deadline: Duration::from_secs(240),
        }
    }

    /// Loads the kernel module `name` and its dependencies before the script starts.
    pub fn module(mut self, name: &str) -> Self {
        self.modules.push(name.into());
        self
    }

    /// Copies this host's program `name`, or that with this path, with its libraries to `/programs` in the guest. BusyBox is always there, and its shell
    /// prefers its own programs: one that it has too must be called by its path.
    pub fn program(mut self, name: &str) -> Self {
        self.programs.push(name.into());
        self
    }

    /// Adds a device of the type and properties `device`, whose back-end listens at `socket`.
    pub fn vhost_user(self, device: &str, socket: &Path) -> Self {
        self.vhost_user_on(device, socket, "")
    }

    /// Adds a device whose back-end may disconnect: QEMU tries to reconnect ten times a second.
    pub fn vhost_user_reconnecting(self, device: &str, socket: &Path) -> Self {
        self.vhost_user_on(device, socket, ",reconnect-ms=100")
    }

    fn vhost_user_on(self, device: &str, socket: &Path, options: &str) -> Self {
        let id = format!("vhost{}", self.arguments.len());
        self.argument("-chardev")
            .argument(joined(&format!("socket,id={id},path="), socket, options))
            .argument("-device")
            .argument(format!("{device},chardev={id}"))
    }

    /// Adds an argument to QEMU's command line.
    pub fn argument(mut self, argument: impl Into<OsString>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// Makes the machine wait for an incoming migration on the socket `path`, instead of booting.
    pub fn incoming(self, path: &Path) -> Self {
        self.argument("-incoming")
            .argument(joined("unix:", path, ""))
    }

    /// Gives the machine `mebibytes` of memory.
    pub fn memory(mut self, mebibytes: u32) -> Self {
        self.memory = mebibytes;
        self
    }

    /// Reserves room for hot-plugging memory: two slots, 2 GiB in all.
    pub fn memory_slots(mut self) -> Self {
        self.memory_slots = ",slots=2,maxmem=2G";
        self
    }

    /// Lets the guest reboot; by default a reboot ends the machine.
    pub fn reboots(mut self) -> Self {
        self.reboots = true;
        self
    }

    /// Boots Debian's generic kernel instead of the one for virtual machines without a screen.
    pub fn kernel(mut self, flavour: Flavour) -> Self {
        self.flavour = flavour;
        self
    }

    /// Runs the guest in `qemu` instead of the installed one.
    pub fn qemu(mut self, qemu: NewQemu) -> Self {
        self.qemu = Some(qemu);
        self
    }

    /// Sets the time limit of the guest, which is four minutes by default.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Writes the initial RAM file system with the machine's modules, programs and script.
    fn write_initramfs(&self, path: &Path, kernel: &kernel::Kernel) -> Result<(), GuestError> {
        initramfs::write(path, kernel, &self.modules, &self.programs, &self.script)
    }

    /// Starts the machine.
    pub fn start(self) -> Result<Guest, GuestError> {
        let kernel = kernel::Kernel::prepare(self.flavour)?;
        let logs = Logs::create(&self.name, self.deadline)?;
        let files = tempfile::tempdir().map_err(system("create a temporary directory"))?;
        let initramfs = files.path().join("initramfs");
        self.write_initramfs(&initramfs, &kernel)?;

        let memory = self.memory;
        let qmp = files.path().join("qmp");
        let mut command = qemu::command(self.qemu.as_ref())?;
        command
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            // Emulated processors run everywhere; many machines that run tests have no working KVM.
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
            let log = logs.directory().join(log);
            command.arg("-serial").arg(joined("file:", &log, ""));
        }
        if !self.reboots {
            command.arg("-no-reboot");
        }
        command.args(&self.arguments).stdin(Stdio::null());
        let qemu = Program::spawn(&mut command)?;
        Ok(Guest {
            qemu,
            qmp,
            logs,
            _files: files,
        })
    }
}

fn joined(before: &str, path: &Path, after: &str) -> OsString {
    let mut joined = OsString::from(before);
    joined.push(path);
    joined.push(after);
    joined
}

/// A running virtual machine. Dropping it ends it.
#[derive(Debug)]
pub struct Guest {
    qemu: Program,
    qmp: PathBuf,
    logs: Logs,
    _files: TempDir,
}

impl Guest {
    /// Waits for the next marker `@name value` and returns its value, which may be empty.
    pub fn wait(&mut self, name: &str) -> Result<String, GuestError> {
        self.logs.wait(name, || ended(&mut self.qemu))
    }

    /// Waits until the script has ended well and the guest has powered off, and returns what the script wrote.
    pub fn finish(&mut self) -> Result<Output, GuestError> {
        self.logs.wait_for_end(|| ended(&mut self.qemu))?;
        let status = self.qemu.wait(self.logs.left())?;
        if !status.success() {
            return Err(self
                .logs
                .trouble(format!("powered off, but QEMU: {status}")));
        }
        Ok(self.logs.output())
    }

    /// Returns what the script has written so far on this machine.
    pub fn output(&self) -> Output {
        self.logs.output()
    }

    /// Migrates the guest to the machine that waits at the socket `path`, and ends this machine. Returns QEMU's statistics.
    pub fn migrate(&mut self, path: &Path) -> Result<Value, GuestError> {
        while !listens(path).map_err(system("look for the other machine"))? {
            if self.logs.left().is_zero() {
                return Err(self
                    .logs
                    .trouble("cannot migrate: no machine waits for it".to_owned()));
            }
            std::thread::sleep(MIGRATION_INTERVAL);
        }
        let mut qmp = self.qmp()?;
        let uri = joined("unix:", path, "");
        qmp.execute("migrate", json!({ "uri": uri.to_string_lossy() }))?;
        loop {
            let report = qmp.execute("query-migrate", json!({}))?;
            match report["status"].as_str() {
                Some("completed") => {
                    qmp.execute("quit", json!({}))?;
                    self.qemu.wait(self.logs.left())?;
                    return Ok(report);
                }
                Some("failed" | "cancelled") => {
                    return Err(self.logs.trouble(format!("did not migrate: {report}")));
                }
                _ if self.logs.left().is_zero() => {
                    return Err(self.logs.trouble(format!("still migrates: {report}")));
                }
                _ => std::thread::sleep(MIGRATION_INTERVAL),
            }
        }
    }

    /// Connects to QEMU's control socket.
    pub fn qmp(&self) -> Result<Qmp, GuestError> {
        Qmp::connect(&self.qmp)
    }

    /// Returns what QEMU has written to stderr.
    pub fn qemu_stderr(&self) -> String {
        self.qemu.stderr()
    }

    /// Returns the processor time that QEMU has taken so far.
    pub fn qemu_processor_time(&self) -> Result<Duration, GuestError> {
        Ok(self.qemu.processor_time()?)
    }
}

fn ended(qemu: &mut Program) -> Result<Option<String>, GuestError> {
    Ok(qemu.status()?.map(|status| format!("QEMU: {status}")))
}
