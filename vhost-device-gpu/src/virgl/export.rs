// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Textures as buffers that other processes can use, where the library and the driver of the GPU can make such.

use std::ffi::c_int;
use std::os::fd::{FromRawFd, OwnedFd};

use virtio_bindings::virtio_gpu::VIRTIO_GPU_RESOURCE_FLAG_Y_0_TOP;

use super::library::{Library, MAX_PLANES, ResourceInfo, ResourceInfoExt};
use super::renderer::Renderer;
use crate::dmabuf::Dmabuf;

impl Renderer {
    /// The texture of a resource as a buffer; `None` where it cannot be one that a display could be told of.
    pub fn export(&mut self, id: u32) -> Option<Dmabuf> {
        let library = self.library_of(id).ok()?;
        // SAFETY: there is no precondition. Textures belong to this context.
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

/// What the library knows of a resource, and the modifier of its format, which release 0.10 does not tell.
fn resource_info(library: &Library, id: u32) -> Option<(ResourceInfo, Option<u64>)> {
    if let Some(get_info) = library.resource_get_info_ext {
        let mut info = ResourceInfoExt::default();
        // SAFETY: the library writes no more than there is; newer releases may add to the end, where there is room.
        let outcome = unsafe { get_info(id as c_int, &raw mut info) };
        let one_plane = info.has_dmabuf_export != 0 && info.planes == 1;
        return (outcome == 0 && one_plane).then_some((info.base, Some(info.modifier)));
    }
    let mut info = ResourceInfo::default();
    // SAFETY: as above.
    let outcome = unsafe { (library.resource_get_info?)(id as c_int, &raw mut info) };
    (outcome == 0).then_some((info, None))
}

/// A file for a texture, and the length of its rows in bytes.
fn export_fd(library: &Library, texture: u32) -> Option<(OwnedFd, u32)> {
    let get_fd = library.get_fd_for_texture2?;
    // The library writes one of each for each plane, and does not say how many that is.
    let (mut fds, mut strides, mut offsets) = ([-1; MAX_PLANES], [0; MAX_PLANES], [0; MAX_PLANES]);
    // SAFETY: there is room for as many planes as a format has.
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
    // SAFETY: files that the library made are the caller's.
    let owned = fds.map(|fd| (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) }));
    let ([Some(fd), None, None, None], [stride, ..], [0, ..]) = (owned, strides, offsets) else {
        return None;
    };
    let stride = u32::try_from(stride).ok()?;
    (stride > 0).then_some((fd, stride))
}
