// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The capability sets that the device offers, and how to start the renderer that implements them.

use std::path::{Path, PathBuf};

use crate::virgl::{self, Capset, Renderer, VirglError};

/// The capability sets (VIRTIO 1.3, 5.7.6.8, GET_CAPSET_INFO), and the configuration of the renderer.
#[derive(Debug)]
pub struct Capsets {
    pub node: Option<PathBuf>,
    /// Whether displays may receive resources as dma-bufs.
    pub export_dmabufs: bool,
    pub sets: Vec<Capset>,
}

impl Capsets {
    /// Queries the renderer of this host.
    ///
    /// # Errors
    /// The renderer cannot be loaded or started, or cannot draw.
    pub fn probe(node: Option<&Path>, export_dmabufs: bool) -> Result<Self, VirglError> {
        virgl::disable_shader_cache();
        let draws = virgl::test_draw(node)?;
        // In a thread of its own: what the library leaves in thread-local storage goes with it.
        let sets = std::thread::scope(|scope| {
            let probe = scope.spawn(|| Renderer::new(node).map(|renderer| renderer.capsets()));
            probe.join().unwrap_or(Err(VirglError::Init))
        })?;
        if sets.is_empty() || !draws {
            return Err(VirglError::Init);
        }
        Ok(Self {
            node: node.map(Path::to_owned),
            export_dmabufs,
            sets,
        })
    }
}
