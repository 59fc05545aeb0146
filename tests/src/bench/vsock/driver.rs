// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest's side of the benchmark: a driver with rings and buffers like those of Linux in QEMU.
//!
//! It respects the credit of the back-end, announces its own, and sleeps on the call eventfds of both queues when there is nothing to do.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::eventfd::EventFd;

use crate::front_end::{Buffer, FrontEnd, Queue};

/// CID of the guest.
pub const GUEST: u64 = 3;
/// CID of the host.
const HOST: u64 = 2;
/// Descriptors of a ring, as in QEMU.
const QUEUE_SIZE: u16 = 128;
/// Bytes of a buffer to receive into, header included.
const RECEIVE_BUFFER: u64 = 4096;
/// The largest packet, without its header.
pub const LARGEST: u32 = 64 << 10;
/// Bytes that the guest buffers for each connection, as Linux does.
const CREDIT: u32 = 256 << 10;
/// The back-end is told of free space when it knows of less than this, as Linux does.
const LEAST_CREDIT: u32 = LARGEST;
/// Bytes of a page: how Linux divides the data of large packets.
const PAGE: u32 = 4096;
/// Bytes of a header, and of its place.
const HEADER_SIZE: usize = 44;
const HEADER_PLACE: u64 = 64;
const SEND_PLACE: u64 = HEADER_PLACE + LARGEST as u64;

/// Operations of packets (VIRTIO 1.3, 5.10.6).
pub mod operation {
    /// Asks for a connection.
    pub const REQUEST: u16 = 1;
    /// Accepts a connection.
    pub const RESPONSE: u16 = 2;
    /// Ends or refuses a connection.
    pub const RST: u16 = 3;
    /// No more data in one direction, or in both.
    pub const SHUTDOWN: u16 = 4;
    /// Data.
    pub const RW: u16 = 5;
    /// Announces free space.
    pub const CREDIT_UPDATE: u16 = 6;
    /// Asks for a CREDIT_UPDATE.
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Both flags of SHUTDOWN.
pub const BOTH: u32 = 3;
/// The type of a stream connection.
const STREAM: u16 = 1;

/// The fields of a header that differ between packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Port of the sender.
    pub source_port: u32,
    /// Port of the receiver.
    pub destination_port: u32,
    /// Bytes of data.
    pub length: u32,
    /// One of [`operation`].
    pub operation: u16,
    /// Flags of the operation.
    pub flags: u32,
    /// Bytes that the sender buffers.
    pub allocated: u32,
    /// Bytes that the sender has taken out of its buffer so far.
    pub forwarded: u32,
}

impl Header {
    /// Returns the bytes of a packet from the guest to the host.
    fn to_host(self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        let mut put = |offset: usize, field: &[u8]| {
            bytes[offset..offset + field.len()].copy_from_slice(field);
        };
        put(0, &GUEST.to_le_bytes());
        put(8, &HOST.to_le_bytes());
        put(16, &self.source_port.to_le_bytes());
        put(20, &self.destination_port.to_le_bytes());
        put(24, &self.length.to_le_bytes());
        put(28, &STREAM.to_le_bytes());
        put(30, &self.operation.to_le_bytes());
        put(32, &self.flags.to_le_bytes());
        put(36, &self.allocated.to_le_bytes());
        put(40, &self.forwarded.to_le_bytes());
        bytes
    }

    fn parse(bytes: &[u8; HEADER_SIZE]) -> Self {
        let word = |offset: usize| {
            u32::from_le_bytes([0, 1, 2, 3].map(|index: usize| bytes[offset + index]))
        };
        Header {
            source_port: word(16),
            destination_port: word(20),
            length: word(24),
            operation: (word(28) >> 16) as u16,
            flags: word(32),
            allocated: word(36),
            forwarded: word(40),
        }
    }
}

/// The guest's side of a connection.
#[derive(Debug, Clone, Copy)]
pub struct Connection {
    /// Port of the guest.
    pub port: u32,
    host_port: u32,
    sent: u32,
    host_allocated: u32,
    host_forwarded: u32,
    received: u32,
    /// What the host knows of `received`.
    told: u32,
}

