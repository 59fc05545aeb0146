// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One connection of a front-end: the vhost-user protocol, from the first message to the last.
//!
//! All state here dies with the connection, and most of it when SET_OWNER begins another session on it. A request that the
//! front-end got wrong is answered with a negative acknowledgement where one was asked for, and ends the connection otherwise.
//! What a guest can bring about through its front-end never ends the connection.

mod config;
mod dirty_log;
mod error;
mod inflight;
mod memory;
mod rings;
mod transfer;
mod vring;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use vhost::vhost_user::message::{
    FrontendReq, VhostUserLog, VhostUserProtocolFeatures as Protocol, VhostUserSingleMemoryRegion,
    VhostUserVringAddr, VhostUserVringState,
};
use virtio_bindings::virtio_config::{VIRTIO_F_IN_ORDER, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::ByteValued;

use crate::device::Device;
use crate::log_limit::{info_limited, warn_limited};
use crate::memory::{DirtyLog, GuestMemory, MAX_REGIONS};
use crate::ring::inflight::InflightFile;
use crate::statistics::Statistics;
pub use crate::wire::MessageError;
use crate::wire::{ConfigChange, Connection, Message};
use crate::worker::{Polling, Worker, WorkerError};
use dirty_log::LOG_ALL;
pub use error::SessionError;
use transfer::DeviceState;
use vring::Vring;

/// VHOST_USER_F_PROTOCOL_FEATURES: without it, all rings are enabled from the start.
const PROTOCOL_FEATURES: u64 = 1 << 30;
/// Feature bits that the core provides for every device.
const TRANSPORT_FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_F_RING_PACKED
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | PROTOCOL_FEATURES;

/// What to answer to a request that succeeded.
enum Answer {
    /// An acknowledgement, if one was asked for.
    Ack,
    /// The request has a reply of its own.
    Reply(Vec<u8>),
    /// The reply has a file with it.
    ReplyWithFile(Vec<u8>, OwnedFd),
}

impl Answer {
    fn object<T: ByteValued>(object: T) -> Result<Self, SessionError> {
        Ok(Self::Reply(object.as_slice().to_vec()))
    }
}

/// The state of one connection.
struct Session<'a, D: Device> {
    device: &'a D,
    statistics: &'a Statistics,
    polling: Polling,
    accepted_features: u64,
    protocol_features: Protocol,
    status: u64,
    memory: GuestMemory,
    /// Where dirty pages are marked while LOG_ALL is accepted.
    log: Option<Arc<DirtyLog>>,
    vrings: Vec<Vring>,
    /// What the front-end remembers of requests that are under way.
    inflight: Option<InflightFile>,
    /// The state of the device, on its way to or from the front-end.
    device_state: DeviceState,
    /// The threads that work on queues, by the numbers that the device gives them.
    workers: BTreeMap<u16, Arc<Worker>>,
    /// Kept open for as long as the front-end is there: QEMU takes its end for an error.
    back_end_channel: Option<Arc<OwnedFd>>,
    /// Rings were to start since SET_OWNER.
    was_used: bool,
}

