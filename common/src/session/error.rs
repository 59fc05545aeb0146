// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What can be wrong with a request of the front-end.

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

/// What is wrong with a request.
#[derive(Debug, Error)]
pub enum SessionError {
    /// No such request, or one that this back-end does not offer.
    #[error("request {0} is not supported")]
    Unsupported(u32),
    /// The request cannot be decoded.
    #[error(transparent)]
    Payload(#[from] PayloadError),
    /// The file is not one that the request can use.
    #[error("a file of the front-end cannot be used: {}", explained(.0))]
    File(#[source] io::Error),
    /// The ring does not exist.
    #[error("queue {index} does not exist; there are {count}")]
    QueueIndex {
        /// The index that was sent.
        index: u64,
        /// Queues of this device.
        count: usize,
    },
    /// The ring has an impossible size.
    #[error("{size} descriptors for a queue: at most {max}, and a power of two in a split ring")]
    QueueSize {
        /// The size that was sent.
        size: u32,
        /// The most that is possible.
        max: u16,
    },
    /// The base is no index of a split ring.
    #[error("{0:#x} is no index of an available ring")]
    Base(u32),
    /// What describes a ring cannot change while it runs.
    #[error("queue {0} is running and enabled; disable it, or stop it with GET_VRING_BASE")]
    Running(u16),
    /// A ring that runs, and is enabled, is not where the front-end says.
    #[error("queue {index} is running at {here:#x}, not at {base:#x}; disable or stop it first")]
    Elsewhere {
        /// Which queue.
        index: u32,
        /// What was sent.
        base: u32,
        /// Where it was when that was looked at.
        here: u32,
    },
    /// Features that were not offered.
    #[error("protocol features {0:#x} were not offered")]
    Features(u64),
    /// The device has no use for the request.
    #[error("this device can not use {0:?}")]
    NotForDevice(FrontendReq),
    /// The memory cannot be used.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The ring cannot be used.
    #[error("queue {index}: {source}")]
    Ring {
        /// Which queue.
        index: u16,
        /// What is wrong with its ring.
        source: RingError,
    },
    /// The driver wrote what it may not.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The requests in flight cannot be noted.
    #[error(transparent)]
    Inflight(#[from] InflightError),
    /// Dirty pages cannot be logged.
    #[error(transparent)]
    DirtyLog(#[from] DirtyLogError),
    /// The state of the device cannot be saved.
    #[error(transparent)]
    State(#[from] StateError),
    /// The queue's thread could not do it.
    #[error(transparent)]
    Worker(#[from] WorkerError),
}

impl SessionError {
    /// Whether a guest, or the state of this host, can bring this about. Closing the connection for
    /// it could end the virtual machine.
    pub(super) fn spares_the_connection(&self) -> bool {
        matches!(self, Self::Ring { .. } | Self::Config(_) | Self::Worker(_))
    }
}
