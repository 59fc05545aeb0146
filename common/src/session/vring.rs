// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The set-up of one ring, and the worker on which it runs.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use vhost::vhost_user::message::VhostUserVringAddr;
use virtio_bindings::virtio_config::VIRTIO_F_RING_PACKED;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::chain::Chain;
use crate::log_limit::info_limited;
use crate::memory::GuestMemory;
use crate::ring::inflight::InflightFile;
use crate::ring::{Ring, RingSetup};
use crate::statistics::Recorder;
use crate::worker::{CallFile, EpollPoller, Poller, Queue, Stopped, Token, Worker, WorkerError};

use super::SessionError;

/// Flag of SET_VRING_ADDR: log writes to the used ring (VHOST_VRING_F_LOG).
const VRING_LOG: u32 = 1;

/// The set-up of one ring. The ring starts when its size, its addresses and its kick are set, in any order; a kick may come without a file.
/// It stops with GET_VRING_BASE, or when any of these changes while the ring is disabled.
#[derive(Default)]
pub struct Vring {
    /// Number of descriptors; 0 until it is set.
    pub size: u16,
    /// Addresses in the front-end's address space.
    pub addresses: Option<VhostUserVringAddr>,
    /// Where the ring starts; `None` until it is set, which means the beginning.
    pub base: Option<u32>,
    /// The kick, once SET_VRING_KICK was sent; a ring without a file is polled.
    pub kick: Option<Option<Arc<OwnedFd>>>,
    pub call: Option<Arc<CallFile>>,
    pub error: Option<Arc<CallFile>>,
    pub enabled: bool,
    /// The ring has run on this connection.
    pub has_run: bool,
    /// The worker of a running ring.
    pub worker: Option<Arc<Worker>>,
    /// The ring stopped because the front-end sets it up again. It starts when the front-end sets its kick or enables it.
    pub is_set_up_anew: bool,
    /// Its identity when it last stopped.
    stopped: Option<Identity>,
    /// Requests that were held over then.
    suspended: Vec<Chain>,
}

/// Identifies a driver that continues: size, addresses and base of its ring.
type Identity = (u16, [u64; 3], u32);

impl Vring {
    /// Returns whether the set-up is complete, and the ring does not run yet.
    pub fn is_ready(&self) -> bool {
        self.worker.is_none()
            && self.size > 0
            && self.addresses.is_some()
            && self.kick.is_some()
            && !self.is_set_up_anew
    }

    /// Returns whether the device takes requests from the ring.
    pub fn is_at_work(&self) -> bool {
        self.worker.is_some() && self.enabled
    }

    fn identity(&self) -> Identity {
        let addresses = self.addresses.unwrap_or_default();
        let parts = [addresses.descriptor, addresses.available, addresses.used];
        (self.size, parts, self.base.unwrap_or_default())
    }

    /// Returns whether a new driver starts: the ring is at `start`, and stopped elsewhere or with another set-up.
    pub fn begins_anew(&self, start: u32) -> bool {
        let stopped = self
            .stopped
            .is_some_and(|stopped| stopped != self.identity());
        stopped && self.base == Some(start)
    }

    /// Discards where the ring stopped: another guest uses it now.
    pub fn forget_stop(&mut self) {
        (self.base, self.stopped) = (None, None);
        self.forget_suspended();
    }

    /// Discards suspended requests: another driver starts.
    pub fn forget_suspended(&mut self) {
        self.suspended.clear();
    }

    /// Discards everything but the call and error files: QEMU sends the error file only once.
    pub fn reset(&mut self) {
        *self = Self {
            call: self.call.take(),
            error: self.error.take(),
            ..Self::default()
        };
    }

    /// Returns the place and the format of the ring.
    fn setup(&self, features: u64) -> RingSetup {
        let addresses = self.addresses.unwrap_or_default();
        let has = |bit: u32| features & 1 << bit != 0;
        RingSetup {
            size: self.size,
            descriptors: addresses.descriptor,
            available: addresses.available,
            used: addresses.used,
            used_log: self.used_log(),
            packed: has(VIRTIO_F_RING_PACKED),
            event_index: has(VIRTIO_RING_F_EVENT_IDX),
            indirect: has(VIRTIO_RING_F_INDIRECT_DESC),
        }
    }

