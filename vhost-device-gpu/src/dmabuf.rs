// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Buffers of the renderer's that a display can show from where they are.

use std::os::fd::OwnedFd;

/// A picture in a dma-buf of one plane, which begins with its first byte.
#[derive(Debug)]
pub struct Dmabuf {
    pub fd: OwnedFd,
    pub width: u32,
    pub height: u32,
    /// Bytes from one row to the next.
    pub stride: u32,
    /// `VIRTIO_GPU_RESOURCE_FLAG_Y_0_TOP`: the first row is the top.
    pub flags: u32,
    /// Its format, as DRM calls it.
    pub fourcc: u32,
    /// How the pixels are arranged, as DRM calls it; `None` where the renderer does not tell.
    pub modifier: Option<u64>,
}
