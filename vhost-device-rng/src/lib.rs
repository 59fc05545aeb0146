// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! vhost-user back-end for the VIRTIO entropy device (VIRTIO 1.3, 5.4).
//!
//! The `device` fills the guest's buffers with bytes from a `source`, within its `quota`.

mod device;
mod options;
mod quota;
mod source;

pub use device::Rng;