/// Serves the front-end behind `socket` until it goes away, or until `stop` becomes readable, and counts in `statistics` what happens.
/// Threads of queues poll as `polling` says.
///
/// # Errors
/// The connection had to be ended.
pub fn serve<D: Device>(
    device: &D,
    statistics: &Statistics,
    socket: UnixStream,
    stop: &OwnedFd,
    polling: Polling,
) -> Result<(), MessageError> {
    let mut connection = Connection::new(socket, stop);
    statistics.count_front_end();
    let mut session = Session {
        device,
        statistics,
        polling,
        accepted_features: 0,
        protocol_features: Protocol::empty(),
        status: 0,
        memory: GuestMemory::default(),
        log: None,
        vrings: (0..device.num_queues()).map(|_| Vring::default()).collect(),
        inflight: None,
        device_state: DeviceState::default(),
        workers: BTreeMap::new(),
        back_end_channel: None,
        was_used: false,
    };
    loop {
        session.transfer_until_message(&connection)?;
        let Some(message) = connection.receive()? else {
            break;
        };
        if message.request == u32::from(FrontendReq::CHECK_DEVICE_STATE) {
            session.finish_transfer(&connection)?;
        }
        let (request, need_reply) = (message.request, message.need_reply);
        log::trace!(
            "request {request}: {} bytes, {} files{}",
            message.payload.len(),
            message.files.len(),
            if need_reply { ", wants a reply" } else { "" }
        );
        match session.handle(message) {
            Ok(Answer::Reply(payload)) => connection.reply(request, &payload, None)?,
            Ok(Answer::ReplyWithFile(payload, file)) => {
                connection.reply(request, &payload, Some(file))?;
            }
            Ok(Answer::Ack) if need_reply => connection.reply(request, 0u64.as_slice(), None)?,
            Ok(Answer::Ack) => {}
            Err(error) => {
                warn_limited(format_args!("front-end: {error}"));
                if need_reply {
                    connection.reply(request, 1u64.as_slice(), None)?;
                } else if !error.spares_the_connection() {
                    warn_limited(format_args!(
                        "the connection ends here: no reply was asked for"
                    ));
                    break;
                }
            }
        }
    }
    Ok(())
}

impl<D: Device> Drop for Session<'_, D> {
    fn drop(&mut self) {
        self.stop_all();
        self.device.reset();
        self.device.set_kept(Some(0));
    }
}

