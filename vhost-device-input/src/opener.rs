// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A process that opens the node at one path, again and again: the one that the guest deals with can open nothing.

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

/// The largest number of an error that Linux has.
const LAST_ERROR: i32 = 4095;

/// Our end of the process.
#[derive(Debug)]
pub struct Opener(UnixStream);

impl Opener {
    /// Starts the process, which opens the node at `path` whenever it is asked to.
    ///
    /// # Errors
    /// One line for the person who started the program.
    pub fn start(path: PathBuf) -> Result<Self, StartError> {
        let work = move |socket| serve(&path, &socket);
        start_process(env!("CARGO_PKG_NAME"), &calls(), work)
            .map(Self)
            .map_err(|error| StartError(format!("cannot start a process: {error}")))
    }

    /// What asking takes.
    pub fn needs() -> [Call; 1] {
        [Call::new(libc::SYS_recvmsg)]
    }

    /// Opens the node, for writing too if that is allowed.
    ///
    /// # Errors
    /// ENOTTY if it is no device, ECHILD if the process is gone, or what is in the way.
    pub fn open(&self) -> Result<OwnedFd, Errno> {
        retry_on_intr(|| send(&self.0, &[0], SendFlags::NOSIGNAL)).map_err(|_| Errno::CHILD)?;
        let mut bytes = [0; 4];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut files = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::WAITALL;
        let received = retry_on_intr(|| {
            recvmsg(
                &self.0,
                &mut [IoSliceMut::new(&mut bytes)],
                &mut files,
                flags,
            )
        });
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

/// What the process does.
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

/// Answers each byte with the node, or the number of an error.
fn serve(path: &Path, socket: &UnixStream) {
    while let Ok(1) = retry_on_intr(|| rustix::io::read(socket, &mut [0u8; 1])) {
        let outcome = open_node(path);
        let error = outcome
            .as_ref()
            .map_or_else(|errno| errno.raw_os_error(), |_| 0);
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

/// Opens the device at `path`, for writing too if that is allowed.
fn open_node(path: &Path) -> Result<OwnedFd, Errno> {
    // To open a device that is something else may have effects.
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
