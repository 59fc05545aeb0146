// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Images that the renderer exports and a display shows without a copy.

use std::os::fd::OwnedFd;

/// An image in a dma-buf of one plane that starts at offset 0.
#[derive(Debug)]
pub struct Dmabuf {
    pub fd: OwnedFd,
    pub width: u32,
    pub height: u32,
    /// Distance between rows, in bytes.
    pub stride: u32,
    /// `VIRTIO_GPU_RESOURCE_FLAG_Y_0_TOP` if the first row is the top.
    pub flags: u32,
    /// DRM format.
    pub fourcc: u32,
    /// DRM format modifier; `None` if the renderer does not report it.
    pub modifier: Option<u64>,
}
