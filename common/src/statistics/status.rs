// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The present state of the connection. The session updates it after each message; queue threads never touch it.

use std::sync::{MutexGuard, PoisonError};

use serde::Serialize;

use super::Statistics;
use super::events::Event;

/// A connected front-end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct FrontEnd {
    /// Feature bits that the driver accepted.
    pub features: u64,
    /// Protocol features that the front-end chose.
    pub protocol_features: u64,
    /// All queues of the device.
    pub queues: Vec<QueueStatus>,
}

/// One queue of a connected front-end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct QueueStatus {
    /// Descriptors of the ring; 0 until the front-end sets it.
    pub size: u16,
    /// Format of the ring.
    pub format: RingFormat,
    /// The front-end allows the device to take requests.
    pub enabled: bool,
    /// The ring has been started and not stopped since.
    pub running: bool,
    /// Where the ring starts next, if that is known.
    pub base: Option<u32>,
}

/// Format of a ring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum RingFormat {
    #[default]
    Split,
    Packed,
}

impl Statistics {
    /// Sets the state of the connection: `None` without a front-end.
    pub(crate) fn set_front_end(&self, front_end: Option<FrontEnd>) {
        let is_connected = front_end.is_some();
        let before = std::mem::replace(&mut *self.lock_front_end(), front_end);
        if is_connected != before.is_some() {
            self.emit(match is_connected {
                true => Event::FrontEndConnected,
                false => Event::FrontEndDisconnected,
            });
        }
    }

    /// Returns the state of the connection; `None` without a front-end.
    pub(crate) fn front_end(&self) -> Option<FrontEnd> {
        self.lock_front_end().clone()
    }

    fn lock_front_end(&self) -> MutexGuard<'_, Option<FrontEnd>> {
        self.front_end
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
