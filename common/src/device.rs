// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a device implements: the [`Device`], one a process, and the [`QueueHandler`], one a thread. The core has the threads, eventfds,
//! the socket and the rings.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use serde_json::Value;
use thiserror::Error;

pub use crate::error::StartError;
pub use crate::sandbox::{Access, Call, CapabilitySet, Needs};
pub use crate::state::StateError;
pub use crate::verb::{Argument, ArgumentType, Arguments, CommandError, Verb};
pub use crate::wire::{
    FrontEnd, Mapping, Replies, Reply, SharedMemoryError, SharedRange, SharedRegion,
};
pub use crate::worker::{QueueHandler, Watcher};
pub use rustix::net::SocketType;

/// The driver wrote to a read-only part of the config space.
#[derive(Debug, Error)]
#[error("{size} bytes at offset {offset} of the config space cannot be written")]
pub struct ConfigError {
    /// Offset of the first byte written.
    pub offset: usize,
    /// Number of bytes.
    pub size: usize,
}

/// A request of the front-end that only one type of device has.
#[derive(Debug)]
#[non_exhaustive]
pub enum DeviceRequest {
    /// GPU_SET_SOCKET: the display of a GPU, in place of the one before.
    GpuSocket(UnixStream),
}

/// A unix socket on which a device accepts connections, beside that of the front-end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListeningSocket {
    /// Where it is in the file system.
    pub path: PathBuf,
    /// Its type, such as [`SocketType::STREAM`].
    pub kind: SocketType,
    /// The option that names the path, such as `--uds-path`.
    pub option: &'static str,
}

