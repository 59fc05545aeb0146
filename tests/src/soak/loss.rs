// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a run must not have: a loss. And how long a run waits before it takes something for lost.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::front_end::Error;
use crate::process::ProcessError;

/// What is answered later than this is lost: seconds.
static PATIENCE: AtomicU64 = AtomicU64::new(60);

/// Returns what is answered later than this is lost.
pub(super) fn patience() -> Duration {
    Duration::from_secs(PATIENCE.load(Ordering::Relaxed))
}

/// Sets how long a request may take before it is lost.
pub(super) fn set_patience(seconds: u64) {
    PATIENCE.store(seconds, Ordering::Relaxed);
}

/// Something was lost, or cannot be told. What, and by how much.
#[derive(Clone, PartialEq, Eq)]
pub struct Loss(pub String);

impl Loss {
    /// Nobody waits any longer for `what`.
    pub(super) fn late(what: &str) -> Self {
        Loss(format!("{what} is not answered within {:?}", patience()))
    }
}

impl fmt::Debug for Loss {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl From<Error> for Loss {
    fn from(error: Error) -> Self {
        Loss(error.to_string())
    }
}

impl From<vhost::Error> for Loss {
    fn from(error: vhost::Error) -> Self {
        Loss(format!("vhost-user: {error}"))
    }
}

impl From<ProcessError> for Loss {
    fn from(error: ProcessError) -> Self {
        Loss(error.to_string())
    }
}

impl From<std::io::Error> for Loss {
    fn from(error: std::io::Error) -> Self {
        Loss(error.to_string())
    }
}
