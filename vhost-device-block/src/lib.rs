// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! vhost-user back-end for the VIRTIO block device (VIRTIO 1.3, 5.2).
//!
//! A request comes from the ring to the `handler`, which checks it (`request`) and cuts it into
//! operations on the image; an engine of `vhost-device-storage` carries these out.

mod caching;
mod device;
mod handler;
mod options;
mod request;
mod shared;

pub use device::Block;
