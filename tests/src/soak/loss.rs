// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Losses, and the time limit after which a request counts as lost.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::front_end::Error;
use crate::process::ProcessError;

/// Time limit of a request, in seconds.
static PATIENCE: AtomicU64 = AtomicU64::new(60);

/// Returns the time limit of a request.
pub(super) fn patience() -> Duration {
    Duration::from_secs(PATIENCE.load(Ordering::Relaxed))
}

/// Sets how long a request may take before it is lost.
pub(super) fn set_patience(seconds: u64) {
    PATIENCE.store(seconds, Ordering::Relaxed);
}

/// Something was lost, or cannot be checked. Says what, and how much.
#[derive(Clone, PartialEq, Eq)]
pub struct Loss(pub String);

impl Loss {
    /// Creates the loss of a request that was not answered in time.
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
