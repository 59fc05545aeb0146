// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The socket device: its options, config space and listening sockets.

use std::collections::HashSet;
use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde_json::Value;
use vhost_device_common::device::{
    Access, Arguments, Call, CommandError, Device, ListeningSocket, Needs, StartError, StateError,
    Verb, Watcher,
};

use crate::handler::{EVENT_QUEUE, VsockHandler};
use crate::options::Options;
use crate::packet::NAMES;
use crate::shared::{SEQPACKET, Shared};

/// VIRTIO_VSOCK_F_STREAM: connections of bytes.
const STREAM: u64 = 1 << 0;

/// Longest path of a unix socket in bytes.
const MAX_PATH: usize = 107;
/// Longest ending of a path: `_` and a port. `_seqpacket` is not longer.
const MAX_ENDING: usize = 11;

/// Files beside those of connections.
const OTHER_FILES: u64 = 64;

/// The command that counts connections.
const QUERY_CONNECTIONS: &str = "query-connections";

/// The socket device.
pub struct Vsock(Arc<Shared>);

impl Device for Vsock {
    const TYPE: &'static str = "vsock";
    const PROGRAM: &'static str = env!("CARGO_PKG_NAME");
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const DESCRIPTION: &'static str = "vhost-user back-end for a virtio socket device";
    const IN_ORDER: bool = true;
    const REQUESTS: &'static [&'static str] = NAMES;
    const VERBS: &'static [Verb] = &[Verb {
        name: QUERY_CONNECTIONS,
        help: "Returns the number of open connections, and how many were opened, refused and reset since the start.",
        arguments: &[],
        files: 0,
    }];

    type Options = Options;
    type Handler = VsockHandler;

    fn open(options: Options) -> Result<Self, StartError> {
        check(&options)?;
        Ok(Self(Arc::new(Shared::new(options))))
    }

    fn features(&self) -> u64 {
        STREAM | SEQPACKET
    }

    fn set_features(&self, accepted: u64) {
        self.0.features.store(accepted, Ordering::Relaxed);
    }

    /// `rx`, `tx` and `event` (VIRTIO 1.3, 5.10.2). Some front-ends keep the event queue.
    fn num_queues(&self) -> u16 {
        EVENT_QUEUE + 1
    }

    /// `guest_cid` (VIRTIO 1.3, 5.10.4).
    fn config(&self) -> Vec<u8> {
        u64::from(self.0.options.guest_cid).to_le_bytes().into()
    }

    fn handler(&self, _thread: u16, watcher: Watcher) -> io::Result<VsockHandler> {
        VsockHandler::new(Arc::clone(&self.0), watcher)
    }

    fn sockets(&self) -> Vec<ListeningSocket> {
        let paths = self.0.listening_paths().into_iter();
        paths
            .map(|(path, kind)| ListeningSocket {
                path,
                kind: kind.socket_type(),
                option: "--uds-path",
            })
            .collect()
    }

    fn set_sockets(&self, sockets: Vec<OwnedFd>) -> Result<(), StartError> {
        let kinds = self.0.listening_paths().into_iter().map(|(_, kind)| kind);
        *self.0.listeners() = sockets.into_iter().map(Arc::new).zip(kinds).collect();
        Ok(())
    }

    fn needs(&self) -> Needs {
        let Options {
            uds_path,
            forward,
            host_vsock,
            max_connections,
            ..
        } = &self.0.options;
        let mut queue = Call::connect_unix();
        let plain = [libc::SYS_accept4, libc::SYS_readv];
        queue.extend(plain.map(Call::new));
        queue.push(Call::new(libc::SYS_ioctl).with(1, libc::FIONREAD as u32));
        if *host_vsock {
            queue.push(Call::new(libc::SYS_socket).with(0, libc::AF_VSOCK as u32));
        }
        let paths = uds_path.iter();
        let paths = paths.chain(forward.iter().map(|forward| &forward.path));
        let directories = paths.map(|path| (directory(path), Access::CONNECT));
        Needs {
            queue,
            files: directories.collect(),
            open_files: u64::from(*max_connections) + OTHER_FILES,
            ..Needs::default()
        }
    }

    fn new_driver(&self) {
        self.0.driver.fetch_add(1, Ordering::Relaxed);
    }

    /// The driver continues with the connections of a device that has ended.
    fn set_kept(&self, kept: Option<u8>) {
        self.0.is_reset_due.store(kept.is_none(), Ordering::Relaxed);
    }

    /// Connections are not part of the state: the guest learns from the event queue that they are gone.
    fn load(&self, _version: u32, state: &[u8]) -> Result<(), StateError> {
        if !state.is_empty() {
            return Err(StateError::TooLong);
        }
        self.0.is_reset_due.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn command(
        &self,
        name: &str,
        _arguments: &Arguments,
        _files: Vec<OwnedFd>,
    ) -> Result<Value, CommandError> {
        match name {
            QUERY_CONNECTIONS => Ok(self.0.counters.to_json()),
            _ => Err(CommandError::NotFound(name.to_owned())),
        }
    }
}

/// Checks what cannot be checked option by option.
fn check(options: &Options) -> Result<(), StartError> {
    let mut cids = HashSet::from([options.guest_cid]);
    for forward in &options.forward {
        if !cids.insert(forward.cid) {
            return Err(StartError(format!(
                "CID {} of --forward is that of another guest; give each guest its own",
                forward.cid
            )));
        }
    }
    let paths = options.uds_path.iter().map(|path| ("--uds-path", path));
    let forwards = options.forward.iter();
    let forwards = forwards.map(|forward| ("--forward", &forward.path));
    for (option, path) in paths.chain(forwards) {
        let length = path.as_os_str().as_bytes().len();
        if length == 0 || length + MAX_ENDING > MAX_PATH {
            return Err(StartError(format!(
                "the path of {option} has {length} bytes; it must have 1 to {}, because ports are appended to it",
                MAX_PATH - MAX_ENDING
            )));
        }
    }
    Ok(())
}

/// Returns the directory of a path.
fn directory(path: &Path) -> PathBuf {
    let parent = path.parent().map(|parent| parent.as_os_str().to_owned());
    let parent = parent.filter(|parent: &OsString| !parent.is_empty());
    parent.map_or_else(|| ".".into(), PathBuf::from)
}
