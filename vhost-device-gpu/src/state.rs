// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The state of the guest, shared by the session and the queues.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::display::Display;
use crate::resource_table::ResourceTable;

/// The guest's resources and scanouts.
#[derive(Debug)]
pub struct State {
    pub resources: ResourceTable,
    pub display: Display,
    /// Increases whenever a new driver starts, so that the handler can clear the renderer.
    pub generation: u64,
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

/// The state behind a lock, which is never held while a thread waits.
#[derive(Debug)]
pub struct Shared {
    state: Mutex<State>,
    accepts_3d: AtomicBool,
}

impl Shared {
    /// Shares the state.
    pub fn new(state: State) -> Self {
        Self {
            state: Mutex::new(state),
            accepts_3d: AtomicBool::new(false),
        }
    }

    /// Records whether the driver has accepted VIRTIO_GPU_F_VIRGL.
    pub fn set_accepts_3d(&self, accepts: bool) {
        self.accepts_3d.store(accepts, Ordering::Relaxed);
    }

    /// Returns whether the driver has accepted VIRTIO_GPU_F_VIRGL.
    pub fn accepts_3d(&self) -> bool {
        self.accepts_3d.load(Ordering::Relaxed)
    }

    /// Locks the state.
    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