impl Connection {
    /// Creates a connection between two ports, which [`operation::REQUEST`] asks for.
    pub fn new(port: u32, host_port: u32) -> Self {
        Connection {
            port,
            host_port,
            sent: 0,
            host_allocated: 0,
            host_forwarded: 0,
            received: 0,
            told: 0,
        }
    }

    /// Returns how many bytes the host has room for.
    fn credit(&self) -> u32 {
        let in_flight = self.sent.wrapping_sub(self.host_forwarded);
        self.host_allocated.saturating_sub(in_flight)
    }

    /// Returns whether a packet with so much data may be sent.
    pub fn may_send(&self, length: u32) -> bool {
        self.credit() >= length
    }

    /// Takes note of a packet from the host.
    pub fn note(&mut self, header: &Header) {
        self.host_allocated = header.allocated;
        self.host_forwarded = header.forwarded;
        if header.operation == operation::RW {
            self.received = self.received.wrapping_add(header.length);
        }
    }

    /// Returns whether the host must be told of free space.
    pub fn owes_credit(&self) -> bool {
        CREDIT - self.received.wrapping_sub(self.told).min(CREDIT) < LEAST_CREDIT
    }
}

/// How the data of a packet is divided into descriptors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// One descriptor.
    Whole,
    /// A descriptor for each page.
    Pages,
}

/// A guest with a started device.
pub struct Driver {
    front_end: FrontEnd,
    receive: Queue,
    send: Queue,
    /// The back-end may use it; nothing here does.
    _event: Queue,
    receive_area: u64,
    send_area: u64,
    /// Places of packets, by the head of their chain.
    receive_places: Vec<u64>,
    send_places: Vec<u64>,
    free: Vec<u64>,
}

/// Returns how much memory the driver needs, in bytes.
pub fn memory_size() -> usize {
    16 << 20
}

impl Driver {
    /// Starts the queues of a device.
    pub fn new(front_end: FrontEnd) -> crate::front_end::Result<Self> {
        let memory = front_end.memory();
        let count = u64::from(QUEUE_SIZE);
        let receive_area = memory.allocate(count * RECEIVE_BUFFER, 4096);
        let send_area = memory.allocate(count * SEND_PLACE, 4096);
        let receive = front_end.queue(0, QUEUE_SIZE)?;
        let send = front_end.queue(1, QUEUE_SIZE)?;
        let event = front_end.queue(2, QUEUE_SIZE)?;
        let mut driver = Driver {
            receive,
            send,
            _event: event,
            receive_area,
            send_area,
            receive_places: vec![0; usize::from(QUEUE_SIZE)],
            send_places: vec![0; usize::from(QUEUE_SIZE)],
            free: (0..count)
                .map(|slot| send_area + slot * SEND_PLACE)
                .collect(),
            front_end,
        };
        for slot in 0..count {
            driver.offer(driver.receive_area + slot * RECEIVE_BUFFER);
        }
        // The data of all packets.
        let data: Vec<u8> = (0..LARGEST).map(|index| index as u8).collect();
        for slot in 0..count {
            let place = driver.send_area + slot * SEND_PLACE + HEADER_PLACE;
            driver.front_end.memory().write(place, &data);
        }
        driver.flush();
        Ok(driver)
    }

    /// Adds a buffer to receive into.
    fn offer(&mut self, place: u64) {
        let buffer = Buffer::writable(place, RECEIVE_BUFFER as u32);
        let head = self.receive.add(&[buffer]).expect("a descriptor for each");
        self.receive_places[usize::from(head)] = place;
    }

