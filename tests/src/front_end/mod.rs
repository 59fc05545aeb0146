// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The front-end (VMM and driver side) of a vhost-user connection.
//!
//! Pieces, in the order in which a test uses them:
//! - [`memory`]: guest memory in shared memfds, with a bump allocator for rings and buffers;
//! - [`connection`]: [`RawConnection`], which sends any bytes and any file descriptors, well-formed or not;
//! - [`device`]: [`FrontEnd`], which negotiates and starts rings through the `vhost` crate's `Frontend`;
//! - [`queue`]: [`Queue`], the driver's side of a queue; [`split`] and [`packed`]: its ring, with raw access for malformed ones;
//!   [`descriptor`]: what lies in it;
//! - [`dirty_log`]: what a front-end does with the memory of a guest that migrates;
//! - [`block`]: virtio-blk requests in any framing;
//! - [`gpu`]: virtio-gpu commands, and a display for the device;
//! - [`state`]: saving and loading the state of a device.
//!
//! Misuse by a test panics; what the back-end does wrong is returned as an [`Error`], or panics with
//! a message that names it where no later step could be meaningful.

pub mod block;
pub mod connection;
pub mod descriptor;
pub mod device;
pub mod dirty_log;
pub mod gpu;
pub mod memory;
pub mod packed;
pub mod queue;
pub mod split;
pub mod state;
mod watchdog;

pub use block::BlockDriver;
pub use connection::{RawConnection, Reply};
pub use descriptor::Buffer;
pub use device::{FrontEnd, Options};
pub use dirty_log::{DirtyLog, Shadow};
pub use memory::GuestMemory;
pub use queue::{Queue, QueueOptions, Used};

/// What can go wrong between a front-end and the back-end that it talks to.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The `vhost` crate's front-end refused, or was refused by, the back-end.
    #[error("vhost-user: {0}")]
    Vhost(#[from] vhost::Error),
    /// A system call failed.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// Nothing came before the deadline.
    #[error("the back-end did not answer within {0:?}")]
    Timeout(std::time::Duration),
    /// The back-end closed the connection.
    #[error("the back-end closed the connection")]
    Closed,
    /// The back-end sent something that is not vhost-user.
    #[error("the back-end sent {0}")]
    Malformed(String),
}

impl From<rustix::io::Errno> for Error {
    fn from(errno: rustix::io::Errno) -> Self {
        Error::Io(errno.into())
    }
}

/// A result of this module.
pub type Result<T> = std::result::Result<T, Error>;
