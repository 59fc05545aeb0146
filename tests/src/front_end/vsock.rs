// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The driver's side of a socket device: packets (VIRTIO 1.3, 5.10.6), well-formed or not.

use std::fmt;
use std::time::Duration;

use super::descriptor::Buffer;
use super::device::FrontEnd;
use super::error::Result;
use super::queue::Queue;

/// Time limit for operations that normally finish at once; generous, for busy machines.
const PATIENCE: Duration = Duration::from_secs(20);
/// Bytes of the header of a packet.
pub const HEADER_SIZE: usize = 44;
/// Descriptors of each queue.
const QUEUE_SIZE: u16 = 256;
/// Bytes reserved for a packet to the device.
const AREA: u64 = 1 << 20;

/// CID of the host.
pub const HOST: u64 = 2;

/// Operations.
pub mod op {
    /// Asks for a connection.
    pub const REQUEST: u32 = 1;
    /// Accepts a connection.
    pub const RESPONSE: u32 = 2;
    /// Refuses or ends a connection.
    pub const RST: u32 = 3;
    /// Ends one direction or both.
    pub const SHUTDOWN: u32 = 4;
    /// Has data.
    pub const RW: u32 = 5;
    /// Has no content but the credit in its header.
    pub const CREDIT_UPDATE: u32 = 6;
    /// Asks for the credit.
    pub const CREDIT_REQUEST: u32 = 7;
}

/// Type of a connection of bytes.
pub const STREAM: u16 = 1;
/// Type of a connection of messages.
pub const SEQPACKET: u16 = 2;
/// Flag of SHUTDOWN: its sender receives nothing more.
pub const NO_RECEIVE: u32 = 1;
/// Flag of SHUTDOWN: its sender sends nothing more.
pub const NO_SEND: u32 = 2;
/// Flag of RW: the end of a message.
pub const END_OF_MESSAGE: u32 = 1;

/// A packet.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Packet {
    /// CID of the sender.
    pub src_cid: u64,
    /// CID of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// [`STREAM`] or [`SEQPACKET`].
    pub kind: u16,
    /// One of [`op`].
    pub op: u32,
    /// Flags of the operation.
    pub flags: u32,
    /// Size of the sender's buffer.
    pub buf_alloc: u32,
    /// Bytes that the sender has taken from its buffer.
    pub fwd_cnt: u32,
    /// What follows the header.
    pub data: Vec<u8>,
}

/// Without the data, which can be long.
impl fmt::Debug for Packet {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            src_cid,
            dst_cid,
            src_port,
            dst_port,
            kind,
            op,
            flags,
            buf_alloc,
            fwd_cnt,
            data,
        } = self;
        write!(
            formatter,
            "operation {op} of type {kind} from {src_cid}:{src_port} to {dst_cid}:{dst_port}, flags {flags}, \
             credit {buf_alloc} {fwd_cnt}, {} bytes",
            data.len()
        )
    }
}

impl Packet {
    /// Returns the bytes of the packet. `length` replaces the true length of the data.
    pub fn to_bytes(&self, length: Option<u32>) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_SIZE + self.data.len());
        bytes.extend(self.src_cid.to_le_bytes());
        bytes.extend(self.dst_cid.to_le_bytes());
        bytes.extend(self.src_port.to_le_bytes());
        bytes.extend(self.dst_port.to_le_bytes());
        bytes.extend(length.unwrap_or(self.data.len() as u32).to_le_bytes());
        bytes.extend(self.kind.to_le_bytes());
        bytes.extend((self.op as u16).to_le_bytes());
        bytes.extend(self.flags.to_le_bytes());
        bytes.extend(self.buf_alloc.to_le_bytes());
        bytes.extend(self.fwd_cnt.to_le_bytes());
        bytes.extend(&self.data);
        bytes
    }

    /// Parses a packet of the device. Panics if it is shorter or longer than its header says.
    #[track_caller]
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        assert!(bytes.len() >= HEADER_SIZE, "{} bytes", bytes.len());
        assert_eq!(bytes.len() - HEADER_SIZE, u32_at(24) as usize, "length");
        Self {
            src_cid: u64_at(0),
            dst_cid: u64_at(8),
            src_port: u32_at(16),
            dst_port: u32_at(20),
            kind: u16_at(28),
            op: u16_at(30).into(),
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
            data: bytes[HEADER_SIZE..].to_vec(),
        }
    }
}