impl<D: Device> Session<'_, D> {
    fn handle(&mut self, mut message: Message) -> Result<Answer, SessionError> {
        let request = FrontendReq::try_from(message.request)
            .map_err(|_| SessionError::Unsupported(message.request))?;
        let size = message.payload.len();
        let malformed = || SessionError::Payload { request, size };
        match request {
            FrontendReq::GET_FEATURES => Answer::object(self.offered_features()),
            FrontendReq::SET_FEATURES => self.set_features(message.object().ok_or_else(malformed)?),
            FrontendReq::GET_PROTOCOL_FEATURES => {
                Answer::object(self.offered_protocol_features().bits())
            }
            FrontendReq::SET_PROTOCOL_FEATURES => {
                self.set_protocol_features(message.object().ok_or_else(malformed)?)
            }
            FrontendReq::SET_OWNER => {
                self.begin();
                Ok(Answer::Ack)
            }
            FrontendReq::RESET_OWNER => {
                for index in 0..self.vrings.len() {
                    self.enable(index, false)?;
                }
                Ok(Answer::Ack)
            }
            FrontendReq::RESET_DEVICE => {
                self.stop_all();
                self.vrings.iter_mut().for_each(Vring::reset);
                self.end_transfer("the device is reset");
                self.device_state = DeviceState::default();
                self.status = 0;
                self.device.reset();
                Ok(Answer::Ack)
            }
            FrontendReq::GET_STATUS => Answer::object(self.status),
            FrontendReq::SET_STATUS => {
                self.status = message.object().ok_or_else(malformed)?;
                Ok(Answer::Ack)
            }
            FrontendReq::GET_QUEUE_NUM => Answer::object(self.vrings.len() as u64),
            FrontendReq::GET_MAX_MEM_SLOTS => Answer::object(MAX_REGIONS as u64),
            FrontendReq::SET_MEM_TABLE => self.set_memory_table(message).ok_or_else(malformed)?,
            FrontendReq::ADD_MEM_REG => {
                let region: VhostUserSingleMemoryRegion = message.object().ok_or_else(malformed)?;
                let file = file(&mut message, request)?;
                self.set_memory(self.memory.with_region(&region, file)?)
            }
            FrontendReq::REM_MEM_REG => {
                let region: VhostUserSingleMemoryRegion = message.object().ok_or_else(malformed)?;
                self.set_memory(self.memory.without_region(&region)?)
            }
            FrontendReq::SET_LOG_BASE => {
                let log: VhostUserLog = message.object().ok_or_else(malformed)?;
                self.set_log(log, message)
            }
            FrontendReq::SET_VRING_NUM => {
                let state: VhostUserVringState = message.object().ok_or_else(malformed)?;
                self.set_size(state)
            }
            FrontendReq::SET_VRING_ADDR => {
                let addresses: VhostUserVringAddr = message.object().ok_or_else(malformed)?;
                self.set_addresses(addresses)
            }
            FrontendReq::SET_VRING_BASE => {
                let state: VhostUserVringState = message.object().ok_or_else(malformed)?;
                self.set_base(state)
            }
            FrontendReq::GET_VRING_BASE => {
                let state: VhostUserVringState = message.object().ok_or_else(malformed)?;
                let index = self.queue_index(state.index.into())?;
                let start = self.first_base();
                let vring = self.vring(index)?;
                vring.stop(index as u16);
                let base = vring.base.unwrap_or(start);
                self.end_idle_workers();
                Answer::object(VhostUserVringState::new(state.index, base))
            }
            FrontendReq::SET_VRING_ENABLE => {
                let state: VhostUserVringState = message.object().ok_or_else(malformed)?;
                let index = self.queue_index(state.index.into())?;
                match state.num {
                    0 | 1 => self.enable(index, state.num == 1)?,
                    _ => return Err(malformed()),
                }
                Ok(Answer::Ack)
            }
            FrontendReq::SET_VRING_KICK
            | FrontendReq::SET_VRING_CALL
            | FrontendReq::SET_VRING_ERR => {
                let value: u64 = message.object().ok_or_else(malformed)?;
                self.set_vring_file(value, message, request)
            }
            FrontendReq::GET_CONFIG => self.get_config(&message).ok_or_else(malformed),
            FrontendReq::SET_CONFIG => self.set_config(&message).ok_or_else(malformed)?,
            FrontendReq::SET_BACKEND_REQ_FD => {
                let channel = Arc::new(file(&mut message, request)?);
                let config_change = ConfigChange::new(&channel);
                self.back_end_channel = Some(channel);
                self.device.set_config_change(config_change);
                Ok(Answer::Ack)
            }
            FrontendReq::GET_INFLIGHT_FD => self.get_inflight(&message),
            FrontendReq::SET_INFLIGHT_FD => self.set_inflight(message),
            FrontendReq::SET_DEVICE_STATE_FD => Ok(self.set_device_state(message)),
            FrontendReq::CHECK_DEVICE_STATE => Answer::object(self.check_device_state()),
            FrontendReq::GPU_SET_SOCKET => {
                let socket = UnixStream::from(file(&mut message, request)?);
                self.device
                    .set_gpu_socket(socket)
                    .map_err(|_| SessionError::NotForDevice(request))?;
                Ok(Answer::Ack)
            }
            _ => Err(SessionError::Unsupported(message.request)),
        }
    }

    /// SET_OWNER: another session begins, unless rings run. QEMU's device_del and device_add leave the connection as it is, and the
    /// new device tells of all memory and rings. Protocol features and the back-end's channel are what QEMU tells of before; and a
    /// front-end that says it twice before rings start loses nothing.
    fn begin(&mut self) {
        let is_running = self.vrings.iter().any(|vring| vring.worker.is_some());
        if is_running || !std::mem::take(&mut self.was_used) {
            return;
        }
        self.stop_all();
        self.vrings.fill_with(Vring::default);
        self.end_transfer("another session begins");
        self.device_state = DeviceState::default();
        self.memory = GuestMemory::default();
        self.log = None;
        self.inflight = None;
        self.accepted_features = 0;
        self.status = 0;
        self.device.reset();
        self.device.set_kept(Some(0));
        info_limited(format_args!("another session begins"));
    }

    fn offered_features(&self) -> u64 {
        let in_order = u64::from(D::IN_ORDER) << VIRTIO_F_IN_ORDER;
        let log = if D::LOGS { LOG_ALL } else { 0 };
        self.device.features() | TRANSPORT_FEATURES | in_order | log
    }

    fn set_features(&mut self, wanted: u64) -> Result<Answer, SessionError> {
        let offered = self.offered_features();
        if wanted & !offered != 0 {
            // QEMU asks some devices for bits that were not offered.
            log::debug!("features {:#x} were not offered", wanted & !offered);
        }
        let before = std::mem::replace(&mut self.accepted_features, wanted & offered);
        // QEMU sends them all to have only LOG_ALL changed while the driver is at work.
        let is_at_work = self.vrings.iter().any(|vring| vring.worker.is_some());
        if !is_at_work || before ^ self.accepted_features != LOG_ALL {
            info_limited(format_args!(
                "features {:#x} accepted",
                self.accepted_features
            ));
            self.device.set_features(self.accepted_features & !LOG_ALL);
        }
        // Where the rings of one format stopped says nothing of those of the other.
        let other_rings = (before ^ self.accepted_features) & 1 << VIRTIO_F_RING_PACKED != 0;
        if other_rings && !is_at_work && self.vrings.iter().any(|vring| vring.base.is_some()) {
            self.vrings.iter_mut().for_each(Vring::forget_suspended);
            self.device.new_driver();
        }
        if self.accepted_features & PROTOCOL_FEATURES == 0 {
            for vring in &mut self.vrings {
                vring.enabled = true;
            }
        }
        self.apply_log()?;
        Ok(Answer::Ack)
    }

    fn has_feature(&self, bit: u32) -> bool {
        self.accepted_features & 1 << bit != 0
    }

    fn offered_protocol_features(&self) -> Protocol {
        let mut offered = Protocol::MQ
            | Protocol::REPLY_ACK
            | Protocol::BACKEND_REQ
            | Protocol::RESET_DEVICE
            | Protocol::CONFIGURE_MEM_SLOTS
            | Protocol::INFLIGHT_SHMFD
            | Protocol::LOG_SHMFD
            | Protocol::DEVICE_STATE
            | Protocol::STATUS;
        offered.set(Protocol::CONFIG, !self.device.config().is_empty());
        offered
    }

    fn set_protocol_features(&mut self, wanted: u64) -> Result<Answer, SessionError> {
        let unknown = wanted & !self.offered_protocol_features().bits();
        if unknown != 0 {
            return Err(SessionError::Features(unknown));
        }
        // Most of what was offered is understood whether it is wanted or not.
        self.protocol_features = Protocol::from_bits_retain(wanted);
        Ok(Answer::Ack)
    }

    /// Notes what the device has to keep.
    fn keep(&self) {
        if let Some(inflight) = &self.inflight {
            inflight.keep(self.device.kept());
        }
    }

    /// The thread that a queue is to run on.
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
        let handler = self.device.handler(thread).map_err(WorkerError::Start)?;
        let worker = Arc::new(Worker::start(name, handler, self.polling)?);
        self.workers.insert(thread, Arc::clone(&worker));
        Ok(worker)
    }

    /// Ends the threads none of whose queues runs, unless the device keeps them.
    fn end_idle_workers(&mut self) {
        if !D::KEEPS_THREADS {
            self.workers
                .retain(|_, worker| Arc::strong_count(worker) > 1);
        }
    }

    fn stop_all(&mut self) {
        for (index, vring) in self.vrings.iter_mut().enumerate() {
            vring.stop(index as u16);
        }
        self.workers.clear();
    }
}

/// The one file that came with a request. More are closed.
fn file(message: &mut Message, request: FrontendReq) -> Result<OwnedFd, SessionError> {
    message
        .files
        .drain(..)
        .next()
        .ok_or(SessionError::NoFile(request))
}
