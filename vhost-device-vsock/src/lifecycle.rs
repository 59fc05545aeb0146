// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The life of connections: how they are added, watched, queued, timed and removed.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use vhost_device_common::worker::Readiness;

use crate::connection::{Connection, Fault, Key, Next, State};
use crate::credit::Inbound;
use crate::handler::{VsockHandler, token};
use crate::packet::{Kind, op, shutdown};
use crate::shared::count;

/// How long the other side may take for a step that opens a connection.
pub const TIME_TO_OPEN: Duration = Duration::from_secs(2);
/// How long the guest may take to confirm that a connection has ended. Linux waits as long.
pub const TIME_TO_CLOSE: Duration = Duration::from_secs(8);
/// Interval at which deadlines are checked.
const TICK: Duration = Duration::from_millis(250);

/// Most bytes that are buffered for all connections together, beside [`MIN_BUFFER`] for each.
const MAX_BUFFERED: u64 = 64 << 20;
/// Bytes that are buffered for one connection: fewer the more there are.
const MAX_BUFFER: u32 = 256 << 10;
const MIN_BUFFER: u32 = 16 << 10;
/// A connection gets this part of what is left of [`MAX_BUFFERED`].
const SHARE: u64 = 64;
/// Most bytes of a message. A host socket takes 208 KiB at most with the default limits of Linux.
const MAX_MESSAGE_BUFFER: u32 = 192 << 10;

impl VsockHandler {
    /// Returns whether no more connections are allowed.
    pub fn is_full(&self) -> bool {
        self.table.len() >= self.shared.options.max_connections as usize
    }

    /// Adds a connection, and watches its socket.
    pub fn insert(
        &mut self,
        key: Key,
        kind: Kind,
        state: State,
        socket: OwnedFd,
    ) -> Result<u32, Fault> {
        let left = MAX_BUFFERED.saturating_sub(self.promised) / SHARE;
        let most = match kind {
            Kind::Stream => MAX_BUFFER,
            Kind::Seqpacket => MAX_MESSAGE_BUFFER,
        };
        let size = u32::try_from(left).map_or(most, |left| left.clamp(MIN_BUFFER, most));
        let connection = Connection::new(key, kind, state, socket, Inbound::new(size));
        let slot = self.table.insert(connection);
        self.promised = self.promised.saturating_add(size.into());
        self.shared
            .counters
            .open
            .store(self.table.len() as u64, Ordering::Relaxed);
        let Some(connection) = self.table.get_mut(slot) else {
            return Ok(slot);
        };
        if let Some(socket) = &connection.socket {
            let is_waited_for = state == State::Connecting;
            connection.is_watched_for_room = is_waited_for;
            let added = self
                .watcher
                .add(socket, interest(is_waited_for), token(slot));
            if let Err(error) = added {
                self.remove(slot);
                let errno = Errno::from_io_error(&error).unwrap_or(Errno::NOMEM);
                return Err(errno.into());
            }
        }
        Ok(slot)
    }

    /// Removes a connection, and closes its socket.
    pub fn remove(&mut self, slot: u32) {
        let Some(connection) = self.table.remove(slot) else {
            return;
        };
        if let Some(socket) = &connection.socket {
            self.watcher.remove(socket);
        }
        self.promised = self
            .promised
            .saturating_sub(connection.inbound.size().into());
        self.shared
            .counters
            .open
            .store(self.table.len() as u64, Ordering::Relaxed);
    }

    /// Ends a connection with a reset, if the guest knows of it.
    pub fn reset(&mut self, slot: u32) {
        let guest_cid = self.guest_cid();
        if let Some(connection) = self.table.get_mut(slot)
            && connection.is_known()
        {
            self.resets
                .push_back(connection.header(guest_cid, op::RESET));
        }
        self.remove(slot);
    }

    /// Ends a connection because of a fault.
    pub fn fail(&mut self, slot: u32, fault: &Fault) {
        if let Some(connection) = self.table.get_mut(slot) {
            log::debug!("connection {:?} is reset: {fault}", connection.key);
            count(&self.shared.counters.reset_by_device);
        }
        self.reset(slot);
    }

