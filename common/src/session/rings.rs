// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The set-up of rings by the front-end, in any order, also while they run; their start and stop, and the queue threads.

use std::sync::Arc;

use vhost::vhost_user::message::{FrontendReq, VhostUserVringAddr, VhostUserVringState};
use virtio_bindings::virtio_config::VIRTIO_F_RING_PACKED;

use super::vring::{Vring, call, kick};
use super::{Answer, Session, SessionError};
use crate::device::Device;
use crate::ring::Ring;
use crate::wire::Message;
use crate::worker::Worker;

/// Payload of SET_VRING_KICK, CALL and ERR: the ring index, and the flag for a request without a file.
const VRING_INDEX_MASK: u64 = 0xff;
const VRING_NO_FILE: u64 = 1 << 8;
/// Maximum ring size of VIRTIO.
const MAX_RING_SIZE: u32 = 32768;

impl<D: Device> Session<'_, D> {
    pub(super) fn queue_index(&self, index: u64) -> Result<usize, SessionError> {
        let count = self.vrings.len();
        usize::try_from(index)
            .ok()
            .filter(|&index| index < count)
            .ok_or(SessionError::QueueIndex { index, count })
    }

    pub(super) fn vring(&mut self, index: usize) -> Result<&mut Vring, SessionError> {
        let count = self.vrings.len();
        self.vrings.get_mut(index).ok_or(SessionError::QueueIndex {
            index: index as u64,
            count,
        })
    }

    /// Returns a ring whose set-up may change: it does not run, or nothing changes. Stops a disabled ring.
    fn changing_vring(
        &mut self,
        index: u32,
        is_same: impl Fn(&Vring) -> bool,
    ) -> Result<&mut Vring, SessionError> {
        let vring = self.vring(index as usize)?;
        if vring.worker.is_some() && !is_same(vring) {
            if vring.enabled {
                return Err(SessionError::Running(index as u16));
            }
            self.stop_for_set_up(index as usize);
        }
        self.vring(index as usize)
    }

    /// Stops a disabled ring that the front-end sets up again without GET_VRING_BASE. If all rings are disabled, the front-end sets up the
    /// whole device, and all rings stop. Those that it does not mention continue when they are enabled.
    fn stop_for_set_up(&mut self, index: usize) {
        let is_device = !self.vrings.iter().any(Vring::is_at_work);
        self.stop(
            |other, vring| vring.worker.is_some() && (is_device || other == index),
            Vring::stop_for_set_up,
        );
    }

    /// Calls `stop` for some rings. Meanwhile the front-end waits, and replies to no request of the device.
    pub(super) fn stop(
        &mut self,
        is_meant: impl Fn(usize, &Vring) -> bool,
        stop: impl Fn(&mut Vring, u16),
    ) {
        let mut vrings = self.vrings.iter().enumerate();
        if vrings.any(|(index, vring)| vring.worker.is_some() && is_meant(index, vring)) {
            self.channel.give_up();
        }
        for (index, vring) in self.vrings.iter_mut().enumerate() {
            if is_meant(index, vring) {
                stop(vring, index as u16);
            }
        }
        self.channel.resume();
    }

    /// Returns the base of a ring whose driver has just started.
    pub(super) fn first_base(&self) -> u32 {
        Ring::first_base(self.has_feature(VIRTIO_F_RING_PACKED))
    }

    /// SET_VRING_BASE: sets where a ring starts.
    pub(super) fn set_base(&mut self, state: VhostUserVringState) -> Result<Answer, SessionError> {
        let VhostUserVringState { index, num: base } = state;
        let start = self.first_base();
        if start == 0 && base > u16::MAX.into() {
            return Err(SessionError::Base(base));
        }
        let vring = self.vring(index as usize)?;
        match &vring.worker {
            Some(_) if !vring.enabled => self.stop_for_set_up(index as usize),
            // The ring started at this base by default, and has moved since.
            Some(_) if vring.base.is_none() && base == start => {}
            Some(worker) => {
                let here = worker.queue_base(index as u16)?;
                return match here {
                    Some(here) if here != base => {
                        Err(SessionError::Elsewhere { index, base, here })
                    }
                    _ => Ok(Answer::Ack),
                };
            }
            None => {}
        }
        self.vring(index as usize)?.base = Some(base);
        Ok(Answer::Ack)
    }

    /// Returns whether a ring of the device may have this size.
    pub(super) fn is_ring_size(&self, size: u32) -> bool {
        let shape = size.is_power_of_two() || size > 0 && self.has_feature(VIRTIO_F_RING_PACKED);
        shape && size <= MAX_RING_SIZE.min(self.device.max_queue_size().into())
    }

    /// SET_VRING_NUM: sets the size of a ring.
    pub(super) fn set_size(&mut self, state: VhostUserVringState) -> Result<Answer, SessionError> {
        let VhostUserVringState { index, num: size } = state;
        let max = self.device.max_queue_size();
        if !self.is_ring_size(size) {
            return Err(SessionError::QueueSize { size, max });
        }
        let vring = self.changing_vring(index, |vring| u32::from(vring.size) == size)?;
        vring.size = size as u16;
        self.start_if_ready(index as usize)
    }

    /// SET_VRING_ADDR: sets the addresses of a ring.
    pub(super) fn set_addresses(
        &mut self,
        addresses: VhostUserVringAddr,
    ) -> Result<Answer, SessionError> {
        let index = addresses.index;
        let vring = self.changing_vring(index, |vring| {
            vring.addresses.is_some_and(|old| {
                (old.descriptor, old.available, old.used)
                    == (addresses.descriptor, addresses.available, addresses.used)
            })
        })?;
        vring.addresses = Some(addresses);
        if let Some(worker) = &vring.worker {
            worker.set_used_log(index as u16, vring.used_log())?;
        }
        self.start_if_ready(index as usize)
    }

    /// SET_VRING_ENABLE: enables or disables a ring.
    pub(super) fn set_enable(&mut self, message: &Message) -> Result<Answer, SessionError> {
        let state: VhostUserVringState = message.object()?;
        let index = self.queue_index(state.index.into())?;
        match state.num {
            0 | 1 => self.enable(index, state.num == 1)?,
            _ => return Err(message.malformed().into()),
        }
        Ok(Answer::Ack)
    }

    pub(super) fn enable(&mut self, index: usize, enabled: bool) -> Result<(), SessionError> {
        let vring = self.vring(index)?;
        vring.enabled = enabled;
        if let Some(worker) = &vring.worker {
            worker.enable_queue(index as u16, enabled)?;
        } else if enabled && std::mem::take(&mut vring.is_set_up_anew) {
            self.start_if_ready(index)?;
        }
        Ok(())
    }

    /// SET_VRING_KICK, SET_VRING_CALL and SET_VRING_ERR: sets one of a ring's eventfds.
    pub(super) fn set_vring_file(
        &mut self,
        request: FrontendReq,
        mut message: Message,
    ) -> Result<Answer, SessionError> {
        let value: u64 = message.object()?;
        let index = self.queue_index(value & VRING_INDEX_MASK)?;
        let file = match value & VRING_NO_FILE {
            0 => Some(message.file()?),
            _ => None,
        };
        let queue = index as u16;
        match request {
            FrontendReq::SET_VRING_CALL => {
                let file = file.map(call).transpose()?;
                let vring = self.vring(index)?;
                vring.call.clone_from(&file);
                if let Some(worker) = &vring.worker {
                    worker.set_call(queue, file)?;
                }
            }
            FrontendReq::SET_VRING_ERR => {
                let file = file.map(call).transpose()?;
                let vring = self.vring(index)?;
                vring.error.clone_from(&file);
                if let Some(worker) = &vring.worker {
                    worker.set_error(queue, file)?;
                }
            }
            _ => {
                let file = file.map(kick).transpose()?;
                let vring = self.vring(index)?;
                vring.kick = Some(file.clone());
                vring.is_set_up_anew = false;
                match &vring.worker {
                    Some(worker) => worker.set_kick(queue, file)?,
                    None => return self.start_if_ready(index),
                }
            }
        }
        Ok(Answer::Ack)
    }

    /// Starts a ring whose set-up is complete. If it cannot start, the next set-up message tries again.
    pub(super) fn start_if_ready(&mut self, index: usize) -> Result<Answer, SessionError> {
        if self.vring(index)?.is_ready() {
            self.end_transfer("a queue starts");
            self.was_used = true;
            let worker = self.worker(index)?;
            let features = self.accepted_features;
            let first_base = self.first_base();
            let memory = self.memory.clone();
            let inflight = self.inflight.clone();
            let recorder = self.statistics.recorder(index as u16);
            let is_at_work = self.vrings.iter().any(Vring::is_at_work);
            let device = self.device;
            let vring = self.vring(index)?;
            let queue = index as u16;
            let started = vring
                .prepare(queue, features, memory, inflight.as_ref())
                .and_then(|ring| {
                    // QEMU announces no reset to most devices. A driver that continues does so where its ring stopped.
                    if !is_at_work && vring.begins_anew(first_base) {
                        device.new_driver();
                    }
                    let resumes = !vring.has_run && ring.base() != first_base;
                    let is_noted = inflight.as_ref().is_some_and(|file| file.kept().is_some());
                    if resumes && !is_noted && device.kept() == 0 {
                        device.set_kept(None);
                    }
                    if let Some(inflight) = &inflight {
                        inflight.keep(device.kept());
                    }
                    vring.start(queue, ring, worker, recorder)
                });
            self.end_idle_workers();
            started?;
        }
        Ok(Answer::Ack)
    }

    /// Returns the thread for a queue, and starts it if necessary.
    fn worker(&mut self, index: usize) -> Result<Arc<Worker>, SessionError> {
        let thread = self.device.thread_of(index as u16);
        if let Some(worker) = self.workers.get(&thread) {
            return Ok(Arc::clone(worker));
        }
        let queues = 0..self.vrings.len() as u16;
        let is_only = queues
            .map(|queue| self.device.thread_of(queue))
            .all(|other| other == thread);
        let name = match is_only {
            true => "queues".to_owned(),
            false => format!("queue-{thread}"),
        };
        let make = |watcher| self.device.handler(thread, watcher);
        let worker = Arc::new(Worker::start(name, make, self.polling)?);
        self.workers.insert(thread, Arc::clone(&worker));
        Ok(worker)
    }

    /// Ends the threads without a running queue, unless the device keeps them or operations of suspended requests are in flight.
    pub(super) fn end_idle_workers(&mut self) {
        if !D::KEEPS_THREADS {
            self.workers
                .retain(|_, worker| Arc::strong_count(worker) > 1 || !worker.is_idle());
        }
    }

    /// Stops all rings and ends all threads.
    pub(super) fn stop_all(&mut self) {
        self.stop(|_, _| true, Vring::stop);
        self.workers.clear();
    }
}
