// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the device and the handlers of all its queues share.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use rustix::event::{EventfdFlags, eventfd};
use vhost_device_common::lock;
use vhost_device_common::worker::{Readiness, Watcher};

use crate::address::Address;
use crate::config::Config;
use crate::events::{Event, Events};
use crate::lun::{Attention, Nexus};
use crate::passthrough::PassThrough;
use crate::sweep::Sweep;
use crate::table::Table;
use crate::unit::Unit;

/// The driver: the only initiator that a VIRTIO device has.
pub const DRIVER: Nexus = Nexus(1);

/// Wakes the thread of an eventfd.
pub fn wake_one(thread: &OwnedFd) {
    let _ = rustix::io::write(thread, &1u64.to_ne_bytes());
}

/// What the device and the handlers of all its queues share.
pub struct Shared {
    pub table: Table,
    /// Devices of the host, which stay the same.
    pub devices: Vec<Arc<PassThrough>>,
    pub config: Config,
    events: Mutex<Events>,
    pub sweep: Sweep,
    /// Requests that begin from now on may be suspended.
    pub expects_suspend: AtomicBool,
    /// The eventfds of the threads. Those of threads that have ended are gone.
    threads: Mutex<Vec<Weak<OwnedFd>>>,
}

impl Shared {
    /// Creates the state of a device without logical units.
    pub fn new(config: Config, devices: Vec<Arc<PassThrough>>) -> Arc<Self> {
        Arc::new(Self {
            table: Table::default(),
            devices,
            config,
            events: Mutex::default(),
            sweep: Sweep::default(),
            expects_suspend: AtomicBool::new(false),
            threads: Mutex::default(),
        })
    }

    /// Returns the device of the host at an address.
    pub fn device(&self, address: Address) -> Option<&Arc<PassThrough>> {
        let mut devices = self.devices.iter();
        devices.find(|device| device.address == address)
    }

    /// Returns whether a target has devices of the host.
    pub fn has_devices(&self, target: u8) -> bool {
        let mut devices = self.devices.iter();
        devices.any(|device| device.address.target == target)
    }

    /// Creates the eventfd by which a thread is woken, and has `watcher` report it as `token`.
    ///
    /// # Errors
    /// The limit of open files is reached.
    pub fn add_thread(&self, watcher: &Watcher, token: u32) -> io::Result<Arc<OwnedFd>> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        watcher.add(&event, Readiness::READABLE, token)?;
        let event = Arc::new(event);
        let mut threads = lock(&self.threads);
        threads.retain(|thread| thread.strong_count() > 0);
        threads.push(Arc::downgrade(&event));
        Ok(event)
    }

    /// Wakes all threads: the units have changed, a function was sent, or a task has ended that others wait for.
    pub fn wake(&self) {
        let threads = lock(&self.threads);
        for thread in threads.iter().filter_map(Weak::upgrade) {
            wake_one(&thread);
        }
    }

    /// The events that the driver was not told yet.
    pub fn events(&self) -> MutexGuard<'_, Events> {
        lock(&self.events)
    }

    /// Tells the driver about an event.
    pub fn tell(&self, event: Event) {
        self.events().add(event);
        self.wake();
    }

    /// Tells the driver the new size of a disk that was measured again.
    pub fn update_size(&self, unit: &Unit) {
        if unit.update_size() {
            self.tell(Event::Changed(unit.address, Attention::CapacityChanged));
        }
    }
}
