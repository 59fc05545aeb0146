// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! vhost-user back-end for the VIRTIO input device (VIRTIO 1.3, 5.8): one evdev node of the host.
//!
//! The `handler` reads events from the node (`host_device`, `source`), collects them into whole reports (`report`) and
//! writes these to the guest's buffers. When reports were dropped, it compares what the guest knows of keys and axes
//! with their current `state`. `config` answers the guest's queries about the device's `identity`.

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
