// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the renderer offers.

use std::path::{Path, PathBuf};

use vhost_device_common::device::Needs;

use crate::virgl::{self, Capset, Renderer, VirglError};

/// What the device offers of 3D.
#[derive(Debug)]
pub struct Capsets {
    pub node: Option<PathBuf>,
    /// Displays may take pictures from buffers of the renderer's.
    pub export_dmabufs: bool,
    pub sets: Vec<Capset>,
}

impl Capsets {
    /// Finds out what the renderer can do on this host.
    pub fn probe(node: Option<&Path>, export_dmabufs: bool) -> Result<Self, VirglError> {
        virgl::disable_shader_cache();
        let draws = virgl::test_draw(node)?;
        // What the library leaves in a thread ends with the thread.
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

    /// What the renderer does, beside the 2D device.
    pub fn add_needs(&self, needs: &mut Needs) {
        virgl::add_needs(needs, self.node.as_deref());
    }

    /// How many sets of capabilities there are.
    pub fn count(&self) -> u32 {
        self.sets.len() as u32
    }
}
