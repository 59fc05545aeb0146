// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! vhost-user back-end for the VIRTIO GPU device (VIRTIO 1.3, 5.7).
//!
//! A command comes from the control queue to the `handler`; `command` carries it out on the `state` of the guest's screen: its
//! `resource`s and what of them is shown. `display` tells the front-end's display of it. `three_d` has the commands
//! that `virgl` carries out.

mod backing;
mod capsets;
mod command;
mod device;
mod display;
mod dmabuf;
mod edid;
mod format;
mod handler;
mod options;
mod pixels;
mod protocol;
mod rectangle;
mod resource;
mod saved;
mod state;
mod three_d;
mod virgl;

pub use device::Gpu;
