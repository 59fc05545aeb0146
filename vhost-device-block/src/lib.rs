// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! vhost-user back-end for the VIRTIO block device (VIRTIO 1.3, 5.2).
//!
//! A request comes from the ring to the `handler`, which checks it (`request`) and cuts it into
//! operations on the image; an `engine` carries these out.

mod device;
mod discard;
#[allow(unsafe_code)]
mod engine;
mod format;
mod handler;
mod image;
mod lock;
mod options;
mod request;
mod source;
mod sync;
mod throttle;

pub use device::Block;
