// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Events of the sockets of the host.

use rustix::io::Errno;
use rustix::net::sockopt::socket_error;
use rustix::net::{SocketFlags, accept_with};
use vhost_device_common::warn_limited;
use vhost_device_common::worker::Readiness;

use crate::connection::{Fault, Key, State};
use crate::handler::{VsockHandler, listener_token};
use crate::lifecycle::TIME_TO_OPEN;
use crate::packet::{HOST_CID, op, shutdown};
use crate::shared::count;
use crate::socket::{self, Line};

/// The lowest port of the host for connections to the guest. Guests choose their own ports below.
const FIRST_PORT: u32 = 1 << 30;

/// Most connections that are accepted before others are served.
const MAX_ACCEPTS: usize = 64;

impl VsockHandler {
    /// Accepts connections on a listening socket.
    pub fn accept(&mut self, index: usize) {
        let listener = self.shared.listeners().get(index).cloned();
        let Some((listener, kind)) = listener else {
            return;
        };
        for _ in 0..MAX_ACCEPTS {
            match accept_with(&*listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
                Ok(socket) if self.is_full() => {
                    count(&self.shared.counters.refused);
                    drop(socket);
                }
                Ok(socket) => match self.insert(Key::default(), kind, State::Greeting, socket) {
                    Ok(slot) => self.set_deadline(slot, Some(TIME_TO_OPEN)),
                    Err(fault) => warn_limited(format_args!("cannot accept a connection: {fault}")),
                },
                Err(Errno::AGAIN) => return,
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(errno) => {
                    warn_limited(format_args!(
                        "cannot accept connections to the guest, trying again: {errno}"
                    ));
                    if !self.retries.contains(&index) {
                        self.retries.push(index);
                    }
                    self.start_timer();
                    return;
                }
            }
        }
        // More may wait, which would not be reported again.
        let again = self
            .watcher
            .change(&*listener, Readiness::READABLE, listener_token(index));
        if let Err(error) = again {
            log::debug!("cannot watch a listening socket: {error}");
        }
    }

    /// Handles an event of the socket of a connection.
    pub fn host_ready(&mut self, slot: u32, readiness: Readiness) {
        let Some(connection) = self.table.get_mut(slot) else {
            return;
        };
        let Some(socket) = &connection.socket else {
            return;
        };
        let is_readable = readiness.contains(Readiness::READABLE);
        let handled = match connection.state {
            State::Greeting => match socket::read_line(socket, connection.kind) {
                Line::Partial => return,
                Line::Invalid => Err(Fault::Greeting),
                Line::Complete(line) => self.greet(slot, &line),
            },
            State::Asking => match socket::read_line(socket, connection.kind) {
                Line::Partial => return,
                Line::Complete(line) if socket::number_after("OK", &line).is_some() => {
                    connection.is_readable = true;
                    self.connected(slot);
                    Ok(())
                }
                _ => Err(Fault::Greeting),
            },
            State::Connecting => match socket_error(socket) {
                Ok(Ok(())) if readiness.contains(Readiness::WRITABLE) => {
                    connection.is_readable = true;
                    self.connected(slot);
                    Ok(())
                }
                Ok(Ok(())) => return,
                Ok(Err(errno)) | Err(errno) => Err(errno.into()),
            },
            State::Requested => {
                connection.is_readable |= is_readable;
                return;
            }
            State::Open | State::Closing | State::Draining => {
                connection.is_readable |= is_readable;
                let is_deaf = connection.guest_shutdown & shutdown::RECEIVE != 0;
                if is_deaf && is_readable && socket::is_closed(socket) {
                    // The guest does not receive, so nothing reads the end of the data.
                    connection.end_of_data();
                }
                match connection.is_blocked && readiness.contains(Readiness::WRITABLE) {
                    true => connection.flush(),
                    false => Ok(()),
                }
            }
        };
        match handled {
            Ok(()) => self.settle(slot),
            Err(fault) => self.fail(slot, &fault),
        }
    }

    /// Asks the guest to accept a connection, whose first line is `line`.
    fn greet(&mut self, slot: u32, line: &str) -> Result<(), Fault> {
        let guest_port = socket::number_after("CONNECT", line).ok_or(Fault::Greeting)?;
        let Some(connection) = self.table.get_mut(slot) else {
            return Ok(());
        };
        if !self.shared.accepts(connection.kind) {
            return Err(Fault::Kind);
        }
        connection.state = State::Requested;
        connection.owed.add(op::REQUEST);
        let mut key = Key {
            peer_cid: HOST_CID,
            peer_port: self.next_port,
            guest_port,
        };
        // The table is bounded, so this ends.
        while self.table.find(&key).is_some() {
            key.peer_port = next_port(key.peer_port);
        }
        self.next_port = next_port(key.peer_port);
        self.table.set_key(slot, key);
        self.set_deadline(slot, Some(TIME_TO_OPEN));
        count(&self.shared.counters.by_host);
        Ok(())
    }

    /// The host has accepted a connection of the guest.
    fn connected(&mut self, slot: u32) {
        self.set_deadline(slot, None);
        if let Some(connection) = self.table.get_mut(slot) {
            connection.state = State::Open;
            connection.owed.add(op::RESPONSE);
        }
    }
}

/// Returns the port of the host after `port`.
fn next_port(port: u32) -> u32 {
    // The highest number is no port.
    match port.wrapping_add(1) {
        0..FIRST_PORT | u32::MAX => FIRST_PORT,
        next => next,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_of_the_host_wrap_around() {
        assert_eq!(next_port(0x4000_0000), 0x4000_0001);
        assert_eq!(next_port(u32::MAX - 2), u32::MAX - 1);
        assert_eq!(next_port(u32::MAX - 1), 0x4000_0000);
        assert_eq!(next_port(u32::MAX), 0x4000_0000);
        assert_eq!(next_port(5), 0x4000_0000);
    }
}
