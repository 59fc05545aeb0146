// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a device implements: the [`Device`] that a process is, and the [`QueueHandler`] that works
//! on its queues. Threads, eventfds, the socket and the rings are the core's.

use std::io;
use std::os::unix::net::UnixStream;

use thiserror::Error;

pub use crate::error::StartError;
pub use crate::sandbox::{Access, Call, Needs};
pub use crate::state::StateError;
pub use crate::wire::{
    FrontEnd, Mapping, Replies, Reply, SharedMemoryError, SharedRange, SharedRegion,
};
pub use crate::worker::QueueHandler;

/// The driver wrote what it may not write to the config space.
#[derive(Debug, Error)]
#[error("{size} bytes at offset {offset} of the config space can not be written")]
pub struct ConfigError {
    /// First byte written.
    pub offset: usize,
    /// How many bytes.
    pub size: usize,
}

/// A request of the front-end that only one type of device has.
#[derive(Debug)]
#[non_exhaustive]
pub enum DeviceRequest {
    /// GPU_SET_SOCKET: the display of a GPU, in place of the one before.
    GpuSocket(UnixStream),
}

/// A device: what it is, what it offers, and its config space.
///
/// It is made once a process, and shared by the connection and all queue handlers.
pub trait Device: Send + Sync + Sized + 'static {
    /// The device's name in the VhostUserBackend schema of QEMU.
    const TYPE: &'static str;
    /// Name of the program.
    const PROGRAM: &'static str;
    /// Version of the program.
    const VERSION: &'static str;
    /// One sentence for the descriptor and the help text.
    const DESCRIPTION: &'static str;
    /// A thread and its handler go on while none of its queues runs, until the device is reset or its front-end goes away. Else they
    /// end with the last of them.
    const KEEPS_THREADS: bool = true;
    /// Each queue's requests are completed in the order in which they were taken (VIRTIO_F_IN_ORDER).
    const IN_ORDER: bool = false;
    /// All that the guest would miss elsewhere is in its memory, what is written there is noted while it migrates (VHOST_F_LOG_ALL), and so
    /// a front-end that takes nothing else along, as QEMU, may migrate it.
    const LOGS: bool = true;
    /// Version of what [`Device::save`] gives: 0 for devices that have nothing to save.
    const STATE_VERSION: u32 = 0;
    /// [`Device::reload`] does something. SIGHUP ends the programs of other devices.
    const RELOADS: bool = false;
    /// Types of requests that are counted apart ([`Queue::complete_with`](crate::worker::Queue::complete_with)), as statistics name them.
    const REQUESTS: &'static [&'static str] = &["request"];

    /// Command line options of this device, beside those that all devices have.
    type Options: clap::Args;
    /// What works on the queues.
    type Handler: QueueHandler + Send + 'static;

    /// Features of the schema that this device has on this host (`--print-capabilities`).
    fn capabilities() -> Vec<&'static str> {
        Vec::new()
    }

    /// Opens all that the options name. Runs before the socket exists.
    ///
    /// # Errors
    /// One line for the person who started the program.
    fn open(options: Self::Options) -> Result<Self, StartError>;

    /// The device's own feature bits (0 to 23, and 50 up); the core adds those of the transport.
    fn features(&self) -> u64 {
        0
    }

    /// The features that the driver accepted, those of the transport among them.
    fn set_features(&self, _accepted: u64) {}

    /// Queues that the device has at most: one, if nothing else is said.
    fn num_queues(&self) -> u16 {
        1
    }

    /// Descriptors that a queue may have at most: as many as VIRTIO allows, if nothing else is said.
    fn max_queue_size(&self) -> u16 {
        32768
    }

    /// The whole config space, as it is now. Empty for a device that has none.
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    /// The driver writes to the config space.
    ///
    /// # Errors
    /// Nothing there can be written.
    fn write_config(&self, offset: usize, data: &[u8]) -> Result<(), ConfigError> {
        let size = data.len();
        Err(ConfigError { offset, size })
    }

    /// Protocol features that this type of device adds to the core's (vhost-user, "Protocol features").
    /// [`FrontEnd::protocol_features`] tells which the front-end accepted.
    fn protocol_features(&self) -> u64 {
        0
    }

    /// Shared memory regions of the device (VIRTIO 1.3, 2.10): always the same ones. None by default.
    fn shared_memory(&self) -> Vec<SharedRegion> {
        Vec::new()
    }

    /// A front-end has connected. `front_end` is the device's handle for it, in place of the one before.
    fn connected(&self, _front_end: &FrontEnd) {}

    /// Handles a request that only this type of device has.
    ///
    /// # Errors
    /// Returns the request if the device does not have it.
    fn handle_request(&self, request: DeviceRequest) -> Result<(), DeviceRequest> {
        Err(request)
    }

    /// The thread that works on `queue`, by a number of its own: it is the same at any time. One thread works on all queues, if nothing
    /// else is said.
    fn thread_of(&self, _queue: u16) -> u16 {
        0
    }

    /// Makes the handler of all queues of `thread`, which is about to start.
    ///
    /// # Errors
    /// A host resource is unavailable; the queue cannot start.
    fn handler(&self, thread: u16) -> io::Result<Self::Handler>;

    /// What front-ends tell a device once, and do not tell the one that takes its place: this is noted with the requests in flight, and
    /// survives the process. 0 if nothing was told.
    fn kept(&self) -> u8 {
        0
    }

    /// Takes over what another device, or this one on another connection, has kept: 0 when a connection ends. `None` if a driver goes on
    /// and nobody knows what it told.
    fn set_kept(&self, _kept: Option<u8>) {}

    /// A driver has begun anew on the same connection, without a reset that the front-end told of: forgets
    /// what the one before it left. Features and config space are already those of the new one, and no request is taken yet.
    ///
    /// A driver is a new one if its rings have another format, or begin (SET_VRING_BASE) where none stopped that has this size and
    /// these addresses. One whose ring stopped exactly at its beginning (a split ring does so after 65,536 requests, a packed one after
    /// two rounds) cannot be told from a new one with the same ring, for which no front-end sends a message; nor is one noticed where
    /// another queue is at work already.
    fn new_driver(&self) {}

    /// What the device does after [`Device::open`], beside what the core does. All else ends the process.
    fn needs(&self) -> Needs {
        Needs::default()
    }

    /// Looks again at what the options name, for that has changed: SIGHUP. The thread is none of those that call the other methods,
    /// and there need be no front-end. It is the one that ends the program when nothing else does: it must not wait for long.
    fn reload(&self) {}

    /// Forgets all that a guest left: the device is reset, or its front-end went away.
    fn reset(&self) {}

    /// Bytes that [`Device::load`] takes at most.
    fn max_state_size(&self) -> u64 {
        64 << 10
    }

    /// What this device knows of its guest, and another process must know in its place: what is neither in the guest's
    /// memory nor in what front-ends say when they start a device. No queue runs. [`state::encode`](crate::state::encode)
    /// makes bytes of a structure.
    ///
    /// # Errors
    /// There is something that cannot be taken elsewhere.
    fn save(&self) -> Result<Vec<u8>, StateError> {
        Ok(Vec::new())
    }

    /// Takes over what a device of this type saved, in place of all that it knows of a guest. `version` is
    /// [`Device::STATE_VERSION`] of the program that saved it: this one's, or an older one. No queue runs, and all handlers
    /// are made anew when they start.
    ///
    /// # Errors
    /// Anything in it is wrong. The device is then as it was before.
    fn load(&self, _version: u32, state: &[u8]) -> Result<(), StateError> {
        match state {
            [] => Ok(()),
            _ => Err(StateError::TooLong),
        }
    }
}
