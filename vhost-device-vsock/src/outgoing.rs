// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Packets to the guest.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;

use rustix::io::{Errno, ioctl_fionread};
use vhost_device_common::chain::Chain;
use vhost_device_common::statistics::Outcome;
use vhost_device_common::warn_limited;
use vhost_device_common::worker::Queue;
use zerocopy::IntoBytes;

use crate::connection::{Connection, Fault, Message, State};
use crate::handler::VsockHandler;
use crate::lifecycle::TIME_TO_OPEN;
use crate::packet::{END_OF_MESSAGE, EVENT, HEADER_SIZE, Header, Kind, op, place};
use crate::socket;

/// Most packets of one connection before it is the turn of others.
const MAX_CHAINS: usize = 16;

/// Most parts of a buffer into which a message is read by one system call.
const MAX_PARTS: usize = 32;

/// Longest message of the host, in bytes.
const MAX_MESSAGE: usize = 256 << 10;

/// An event (VIRTIO 1.3, 5.10.6.7): all connections are gone.
const TRANSPORT_RESET: u32 = 0;

/// What became of an attempt to send data of a connection.
#[derive(Debug)]
enum Sent {
    /// A packet with this many bytes, which ends a message or not.
    Data { length: u32, is_end: bool },
    /// Nothing: the socket has no data now.
    Nothing,
    /// Nothing: an empty message was skipped.
    Skipped,
    /// The host sends no more.
    End,
    /// The buffer of the guest cannot be used.
    BadBuffer,
    /// The connection cannot go on.
    Failed(Fault),
}

/// What to do after the turn of a connection.
enum Turn {
    /// The guest has no buffers; it is still the connection's turn.
    NoBuffer,
    /// There may be more to send.
    Again,
    /// There is nothing to send.
    Done,
}

impl VsockHandler {
    /// Fills the guest's buffers: some packets for each connection in turn.
    pub fn send_packets(&mut self, queue: &mut Queue) {
        if !self.send_resets(queue) {
            return;
        }
        while let Some(slot) = self.waiting.pop_front() {
            let Some(connection) = self.table.get_mut(slot) else {
                continue;
            };
            if !std::mem::take(&mut connection.is_queued) {
                continue;
            }
            match self.send_packet(slot, queue) {
                Turn::NoBuffer => {
                    if let Some(connection) = self.table.get_mut(slot) {
                        connection.is_queued = true;
                        self.waiting.push_front(slot);
                    }
                    return;
                }
                Turn::Again => self.queue(slot),
                Turn::Done => {}
            }
            if !self.send_resets(queue) {
                return;
            }
        }
        // The thread sleeps although buffers are left, once it has looked for them.
        queue.has_available();
    }

    /// Sends all resets. Returns false if the guest has no more buffers.
    fn send_resets(&mut self, queue: &mut Queue) -> bool {
        while let Some(reset) = self.resets.front() {
            if !send(queue, reset) {
                return false;
            }
            self.resets.pop_front();
        }
        true
    }

    /// Sends the next packet of a connection, or several if there is much data.
    fn send_packet(&mut self, slot: u32, queue: &mut Queue) -> Turn {
        let guest_cid = self.guest_cid();
        let Some(connection) = self.table.get_mut(slot) else {
            return Turn::Done;
        };
        if matches!(connection.state, State::Greeting | State::Draining) {
            return Turn::Done;
        }
        let before = connection.owed;
        if let Some(op) = connection.owed.next() {
            let header = connection.header(guest_cid, op);
            if !send(queue, &header) {
                connection.owed = before;
                return Turn::NoBuffer;
            }
            if op == op::REQUEST {
                // The guest's time begins now.
                self.set_deadline(slot, Some(TIME_TO_OPEN));
            }
            return Turn::Again;
        }
        if !connection.has_data() {
            return Turn::Done;
        }
        if connection.outbound.free() == 0 {
            return match std::mem::replace(&mut connection.has_asked, true) {
                true => Turn::Done,
                false => {
                    connection.owed.add(op::CREDIT_REQUEST);
                    Turn::Again
                }
            };
        }
        connection.has_asked = false;
        if connection.is_bulk {
            return self.send_data(slot, queue);
        }
        let mut sent = None;
        let chain = queue.take_if(|chain| {
            let outcome = sent.insert(connection.fill(chain));
            matches!(outcome, Sent::Data { .. } | Sent::BadBuffer)
        });
        let Some(sent) = sent else {
            return Turn::NoBuffer;
        };
        match (sent, chain) {
            (Sent::Data { length, is_end }, Some(chain)) => {
                connection.is_bulk = connection.kind == Kind::Stream && chain.writable_len() == 0;
                connection.complete(queue, chain, length, is_end, guest_cid);
                Turn::Again
            }
            (Sent::BadBuffer, Some(chain)) => {
                refuse(queue, chain);
                Turn::Again
            }
            (Sent::End, _) => {
                connection.end_of_data();
                self.settle(slot);
                Turn::Done
            }
            (Sent::Failed(fault), _) => {
                self.fail(slot, &fault);
                Turn::Done
            }
            (Sent::Skipped, _) => {
                // A host that sends nothing but empty messages must not keep the thread busy.
                connection.is_readable = false;
                self.watch_again(slot);
                Turn::Done
            }
            _ => Turn::Done,
        }
    }

