// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Forwards events from the node to the guest, and settings from the guest to the node.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vhost_device_common::device::QueueHandler;
use vhost_device_common::worker::{Queue, Queues, Readiness, Timer, Watcher};
use vhost_device_common::{lock, warn_limited};

use crate::event::Event;
use crate::host_device::HostDevice;
use crate::identity::Identity;
use crate::report::{Reports, Suspended};
use crate::state::State;

/// Index of the event queue. The other queue is the status queue.
const EVENT_QUEUE: u16 = 0;

/// Tokens of the files that the worker watches: the node, and the timer that reopens it.
const NODE: u32 = 0;
const RETRY: u32 = 1;

/// How often the device state is read while it keeps changing.
const STATE_ATTEMPTS: usize = 8;

/// Interval between attempts to reopen the node.
const RETRY_INTERVAL: Duration = Duration::from_millis(250);

/// Processes both queues.
pub struct InputHandler {
    identity: Arc<Identity>,
    host: Arc<Mutex<HostDevice>>,
    suspended: Arc<Mutex<Suspended>>,
    reports: Reports,
    watcher: Watcher,
    retry: Timer,
}

impl InputHandler {
    /// Creates the handler for a guest that starts, or that continues from `suspended`. Pending events of the node are
    /// discarded.
    pub fn new(
        identity: Arc<Identity>,
        host: Arc<Mutex<HostDevice>>,
        suspended: Arc<Mutex<Suspended>>,
        watcher: Watcher,
    ) -> io::Result<Self> {
        let suspended_state = lock(&suspended).clone();
        let mut handler = Self {
            reports: Reports::new(identity.repeats_keys(), suspended_state),
            identity,
            host,
            suspended,
            watcher,
            retry: Timer::new()?,
        };
        handler
            .watcher
            .add(&handler.retry, Readiness::READABLE, RETRY)?;
        let host = lock(&handler.host);
        match host.node() {
            Some(node) => handler.watcher.add(node, Readiness::READABLE, NODE)?,
            None => handler.retry.set(Duration::ZERO),
        }
        drop(host);
        handler.read_events();
        Ok(handler)
    }

    /// Reads all pending events of the node.
    fn read_events(&mut self) {
        let mut host = lock(&self.host);
        if host.node().is_none() {
            return;
        }
        let reports = &mut self.reports;
        let outcome = host.read(|event| reports.push(event)).and_then(|()| {
            if reports.is_dropping() {
                reports.resync(stable_state(&host)?);
            }
            Ok(())
        });
        if let Err(error) = outcome {
            log::warn!("the input device has disappeared ({error}); waiting until it is back");
            if let Some(node) = host.node() {
                self.watcher.remove(node);
            }
            host.close();
            self.reports.unplug();
            self.retry.set(RETRY_INTERVAL);
        }
    }

    /// Continues with the node if it is back.
    fn reopen_node(&mut self) {
        let mut host = lock(&self.host);
        let reopened = host.reopen();
        let outcome = reopened.map(|node| self.watcher.add(node, Readiness::READABLE, NODE));
        match outcome {
            Some(Ok(())) => {
                drop(host);
                log::info!("the input device is back");
                self.reports.drop_events();
                self.read_events();
            }
            Some(Err(error)) => {
                log::error!("cannot wait for input events: {error}");
                host.close();
                self.retry.set(RETRY_INTERVAL);
            }
            None => self.retry.set(RETRY_INTERVAL),
        }
    }

    /// Fills the guest's buffers with one event each (VIRTIO 1.3, 5.8.6).
    fn send_events(&mut self, queue: &mut Queue) {
        while queue.has_available()
            && let Some(event) = self.reports.next()
            && let Some(mut chain) = queue.take()
        {
            let written = match chain.write(&event.to_guest()) {
                Ok(()) => {
                    self.reports.pop();
                    Event::GUEST_SIZE
                }
                Err(error) => {
                    warn_limited(format_args!("cannot fill an event buffer: {error}"));
                    0
                }
            };
            queue.complete(chain, written as u32);
        }
    }

    /// Executes the settings that the guest sends, and returns all buffers.
    fn receive_events(&mut self, queue: &mut Queue) {
        while let Some(mut chain) = queue.take() {
            let mut bytes = [0; Event::GUEST_SIZE];
            match chain.read(&mut bytes) {
                Ok(()) => {
                    let event = Event::from_guest(bytes);
                    if self.identity.accepts(event) {
                        lock(&self.host).write(event);
                    }
                }
                Err(error) => warn_limited(format_args!("invalid event from the guest: {error}")),
            }
            queue.complete(chain, 0);
        }
    }
}

impl QueueHandler for InputHandler {
    fn process(&mut self, queue: &mut Queue) {
        match queue.index() {
            EVENT_QUEUE => self.send_events(queue),
            _ => self.receive_events(queue),
        }
    }

    fn ready(&mut self, token: u32, _readiness: Readiness, queues: &mut Queues) {
        // A queue that has started receives events even if it has no buffers yet.
        if queues.get_mut(EVENT_QUEUE).is_some() {
            self.reports.sync_guest();
        }
        match token {
            RETRY => self.reopen_node(),
            _ => self.read_events(),
        }
    }

    fn drain(&mut self, queue: &mut Queue) {
        if queue.index() == EVENT_QUEUE {
            *lock(&self.suspended) = self.reports.stop();
        }
    }
}

/// Returns the device state and discards the events that it contains. Such an event could belong to another slot than
/// the one that the state ends with.
fn stable_state(host: &HostDevice) -> io::Result<State> {
    let mut state = host.state()?;
    for _ in 0..STATE_ATTEMPTS {
        let mut has_changed = false;
        host.read(|_| has_changed = true)?;
        if !has_changed {
            break;
        }
        state = host.state()?;
    }
    Ok(state)
}

#[cfg(test)]
mod tests;
