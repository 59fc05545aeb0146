// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One connection between a port of the guest and a socket of the host.

use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::time::Instant;

use rustix::io::Errno;
use rustix::net::Shutdown;
use thiserror::Error;
use vhost_device_common::chain::Chain;

use crate::buffer::Buffer;
use crate::credit::{Inbound, Outbound};
use crate::packet::{END_OF_MESSAGE, Header, Kind, op, shutdown};
use crate::socket;

/// Parts of a message that one system call can send.
const MAX_PARTS: usize = 1024;

/// How a connection is found: its addresses, as the guest sees them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Key {
    /// CID of the host or of a sibling.
    pub peer_cid: u32,
    pub peer_port: u32,
    pub guest_port: u32,
}

/// The states of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// A program of the host has connected, and has not sent its first line. The guest knows nothing yet.
    Greeting,
    /// The guest is asked to accept a connection of the host.
    Requested,
    /// The guest asked for a connection to an AF_VSOCK socket, which is being connected.
    Connecting,
    /// The guest asked for a connection to a sibling, whose device has not answered.
    Asking,
    /// Connected.
    Open,
    /// The host has closed its end; the guest has not confirmed.
    Closing,
    /// The guest has closed its end and forgotten the connection; the host has not taken all data.
    Draining,
}

/// Why a connection is reset.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum Fault {
    #[error("the source CID is not that of the guest")]
    Source,
    #[error("neither the host nor a sibling has this CID")]
    Destination,
    #[error("type not supported, or not that of the connection")]
    Kind,
    #[error("no such connection")]
    Unknown,
    #[error("the packet does not fit the state of the connection")]
    State,
    #[error("the packet is shorter than its header says, or outside guest memory")]
    Memory,
    #[error("more data than the buffer has room for")]
    Credit,
    #[error("--allow-ports does not include the port")]
    Port,
    #[error("too many connections: see --max-connections")]
    TooMany,
    #[error("the message is too long")]
    MessageSize,
    #[error("the program of the host does not follow the protocol of the socket")]
    Greeting,
    #[error("timeout")]
    Timeout,
    #[error("{0}")]
    Host(#[from] Errno),
}

/// A message of the host that does not fit one packet.
#[derive(Debug)]
pub struct Message {
    pub bytes: Vec<u8>,
    /// How many of them have been sent.
    pub sent: usize,
}

/// Packets that the guest is owed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Owed(u8);

impl Owed {
    /// Returns the next operation, and removes it.
    pub fn next(&mut self) -> Option<u16> {
        let op = self.0.trailing_zeros() as u16;
        self.0 &= self.0.wrapping_sub(1);
        (op < 8).then_some(op)
    }

    pub fn add(&mut self, op: u16) {
        self.0 |= 1 << op;
    }

    pub fn remove(&mut self, op: u16) {
        self.0 &= !(1 << op);
    }

    pub fn contains(&self, op: u16) -> bool {
        self.0 & 1 << op != 0
    }

    pub fn is_empty(&self) -> bool {
        self.0 == 0
    }
}

/// What follows for a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// It continues.
    Stays,
    /// All is done: the guest gets a reset, which confirms its shutdown, and the connection ends.
    Ends,
}

/// A connection.
#[derive(Debug)]
pub struct Connection {
    pub key: Key,
    pub kind: Kind,
    pub state: State,
    /// None once the host has closed its end.
    pub socket: Option<OwnedFd>,
    pub owed: Owed,
    /// The connection is in the queue of those that have something for the guest.
    pub is_queued: bool,
    /// The socket may have data.
    pub is_readable: bool,
    /// The last packet of data filled a buffer of the guest: the socket may have data for several buffers.
    pub is_bulk: bool,
    /// The socket takes no more data; the rest is in the buffer.
    pub is_blocked: bool,
    /// The socket is watched for room to write.
    pub is_watched_for_room: bool,
    /// The guest was asked for credit since it last had some.
    pub has_asked: bool,
    pub inbound: Inbound,
    pub outbound: Outbound,
    pub buffer: Buffer,
    pub message: Option<Message>,
    /// What the guest does not do any more.
    pub guest_shutdown: u32,
    /// What the host does not do any more.
    pub host_shutdown: u32,
    /// What was passed on to the host's socket of `guest_shutdown`.
    passed_on: u32,
    /// When the device gives up waiting for the other side.
    pub deadline: Option<Instant>,
}

