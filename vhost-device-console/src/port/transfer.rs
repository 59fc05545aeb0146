// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The data of a port, in both directions.

use std::time::Duration;

use vhost_device_common::chain::Chain;
use vhost_device_common::statistics::Outcome;
use vhost_device_common::warn_limited;
use vhost_device_common::worker::Queue;

use super::{CHANNEL_HISTORY, Port, RECEIVE, TRANSMIT};
use crate::client::Received;
use crate::endpoint::Endpoint;
use crate::log_file::{Job, LogFile};

/// Bytes that are collected before they are sent to clients.
const FLUSH_SIZE: u64 = 128 << 10;
/// Bytes of one direction of a port that are moved before other queues and the front-end get their turn.
const BUDGET: u64 = 2 << 20;
/// Bytes that are filtered at a time.
const FILTER_SIZE: usize = 4 << 10;

/// What the guest writes.
impl Port {
    /// Takes what the guest has written.
    pub fn transmit(&mut self, queue: &mut Queue) {
        self.is_saved = false;
        let mut budget = BUDGET;
        loop {
            let mut outcome = Outcome {
                request: TRANSMIT,
                ..Outcome::default()
            };
            let taken = queue.take_if(|chain| match self.accept(chain, &mut budget) {
                Ok(is_done) => is_done,
                Err(()) => {
                    outcome.failed = true;
                    true
                }
            });
            let Some(chain) = taken else {
                break;
            };
            outcome.bytes = std::mem::take(&mut self.offset);
            queue.complete_with(chain, 0, outcome);
        }
        if budget == 0 {
            queue.retry_after(Duration::ZERO);
        }
        self.flush();
    }

    /// Reads from a chain what there is room for. Returns whether that is all of it.
    fn accept(&mut self, chain: &mut Chain, budget: &mut u64) -> Result<bool, ()> {
        if let Err(error) = chain.readable_iovecs() {
            warn_limited(format_args!("port {}: {error}", self.number));
            return Err(());
        }
        // The driver may have changed the chain since it was last looked at.
        self.offset = self.offset.min(chain.readable_len());
        chain.skip_readable(self.offset).map_err(|_| ())?;
        while chain.readable_len() > 0 {
            if self.room() == 0 {
                self.flush();
            }
            let most = chain.readable_len().min(*budget).min(self.room());
            if most == 0 {
                return Ok(false);
            }
            let count = self.add(chain, most as usize)?;
            *budget -= count;
            self.offset += count;
            self.counters.transmitted += count;
        }
        Ok(true)
    }

    /// Adds up to `most` bytes of a chain to the history. Returns how many were read.
    fn add(&mut self, chain: &mut Chain, most: usize) -> Result<u64, ()> {
        let count = match &mut self.filter {
            None => {
                let space = self.history.space(most);
                let count = space.len();
                chain.read(space).map_err(|_| ())?;
                self.history.added(count);
                count
            }
            Some(filter) => {
                let mut bytes = [0; FILTER_SIZE];
                let bytes = bytes.get_mut(..most.min(FILTER_SIZE)).unwrap_or_default();
                chain.read(bytes).map_err(|_| ())?;
                let mut output = Vec::with_capacity(bytes.len());
                filter.apply(bytes, &mut output);
                self.history.append(&output);
                bytes.len()
            }
        };
        Ok(count as u64)
    }

    /// Returns how many bytes can be added to the history now, before it is flushed.
    fn room(&self) -> u64 {
        let (size, from) = match (&self.endpoint, self.receiver()) {
            // The guest waits for the file that it writes to.
            (Endpoint::File, _) => {
                let file = self.files.last();
                (CHANNEL_HISTORY as u64, file.map_or(0, LogFile::done))
            }
            _ if self.is_console() => (FLUSH_SIZE, self.flushed),
            (_, Some(client)) => (CHANNEL_HISTORY as u64, client.next),
            (_, None) => return 0,
        };
        size.saturating_sub(self.history.end().saturating_sub(from))
    }

    /// Adds a byte for EMERG_WRITE (VIRTIO 1.3, 5.3.4).
    pub fn write_emergency(&mut self, byte: u8) {
        match &mut self.filter {
            Some(filter) => {
                let mut output = Vec::new();
                filter.apply(&[byte], &mut output);
                self.history.append(&output);
            }
            None => self.history.append(&[byte]),
        }
        self.counters.transmitted += 1;
        self.flush();
    }

    /// Returns what a thread is to write to the file `number` of this port, which has the index `index`.
    pub fn next_job(&mut self, index: usize, number: usize) -> Option<Job> {
        let file = self.files.get_mut(number)?;
        file.next_job(&self.history, (index, number))
    }

    /// Notes that a thread has written to the file `number`.
    pub fn job_ended(&mut self, number: usize) {
        if let Some(file) = self.files.get_mut(number) {
            file.ended();
        }
    }

    /// Sends to clients what was added to the history.
    pub fn flush(&mut self) {
        let is_paused = self.is_saved && !self.is_console();
        let open = self
            .clients
            .iter_mut()
            .filter(|client| client.is_open && !is_paused);
        for client in open {
            if let Err(error) = client.write(&self.history) {
                log::debug!("port {}: cannot write to a client: {error}", self.number);
            }
        }
        if let Some(client) = self.receiver() {
            self.delivered = client.next.max(self.delivered);
        }
        self.flushed = self.history.end();
    }
}

/// What the guest reads.
impl Port {
    /// Fills buffers of the guest with what the first client has sent. `bytes` is room for that. Returns whether a client has ended.
    pub fn receive(&mut self, queue: &mut Queue, bytes: &mut [u8]) -> bool {
        let mut budget = BUDGET;
        let mut has_ended = false;
        while let Some(index) = self.sender()
            && let Some(client) = self.clients.get_mut(index)
            && client.has_input()
        {
            if budget == 0 {
                queue.retry_after(Duration::ZERO);
                break;
            }
            let mut outcome = Outcome {
                request: RECEIVE,
                ..Outcome::default()
            };
            let mut received = Received::Nothing;
            let taken = queue.take_if(|chain| {
                if let Err(error) = chain.check() {
                    warn_limited(format_args!("port {}: {error}", self.number));
                    outcome.failed = true;
                    return true;
                }
                let most = chain.writable_len().min(budget).min(bytes.len() as u64);
                let Some(room) = bytes
                    .get_mut(..most as usize)
                    .filter(|room| !room.is_empty())
                else {
                    return true;
                };
                received = client.read(room);
                let Received::Bytes(count) = received else {
                    return false;
                };
                outcome.failed = chain.write(room.get(..count).unwrap_or_default()).is_err();
                outcome.bytes = count as u64;
                true
            });
            match (taken, received) {
                (Some(chain), _) => {
                    budget -= outcome.bytes;
                    self.counters.received += outcome.bytes;
                    queue.complete_with(chain, outcome.bytes as u32, outcome);
                }
                // Another client may be next.
                (None, Received::End) => {
                    self.settle();
                    has_ended = true;
                }
                (None, _) => break,
            }
        }
        has_ended
    }
}
