// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the device knows of its guest, shared by the connection and the queues.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::display::Display;
use crate::resource::Resources;

/// The guest's resources, and its screen.
#[derive(Debug)]
pub struct State {
    pub resources: Resources,
    pub display: Display,
    /// Counts the guests, for those who keep something of one elsewhere.
    pub generation: u64,
    /// The renderer had contexts of the guest's when the control queue stopped.
    pub has_contexts: bool,
}

impl State {
    pub fn new(max_hostmem: u64) -> io::Result<Self> {
        Ok(Self {
            resources: Resources::new(max_hostmem),
            display: Display::new()?,
            generation: 0,
            has_contexts: false,
        })
    }

    /// Forgets all of the guest, but not the display.
    pub fn clear(&mut self) {
        self.display.clear(&self.resources);
        self.resources.clear();
        self.generation = self.generation.wrapping_add(1);
        self.has_contexts = false;
    }
}

/// The state, for whoever needs it. It is never held while something is waited for.
#[derive(Debug)]
pub struct Shared {
    state: Mutex<State>,
    accepts_3d: AtomicBool,
}

impl Shared {
    pub fn new(state: State) -> Self {
        Self {
            state: Mutex::new(state),
            accepts_3d: AtomicBool::new(false),
        }
    }

    /// The driver wants 3D, or does not.
    pub fn set_accepts_3d(&self, accepts: bool) {
        self.accepts_3d.store(accepts, Ordering::Relaxed);
    }

    /// Whether the driver wants 3D.
    pub fn accepts_3d(&self) -> bool {
        self.accepts_3d.load(Ordering::Relaxed)
    }

    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
