// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! vhost-user back-end for the VIRTIO input device (VIRTIO 1.3, 5.8): one evdev node of the host.
//!
//! Events come from the node (`node`, `source`) to the `handler`, which has them put together to
//! whole reports (`report`) and writes these into the buffers of the guest. What the guest believes
//! of keys and axes is compared with what they are (`state`) whenever reports had to be dropped.
//! `config` answers what the guest asks about the device.

mod config;
mod device;
mod event;
mod handler;
mod host_device;
mod identity;
#[allow(unsafe_code)]
mod node;
mod opener;
mod options;
mod report;
mod saved;
mod source;
mod state;

pub use device::Input;
pub use event::Event;
pub use identity::{Axis, Bitmap, Identity, Ids};
pub use source::Source;
pub use state::State;
