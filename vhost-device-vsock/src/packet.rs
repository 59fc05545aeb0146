// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Packets (VIRTIO 1.3, 5.10.6).

use rustix::net::SocketType;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The CID of the host.
pub const HOST_CID: u32 = 2;
/// The lowest CID of a guest.
pub const FIRST_GUEST_CID: u32 = 3;

/// Operations of packets.
pub mod op {
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RESET: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const DATA: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Names of the operations in statistics, by their numbers; the last one is that of the event queue.
pub const NAMES: &[&str] = &[
    "invalid",
    "request",
    "response",
    "reset",
    "shutdown",
    "data",
    "credit-update",
    "credit-request",
    "event",
];

/// Place of the event queue in [`NAMES`].
pub const EVENT: usize = 8;

/// Returns the place of an operation in [`NAMES`].
pub fn place(op: u16) -> usize {
    match op {
        op::REQUEST..=op::CREDIT_REQUEST => op.into(),
        _ => 0,
    }
}

/// Flags of a shutdown: what its sender does not do any more.
pub mod shutdown {
    pub const RECEIVE: u32 = 1;
    pub const SEND: u32 = 2;
    pub const BOTH: u32 = RECEIVE | SEND;
}

/// Flag of data: it ends a message (SEQPACKET).
pub const END_OF_MESSAGE: u32 = 1;

/// Type of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A stream of bytes.
    Stream,
    /// A sequence of messages.
    Seqpacket,
}

impl Kind {
    /// Returns the type with this number.
    pub fn from_number(number: u16) -> Option<Self> {
        match number {
            1 => Some(Self::Stream),
            2 => Some(Self::Seqpacket),
            _ => None,
        }
    }

    /// Returns the number of the type in packets.
    pub fn number(self) -> u16 {
        match self {
            Self::Stream => 1,
            Self::Seqpacket => 2,
        }
    }

    /// Returns the type of the socket on the host.
    pub fn socket_type(self) -> SocketType {
        match self {
            Self::Stream => SocketType::STREAM,
            Self::Seqpacket => SocketType::SEQPACKET,
        }
    }
}

/// The header of a packet: `struct virtio_vsock_hdr`.
#[derive(Clone, Copy, Debug, Default, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    pub src_cid: U64,
    pub dst_cid: U64,
    pub src_port: U32,
    pub dst_port: U32,
    pub len: U32,
    pub kind: U16,
    pub op: U16,
    pub flags: U32,
    pub buf_alloc: U32,
    pub fwd_cnt: U32,
}

/// Size of the header in bytes.
pub const HEADER_SIZE: u32 = 44;
const _: () = assert!(size_of::<Header>() == HEADER_SIZE as usize);

impl Header {
    /// Returns the reset that refuses this packet. The guest receives it under its own CID, whatever the packet claims.
    pub fn refusal(&self, guest_cid: u32) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: u64::from(guest_cid).into(),
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: op::RESET.into(),
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_goes_back_where_the_packet_came_from() {
        let packet = Header {
            src_cid: 77.into(),
            dst_cid: u64::MAX.into(),
            src_port: 1.into(),
            dst_port: 2.into(),
            len: 3.into(),
            kind: 9.into(),
            op: op::DATA.into(),
            flags: 4.into(),
            buf_alloc: 5.into(),
            fwd_cnt: 6.into(),
        };
        let reset = packet.refusal(3);
        let cids = [reset.src_cid, reset.dst_cid].map(U64::get);
        assert_eq!(cids, [u64::MAX, 3]);
        assert_eq!([reset.src_port, reset.dst_port].map(U32::get), [2, 1]);
        assert_eq!([reset.kind, reset.op].map(U16::get), [9, op::RESET]);
        assert_eq!(reset.len.get(), 0);
    }
}