    /// Returns the guest address under which writes to the used ring are logged.
    pub fn used_log(&self) -> Option<u64> {
        let logged = |addresses: &VhostUserVringAddr| addresses.flags & VRING_LOG != 0;
        self.addresses.filter(logged).map(|addresses| addresses.log)
    }

    /// Maps the ring in guest memory, so that it can start with these features.
    pub fn prepare(
        &mut self,
        index: u16,
        features: u64,
        memory: GuestMemory,
        inflight: Option<&InflightFile>,
    ) -> Result<Ring, SessionError> {
        let setup = self.setup(features);
        let first = Ring::first_base(setup.packed);
        let base = self.base.unwrap_or(first);
        let is_other_driver = self.begins_anew(first);
        if is_other_driver && let Some(inflight) = inflight {
            inflight.forget(index);
        }
        // Requests that were suspended without such a file are recorded nowhere. The next start uses the file.
        let inflight = inflight.filter(|_| is_other_driver || self.suspended.is_empty());
        let ring = Ring::new(setup, Arc::new(memory), base, inflight, index);
        let mut ring = ring.map_err(|source| {
            self.error.iter().for_each(|error| error.signal_if_room());
            SessionError::Ring { index, source }
        })?;
        // Some front-ends start a packed ring at base 0.
        if self.base == Some(0) && ring.base() == first {
            self.base = Some(first);
        }
        let suspended = std::mem::take(&mut self.suspended);
        if self.stopped == Some(self.identity()) {
            ring.resume(suspended);
        }
        Ok(ring)
    }

    /// Starts the ring on `worker`.
    pub fn start(
        &mut self,
        index: u16,
        ring: Ring,
        worker: Arc<Worker>,
        recorder: Recorder,
    ) -> Result<(), SessionError> {
        let (base, recovered, format) = (ring.base(), ring.recovered(), ring.format());
        let queue = Queue::with_recorder(index, ring, self.enabled, recorder)
            .with_files(self.call.clone(), self.error.clone());
        worker.start_queue(queue, self.kick.clone().flatten())?;
        info_limited(format_args!(
            "queue {index} started: {format} of {} descriptors, from {base:#x}{}",
            self.size,
            match recovered {
                0 => String::new(),
                count => format!(", recovering {count} requests in flight"),
            }
        ));
        self.worker = Some(worker);
        self.has_run = true;
        Ok(())
    }

    /// Completes all requests that the device holds, and stops the ring.
    pub fn stop(&mut self, index: u16) {
        self.stop_by(index, Worker::stop_queue);
    }

    /// Stops the ring, and leaves the requests that the device holds noted in flight if that is possible.
    pub fn suspend(&mut self, index: u16) {
        self.stop_by(index, Worker::suspend_queue);
    }

    fn stop_by(
        &mut self,
        index: u16,
        stop: impl FnOnce(&Worker, u16) -> Result<Option<Stopped>, WorkerError>,
    ) {
        self.kick = None;
        self.is_set_up_anew = false;
        let Some(worker) = self.worker.take() else {
            return;
        };
        match stop(&worker, index) {
            Ok(Some(stopped)) => {
                self.base = Some(stopped.base);
                self.suspended = stopped.suspended;
            }
            Ok(None) => {}
            Err(error) => log::error!("queue {index}: {error}"),
        }
        self.stopped = Some(self.identity());
        info_limited(format_args!(
            "queue {index} stopped at {:#x}",
            self.base.unwrap_or_default()
        ));
    }

    /// Stops the ring because the front-end sets it up again. It starts when the front-end sets its kick or enables it.
    pub fn stop_for_set_up(&mut self, index: u16) {
        let kick = self.kick.take();
        self.stop(index);
        self.kick = kick;
        self.is_set_up_anew = true;
    }
}

/// Checks that a file of the front-end can be waited on, for kicks.
pub fn kick(file: OwnedFd) -> Result<Arc<OwnedFd>, SessionError> {
    EpollPoller::new()
        .and_then(|mut poller| poller.watch(file.as_fd(), Token::Control))
        .map_err(SessionError::File)?;
    Ok(Arc::new(file))
}

/// Checks that a file of the front-end can be signalled.
pub fn call(file: OwnedFd) -> Result<Arc<CallFile>, SessionError> {
    CallFile::new(file)
        .map(Arc::new)
        .map_err(SessionError::File)
}