    /// Sends data of a stream by one system call for several packets.
    fn send_data(&mut self, slot: u32, queue: &mut Queue) -> Turn {
        let guest_cid = self.guest_cid();
        let Some(connection) = self.table.get_mut(slot) else {
            return Turn::Done;
        };
        connection.is_bulk = false;
        let Some(socket) = &connection.socket else {
            return Turn::Done;
        };
        let available = ioctl_fionread(socket).unwrap_or(0);
        let most = available.min(connection.outbound.free().into());
        let chains = &mut self.chains;
        let mut room = 0_u64;
        while room < most
            && chains.len() < MAX_CHAINS
            && let Some(chain) = queue.take_if(prepare)
        {
            room = room.saturating_add(chain.writable_len());
            chains.push(chain);
        }
        let rooms: [u64; MAX_CHAINS] =
            std::array::from_fn(|at| chains.get(at).map_or(0, Chain::writable_len));
        // What is wrong here is found again, and handled, where there is one packet at a time.
        let read = match chains.is_empty() {
            true => 0,
            false => Chain::read_many(chains, socket, most).unwrap_or(0),
        };
        connection.is_bulk = read > 0 && read as u64 == room;
        let used = chains.iter().zip(rooms);
        let used = used.filter(|(chain, room)| chain.writable_len() < *room);
        let used = used.count();
        for chain in chains.drain(used..).rev() {
            queue.put_back(chain);
        }
        for (chain, room) in chains.drain(..).zip(rooms) {
            let length = room.saturating_sub(chain.writable_len());
            // No longer than the credit.
            connection.complete(queue, chain, length as u32, false, guest_cid);
        }
        Turn::Again
    }

    /// Tells the guest that its connections are gone, if it has some of which this device does not know.
    pub fn send_event(&mut self, queue: &mut Queue) {
        while self.shared.is_reset_due.load(Ordering::Relaxed) {
            let Some(mut chain) = queue.take() else {
                return;
            };
            let written = chain.write(&TRANSPORT_RESET.to_le_bytes());
            if written.is_ok() {
                self.shared.is_reset_due.store(false, Ordering::Relaxed);
            }
            let outcome = Outcome {
                request: EVENT,
                failed: written.is_err(),
                ..Outcome::default()
            };
            let length = written.map_or(0, |()| size_of_val(&TRANSPORT_RESET) as u32);
            queue.complete_with(chain, length, outcome);
        }
        queue.has_available();
    }
}

/// Sends a packet without data. Returns false if the guest has no buffer.
fn send(queue: &mut Queue, header: &Header) -> bool {
    while let Some(mut chain) = queue.take() {
        if chain.write(header.as_bytes()).is_err() {
            refuse(queue, chain);
            continue;
        }
        let outcome = Outcome {
            request: place(header.op.get()),
            ..Outcome::default()
        };
        queue.complete_with(chain, HEADER_SIZE, outcome);
        return true;
    }
    false
}

/// Gives back a buffer that cannot be used.
fn refuse(queue: &mut Queue, chain: Chain) {
    warn_limited(format_args!(
        "a buffer of the guest is too small for a packet, or outside guest memory"
    ));
    let failed = true;
    let outcome = Outcome {
        failed,
        ..Outcome::default()
    };
    queue.complete_with(chain, 0, outcome);
}

