// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Export of textures as dma-bufs, where the library and the GPU's driver support it.

use std::ffi::c_int;
use std::os::fd::{FromRawFd, OwnedFd};

use virtio_bindings::virtio_gpu::VIRTIO_GPU_RESOURCE_FLAG_Y_0_TOP;

use super::library::{Library, MAX_PLANES, ResourceInfo, ResourceInfoExt};
use super::renderer::Renderer;
use crate::dmabuf::Dmabuf;

impl Renderer {
    /// Exports the texture of a resource as a dma-buf. Returns `None` if that is not possible, or the display protocol
    /// cannot describe it.
    pub fn export(&mut self, id: u32) -> Option<Dmabuf> {
        let library = self.library_of(id).ok()?;
        // SAFETY: the call has no preconditions. Textures belong to context 0.
        unsafe { (library.force_ctx_0)() };
        let (info, modifier) = resource_info(library, id)?;
        let (fd, stride) = export_fd(library, info.texture)?;
        let dmabuf = Dmabuf {
            fd,
            width: info.width,
            height: info.height,
            stride,
            flags: info.flags & VIRTIO_GPU_RESOURCE_FLAG_Y_0_TOP,
            fourcc: info.fourcc as u32,
            modifier,
        };
        let is_complete = dmabuf.width > 0 && dmabuf.height > 0 && dmabuf.fourcc != 0;
        is_complete.then_some(dmabuf)
    }
}

/// Returns the library's description of a resource, and the format modifier, which release 0.10 does not report.
fn resource_info(library: &Library, id: u32) -> Option<(ResourceInfo, Option<u64>)> {
    if let Some(get_info) = library.resource_get_info_ext {
        let mut info = ResourceInfoExt::default();
        // SAFETY: the library writes no more than `ResourceInfoExt` holds; there is room for fields that newer releases
        // append.
        let outcome = unsafe { get_info(id as c_int, &raw mut info) };
        let one_plane = info.has_dmabuf_export != 0 && info.planes == 1;
        return (outcome == 0 && one_plane).then_some((info.base, Some(info.modifier)));
    }
    let mut info = ResourceInfo::default();
    // SAFETY: as above.
    let outcome = unsafe { (library.resource_get_info?)(id as c_int, &raw mut info) };
    (outcome == 0).then_some((info, None))
}

/// Exports a texture. Returns the file and the stride in bytes.
fn export_fd(library: &Library, texture: u32) -> Option<(OwnedFd, u32)> {
    let get_fd = library.get_fd_for_texture2?;
    // The library writes one element for each plane, and does not return the number of planes.
    let (mut fds, mut strides, mut offsets) = ([-1; MAX_PLANES], [0; MAX_PLANES], [0; MAX_PLANES]);
    // SAFETY: each array has room for the planes of any format.
    let outcome = unsafe {
        get_fd(
            texture,
            fds.as_mut_ptr(),
            strides.as_mut_ptr(),
            offsets.as_mut_ptr(),
        )
    };
    if outcome != 0 {
        return None;
    }
    // SAFETY: the library passes the ownership of the files to the caller.
    let owned = fds.map(|fd| (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) }));
    let ([Some(fd), None, None, None], [stride, ..], [0, ..]) = (owned, strides, offsets) else {
        return None;
    };
    let stride = u32::try_from(stride).ok()?;
    (stride > 0).then_some((fd, stride))
}
