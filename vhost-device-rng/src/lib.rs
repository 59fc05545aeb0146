// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! vhost-user back-end for the VIRTIO entropy device (VIRTIO 1.3, 5.4).
//!
//! The `device` fills the buffers of the guest with the bytes of a `source`, and no more of them in
//! a period than its `quota`.

mod device;
mod options;
mod quota;
mod source;

pub use device::Rng;