impl Connection {
    pub fn new(key: Key, kind: Kind, state: State, socket: OwnedFd, inbound: Inbound) -> Self {
        Self {
            key,
            kind,
            state,
            socket: Some(socket),
            owed: Owed::default(),
            is_queued: false,
            is_readable: false,
            is_bulk: false,
            is_blocked: false,
            is_watched_for_room: false,
            has_asked: false,
            inbound,
            outbound: Outbound::default(),
            buffer: Buffer::default(),
            message: None,
            guest_shutdown: 0,
            host_shutdown: 0,
            passed_on: 0,
            deadline: None,
        }
    }

    fn is_stream(&self) -> bool {
        self.kind == Kind::Stream
    }

    /// Returns whether the guest knows the connection and has not been told that it is gone.
    pub fn is_known(&self) -> bool {
        !matches!(self.state, State::Greeting | State::Draining) && !self.owed.contains(op::REQUEST)
    }

    /// Returns whether data of the host can be sent to the guest, apart from credit.
    pub fn has_data(&self) -> bool {
        self.is_readable
            && self.state == State::Open
            && self.guest_shutdown & shutdown::RECEIVE == 0
            && self.host_shutdown & shutdown::SEND == 0
    }

    /// Returns the header of a packet to the guest. It reports the credit.
    pub fn header(&mut self, guest_cid: u32, op: u16) -> Header {
        let (buf_alloc, fwd_cnt) = self.inbound.report();
        self.owed.remove(op::CREDIT_UPDATE);
        let flags = match op {
            op::SHUTDOWN => self.host_shutdown,
            _ => 0,
        };
        Header {
            src_cid: u64::from(self.key.peer_cid).into(),
            dst_cid: u64::from(guest_cid).into(),
            src_port: self.key.peer_port.into(),
            dst_port: self.key.guest_port.into(),
            len: 0.into(),
            kind: self.kind.number().into(),
            op: op.into(),
            flags: flags.into(),
            buf_alloc: buf_alloc.into(),
            fwd_cnt: fwd_cnt.into(),
        }
    }

