// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The same guests, run by libvirt's system daemon, as root, with QEMU as the user `libvirt-qemu`.
//!
//! The daemon is private to a test. It runs in its own namespaces, with its own `/run` and libvirt directories: it
//! does not interact with a daemon of the host, systemd, D-Bus, control groups or the firewall. It is used through `virsh` only.

use std::fs::{self, Permissions};
use std::io::{self, PipeWriter};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use tempfile::TempDir;

use super::output::{CONSOLE_LOG, Logs, Output, SCRIPT_LOG, print};
use super::{GuestError, KERNEL_COMMAND_LINE, Machine, QEMU, find_program, kernel, system};
use crate::process::{PATIENCE, Program};

/// Time limit of a libvirt command. libvirt runs QEMU to query its capabilities before it starts the first domain.
const COMMAND_PATIENCE: Duration = Duration::from_secs(120);

/// How often libvirt is asked whether a domain has shut down.
const INTERVAL: Duration = Duration::from_millis(100);

/// Namespaces for the daemon. When their first process ends, the kernel ends all the others: virtual machines too.
const NAMESPACES: [&str; 5] = ["--mount", "--net", "--pid", "--mount-proc", "--kill-child"];

/// The first process in the namespaces: makes the directories private, and runs as long as its stdin is open. It is a shell because it has
/// to reap the children of the daemon. Control groups are hidden because libvirt would create some in those of the whole host.
const INIT: &str = r#"
set -e
[ ! -d "$1/over-etc" ] || mount -t overlay overlay -o "lowerdir=$1/over-etc:/etc" /etc
mount --bind "$1/run" /run
mount --bind "$1/etc" /etc/libvirt
mount --bind "$1/lib" /var/lib/libvirt
mount --bind "$1/cache" /var/cache/libvirt
mount --bind "$2" /var/log/libvirt
umount --recursive --lazy /sys/fs/cgroup || true
libvirtd &
cat
"#;

/// Settings of libvirt's QEMU driver: file ownership is not recorded in the file, logs are written without a daemon, and AppArmor,
/// which is shared with the host, gets no profiles.
const SETTINGS: &str = r#"
remember_owner = 0
stdio_handler = "file"
security_driver = "none"
"#;

/// Returns why this host cannot run libvirt's system daemon in its own namespaces, if it cannot.
pub fn obstacle() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("libvirt's system daemon needs root".into());
    }
    let output = Command::new("unshare")
        .args(NAMESPACES)
        .arg("true")
        .output();
    match output {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(String::from_utf8_lossy(&output.stderr).trim().into()),
        Err(error) => Some(format!("unshare: {error}")),
    }
}

/// A libvirt daemon. Dropping it ends it, with all its children.
#[derive(Debug)]
struct Daemon {
    /// While this is open, the daemon's namespaces live.
    lifeline: Option<PipeWriter>,
    program: Program,
    files: TempDir,
}

impl Daemon {
    /// Starts a daemon that writes its logs to `logs`.
    fn start(files: TempDir, logs: &Path) -> Result<Self, GuestError> {
        for program in ["libvirtd", "virsh", QEMU] {
            find_program(program).ok_or_else(|| GuestError::NotInstalled(program.into()))?;
        }
        let (stdin, lifeline) = io::pipe().map_err(system("create a pipe"))?;
        let mut command = Command::new("unshare");
        command
            .args(NAMESPACES)
            .args(["sh", "-c", INIT, "sh"])
            .args([files.path(), logs])
            .stdin(Stdio::from(stdin));
        let mut daemon = Self {
            lifeline: Some(lifeline),
            program: Program::spawn(&mut command)?,
            files,
        };
        let socket = daemon.socket();
        daemon
            .program
            .wait_until("make libvirtd listen", PATIENCE, || {
                Ok(UnixStream::connect(&socket).is_ok())
            })?;
        Ok(daemon)
    }

    fn socket(&self) -> PathBuf {
        self.files.path().join("run/libvirt/libvirt-sock")
    }

    /// Runs a command of `virsh`, and returns what it prints.
    fn virsh(&self, arguments: &[&str]) -> Result<String, GuestError> {
        let mut command = Command::new("virsh");
        command
            .arg("--connect")
            .arg(format!(
                "qemu+unix:///system?socket={}",
                self.socket().display()
            ))
            .args(arguments)
            .env("LC_ALL", "C")
            .stdin(Stdio::null());
        let mut virsh = Program::spawn(&mut command)?;
        let status = virsh.wait(COMMAND_PATIENCE)?;
        if !status.success() {
            return Err(GuestError::Command {
                command: format!("virsh {}", arguments.join(" ")),
                status,
                stderr: virsh.stderr(),
            });
        }
        Ok(virsh.stdout())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.lifeline = None;
        // When the first process of the namespaces has ended, all others have too.
        let _ = self.program.wait(PATIENCE);
    }
}

/// A virtual machine that libvirt runs. Dropping it ends it, and libvirt.
#[derive(Debug)]
pub struct Domain {
    name: String,
    daemon: Daemon,
    logs: Logs,
}

