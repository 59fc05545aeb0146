// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a worker cannot do.

use std::io;

use thiserror::Error;

use crate::file_limit::explained;

/// Why a worker did not do what the session asked for.
#[derive(Debug, Error)]
pub enum WorkerError {
    /// The thread, or what it needs, could not be made.
    #[error("cannot start working on a queue: {}", explained(.0))]
    Start(#[source] io::Error),
    /// The kick file cannot be waited on.
    #[error("cannot wait for kicks on the file that the front-end sent: {}", explained(.0))]
    Kick(#[source] io::Error),
    /// The thread has ended.
    #[error("the thread of this queue has ended")]
    Gone,
}
