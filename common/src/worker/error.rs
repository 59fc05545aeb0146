// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Errors of a worker.

use std::io;

use thiserror::Error;

use crate::file_limit::explained;

/// Why a worker did not carry out a command.
#[derive(Debug, Error)]
pub enum WorkerError {
    /// The thread, its files or its handler could not be created.
    #[error("cannot start the thread of a queue: {}", explained(.0))]
    Start(#[source] io::Error),
    /// The kick file cannot be waited on.
    #[error("cannot wait for kicks on the file from the front-end: {}", explained(.0))]
    Kick(#[source] io::Error),
    /// The thread has ended.
    #[error("the thread of this queue has ended")]
    Gone,
}
