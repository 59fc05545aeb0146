// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Why the session rejects a request of the front-end.

use std::io;

use thiserror::Error;
use vhost::vhost_user::message::FrontendReq;

use crate::device::ConfigError;
use crate::file_limit::explained;
use crate::memory::{DirtyLogError, MemoryError};
use crate::ring::RingError;
use crate::ring::inflight::InflightError;
use crate::state::StateError;
use crate::wire::PayloadError;
use crate::worker::WorkerError;

/// Why a request is rejected.
#[derive(Debug, Error)]
pub enum SessionError {
    /// The request does not exist, or its feature is not offered.
    #[error("request {0} is not supported")]
    Unsupported(u32),
    /// The request cannot be decoded.
    #[error(transparent)]
    Payload(#[from] PayloadError),
    /// The request cannot use this file.
    #[error("a file of the front-end cannot be used: {}", explained(.0))]
    File(#[source] io::Error),
    /// The ring does not exist.
    #[error("queue {index} does not exist; there are {count}")]
    QueueIndex {
        /// The index in the request.
        index: u64,
        /// Number of queues of this device.
        count: usize,
    },
    /// The ring size is invalid.
    #[error(
        "invalid queue size {size}: the maximum is {max}, and a split ring needs a power of two"
    )]
    QueueSize {
        /// The size in the request.
        size: u32,
        /// The maximum.
        max: u16,
    },
    /// The base is not an index of a split ring.
    #[error("invalid base {0:#x} for a split ring")]
    Base(u32),
    /// The set-up of a ring cannot change while it runs.
    #[error("queue {0} is running and enabled; disable it, or stop it with GET_VRING_BASE")]
    Running(u16),
    /// A running, enabled ring is at another position than the front-end says.
    #[error("queue {index} is running at {here:#x}, not at {base:#x}; disable or stop it first")]
    Elsewhere {
        /// The queue.
        index: u32,
        /// The base in the request.
        base: u32,
        /// The position of the ring.
        here: u32,
    },
    /// The front-end set protocol features that were not offered.
    #[error("protocol features {0:#x} were not offered")]
    Features(u64),
    /// Only devices of another type support this request.
    #[error("this device does not support {0:?}")]
    NotForDevice(FrontendReq),
    /// The memory cannot be used.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The ring cannot be used.
    #[error("queue {index}: {source}")]
    Ring {
        /// The queue.
        index: u16,
        /// Why its ring cannot be used.
        source: RingError,
    },
    /// The driver wrote to a read-only part of the config space.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The file of requests in flight cannot be used.
    #[error(transparent)]
    Inflight(#[from] InflightError),
    /// Dirty pages cannot be logged.
    #[error(transparent)]
    DirtyLog(#[from] DirtyLogError),
    /// The state of the device cannot be saved.
    #[error(transparent)]
    State(#[from] StateError),
    /// The queue thread failed.
    #[error(transparent)]
    Worker(#[from] WorkerError),
}

impl SessionError {
    /// Returns whether a guest, or the state of this host, can cause this error. Closing the connection for it could end the virtual
    /// machine.
    pub(super) fn spares_the_connection(&self) -> bool {
        matches!(self, Self::Ring { .. } | Self::Config(_) | Self::Worker(_))
    }
}
