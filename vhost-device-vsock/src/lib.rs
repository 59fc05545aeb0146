// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! vhost-user back-end for the VIRTIO socket device (VIRTIO 1.3, 5.10).
//!
//! The `handler` serves the queues. `guest` handles packets of the guest, `host` events of the host's sockets, and `outgoing` sends
//! packets to the guest. They work on the `table` of `connection`s, each with its `credit` and its `buffer`; `lifecycle` adds and
//! removes these.

mod buffer;
mod connection;
mod credit;
mod device;
mod guest;
mod handler;
mod host;
mod lifecycle;
mod options;
mod outgoing;
mod packet;
mod ports;
mod shared;
mod socket;
mod table;

pub use device::Vsock;
