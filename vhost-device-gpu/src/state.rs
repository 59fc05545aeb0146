// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The state of the guest, shared by the session and the queues.

use std::io;

use crate::display::Display;
use crate::resource_table::ResourceTable;

/// The guest's resources and scanouts. No thread waits while it holds the mutex around them.
#[derive(Debug)]
pub struct State {
    pub resources: ResourceTable,
    pub display: Display,
    /// Increases whenever a new driver starts, so that the handler can clear the renderer.
    pub generation: u64,
    /// Whether the driver has accepted VIRTIO_GPU_F_VIRGL.
    pub accepts_3d: bool,
    /// Whether the renderer had contexts when the control queue stopped.
    pub has_contexts: bool,
}

impl State {
    /// Creates the state of a device whose resources may use `max_hostmem` bytes of host memory.
    pub fn new(max_hostmem: u64) -> io::Result<Self> {
        Ok(Self {
            resources: ResourceTable::new(max_hostmem),
            display: Display::new()?,
            generation: 0,
            accepts_3d: false,
            has_contexts: false,
        })
    }

    /// Clears the guest's state. The display stays connected.
    pub fn clear(&mut self) {
        self.display.clear(&self.resources);
        self.resources.clear();
        self.generation = self.generation.wrapping_add(1);
        self.has_contexts = false;
    }
}
