// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The back-ends that are compared: how each starts, and what a running one consumes.

use std::ffi::OsString;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::process::{self, PATIENCE, ProcessError, Program, Signal};

/// Name of our own back-end, the one that ratios are of.
pub const OURS: &str = "vhost-device-block";
const QEMU: &str = "qemu-storage-daemon";

/// A back-end with its settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Peer {
    /// Our own.
    VhostDeviceBlock,
    /// qemu-storage-daemon as it comes: aio=threads.
    QsdThreads,
    /// qemu-storage-daemon with aio=io_uring.
    QsdIoUring,
    /// The same in an iothread that polls for up to 32 us.
    QsdIoUringIothread,
}

impl Peer {
    /// All, in the order in which they take turns.
    pub const ALL: [Peer; 4] = [
        Peer::VhostDeviceBlock,
        Peer::QsdThreads,
        Peer::QsdIoUring,
        Peer::QsdIoUringIothread,
    ];

    /// The name in the table and for `--peers`.
    pub fn name(self) -> &'static str {
        match self {
            Peer::VhostDeviceBlock => OURS,
            Peer::QsdThreads => "qsd-threads",
            Peer::QsdIoUring => "qsd-io_uring",
            Peer::QsdIoUringIothread => "qsd-io_uring-iothread",
        }
    }

    /// The first line of what the program says of its version.
    pub fn version(self) -> Result<String, ProcessError> {
        let output = Command::new(self.program()?)
            .arg("--version")
            .output()
            .map_err(|error| ProcessError::System("ask for the version", error))?;
        let text = String::from_utf8_lossy(&output.stdout);
        Ok(text.lines().next().unwrap_or_default().to_owned())
    }

    fn program(self) -> Result<PathBuf, ProcessError> {
        match self {
            Peer::VhostDeviceBlock => process::binary(OURS),
            _ => Ok(PathBuf::from(QEMU)),
        }
    }

    /// The command that serves `image` at `socket`.
    pub fn command(
        self,
        image: &Image,
        socket: &Path,
        queues: usize,
    ) -> Result<Command, ProcessError> {
        let mut command = Command::new(self.program()?);
        if self == Peer::VhostDeviceBlock {
            command.arg(process::option("socket-path", socket));
            command.arg(process::option("blk-file", &image.path));
            command.arg(format!("--num-queues={queues}"));
            command.args(image.direct.then_some("--direct"));
            return Ok(command);
        }
        let (aio, iothread) = match self {
            Peer::QsdThreads => ("threads", false),
            Peer::QsdIoUring => ("io_uring", false),
            _ => ("io_uring", true),
        };
        let direct = if image.direct { "on" } else { "off" };
        let mut blockdev = OsString::from(format!(
            "driver=file,node-name=disk,aio={aio},cache.direct={direct},discard=unmap,filename="
        ));
        blockdev.push(&image.path);
        let mut export = OsString::from(format!(
            "type=vhost-user-blk,id=export,node-name=disk,writable=on,num-queues={queues},"
        ));
        if iothread {
            command.args(["--object", "iothread,id=thread,poll-max-ns=32768"]);
            export.push("iothread=thread,");
        }
        export.push("addr.type=unix,addr.path=");
        export.push(socket);
        command.arg("--blockdev").arg(blockdev);
        command.arg("--export").arg(export);
        Ok(command)
    }

    /// Starts the peer and waits until its socket takes a connection, without making more than one.
    pub fn start(
        self,
        image: &Image,
        socket: &Path,
        queues: usize,
    ) -> Result<Running, ProcessError> {
        let mut command = self.command(image, socket, queues)?;
        let started = Instant::now();
        let mut program = Program::spawn(&mut command)?;
        let stream = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(_) if started.elapsed() < PATIENCE && program.status()?.is_none() => {
                    std::thread::sleep(Duration::from_micros(20));
                }
                // Waits no longer: this makes the error that names the program and shows its stderr.
                Err(_) => {
                    program.wait_until("listen on its socket", Duration::ZERO, || Ok(false))?;
                    unreachable!("the condition never holds");
                }
            }
        };
        Ok(Running {
            ready: started.elapsed(),
            program,
            stream: Some(stream),
        })
    }
}

/// A disk image.
#[derive(Debug, Clone)]
pub struct Image {
    /// The file.
    pub path: PathBuf,
    /// Open it with O_DIRECT.
    pub direct: bool,
}

/// A peer that runs.
#[derive(Debug)]
pub struct Running {
    /// Time from the start of the program to the connection.
    pub ready: Duration,
    program: Program,
    stream: Option<UnixStream>,
}

impl Running {
    /// The connection that was made at the start. It can be taken once.
    pub fn take_stream(&mut self) -> UnixStream {
        self.stream.take().expect("taken once")
    }

    /// CPU time that all threads of the process, ended ones too, have used so far.
    pub fn cpu_time(&self) -> io::Result<Duration> {
        let mut clock = 0;
        // SAFETY: the call writes the clock id to a live variable.
        let result = unsafe { libc::clock_getcpuclockid(self.program.id() as i32, &mut clock) };
        if result != 0 {
            return Err(io::Error::from_raw_os_error(result));
        }
        let mut time = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: the call writes the time to a live variable.
        if unsafe { libc::clock_gettime(clock, &mut time) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Duration::new(time.tv_sec as u64, time.tv_nsec as u32))
    }

    /// Most memory that was resident at any time (guest memory that it mapped and touched included), in bytes.
    pub fn peak_resident(&self) -> Result<u64, ProcessError> {
        self.program.peak_resident_bytes()
    }

    /// Anonymous memory that is resident now: the pages that the process itself costs, in bytes.
    pub fn own_resident(&self) -> io::Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.program.id()))?;
        status
            .lines()
            .find_map(|line| {
                line.strip_prefix("RssAnon:")?
                    .trim()
                    .strip_suffix(" kB")?
                    .parse()
                    .ok()
            })
            .map(|kibibytes: u64| kibibytes * 1024)
            .ok_or_else(|| io::Error::other("no RssAnon in the status of the process"))
    }

    /// What the peer wrote to stderr, to go with an error.
    pub fn stderr(&self) -> String {
        self.program.stderr()
    }

    /// Ends the peer.
    pub fn end(mut self) -> Result<(), ProcessError> {
        drop(self.stream.take());
        self.program.end(Signal::TERM, PATIENCE)?;
        Ok(())
    }
}