    /// Queues a connection that has something for the guest.
    pub fn queue(&mut self, slot: u32) {
        let Some(connection) = self.table.get_mut(slot) else {
            return;
        };
        if connection.is_queued {
            return;
        }
        connection.is_queued = true;
        self.waiting.push_back(slot);
        // Removed connections leave their slots behind, which a guest without buffers would never clear.
        if self.waiting.len() > self.table.len().saturating_mul(2).saturating_add(64) {
            self.tidy_queue();
        }
    }

    /// Removes slots from the queue that are not in use any more, or there twice.
    fn tidy_queue(&mut self) {
        let table = &mut self.table;
        let mut is_seen = HashSet::new();
        self.waiting.retain(|slot| {
            table
                .get_mut(*slot)
                .is_some_and(|connection| connection.is_queued)
                && is_seen.insert(*slot)
        });
    }

    /// Sets the deadline of a connection, or removes it.
    pub fn set_deadline(&mut self, slot: u32, time: Option<Duration>) {
        if let Some(connection) = self.table.get_mut(slot) {
            connection.deadline = time.map(|time| Instant::now() + time);
        }
        if time.is_some() {
            self.start_timer();
        }
    }

    pub fn start_timer(&mut self) {
        if !self.is_timer_set {
            self.is_timer_set = true;
            self.timer.set(TICK);
        }
    }

    /// Ends the connections whose deadlines have passed, and tries again what failed.
    pub fn tick(&mut self) {
        self.is_timer_set = false;
        let now = Instant::now();
        let mut late = Vec::new();
        let mut waits = false;
        for (slot, connection) in self.table.iter() {
            match connection.deadline {
                Some(deadline) if deadline <= now => late.push(slot),
                Some(_) => waits = true,
                None => {}
            }
        }
        for slot in late {
            self.fail(slot, &Fault::Timeout);
        }
        for listener in std::mem::take(&mut self.retries) {
            self.accept(listener);
        }
        if waits {
            self.start_timer();
        }
    }

    /// Does what follows from a change of a connection: passes shutdowns on, watches the socket for what the connection waits for,
    /// and queues it if it has something for the guest.
    pub fn settle(&mut self, slot: u32) {
        let Some(connection) = self.table.get_mut(slot) else {
            return;
        };
        if connection.state == State::Draining {
            if connection.pass_on_shutdown() == Next::Ends {
                self.remove(slot);
                return;
            }
        } else if matches!(connection.state, State::Open | State::Closing) {
            if connection.pass_on_shutdown() == Next::Ends {
                self.reset(slot);
                return;
            }
            if connection.state == State::Open && connection.host_shutdown == shutdown::BOTH {
                connection.state = State::Closing;
                if let Some(socket) = connection.socket.take() {
                    self.watcher.remove(&socket);
                }
                self.set_deadline(slot, Some(TIME_TO_CLOSE));
            }
        }
        let Some(connection) = self.table.get_mut(slot) else {
            return;
        };
        let waits_for_room = connection.is_blocked || connection.state == State::Connecting;
        if waits_for_room != connection.is_watched_for_room {
            connection.is_watched_for_room = waits_for_room;
            self.watch_again(slot);
        }
        let Some(connection) = self.table.get_mut(slot) else {
            return;
        };
        if connection.inbound.is_outdated() && connection.state == State::Open {
            connection.owed.add(op::CREDIT_UPDATE);
        }
        let is_known = !matches!(connection.state, State::Greeting | State::Draining);
        if is_known && !connection.owed.is_empty() || connection.has_data() {
            self.queue(slot);
        }
    }

    /// Has the socket of a connection reported again.
    pub fn watch_again(&mut self, slot: u32) {
        if let Some(connection) = self.table.get_mut(slot)
            && let Some(socket) = &connection.socket
        {
            let interest = interest(connection.is_watched_for_room);
            if let Err(error) = self.watcher.change(socket, interest, token(slot)) {
                log::debug!("cannot watch a socket: {error}");
            }
        }
    }
}

/// Returns what a socket is watched for. Room to write is reported each time that the host reads, so only a socket that was full is
/// watched for it.
fn interest(waits_for_room: bool) -> Readiness {
    match waits_for_room {
        true => Readiness::READABLE | Readiness::WRITABLE,
        false => Readiness::READABLE,
    }
}
