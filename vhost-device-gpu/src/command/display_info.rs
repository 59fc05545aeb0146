// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The responses to GET_DISPLAY_INFO and GET_EDID.

use virtio_bindings::virtio_gpu as gpu;
use zerocopy::IntoBytes;

use crate::display::{Display, Query};
use crate::edid;
use crate::protocol::{
    CommandError, DisplayMode, EdidHeader, Header, MAX_EDID, MAX_SCANOUTS, Response,
};

/// Size in bytes of the header at the start of a display's reply. The header has the layout of a response to the
/// driver.
const HEADER_SIZE: usize = size_of::<Header>();

/// Returns the response to a command from the display's reply.
pub fn display_response(query: Query, reply: &[u8]) -> Response {
    let kind = match query {
        Query::DisplayInfo => gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_OK_DISPLAY_INFO,
        Query::Edid { .. } => gpu::virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_OK_EDID,
        Query::ProtocolFeatures | Query::DmabufUpdate { .. } => {
            return CommandError::Unspecified.into();
        }
    };
    Response::new(kind, reply.get(HEADER_SIZE..).unwrap_or_default())
}

/// Returns the response to a command when there is no reply from a display: one screen of the default mode. The EDID is
/// unknown, which is an error, if a display is connected.
pub fn default_response(query: Query, display: &Display) -> Response {
    let body = match query {
        Query::DisplayInfo => {
            let mut modes = [DisplayMode::default(); MAX_SCANOUTS];
            let [first, ..] = &mut modes;
            first.rectangle.width = edid::MODE.0.into();
            first.rectangle.height = edid::MODE.1.into();
            first.enabled = 1.into();
            [&[0; HEADER_SIZE], modes.as_bytes()].concat()
        }
        Query::Edid { .. } if !display.is_connected() => {
            let header = EdidHeader {
                size: (edid::EDID.len() as u32).into(),
                padding: 0.into(),
            };
            let mut body = [&[0; HEADER_SIZE], header.as_bytes(), &edid::EDID].concat();
            body.resize(HEADER_SIZE + size_of::<EdidHeader>() + MAX_EDID, 0);
            body
        }
        _ => return CommandError::Unspecified.into(),
    };
    display_response(query, &body)
}
