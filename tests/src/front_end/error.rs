// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Errors of the front-end.

/// Errors between a front-end and its back-end.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The `vhost` crate's front-end refused a call, or the back-end refused it.
    #[error("vhost-user: {0}")]
    Vhost(#[from] vhost::Error),
    /// A system call failed.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// Nothing was received before the deadline.
    #[error("the back-end did not answer within {0:?}")]
    Timeout(std::time::Duration),
    /// The back-end closed the connection.
    #[error("the back-end closed the connection")]
    Closed,
    /// The back-end sent something that is not vhost-user.
    #[error("the back-end sent {0}")]
    Malformed(String),
}

impl From<rustix::io::Errno> for Error {
    fn from(errno: rustix::io::Errno) -> Self {
        Error::Io(errno.into())
    }
}

/// The result type of this module.
pub type Result<T> = std::result::Result<T, Error>;
