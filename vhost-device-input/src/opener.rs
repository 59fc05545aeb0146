// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A process that opens the node, again and again, for the main process, whose sandbox does not allow opening files.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, open, stat};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, send, sendmsg,
};
use vhost_device_common::device::{Call, StartError};
use vhost_device_common::sandbox::start_process;

/// Largest error number of Linux.
const LAST_ERROR: i32 = 4095;

/// The connection to the process.
#[derive(Debug)]
pub struct Opener(UnixStream);

impl Opener {
    /// Starts a process that opens the node at `path` on request.
    ///
    /// # Errors
    /// The process cannot be started.
    pub fn start(path: PathBuf) -> Result<Self, StartError> {
        let work = move |socket| serve(&path, &socket);
        start_process(env!("CARGO_PKG_NAME"), &calls(), work)
            .map(Self)
            .map_err(|error| {
                StartError(format!(
                    "cannot start the process that opens the node: {error}"
                ))
            })
    }

    /// Returns the system calls that [`Opener::open`] needs.
    pub fn needs() -> [Call; 1] {
        [Call::new(libc::SYS_recvmsg)]
    }

    /// Opens the node for reading and, if permitted, writing.
    ///
    /// # Errors
    /// ENOTTY if it is not a character device, ECHILD if the process has ended, or the error of opening it.
    pub fn open(&self) -> Result<OwnedFd, Errno> {
        retry_on_intr(|| send(&self.0, &[0], SendFlags::NOSIGNAL)).map_err(|_| Errno::CHILD)?;
        let mut bytes = [0; 4];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut files = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::WAITALL;
        let mut text = [IoSliceMut::new(&mut bytes)];
        let received = retry_on_intr(|| recvmsg(&self.0, &mut text, &mut files, flags));
        if received.map(|message| message.bytes) != Ok(bytes.len()) {
            return Err(Errno::CHILD);
        }
        let file = files.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut files) => files.next(),
            _ => None,
        });
        file.ok_or_else(|| match i32::from_ne_bytes(bytes) {
            number @ 1..=LAST_ERROR => Errno::from_raw_os_error(number),
            _ => Errno::CHILD,
        })
    }
}

/// Returns the system calls that the process needs.
fn calls() -> Vec<Call> {
    let calls = [
        libc::SYS_recvfrom,
        libc::SYS_sendmsg,
        libc::SYS_openat,
        libc::SYS_newfstatat,
        libc::SYS_statx,
    ];
    let mut calls = calls.map(Call::new).to_vec();
    #[cfg(target_arch = "x86_64")]
    calls.extend([libc::SYS_open, libc::SYS_stat].map(Call::new));
    calls
}

/// Answers each byte received with the node, or with an error number.
fn serve(path: &Path, socket: &UnixStream) {
    while let Ok(1) = retry_on_intr(|| rustix::io::read(socket, &mut [0u8; 1])) {
        let outcome = open_node(path);
        let error = outcome.as_ref().err();
        let error = error.map_or(0, |errno| errno.raw_os_error());
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut files = SendAncillaryBuffer::new(&mut space);
        let file = outcome.as_ref().map(|node| [node.as_fd()]);
        if let Ok(file) = &file {
            files.push(SendAncillaryMessage::ScmRights(file));
        }
        let bytes = error.to_ne_bytes();
        let text = [IoSlice::new(&bytes)];
        if retry_on_intr(|| sendmsg(socket, &text, &mut files, SendFlags::NOSIGNAL)).is_err() {
            return;
        }
    }
}

/// Opens the node at `path` for reading and, if permitted, writing.
fn open_node(path: &Path) -> Result<OwnedFd, Errno> {
    // Opening another kind of file may have side effects.
    if FileType::from_raw_mode(stat(path)?.st_mode) != FileType::CharacterDevice {
        return Err(Errno::NOTTY);
    }
    let flags = OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    match open(path, flags | OFlags::RDWR, Mode::empty()) {
        Err(Errno::ACCESS | Errno::PERM | Errno::ROFS) => {
            open(path, flags | OFlags::RDONLY, Mode::empty())
        }
        result => result,
    }
}
