// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The device state for migration and snapshots: what the driver knows of each port, and bytes that clients are still to receive.

use serde::{Deserialize, Serialize};
use vhost_device_common::device::StateError;

use crate::control::Driver;
use crate::port::{CHANNEL_HISTORY, SCROLLBACK};
use crate::state::State;

/// Most bytes of a port in the state.
const MAX_BYTES: u64 = if SCROLLBACK > CHANNEL_HISTORY as u64 {
    SCROLLBACK
} else {
    CHANNEL_HISTORY as u64
};

/// The device state, version 1.
#[derive(Debug, Serialize, Deserialize)]
pub struct Saved {
    is_ready: bool,
    ports: Vec<SavedPort>,
}

#[derive(Debug, Serialize, Deserialize)]
struct SavedPort {
    driver: Driver,
    /// Bytes that were read from the first chain that the guest has written and that is not completed.
    offset: u64,
    /// The last bytes that the guest wrote.
    bytes: Vec<u8>,
}

/// Returns the largest size of the state of a device with so many ports, in bytes.
pub fn max_size(ports: usize) -> u64 {
    (MAX_BYTES + 64) * ports as u64 + 64
}

impl Saved {
    /// Creates the state to save.
    pub fn new(state: &mut State) -> Self {
        let ports = state.ports.iter_mut().map(|port| {
            let (offset, bytes) = port.save();
            SavedPort {
                driver: port.driver,
                offset,
                bytes,
            }
        });
        Self {
            is_ready: state.is_ready,
            ports: ports.collect(),
        }
    }

    /// Replaces what `state` knows of a driver by this.
    ///
    /// # Errors
    /// The state is invalid, or that of a device with other ports.
    pub fn load(self, state: &mut State) -> Result<(), StateError> {
        if self.ports.len() != state.ports.len() {
            return Err(StateError::Contents("another number of ports"));
        }
        if self
            .ports
            .iter()
            .any(|port| port.bytes.len() as u64 > MAX_BYTES)
        {
            return Err(StateError::Contents("too many bytes of a port"));
        }
        state.is_ready = self.is_ready;
        for (port, saved) in state.ports.iter_mut().zip(self.ports) {
            port.driver = saved.driver;
            port.restore(saved.offset, &saved.bytes);
        }
        Ok(())
    }
}
