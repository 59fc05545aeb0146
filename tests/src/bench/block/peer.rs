// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The back-ends that are compared: how each starts.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::{Deserialize, Serialize};

use super::image::{Image, Place};
use crate::bench::running::Running;
use crate::process::{self, ProcessError};

/// Name of our own back-end, the one that ratios are of.
pub const OURS: &str = "vhost-device-block";
/// The null device on our core, measured in its place.
const NULL_DEVICE: &str = "null-device";
const QEMU: &str = "qemu-storage-daemon";

/// A back-end with its settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Peer {
    /// Our own.
    #[serde(rename = "vhost-device-block")]
    Ours,
    /// Our own with packed rings.
    #[serde(rename = "vhost-device-block-packed")]
    OursPacked,
    /// qemu-storage-daemon with its default, aio=threads.
    #[serde(rename = "qsd-threads")]
    QsdThreads,
    /// qemu-storage-daemon with aio=io_uring.
    #[serde(rename = "qsd-io_uring")]
    QsdIoUring,
    /// The same in an iothread that polls for up to 32 us.
    #[serde(rename = "qsd-io_uring-iothread")]
    QsdIoUringIothread,
    /// No back-end: the file itself.
    #[serde(rename = "file")]
    File,
}

impl Peer {
    /// All, in the order in which they take turns.
    pub const ALL: [Peer; 6] = [
        Peer::Ours,
        Peer::OursPacked,
        Peer::QsdThreads,
        Peer::QsdIoUring,
        Peer::QsdIoUringIothread,
        Peer::File,
    ];

    /// The settings of qemu-storage-daemon.
    pub const QSD: [Peer; 3] = [Peer::QsdThreads, Peer::QsdIoUring, Peer::QsdIoUringIothread];

    /// Returns the name in the table and for `--peers`.
    pub fn name(self) -> &'static str {
        match self {
            Peer::Ours => OURS,
            Peer::OursPacked => "vhost-device-block-packed",
            Peer::QsdThreads => "qsd-threads",
            Peer::QsdIoUring => "qsd-io_uring",
            Peer::QsdIoUringIothread => "qsd-io_uring-iothread",
            Peer::File => "file",
        }
    }

    /// Returns the name in the table of `place`.
    pub fn name_at(self, place: Place) -> &'static str {
        match (self, place) {
            (Peer::Ours, Place::Null) => NULL_DEVICE,
            (Peer::OursPacked, Place::Null) => "null-device-packed",
            (Peer::QsdThreads, Place::Null) => "null-co",
            (Peer::QsdIoUringIothread, Place::Null) => "null-co-iothread",
            _ => self.name(),
        }
    }

    /// Returns whether it is measured at `place`, which is so where its settings make a difference.
    pub fn is_at(self, place: Place) -> bool {
        match place {
            // io_uring is not the fastest access to a file there.
            Place::Tmpfs => self != Peer::File,
            Place::Disk | Place::PageCache => self != Peer::OursPacked,
            // Without I/O, engines do not differ.
            Place::Null => !matches!(self, Peer::QsdIoUring | Peer::File),
        }
    }

    /// Returns whether it is one of ours.
    pub fn is_ours(self) -> bool {
        matches!(self, Peer::Ours | Peer::OursPacked)
    }

    /// Returns the first line of what the program says of its version.
    pub fn version(self) -> Result<String, ProcessError> {
        if self == Peer::File {
            return Ok("io_uring, without a back-end".to_owned());
        }
        let output = Command::new(self.program(Place::Tmpfs)?)
            .arg("--version")
            .output()
            .map_err(|error| ProcessError::System("ask for the version", error))?;
        let text = String::from_utf8_lossy(&output.stdout);
        Ok(text.lines().next().unwrap_or_default().to_owned())
    }

    fn program(self, place: Place) -> Result<PathBuf, ProcessError> {
        match (self.is_ours(), place) {
            (true, Place::Null) => process::binary(NULL_DEVICE),
            (true, _) => process::binary(OURS),
            (false, _) => Ok(PathBuf::from(QEMU)),
        }
    }

    /// Returns the command that serves `image` at `socket`.
    pub fn command(
        self,
        image: &Image,
        socket: &Path,
        queues: usize,
    ) -> Result<Command, ProcessError> {
        let mut command = Command::new(self.program(image.place)?);
        if self.is_ours() {
            command.arg(process::option("socket-path", socket));
            if image.place != Place::Null {
                command.arg(process::option("blk-file", &image.path));
                command.arg(format!("--num-queues={queues}"));
                command.args(image.is_direct().then_some("--direct"));
            }
            return Ok(command);
        }
        let aio = match self {
            Peer::QsdThreads => "threads",
            _ => "io_uring",
        };
        let direct = if image.is_direct() { "on" } else { "off" };
        let blockdev = match image.place {
            Place::Null => {
                let size = image.place.size();
                format!("driver=null-co,node-name=disk,size={size},read-zeroes=off").into()
            }
            _ => {
                let mut blockdev = OsString::from(format!(
                    "driver=file,node-name=disk,aio={aio},cache.direct={direct},discard=unmap,filename="
                ));
                blockdev.push(&image.path);
                blockdev
            }
        };
        let mut export = OsString::from(format!(
            "type=vhost-user-blk,id=export,node-name=disk,writable=on,num-queues={queues},"
        ));
        if self == Peer::QsdIoUringIothread {
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
