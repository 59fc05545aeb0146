// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Headers, commands and responses in the queues (VIRTIO 1.3, 5.7.6). All numbers are little-endian.

use thiserror::Error;
use vhost_device_common::chain::{Chain, ChainError};
use virtio_bindings::virtio_gpu::{
    VIRTIO_GPU_FLAG_FENCE, VIRTIO_GPU_RESOURCE_FLAG_Y_0_TOP,
    virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_CTX_CREATE as CTX_CREATE,
    virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_SUBMIT_3D as SUBMIT_3D,
    virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_ERR_INVALID_CONTEXT_ID as INVALID_CONTEXT_ID,
    virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_ERR_INVALID_PARAMETER as INVALID_PARAMETER,
    virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_ERR_INVALID_RESOURCE_ID as INVALID_RESOURCE_ID,
    virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_ERR_INVALID_SCANOUT_ID as INVALID_SCANOUT_ID,
    virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_ERR_OUT_OF_MEMORY as OUT_OF_MEMORY,
    virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_ERR_UNSPEC as UNSPEC,
    virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_OK_NODATA as OK_NODATA,
};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::rectangle::Rectangle;

/// Most scanouts of a device.
pub const MAX_SCANOUTS: usize = 16;
/// Size in bytes of the EDID field in the response to GET_EDID.
pub const MAX_EDID: usize = 1024;
/// `PIPE_TEXTURE_2D`, a value of `pipe_texture_target`: the resource holds an image.
const PIPE_TEXTURE_2D: u32 = 2;
/// Width and height of a cursor in pixels.
pub const CURSOR_SIZE: u32 = 64;

