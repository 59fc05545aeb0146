// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! vhost-user back-end for the VIRTIO console device (VIRTIO 1.3, 5.3): consoles and named ports.
//!
//! The `handler` finds out which queue belongs to which `port`, or is the `control` queue. What the guest writes to a port goes
//! through the `filter` into the port's `history`. From there it is sent to each `client` and written to each `log_file`, each at its
//! own pace. What the first client writes goes directly to the guest's buffers. The `endpoint` of a port is how clients arrive: a
//! pseudoterminal (`pty`), a terminal (`stdio`), a socket.

mod client;
mod commands;
mod control;
mod device;
mod endpoint;
mod filter;
mod handler;
mod history;
mod log_file;
mod options;
mod port;
mod pty;
mod saved;
mod state;
mod stdio;

pub use device::Console;
pub use filter::Filter;