/// A driver that sends one packet at a time, and has buffers for those that it receives.
pub struct VsockDriver {
    /// The connection.
    pub front_end: FrontEnd,
    /// The queue of packets from the device.
    pub rx: Queue,
    /// The queue of packets to the device.
    pub tx: Queue,
    /// The event queue.
    pub event: Queue,
    /// CID of the guest, from the config space.
    pub cid: u64,
    /// Whether a buffer is made available again as soon as its packet is received.
    pub refills: bool,
    buffer_size: u32,
    /// Addresses of buffers by the heads of their chains.
    buffers: Vec<u64>,
    free: Vec<u64>,
    area: u64,
}

impl VsockDriver {
    /// Starts all queues, with 64 buffers of 4 KiB for packets.
    pub fn new(front_end: FrontEnd) -> Result<Self> {
        let mut driver = Self::without_buffers(front_end, 64, 4096)?;
        driver.supply(64);
        Ok(driver)
    }

    /// Starts all queues, and supplies none of its `count` buffers of `size` bytes yet.
    pub fn without_buffers(front_end: FrontEnd, count: usize, size: u32) -> Result<Self> {
        let config = front_end.config(0, 8)?;
        let cid = config.try_into().map_or(0, u64::from_le_bytes);
        let rx = front_end.queue(0, QUEUE_SIZE)?;
        let tx = front_end.queue(1, QUEUE_SIZE)?;
        let event = front_end.queue(2, QUEUE_SIZE)?;
        let memory = front_end.memory();
        let allocate = |_| memory.allocate(size.into(), 64);
        let free = (0..count).map(allocate).collect();
        let area = memory.allocate(AREA, 64);
        Ok(Self {
            rx,
            tx,
            event,
            cid,
            refills: true,
            buffer_size: size,
            buffers: vec![0; QUEUE_SIZE.into()],
            free,
            area,
            front_end,
        })
    }

    /// Makes up to `count` unused buffers available.
    pub fn supply(&mut self, count: usize) {
        for _ in 0..count {
            let Some(address) = self.free.pop() else {
                break;
            };
            let buffer = Buffer::writable(address, self.buffer_size);
            let head = self.rx.add(&[buffer]).expect("room for a buffer");
            self.buffers[usize::from(head)] = address;
        }
        self.rx.publish();
        self.rx.kick();
    }

    /// Returns the next packet of the device, if there is one within `limit`.
    #[track_caller]
    pub fn receive_within(&mut self, limit: Duration) -> Option<Packet> {
        if !self.rx.has_used() && !self.rx.wait_used(limit) {
            return None;
        }
        let used = self.rx.take_used()?;
        let address = self.buffers[usize::from(used.head)];
        assert!(used.length <= self.buffer_size, "{used:?}");
        let memory = self.front_end.memory();
        let packet = Packet::from_bytes(&memory.read_vec(address, used.length as usize));
        self.free.push(address);
        if self.refills {
            self.supply(1);
        }
        Some(packet)
    }

    /// Returns the next packet of the device. Panics if there is none.
    #[track_caller]
    pub fn receive(&mut self) -> Packet {
        self.receive_within(PATIENCE).expect("a packet")
    }

    /// Sends a packet, and waits until the device has handled it.
    #[track_caller]
    pub fn send(&mut self, packet: &Packet) {
        self.send_bytes(&packet.to_bytes(None), &[]);
    }

    /// Sends any bytes, in buffers of these lengths, the last of which has the rest. Waits until the device has handled them.
    #[track_caller]
    pub fn send_bytes(&mut self, bytes: &[u8], lengths: &[u32]) {
        assert!(
            self.try_send_bytes(bytes, lengths, PATIENCE),
            "a packet was not taken"
        );
    }

    /// Sends any bytes like [`VsockDriver::send_bytes`]. Returns whether the device has handled them within `limit`.
    #[track_caller]
    pub fn try_send_bytes(&mut self, bytes: &[u8], lengths: &[u32], limit: Duration) -> bool {
        assert!(bytes.len() as u64 <= AREA);
        self.front_end.memory().write(self.area, bytes);
        let whole = Buffer::readable(self.area, bytes.len() as u32);
        self.tx.submit(&whole.split(lengths));
        self.wait_sent(limit)
    }

    /// Waits until the device has handled the packet that was sent last. Returns false after `limit`.
    #[track_caller]
    pub fn wait_sent(&mut self, limit: Duration) -> bool {
        if !self.tx.has_used() && !self.tx.wait_used(limit) {
            return false;
        }
        let used = self.tx.take_used().expect("a used chain");
        assert_eq!(used.length, 0, "the device writes nothing to a packet");
        true
    }
}
