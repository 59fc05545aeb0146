// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the device knows of its guest, shared by the connection and the queues.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::display::Display;
use crate::resource::Resources;

/// The guest's resources, and its screen.
#[derive(Debug)]
pub struct State {
    pub resources: Resources,
    pub display: Display,
}

impl State {
    pub fn new(max_hostmem: u64) -> io::Result<Self> {
        Ok(Self {
            resources: Resources::new(max_hostmem),
            display: Display::new()?,
        })
    }

    /// Forgets all of the guest, but not the display.
    pub fn clear(&mut self) {
        self.display.clear(&self.resources);
        self.resources.clear();
    }
}

/// The state, for whoever needs it. It is never held while something is waited for.
#[derive(Debug)]
pub struct Shared(Mutex<State>);

impl Shared {
    pub fn new(state: State) -> Self {
        Self(Mutex::new(state))
    }

    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
