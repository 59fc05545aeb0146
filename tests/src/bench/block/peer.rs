// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The back-ends that are compared: how each starts.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Serialize;

use crate::bench::running::Running;
use crate::process::{self, ProcessError};

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
        Running::start(&mut self.command(image, socket, queues)?, socket)
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