macro_rules! layout {
    ($($(#[$doc:meta])* $name:ident: $size:literal { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
        #[repr(C)]
        pub struct $name { $($(#[$field_doc])* pub $field: $type,)* }
        const _: () = assert!(size_of::<$name>() == $size);
    )*};
}

layout! {
    /// Start of every command and response (`virtio_gpu_ctrl_hdr`).
    Header: 24 {
        /// Type of the command or response.
        kind: U32,
        flags: U32,
        fence_id: U64,
        context_id: U32,
        ring_index: u8,
        padding: [u8; 3],
    }
    /// A rectangle as the driver sends it (`virtio_gpu_rect`).
    RawRectangle: 16 {
        x: U32,
        y: U32,
        width: U32,
        height: U32,
    }
    /// RESOURCE_CREATE_2D.
    Create2d: 16 {
        resource: U32,
        format: U32,
        width: U32,
        height: U32,
    }
    /// Commands with one number: RESOURCE_UNREF, RESOURCE_DETACH_BACKING, RESOURCE_ASSIGN_UUID, GET_EDID,
    /// GET_CAPSET_INFO, CTX_ATTACH_RESOURCE and CTX_DETACH_RESOURCE. SUBMIT_3D starts with it.
    IdCommand: 8 {
        id: U32,
        padding: U32,
    }
    /// SET_SCANOUT.
    SetScanout: 24 {
        rectangle: RawRectangle,
        scanout: U32,
        resource: U32,
    }
    /// RESOURCE_FLUSH.
    Flush: 24 {
        rectangle: RawRectangle,
        resource: U32,
        padding: U32,
    }
    /// TRANSFER_TO_HOST_2D.
    Transfer2d: 32 {
        rectangle: RawRectangle,
        /// Offset of the rectangle's first pixel in the backing, in bytes.
        offset: U64,
        resource: U32,
        padding: U32,
    }
    /// RESOURCE_ATTACH_BACKING, before its entries.
    AttachBacking: 8 {
        resource: U32,
        entries: U32,
    }
    /// An entry of RESOURCE_ATTACH_BACKING: a range of guest memory.
    MemoryEntry: 16 {
        address: U64,
        length: U32,
        padding: U32,
    }
    /// UPDATE_CURSOR and MOVE_CURSOR.
    Cursor: 32 {
        scanout: U32,
        x: U32,
        y: U32,
        padding: U32,
        resource: U32,
        hot_x: U32,
        hot_y: U32,
        more_padding: U32,
    }
    /// GET_CAPSET.
    GetCapset: 8 {
        id: U32,
        version: U32,
    }
    /// The response to GET_CAPSET_INFO.
    CapsetInfo: 16 {
        id: U32,
        max_version: U32,
        max_size: U32,
        padding: U32,
    }
    /// CTX_CREATE.
    CreateContext: 72 {
        name_length: U32,
        init: U32,
        name: [[u8; 32]; 2],
    }
    /// RESOURCE_CREATE_3D.
    Create3d: 48 {
        resource: U32,
        target: U32,
        format: U32,
        bind: U32,
        width: U32,
        height: U32,
        depth: U32,
        array_size: U32,
        last_level: U32,
        samples: U32,
        flags: U32,
        padding: U32,
    }
    /// TRANSFER_TO_HOST_3D and TRANSFER_FROM_HOST_3D.
    Transfer3d: 48 {
        x: U32,
        y: U32,
        z: U32,
        width: U32,
        height: U32,
        depth: U32,
        /// Offset of the box's first byte in the backing, in bytes.
        offset: U64,
        resource: U32,
        level: U32,
        stride: U32,
        layer_stride: U32,
    }
    /// The response to GET_EDID, before its [`MAX_EDID`] bytes.
    EdidHeader: 8 {
        size: U32,
        padding: U32,
    }
    /// One display in the response to GET_DISPLAY_INFO.
    DisplayMode: 24 {
        rectangle: RawRectangle,
        enabled: U32,
        flags: U32,
    }
}

impl RawRectangle {
    /// Converts the rectangle.
    ///
    /// # Errors
    /// It is empty or overflows.
    pub fn checked(&self) -> Result<Rectangle, CommandError> {
        let [x, y, width, height] = [self.x, self.y, self.width, self.height].map(U32::get);
        Rectangle::new(x, y, width, height).ok_or(CommandError::InvalidParameter)
    }
}

impl Create3d {
    /// Creates the command for a 2D image whose first row is the top. `bind` is `VIRGL_BIND_*`.
    pub fn image(image: &Create2d, bind: u32) -> Self {
        Self {
            resource: image.resource,
            target: PIPE_TEXTURE_2D.into(),
            format: image.format,
            bind: bind.into(),
            width: image.width,
            height: image.height,
            depth: 1.into(),
            array_size: 1.into(),
            flags: VIRTIO_GPU_RESOURCE_FLAG_Y_0_TOP.into(),
            ..Self::default()
        }
    }
}

impl Header {
    /// Returns whether the response must wait until all work of the command is finished (VIRTIO_GPU_FLAG_FENCE).
    pub fn is_fenced(&self) -> bool {
        self.flags.get() & VIRTIO_GPU_FLAG_FENCE != 0
    }

    /// Returns whether this is a 3D command.
    pub fn is_3d(&self) -> bool {
        (CTX_CREATE..=SUBMIT_3D).contains(&self.kind.get())
    }

    /// Returns the header of the response to this command. A fenced command gets its fence back.
    pub fn response(&self, kind: u32) -> Self {
        let mut response = Self {
            kind: kind.into(),
            ..Self::default()
        };
        if self.is_fenced() {
            response.flags = self.flags;
            response.fence_id = self.fence_id;
            response.context_id = self.context_id;
            response.ring_index = self.ring_index;
        }
        response
    }
}

/// Why a command failed: an error response type (VIRTIO 1.3, 5.7.6.7).
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[repr(u32)]
pub enum CommandError {
    #[error("unspecified error")]
    Unspecified = UNSPEC,
    #[error("out of memory")]
    OutOfMemory = OUT_OF_MEMORY,
    #[error("invalid scanout ID")]
    InvalidScanoutId = INVALID_SCANOUT_ID,
    #[error("invalid resource ID")]
    InvalidResourceId = INVALID_RESOURCE_ID,
    #[error("invalid context ID")]
    InvalidContextId = INVALID_CONTEXT_ID,
    #[error("invalid parameter")]
    InvalidParameter = INVALID_PARAMETER,
}

impl From<ChainError> for CommandError {
    fn from(error: ChainError) -> Self {
        match error {
            ChainError::TooShort { .. } => Self::InvalidParameter,
            ChainError::NotMemory => Self::Unspecified,
        }
    }
}

/// A response to a command.
#[derive(Debug, PartialEq, Eq)]
pub struct Response {
    /// The type: `VIRTIO_GPU_RESP_*`.
    pub kind: u32,
    /// What follows the header.
    pub body: Vec<u8>,
}

impl Response {
    /// Creates a response of type `kind`.
    pub fn new(kind: u32, body: impl Into<Vec<u8>>) -> Self {
        let body = body.into();
        Self { kind, body }
    }

    /// Creates a response without data.
    pub fn no_data() -> Self {
        Self::new(OK_NODATA, [])
    }
}

impl From<CommandError> for Response {
    fn from(error: CommandError) -> Self {
        Self::new(error as u32, [])
    }
}

/// Reads the next part of a command.
pub fn read<T: FromBytes + IntoBytes>(chain: &mut Chain) -> Result<T, ChainError> {
    let mut object = T::new_zeroed();
    chain.read(object.as_mut_bytes())?;
    Ok(object)
}

/// Checks that the scanout exists.
pub fn check_scanout(scanout: u32) -> Result<(), CommandError> {
    match (scanout as usize) < MAX_SCANOUTS {
        true => Ok(()),
        false => Err(CommandError::InvalidScanoutId),
    }
}
