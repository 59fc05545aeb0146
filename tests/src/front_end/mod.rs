// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The front-end (VMM and driver side) of a vhost-user connection.
//!
//! Modules, in the order in which a test uses them:
//! - [`memory`]: guest memory in shared memfds, with a bump allocator for rings and buffers;
//! - [`connection`]: [`RawConnection`], which sends any bytes and any file descriptors, well-formed or not;
//! - [`device`]: [`FrontEnd`], which negotiates and starts rings through the `vhost` crate's `Frontend`;
//! - [`queue`]: [`Queue`], the driver's side of a queue; [`split`] and [`packed`]: its ring, with raw access for malformed contents;
//!   [`descriptor`]: the contents of a ring;
//! - [`dirty_log`]: the memory of a guest that migrates;
//! - [`block`]: virtio-blk requests in any framing;
//! - [`console`]: control messages and ports of a console;
//! - [`gpu`]: virtio-gpu commands, and a display for the device;
//! - [`vsock`]: virtio-vsock packets;
//! - [`scsi`]: virtio-scsi requests, task management and events;
//! - [`state`]: saving and loading the state of a device.
//!
//! Misuse by a test panics. Errors of the back-end are returned as an [`Error`], or panic with
//! a message that names them where the test cannot continue.

pub mod block;
pub mod connection;
pub mod console;
pub mod descriptor;
pub mod device;
pub mod dirty_log;
mod error;
pub mod gpu;
pub mod memory;
pub mod packed;
pub mod queue;
pub mod scsi;
pub mod split;
pub mod state;
pub mod vsock;
mod watchdog;

pub use block::BlockDriver;
pub use connection::{RawConnection, Reply};
pub use console::ConsoleDriver;
pub use descriptor::{Buffer, Used};
pub use device::{FrontEnd, Options};
pub use dirty_log::{DirtyLog, Shadow};
pub use error::{Error, Result};
pub use memory::GuestMemory;
pub use queue::{Queue, QueueOptions};
