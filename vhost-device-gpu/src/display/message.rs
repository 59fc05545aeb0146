// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Messages to the display (vhost-user-gpu protocol): a header of three u32 (request, flags, payload size), then the
//! payload. Numbers are in the host's byte order.

use zerocopy::IntoBytes;

use crate::dmabuf::Dmabuf;
use crate::rectangle::Rectangle;

/// Requests of the vhost-user-gpu protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Request {
    GetProtocolFeatures = 1,
    SetProtocolFeatures = 2,
    GetDisplayInfo = 3,
    CursorPos = 4,
    CursorPosHide = 5,
    CursorUpdate = 6,
    Scanout = 7,
    Update = 8,
    DmabufScanout = 9,
    DmabufUpdate = 10,
    GetEdid = 11,
    DmabufScanout2 = 12,
}

/// Header flag: the message is a reply.
const REPLY: u32 = 1 << 2;
/// Protocol feature: GET_EDID.
pub const FEATURE_EDID: u64 = 1 << 0;
/// Protocol feature: DMABUF_SCANOUT2.
pub const FEATURE_DMABUF2: u64 = 1 << 1;
/// Size of a header in bytes.
pub const HEADER_SIZE: usize = 12;
/// Most pixels in one UPDATE: a display reads the whole message before it processes the next one.
pub const MAX_UPDATE_PIXELS: u32 = 16 << 20;
/// A request that the display replies to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Query {
    ProtocolFeatures,
    DisplayInfo,
    Edid {
        scanout: u32,
    },
    /// DMABUF_UPDATE. The reply is empty and says that the rectangle is shown.
    DmabufUpdate {
        scanout: u32,
        rectangle: Rectangle,
    },
}

impl Query {
    /// Returns the size of the reply's payload in bytes.
    pub fn reply_size(self) -> usize {
        match self {
            Self::ProtocolFeatures => 8,
            Self::DisplayInfo => 408,
            Self::Edid { .. } => 1056,
            Self::DmabufUpdate { .. } => 0,
        }
    }

    fn request(self) -> Request {
        match self {
            Self::ProtocolFeatures => Request::GetProtocolFeatures,
            Self::DisplayInfo => Request::GetDisplayInfo,
            Self::Edid { .. } => Request::GetEdid,
            Self::DmabufUpdate { .. } => Request::DmabufUpdate,
        }
    }

    /// Returns the message for the query.
    pub fn message(self) -> Vec<u8> {
        match self {
            Self::Edid { scanout } => message(self.request(), &[scanout]),
            Self::DmabufUpdate { scanout, rectangle } => {
                let words = [&[scanout], &rectangle.words()[..]].concat();
                message(self.request(), &words)
            }
            _ => message(self.request(), &[]),
        }
    }

    /// Returns whether `header` is the header of a reply to this query.
    pub fn matches_reply(self, header: &[u8]) -> bool {
        let expected = [self.request() as u32, REPLY, self.reply_size() as u32];
        header == expected.as_bytes()
    }
}

/// Encodes a message whose payload consists of u32.
pub fn message(request: Request, words: &[u32]) -> Vec<u8> {
    let size = size_of_val(words) as u32;
    let mut bytes = [request as u32, 0, size].as_bytes().to_vec();
    bytes.extend_from_slice(words.as_bytes());
    bytes
}

/// Encodes DMABUF_SCANOUT2 or, without the feature or a modifier, DMABUF_SCANOUT.
pub fn dmabuf_scanout(
    scanout: u32,
    rectangle: &Rectangle,
    buffer: &Dmabuf,
    features: u64,
) -> Vec<u8> {
    let image = [
        buffer.width,
        buffer.height,
        buffer.stride,
        buffer.flags,
        buffer.fourcc,
    ];
    let mut words = [&[scanout], &rectangle.words()[..], &image].concat();
    match buffer.modifier {
        Some(modifier) if features & FEATURE_DMABUF2 != 0 => {
            let halves: [u32; 2] = zerocopy::transmute!(modifier);
            words.extend_from_slice(&halves);
            message(Request::DmabufScanout2, &words)
        }
        _ => message(Request::DmabufScanout, &words),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_is_recognised_by_its_header() {
        let header = |words: [u32; 3]| Query::DisplayInfo.matches_reply(words.as_bytes());
        assert!(header([3, 4, 408]));
        assert!(!header([3, 0, 408]));
        assert!(!header([1, 4, 408]));
        assert!(!header([3, 4, 407]));
    }
}