impl Machine {
    /// Starts the machine in its own libvirt, with `devices` in libvirt's XML. It cannot have arguments for QEMU. `descriptors` of
    /// vhost-user back-ends, by file name, are added to those in `/etc/qemu/vhost-user`.
    pub fn start_in_libvirt(
        self,
        devices: &str,
        descriptors: &[(&str, &str)],
    ) -> Result<Domain, GuestError> {
        assert!(self.arguments.is_empty() && self.memory_slots.is_empty());
        let kernel = kernel::Kernel::prepare(self.flavour)?;
        let logs = Logs::create(&self.name, self.deadline)?;
        let files = tempfile::tempdir().map_err(system("create a temporary directory"))?;
        prepare(files.path(), logs.directory())
            .map_err(system("prepare directories for libvirt"))?;
        let initramfs = files.path().join("lib/initramfs");
        self.write_initramfs(&initramfs, &kernel)?;
        // A copy, because libvirt changes its owner to QEMU's user.
        let image = files.path().join("lib/boot/image");
        fs::copy(&kernel.image, &image).map_err(system("copy the kernel"))?;
        for (name, text) in descriptors {
            let directory = files.path().join("over-etc/qemu/vhost-user");
            fs::create_dir_all(&directory)
                .and_then(|()| fs::write(directory.join(name), text))
                .map_err(system("write a descriptor"))?;
        }
        let definition = files.path().join("domain.xml");
        let xml = self.xml(devices);
        fs::write(&definition, xml).map_err(system("write the domain's definition"))?;

        let daemon = Daemon::start(files, logs.directory())?;
        let domain = Domain {
            name: self.name,
            daemon,
            logs,
        };
        domain.virsh(&["define", &definition.to_string_lossy()])?;
        domain.virsh(&["start", &domain.name])?;
        Ok(domain)
    }

    fn xml(&self, devices: &str) -> String {
        let Self { name, memory, .. } = self;
        let on_reboot = if self.reboots { "restart" } else { "destroy" };
        let qemu = find_program(QEMU).unwrap_or_default();
        let qemu = qemu.display();
        let serial = |log: &str, port: u32| {
            format!(
                "<serial type='file'><source path='/var/log/libvirt/{log}'/><target port='{port}'/></serial>"
            )
        };
        let console = serial(CONSOLE_LOG, 0);
        let script = serial(SCRIPT_LOG, 1);
        format!(
            "<domain type='qemu'>
               <name>{name}</name>
               <memory unit='MiB'>{memory}</memory>
               <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>
               <vcpu>1</vcpu>
               <cpu mode='maximum'/>
               <os>
                 <type arch='x86_64' machine='q35'>hvm</type>
                 <kernel>/var/lib/libvirt/boot/image</kernel>
                 <initrd>/var/lib/libvirt/initramfs</initrd>
                 <cmdline>{KERNEL_COMMAND_LINE}</cmdline>
               </os>
               <features><acpi/></features>
               <on_reboot>{on_reboot}</on_reboot>
               <devices>
                 <emulator>{qemu}</emulator>
                 {console}
                 {script}
                 <controller type='usb' model='none'/>
                 <memballoon model='none'/>
                 {devices}
               </devices>
             </domain>"
        )
    }
}

/// Creates the private directories, and lets QEMU's user read what it needs.
fn prepare(files: &Path, logs: &Path) -> io::Result<()> {
    for name in ["run", "etc", "lib", "lib/boot", "cache"] {
        let directory = files.join(name);
        fs::create_dir(&directory)?;
        fs::set_permissions(&directory, Permissions::from_mode(0o755))?;
    }
    fs::write(files.join("etc/qemu.conf"), SETTINGS)?;
    fs::write(files.join("lib/initramfs"), "")?;
    fs::set_permissions(files.join("lib/initramfs"), Permissions::from_mode(0o644))?;
    fs::set_permissions(logs, Permissions::from_mode(0o755))?;
    // libvirt appends to this one.
    match fs::remove_dir_all(logs.join("qemu")) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

impl Domain {
    /// Runs a command of `virsh`, and returns what it prints.
    pub fn virsh(&self, arguments: &[&str]) -> Result<String, GuestError> {
        self.daemon.virsh(arguments)
    }

    /// Waits for the next marker `@name value` and returns its value, which may be empty.
    pub fn wait(&mut self, name: &str) -> Result<String, GuestError> {
        self.logs.wait(name, || Ok(ended(&self.daemon, &self.name)))
    }

    /// Waits until the script has ended well and the domain has shut down by itself, and returns what the script wrote.
    pub fn finish(&mut self) -> Result<Output, GuestError> {
        self.logs
            .wait_for_end(|| Ok(ended(&self.daemon, &self.name)))?;
        loop {
            let state = self.virsh(&["domstate", "--reason", &self.name])?;
            let state = state.trim();
            if state == "shut off (shutdown)" {
                return Ok(self.logs.output());
            }
            if state.starts_with("shut off") || self.logs.left().is_zero() {
                return Err(self
                    .logs
                    .trouble(format!("ended its script, but its domain is {state}")));
            }
            thread::sleep(INTERVAL);
        }
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        if thread::panicking() {
            let log = format!("qemu/{}.log", self.name);
            print(&self.logs.directory().join(log));
        }
    }
}

/// Returns how the domain has ended, if it has. While it runs, libvirt keeps a file with QEMU's process id.
fn ended(daemon: &Daemon, name: &str) -> Option<String> {
    let file = format!("run/libvirt/qemu/{name}.pid");
    let runs = daemon.files.path().join(file).exists();
    (!runs).then(|| "libvirt has ended its domain".into())
}
