// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The queue handler: which work is done when, and what all parts of it share.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vhost_device_common::chain::Chain;
use vhost_device_common::device::{QueueHandler, Watcher};
use vhost_device_common::worker::{Queue, Queues, Readiness, Timer};

use crate::packet::Header;
use crate::shared::Shared;
use crate::table::Table;

/// Indices of the queues (VIRTIO 1.3, 5.10.2).
const RX_QUEUE: u16 = 0;
const TX_QUEUE: u16 = 1;
pub const EVENT_QUEUE: u16 = 2;

/// Tokens of watched files: the timer, then the listening sockets, then the sockets of connections by their slots.
const TIMER: u32 = 0;
const FIRST_LISTENER: u32 = 1;
const FIRST_CONNECTION: u32 = 16;

/// Most resets that wait for buffers of the guest. With more, no packets are taken from it.
const MAX_RESETS: usize = 1024;

/// Works on all queues, and on the sockets of the host.
pub struct VsockHandler {
    pub shared: Arc<Shared>,
    pub watcher: Watcher,
    pub timer: Timer,
    pub table: Table,
    /// Slots of connections that have something for the guest, and some that had.
    pub waiting: VecDeque<u32>,
    /// Resets that are not sent yet.
    pub resets: VecDeque<Header>,
    /// Listening sockets that could not accept, to be tried again.
    pub retries: Vec<usize>,
    pub is_timer_set: bool,
    /// Sum of the sizes of all buffers that were announced to the guest, in bytes.
    pub promised: u64,
    /// Port of the host for the next connection to the guest.
    pub next_port: u32,
    /// Buffers of the guest that are being filled.
    pub chains: Vec<Chain>,
    /// Data on its way from a packet into a buffer.
    pub scratch: Vec<u8>,
    /// The driver that the connections belong to.
    driver: u64,
}

impl VsockHandler {
    pub fn new(shared: Arc<Shared>, watcher: Watcher) -> io::Result<Self> {
        let timer = Timer::new()?;
        watcher.add(&timer, Readiness::READABLE, TIMER)?;
        let listeners = shared.listeners().clone();
        for (token, (listener, _)) in (FIRST_LISTENER..FIRST_CONNECTION).zip(&listeners) {
            watcher.add(listener, Readiness::READABLE, token)?;
        }
        Ok(Self {
            driver: shared.driver.load(Ordering::Relaxed),
            shared,
            watcher,
            timer,
            table: Table::default(),
            waiting: VecDeque::new(),
            resets: VecDeque::new(),
            retries: Vec::new(),
            is_timer_set: false,
            promised: 0,
            // A guest may still believe in connections of a device that has ended.
            next_port: fastrand::u32(1 << 30..1 << 31),
            chains: Vec::new(),
            scratch: Vec::new(),
        })
    }

    pub fn guest_cid(&self) -> u32 {
        self.shared.options.guest_cid
    }

    /// Closes all connections if another driver has started.
    fn check_driver(&mut self) {
        let driver = self.shared.driver.load(Ordering::Relaxed);
        if std::mem::replace(&mut self.driver, driver) != driver {
            let slots: Vec<u32> = self.table.iter().map(|(slot, _)| slot).collect();
            slots.into_iter().for_each(|slot| self.remove(slot));
            self.waiting.clear();
            self.resets.clear();
        }
    }

    /// Takes packets of the guest, as long as resets have room.
    fn receive_packets(&mut self, queue: &mut Queue) {
        while self.resets.len() < MAX_RESETS {
            let Some(mut chain) = queue.take() else {
                return;
            };
            let outcome = self.receive(&mut chain);
            queue.complete_with(chain, 0, outcome);
        }
        // The thread sleeps although packets are left, once it has looked for them.
        queue.has_available();
    }
}

impl QueueHandler for VsockHandler {
    fn process(&mut self, queue: &mut Queue) {
        match queue.index() {
            RX_QUEUE => self.send_packets(queue),
            TX_QUEUE => self.receive_packets(queue),
            _ => self.send_event(queue),
        }
    }

    fn ready(&mut self, token: u32, readiness: Readiness, _queues: &mut Queues) {
        if token == TIMER {
            self.tick();
        } else if let Some(slot) = token.checked_sub(FIRST_CONNECTION) {
            self.host_ready(slot, readiness);
        } else {
            self.accept(token.saturating_sub(FIRST_LISTENER) as usize);
        }
    }

    /// The driver that starts a queue may be another one than that which stopped it.
    fn set_enabled(&mut self, _queue: &mut Queue, _enabled: bool) {
        self.check_driver();
    }
}

impl Drop for VsockHandler {
    fn drop(&mut self) {
        self.shared.counters.open.store(0, Ordering::Relaxed);
    }
}

/// Returns the token of the socket of a connection.
pub fn token(slot: u32) -> u32 {
    slot.saturating_add(FIRST_CONNECTION)
}

/// Returns the token of a listening socket.
pub fn listener_token(index: usize) -> u32 {
    FIRST_LISTENER.saturating_add(index as u32)
}