    /// Passes data of the guest to the host: `length` bytes of `chain`. What the socket does not take is buffered.
    pub fn receive(
        &mut self,
        chain: &mut Chain,
        length: u32,
        flags: u32,
        scratch: &mut Vec<u8>,
    ) -> Result<(), Fault> {
        if self.guest_shutdown & shutdown::SEND != 0 {
            return Err(Fault::State);
        }
        if !self.inbound.receive(length) {
            return Err(Fault::Credit);
        }
        let Some(socket) = self
            .socket
            .as_ref()
            .filter(|_| self.host_shutdown & shutdown::RECEIVE == 0)
        else {
            // The guest sent it before it learned that the host receives no more.
            self.inbound.forward(length);
            return Ok(());
        };
        let is_end = flags & END_OF_MESSAGE != 0;
        let mut left = length;
        let at_once = match self.kind {
            Kind::Stream => true,
            Kind::Seqpacket => {
                let parts = chain.readable_iovecs().map_err(|_| Fault::Memory)?.len();
                is_end && u64::from(length) == chain.readable_len() && parts <= MAX_PARTS
            }
        };
        if at_once && self.buffer.is_empty() {
            while left > 0 {
                match chain.write_to(socket, left.into()) {
                    Ok(0) => break,
                    Ok(count) => {
                        left = left.saturating_sub(count as u32);
                        self.inbound.forward(count as u32);
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {
                        self.is_blocked = true;
                        break;
                    }
                    Err(error) if error.kind() == ErrorKind::InvalidInput => {
                        return Err(Fault::Memory);
                    }
                    Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => {
                        return Err(Fault::MessageSize);
                    }
                    Err(_) => {
                        self.inbound.forward(left);
                        self.refuse_data();
                        return Ok(());
                    }
                }
            }
        }
        if left == 0 && (self.is_stream() || length > 0 && at_once && self.buffer.is_empty()) {
            return Ok(());
        }
        scratch.resize(left as usize, 0);
        chain.read(scratch).map_err(|_| Fault::Memory)?;
        match self.kind {
            Kind::Stream => self.buffer.push(scratch),
            Kind::Seqpacket => self.buffer.push_message(scratch, is_end),
        }
        match self.is_blocked {
            true => Ok(()),
            false => self.flush(),
        }
    }

    /// Sends what is buffered to the host.
    pub fn flush(&mut self) -> Result<(), Fault> {
        let is_stream = self.is_stream();
        let Some(socket) = &self.socket else {
            return Ok(());
        };
        let (count, errno) = self.buffer.flush(socket, is_stream);
        self.inbound.forward(count);
        self.is_blocked = errno == Some(Errno::AGAIN);
        match errno {
            None | Some(Errno::AGAIN) => {}
            Some(Errno::MSGSIZE) => return Err(Fault::MessageSize),
            Some(_) => self.refuse_data(),
        }
        Ok(())
    }

    /// Notes that the host receives no more data.
    fn refuse_data(&mut self) {
        self.is_blocked = false;
        let count = self.buffer.clear();
        self.inbound.forward(count);
        self.end_of_host(shutdown::RECEIVE);
    }

    /// Notes that the host does not receive or send any more, or neither, and has the guest told.
    pub fn end_of_host(&mut self, flags: u32) {
        if self.host_shutdown | flags != self.host_shutdown {
            self.host_shutdown |= flags;
            self.owed.add(op::SHUTDOWN);
        }
    }

    /// Notes the end of the data of the host.
    pub fn end_of_data(&mut self) {
        self.is_readable = false;
        let is_closed = self.socket.as_ref().is_none_or(socket::is_closed);
        if is_closed {
            self.refuse_data();
        }
        self.end_of_host(shutdown::SEND);
    }

    /// Passes on what the guest has shut down, once the host has taken all data before that.
    pub fn pass_on_shutdown(&mut self) -> Next {
        let has_output = self.buffer.has_output(self.is_stream());
        if self.guest_shutdown == shutdown::BOTH && !has_output {
            return Next::Ends;
        }
        let mut ready = self.guest_shutdown & !self.passed_on;
        if has_output {
            ready &= !shutdown::SEND;
        }
        if let Some(socket) = &self.socket {
            if ready & shutdown::SEND != 0 {
                let _ = rustix::net::shutdown(socket, Shutdown::Write);
            }
            if ready & shutdown::RECEIVE != 0 {
                let _ = rustix::net::shutdown(socket, Shutdown::Read);
            }
        }
        self.passed_on |= ready;
        Next::Stays
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owed_packets_are_sent_once_in_the_order_of_their_numbers() {
        let mut owed = Owed::default();
        for op in [op::CREDIT_REQUEST, op::RESPONSE, op::SHUTDOWN, op::RESPONSE] {
            owed.add(op);
        }
        owed.add(op::CREDIT_UPDATE);
        owed.remove(op::CREDIT_UPDATE);
        let ops: Vec<_> = std::iter::from_fn(|| owed.next()).collect();
        assert_eq!(ops, [op::RESPONSE, op::SHUTDOWN, op::CREDIT_REQUEST]);
        assert!(owed.is_empty());
    }
}
