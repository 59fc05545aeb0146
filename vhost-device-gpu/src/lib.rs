// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! vhost-user back-end for the VIRTIO GPU device (VIRTIO 1.3, 5.7).
//!
//! The `handler` takes commands from the control queue; `command` executes them on the `state`: the guest's `resource`s
//! and the scanouts that show them; `completion` responds to them in order. `display` sends what the scanouts show to
//! the front-end's display. `three_d` runs the renderer in `virgl`, which executes the 3D commands.

mod backing;
mod capsets;
mod command;
mod completion;
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
mod resource_table;
mod saved;
mod state;
mod three_d;
mod virgl;

pub use device::Gpu;
