// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the front-end said of one ring, and the worker that it runs on once all is said.

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
use crate::worker::{CallFile, EpollPoller, Poller, Queue, Token, Worker};

use super::SessionError;

/// Flag of SET_VRING_ADDR: writes to the used ring are logged (VHOST_VRING_F_LOG).
const VRING_LOG: u32 = 1;

/// The set-up of one ring. It starts when its size, addresses and kick have been set, in any order
/// (a kick without a file is a kick), and stops with GET_VRING_BASE; or, while it is disabled, when any of them changes.
#[derive(Default)]
pub struct Vring {
    /// Descriptors, a power of two; 0 until it is set.
    pub size: u16,
    /// Addresses in the front-end.
    pub addresses: Option<VhostUserVringAddr>,
    /// Where it goes on; `None` until that is said, and for the beginning then.
    pub base: Option<u32>,
    /// SET_VRING_KICK was sent; without a file the ring is polled.
    pub kick: Option<Option<Arc<OwnedFd>>>,
    pub call: Option<Arc<CallFile>>,
    pub error: Option<Arc<CallFile>>,
    pub enabled: bool,
    /// It has been started on this connection.
    pub has_run: bool,
    /// What the ring runs on.
    pub worker: Option<Arc<Worker>>,
    /// It was stopped to be set up anew, and starts when it is kicked or enabled: until then more may come.
    pub is_set_up_anew: bool,
    /// What it was when it stopped last.
    stopped: Option<Identity>,
    /// Requests that were held over then.
    suspended: Vec<Chain>,
}

/// By which a driver that goes on is told from a new one: size, addresses and base of its ring.
type Identity = (u16, [u64; 3], u32);

impl Vring {
    /// Whether all is set that the ring needs to run.
    pub fn is_ready(&self) -> bool {
        self.worker.is_none()
            && self.size > 0
            && self.addresses.is_some()
            && self.kick.is_some()
            && !self.is_set_up_anew
    }

    /// Whether requests are taken from the ring.
    pub fn is_at_work(&self) -> bool {
        self.worker.is_some() && self.enabled
    }

    fn identity(&self) -> Identity {
        let addresses = self.addresses.unwrap_or_default();
        let parts = [addresses.descriptor, addresses.available, addresses.used];
        (self.size, parts, self.base.unwrap_or_default())
    }

    /// Whether the ring is at `start`, where drivers begin, and was elsewhere, or otherwise, when it stopped: its driver is another one
    /// than the one before.
    pub fn begins_anew(&self, start: u32) -> bool {
        let stopped = self
            .stopped
            .is_some_and(|stopped| stopped != self.identity());
        stopped && self.base == Some(start)
    }

    /// Forgets where it stopped: another guest has it.
    pub fn forget_stop(&mut self) {
        (self.base, self.stopped) = (None, None);
        self.forget_suspended();
    }

    /// Forgets the requests that were held over: the driver begins anew.
    pub fn forget_suspended(&mut self) {
        self.suspended.clear();
    }

    /// Forgets all but the files that the front-end is told by: QEMU sends the one for errors only once.
    pub fn reset(&mut self) {
        *self = Self {
            call: self.call.take(),
            error: self.error.take(),
            ..Self::default()
        };
    }

    /// Where the ring is, and how it is to be read.
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

    /// Guest address by which writes to the used ring are logged.
    pub fn used_log(&self) -> Option<u64> {
        let logged = |addresses: &VhostUserVringAddr| addresses.flags & VRING_LOG != 0;
        self.addresses.filter(logged).map(|addresses| addresses.log)
    }

    /// Finds the ring, with these features accepted, so that it can start.
    pub fn prepare(
        &mut self,
        index: u16,
        features: u64,
        memory: GuestMemory,
        inflight: Option<&InflightFile>,
    ) -> Result<Ring, SessionError> {
        let setup = self.setup(features);
        let base = self.base.unwrap_or_else(|| Ring::first_base(setup.packed));
        let ring = Ring::new(setup, Arc::new(memory), base, inflight, index);
        let mut ring = ring.map_err(|source| {
            self.error.iter().for_each(|error| error.signal_if_room());
            SessionError::Ring { index, source }
        })?;
        // A packed ring may begin where the front-end says 0.
        let first = Ring::first_base(setup.packed);
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
                count => format!(", after {count} that were under way"),
            }
        ));
        self.worker = Some(worker);
        self.has_run = true;
        Ok(())
    }

    /// Stops the ring, after all that the device holds of it is finished.
    pub fn stop(&mut self, index: u16) {
        self.kick = None;
        self.is_set_up_anew = false;
        let Some(worker) = self.worker.take() else {
            return;
        };
        match worker.stop_queue(index) {
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

    /// Stops the ring to have it set up anew: it starts when it is kicked or enabled.
    pub fn stop_for_set_up(&mut self, index: u16) {
        let kick = self.kick.take();
        self.stop(index);
        self.kick = kick;
        self.is_set_up_anew = true;
    }
}

/// Takes a file of the front-end as an eventfd for kicks: one that can be waited on.
pub fn kick(file: OwnedFd) -> Result<Arc<OwnedFd>, SessionError> {
    EpollPoller::new()
        .and_then(|mut poller| poller.watch(file.as_fd(), Token::Control))
        .map_err(SessionError::File)?;
    Ok(Arc::new(file))
}

/// Takes a file of the front-end to signal it by.
pub fn call(file: OwnedFd) -> Result<Arc<CallFile>, SessionError> {
    CallFile::new(file)
        .map(Arc::new)
        .map_err(SessionError::File)
}