/// Reserves the place of the header in a buffer of the guest. Returns false if the buffer cannot be used for data.
fn prepare(chain: &mut Chain) -> bool {
    let has_head = chain.split_head(HEADER_SIZE.into());
    has_head.is_ok() && chain.writable_len() > 0 && chain.writable_iovecs().is_ok()
}

impl Connection {
    /// Completes a packet whose data is written.
    fn complete(
        &mut self,
        queue: &mut Queue,
        mut chain: Chain,
        length: u32,
        is_end: bool,
        guest_cid: u32,
    ) {
        self.outbound.send(length);
        let mut header = self.header(guest_cid, op::DATA);
        header.len = length.into();
        header.flags = if is_end { END_OF_MESSAGE } else { 0 }.into();
        let written = chain.write_head(header.as_bytes());
        let outcome = Outcome {
            request: place(op::DATA),
            bytes: length.into(),
            failed: written.is_err(),
        };
        queue.complete_with(chain, HEADER_SIZE.saturating_add(length), outcome);
    }

    /// Reads data of the host into `chain`, behind the place of the header.
    fn fill(&mut self, chain: &mut Chain) -> Sent {
        if !prepare(chain) {
            return Sent::BadBuffer;
        }
        let Some(socket) = &self.socket else {
            self.is_readable = false;
            return Sent::Nothing;
        };
        let room = u32::try_from(chain.writable_len()).unwrap_or(u32::MAX);
        let most = room.min(self.outbound.free());
        let outcome = match self.kind {
            Kind::Stream => fill_stream(socket, chain, most),
            Kind::Seqpacket => {
                fill_message(socket, chain, most, self.outbound.size(), &mut self.message)
            }
        };
        if let Sent::Nothing = outcome {
            self.is_readable = false;
        }
        outcome
    }
}

fn fill_stream(socket: &OwnedFd, chain: &mut Chain, most: u32) -> Sent {
    match chain.read_from(socket, most.into()) {
        Ok(0) => Sent::End,
        Ok(count) => Sent::Data {
            length: count as u32,
            is_end: false,
        },
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Sent::Nothing,
        Err(error) => Sent::Failed(Errno::from_io_error(&error).unwrap_or(Errno::IO).into()),
    }
}

fn fill_message(
    socket: &OwnedFd,
    chain: &mut Chain,
    most: u32,
    guest_size: u32,
    message: &mut Option<Message>,
) -> Sent {
    if message.is_none() {
        let length = match socket::message_length(socket) {
            Ok(0) if socket::skip_empty_message(socket) => return Sent::Skipped,
            Ok(0) => return Sent::End,
            Ok(length) => length,
            Err(Errno::AGAIN | Errno::INTR) => return Sent::Nothing,
            Err(errno) => return Sent::Failed(errno.into()),
        };
        if length > MAX_MESSAGE.min(guest_size as usize) {
            return Sent::Failed(Fault::MessageSize);
        }
        // A call that takes only a part of the buffer has a bound on iovecs, and would cut the message.
        let parts = chain.writable_iovecs().map_or(usize::MAX, <[_]>::len);
        if length <= most as usize && parts <= MAX_PARTS {
            return match fill_stream(socket, chain, most) {
                Sent::Data { length, .. } => Sent::Data {
                    length,
                    is_end: true,
                },
                other => other,
            };
        }
        match socket::read_message(socket, length) {
            Ok(bytes) => *message = Some(Message { bytes, sent: 0 }),
            Err(errno) => return Sent::Failed(errno.into()),
        }
    }
    let Some(pending) = message else {
        return Sent::Nothing;
    };
    let rest = pending.bytes.get(pending.sent..).unwrap_or_default();
    let length = rest.len().min(most as usize);
    let part = rest.get(..length).unwrap_or_default();
    if chain.write(part).is_err() {
        return Sent::BadBuffer;
    }
    pending.sent = pending.sent.saturating_add(length);
    let is_end = pending.sent >= pending.bytes.len();
    if is_end {
        *message = None;
    }
    Sent::Data {
        length: length as u32,
        is_end,
    }
}