    /// Adds a packet, which the back-end sees after [`Driver::flush`]. Returns false if the queue is full.
    pub fn send(
        &mut self,
        connection: &mut Connection,
        operation: u16,
        flags: u32,
        length: u32,
        framing: Framing,
    ) -> bool {
        let Some(&place) = self.free.last() else {
            return false;
        };
        let header = Header {
            source_port: connection.port,
            destination_port: connection.host_port,
            length,
            operation,
            flags,
            allocated: CREDIT,
            forwarded: connection.received,
        };
        self.front_end.memory().write(place, &header.to_host());
        let first = Buffer::readable(place, HEADER_SIZE as u32);
        let data = Buffer::readable(place + HEADER_PLACE, length);
        let head = match (length, framing) {
            (0, _) => self.send.add(&[first]),
            (_, Framing::Whole) => self.send.add(&[first, data]),
            (_, Framing::Pages) => {
                let mut chain = vec![first];
                chain.extend(data.split(&vec![PAGE; (length / PAGE) as usize - 1]));
                self.send.add(&chain)
            }
        };
        let Some(head) = head else {
            return false;
        };
        self.free.pop();
        self.send_places[usize::from(head)] = place;
        connection.sent = connection.sent.wrapping_add(length);
        connection.told = connection.received;
        true
    }

    /// Takes the next packet of the host, and offers its buffer again.
    pub fn take(&mut self) -> Option<Header> {
        let used = self.receive.take_used()?;
        let place = self.receive_places[usize::from(used.head)];
        let mut bytes = [0; HEADER_SIZE];
        self.front_end.memory().read(place, &mut bytes);
        self.offer(place);
        Some(Header::parse(&bytes))
    }

    /// Makes all that was added visible, and takes back what was sent.
    pub fn flush(&mut self) {
        while let Some(used) = self.send.take_used() {
            self.free.push(self.send_places[usize::from(used.head)]);
        }
        for queue in [&mut self.receive, &mut self.send] {
            queue.publish();
            queue.kick();
        }
    }

    /// Waits until the host has sent a packet or, if `or_sent`, until the back-end has taken one. Returns false after `limit`.
    pub fn wait(&mut self, or_sent: bool, limit: Duration) -> io::Result<bool> {
        if self.receive.arm_interrupt() || or_sent && self.send.arm_interrupt() {
            return Ok(true);
        }
        let limit = Timespec::try_from(limit).map_err(io::Error::other)?;
        let calls = [self.receive.call_fd(), self.send.call_fd()];
        let count = if or_sent { 2 } else { 1 };
        // SAFETY: the eventfds stay open as long as their queues.
        let files = calls.map(|call| unsafe { BorrowedFd::borrow_raw(call.as_raw_fd()) });
        let mut events = files
            .each_ref()
            .map(|file| PollFd::new(file, PollFlags::IN));
        let ready = poll(&mut events[..count], Some(&limit))?;
        let signalled = |event: &PollFd, call: &EventFd| {
            if event.revents().contains(PollFlags::IN) {
                let _ = call.read();
            }
        };
        for (event, call) in events[..count].iter().zip(calls) {
            signalled(event, call);
        }
        self.receive.disarm_interrupt();
        self.send.disarm_interrupt();
        Ok(ready > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_read_as_it_was_written() {
        let header = Header {
            source_port: 1,
            destination_port: 2,
            length: 3,
            operation: operation::RW,
            flags: 4,
            allocated: 5,
            forwarded: 6,
        };
        let bytes = header.to_host();
        assert_eq!(Header::parse(&bytes), header);
        // Type, then operation (VIRTIO 1.3, 5.10.6).
        assert_eq!(bytes[28..32], [1, 0, 5, 0]);
    }

    #[test]
    fn credit_is_what_the_host_has_room_for() {
        let mut connection = Connection::new(1024, 1);
        assert!(!connection.may_send(1));
        let header = Header {
            source_port: 1,
            destination_port: 1024,
            length: 0,
            operation: operation::RESPONSE,
            flags: 0,
            allocated: 100,
            forwarded: 0,
        };
        connection.note(&header);
        connection.sent = 60;
        assert!(connection.may_send(40) && !connection.may_send(41));
        // Less room than the data in flight is no room.
        let less = Header {
            allocated: 10,
            ..header
        };
        connection.note(&less);
        assert!(!connection.may_send(1));
    }
}
