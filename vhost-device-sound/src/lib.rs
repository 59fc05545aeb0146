// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! vhost-user back-end for the VIRTIO sound device (VIRTIO 1.3, 5.14).
//!
//! The `handler` serves all queues on one thread. The `card` has the state of the device: each `stream` has a `lifecycle`, a `clock`, the
//! buffers that the driver has queued, and the host's end in `backend`. `control` answers the requests about all of them.

mod backend;
mod card;
mod chmap;
mod clock;
mod control;
mod device;
mod elements;
mod format;
mod gain;
mod handler;
mod jack;
mod lifecycle;
mod options;
mod profile;
mod protocol;
mod request_type;
mod stream;

pub use device::Sound;
