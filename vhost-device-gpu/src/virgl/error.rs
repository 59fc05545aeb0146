// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Why there is no 3D.

use std::io;

use thiserror::Error;

/// Why there is no 3D.
#[derive(Clone, Debug, Error)]
pub enum VirglError {
    /// The library is not there.
    #[error("libvirglrenderer can not be loaded: {0}")]
    Load(String),
    /// The render node cannot be opened.
    #[error("{path}: {error}")]
    Node {
        /// Its path.
        path: String,
        /// Why not.
        error: String,
    },
    /// The library found nothing that it can draw with.
    #[error("libvirglrenderer can not draw on this host (RUST_LOG=debug shows what it says)")]
    Init,
    /// What was drawn did not come out.
    #[error("libvirglrenderer can not draw on this host: the picture stays blank")]
    WrongPixels,
    /// The attempt to draw ended the process that made it.
    #[error(
        "libvirglrenderer can not draw on this host: it ends with signal {0} (without a GPU it needs memory that it may write to and execute, \
         as with MemoryDenyWriteExecute=no in the systemd unit)"
    )]
    Killed(i32),
    /// There is one renderer in a process.
    #[error("another renderer is in use")]
    Busy,
    /// What tells of fences cannot be made.
    #[error("{0}")]
    System(io::ErrorKind),
}