/// A device: what it is, what it offers, and its config space.
///
/// A process creates one device. The connection and all queue handlers share it.
pub trait Device: Send + Sync + Sized + 'static {
    /// Type of the device in QEMU's VhostUserBackend schema.
    const TYPE: &'static str;
    /// Name of the program.
    const PROGRAM: &'static str;
    /// Version of the program.
    const VERSION: &'static str;
    /// One sentence for the descriptor and the help text.
    const DESCRIPTION: &'static str;
    /// Whether a thread and its handler outlive its queues, until the device is reset or the front-end disconnects. Otherwise they end
    /// when the last of their queues stops.
    const KEEPS_THREADS: bool = true;
    /// Whether each queue completes its requests in the order in which it took them (VIRTIO_F_IN_ORDER).
    const IN_ORDER: bool = false;
    /// Whether the device logs its writes to guest memory during a live migration (VHOST_F_LOG_ALL). Only for a device whose whole state
    /// is in guest memory: a front-end such as QEMU then migrates the guest and transfers nothing else.
    const LOGS: bool = true;
    /// Version of the state that [`Device::save`] returns; 0 for a device without state.
    const STATE_VERSION: u32 = 0;
    /// Whether handlers can suspend requests ([`QueueHandler::suspend`]), so that a guest migrates without waiting for them
    /// (GET_VRING_BASE_INFLIGHT, GET_VRING_BASE_SKIP_DRAIN). Devices whose requests take no time do not need this.
    const SUSPENDS: bool = false;
    /// Whether the device implements [`Device::reload`]. Without it, SIGHUP ends the program.
    const RELOADS: bool = false;
    /// Names of the request types that statistics count separately
    /// ([`Queue::complete_with`](crate::worker::Queue::complete_with)).
    const REQUESTS: &'static [&'static str] = &["request"];
    /// Commands of the control socket that this device adds to those of every device; their names must differ from those.
    const VERBS: &'static [Verb] = &[];

    /// Command line options of this device, in addition to those of all devices.
    type Options: clap::Args;
    /// The handler of the queues of one thread.
    type Handler: QueueHandler + Send + 'static;

    /// Returns the features of the schema that this device has on this host (`--print-capabilities`).
    fn capabilities() -> Vec<&'static str> {
        Vec::new()
    }

    /// Opens everything that the options name. Runs before the socket exists.
    ///
    /// # Errors
    /// Returns one line for the person who started the program.
    fn open(options: Self::Options) -> Result<Self, StartError>;

    /// Returns the device's own feature bits (0 to 23, and 50 up). The core adds those of the transport.
    fn features(&self) -> u64 {
        0
    }

    /// Receives the features that the driver accepted, including those of the transport.
    fn set_features(&self, _accepted: u64) {}

    /// Announces whether requests that are taken from now on may have to be suspended: the guest migrates, and its front-end transfers
    /// requests in flight. A handler can suspend a request only if nothing writes guest memory for it afterwards.
    fn expect_suspend(&self, _expected: bool) {}

    /// Returns the maximum number of queues. One by default.
    fn num_queues(&self) -> u16 {
        1
    }

    /// Returns the maximum number of descriptors of a queue. By default, the maximum of VIRTIO.
    fn max_queue_size(&self) -> u16 {
        32768
    }

    /// Returns the whole config space as it is now. Empty for a device without one.
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Writes to the config space for the driver.
    ///
    /// # Errors
    /// This part of the config space is read-only.
    fn write_config(&self, offset: usize, data: &[u8]) -> Result<(), ConfigError> {
        let size = data.len();
        Err(ConfigError { offset, size })
    }

    /// Returns the protocol features that this type of device adds to the core's (vhost-user, "Protocol features").
    /// [`FrontEnd::protocol_features`] returns those that the front-end accepted.
    fn protocol_features(&self) -> u64 {
        0
    }

    /// Returns the shared memory regions of the device (VIRTIO 1.3, 2.10), always the same ones. None by default.
    fn shared_memory(&self) -> Vec<SharedRegion> {
        Vec::new()
    }

    /// Receives the handle for a front-end that has connected. It replaces the previous one.
    fn connected(&self, _front_end: &FrontEnd) {}

    /// Handles a request that only this type of device has.
    ///
    /// # Errors
    /// Returns the request if the device does not have it.
    fn handle_request(&self, request: DeviceRequest) -> Result<(), DeviceRequest> {
        Err(request)
    }

    /// Returns the number of the thread that serves `queue`. It never changes. By default, one thread serves all queues.
    fn thread_of(&self, _queue: u16) -> u16 {
        0
    }

    /// Creates the handler for all queues of `thread`, which is about to start. The handler waits for files by `watcher`.
    ///
    /// # Errors
    /// A host resource is unavailable; the queue cannot start.
    fn handler(&self, thread: u16, watcher: Watcher) -> io::Result<Self::Handler>;

    /// Returns what the front-end sends to a device once, and does not send again to its replacement. The core stores it with the requests
    /// in flight, so that it survives the process. 0 if nothing was sent.
    fn kept(&self) -> u8 {
        0
    }

    /// Restores what another device, or this one on an earlier connection, returned from [`Device::kept`]; 0 when a connection ends.
    /// `None` if a driver continues and the value is unknown.
    fn set_kept(&self, _kept: Option<u8>) {}

    /// Discards the state of the previous driver: a new driver starts on the same connection, and the front-end has announced no reset.
    /// The features and the config space are already those of the new driver, and no request has been taken yet.
    ///
    /// The core detects a new driver by its rings: they have another format, or start (SET_VRING_BASE) at the beginning although the ring
    /// of this size and these addresses stopped elsewhere. It does not detect a new driver if the ring stopped exactly at its beginning
    /// (a split ring after 65,536 requests, a packed ring after two rounds), or if another queue is already running.
    fn new_driver(&self) {}

    /// Returns what the device keeps after [`Device::open`] in addition to the core. The sandbox denies everything else.
    fn needs(&self) -> Needs {
        Needs::default()
    }

    /// Returns the sockets on which the device accepts connections. The core creates their files as it creates that of `--socket-path`,
    /// and removes them at exit. None by default.
    fn sockets(&self) -> Vec<ListeningSocket> {
        Vec::new()
    }

    /// Receives the sockets of [`Device::sockets`], in their order, before the sandbox is entered. They do not block, and listen soon.
    ///
    /// All sockets of the program exist now, so no other process serves the same ones. What must not happen to the files of a running
    /// device if the program is started twice belongs here, not in [`Device::open`].
    ///
    /// # Errors
    /// Returns one line for the person who started the program.
    fn set_sockets(&self, _sockets: Vec<OwnedFd>) -> Result<(), StartError> {
        Ok(())
    }

    /// Re-examines the files named by the options (SIGHUP). Runs on the control thread, with or without a front-end, and must not block:
    /// the same thread ends the program.
    fn reload(&self) {}

    /// Executes a command of [`Device::VERBS`] for a client of the control socket. Its arguments are already checked against the
    /// description. Runs on the same thread as [`Device::reload`], and must not block either. `files` are what the client passed.
    ///
    /// # Errors
    /// The command failed.
    fn command(
        &self,
        name: &str,
        _arguments: &Arguments,
        _files: Vec<OwnedFd>,
    ) -> Result<Value, CommandError> {
        Err(CommandError::NotFound(name.to_owned()))
    }

    /// Discards all state of the guest: the device is reset, or the front-end has disconnected.
    fn reset(&self) {}

    /// Returns the maximum size of the state that [`Device::load`] accepts, in bytes.
    fn max_state_size(&self) -> u64 {
        64 << 10
    }

    /// Returns the state that another process needs to continue for this guest: everything that is neither in guest memory nor in the
    /// messages by which a front-end starts a device. No queue runs. [`state::encode`](crate::state::encode) encodes a structure.
    ///
    /// # Errors
    /// A part of the state cannot be transferred.
    fn save(&self) -> Result<Vec<u8>, StateError> {
        Ok(Vec::new())
    }

    /// Loads the state that a device of this type saved, in place of its own. `version` is [`Device::STATE_VERSION`] of the program that
    /// saved it: that of this program, or an older one. No queue runs, and the core creates new handlers when queues start.
    ///
    /// # Errors
    /// The state is invalid. The device keeps its previous state.
    fn load(&self, _version: u32, state: &[u8]) -> Result<(), StateError> {
        match state {
            [] => Ok(()),
            _ => Err(StateError::TooLong),
        }
    }
}
