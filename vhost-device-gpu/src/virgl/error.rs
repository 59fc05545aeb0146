// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Errors of virglrenderer.

use std::io;

use thiserror::Error;

/// Why 3D is not available.
#[derive(Clone, Debug, Error)]
pub enum VirglError {
    /// The library cannot be loaded.
    #[error("cannot load libvirglrenderer: {0}")]
    Load(String),
    /// The render node cannot be opened.
    #[error("{path}: {error}")]
    Node {
        /// Path of the node.
        path: String,
        /// The error of the system.
        error: String,
    },
    /// The library found no driver to draw with.
    #[error("libvirglrenderer cannot draw on this host (RUST_LOG=debug shows its messages)")]
    Init,
    /// The test image has wrong pixels.
    #[error("libvirglrenderer cannot draw on this host: the test image is wrong")]
    WrongPixels,
    /// A signal killed the process that drew the test image.
    #[error(
        "libvirglrenderer cannot draw on this host: the test was killed by signal {0} (without a GPU it needs \
         memory that is both writable and executable: set MemoryDenyWriteExecute=no in the systemd unit)"
    )]
    Killed(i32),
    /// A process can have only one renderer.
    #[error("another renderer is in use")]
    Busy,
    /// A host resource for waiting is not available.
    #[error("{0}")]
    System(io::ErrorKind),
}
