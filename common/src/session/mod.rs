// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One connection of a front-end: the vhost-user protocol from the first message to the last.
//!
//! All state here ends with the connection, and most of it when SET_OWNER starts another session on the same connection. The session
//! rejects an invalid request with a negative acknowledgement if the front-end asked for one, and closes the connection otherwise. An error
//! that a guest can cause through its front-end never closes the connection.

mod config;
mod dirty_log;
mod error;
mod inflight;
mod memory;
mod reset;
mod rings;
mod status;
mod stop;
mod transfer;
mod vring;
mod wait;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures as Protocol};
use virtio_bindings::virtio_config::{VIRTIO_F_IN_ORDER, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::ByteValued;

use crate::device::{Device, DeviceRequest};
use crate::log_limit::{info_limited, warn_limited};
use crate::memory::{DirtyLog, GuestMemory, MAX_REGIONS};
use crate::ring::inflight::InflightFile;
use crate::statistics::Statistics;
pub use crate::wire::MessageError;
use crate::wire::{Channel, Connection, Message};
use crate::worker::{Polling, Worker};
use dirty_log::LOG_ALL;
pub use error::SessionError;
use transfer::DeviceState;
use vring::Vring;

/// VHOST_USER_F_PROTOCOL_FEATURES: without this bit, all rings are enabled from the start.
const PROTOCOL_FEATURES: u64 = 1 << 30;
/// Feature bits that the core provides for every device.
const TRANSPORT_FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_F_RING_PACKED
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | PROTOCOL_FEATURES;

/// The answer to a request that succeeded.
enum Answer {
    /// An acknowledgement, if the front-end asked for one.
    Ack,
    /// The reply that this request always has.
    Reply(Vec<u8>),
    /// The same, with a file.
    ReplyWithFile(Vec<u8>, OwnedFd),
}

impl Answer {
    fn object<T: ByteValued>(object: T) -> Self {
        Self::Reply(object.as_slice().to_vec())
    }
}

/// The state of one connection.
struct Session<'a, D: Device> {
    device: &'a D,
    statistics: &'a Statistics,
    polling: Polling,
    accepted_features: u64,
    status: u64,
    memory: GuestMemory,
    /// The dirty log, used while LOG_ALL is accepted.
    log: Option<Arc<DirtyLog>>,
    vrings: Vec<Vring>,
    /// The file of requests in flight, which the front-end keeps.
    inflight: Option<InflightFile>,
    /// The last transfer of the device state.
    device_state: DeviceState,
    /// The queue threads, by the numbers from [`Device::thread_of`].
    workers: BTreeMap<u16, Arc<Worker>>,
    /// The channel for requests of the device to the front-end.
    channel: Arc<Channel>,
    /// A ring was started since SET_OWNER.
    was_used: bool,
}

/// Serves the front-end at `socket` until it disconnects, or until `stop` becomes readable. Counts requests in `statistics`. Queue threads
/// poll as `polling` says.
///
/// # Errors
/// The socket failed, or the front-end broke the protocol.
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
        status: 0,
        memory: GuestMemory::default(),
        log: None,
        vrings: (0..device.num_queues()).map(|_| Vring::default()).collect(),
        inflight: None,
        device_state: DeviceState::default(),
        workers: BTreeMap::new(),
        channel: Channel::new(device.shared_memory()),
        was_used: false,
    };
    device.connected(&session.channel.handle());
    session.publish_status();
    loop {
        session.wait_for_message(&connection)?;
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
        let answer = session.handle(message);
        session.publish_status();
        match answer {
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
                        "closing the connection: the request asked for no reply"
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
        self.channel.close();
        self.stop_all();
        self.device.expect_suspend(false);
        self.device.reset();
        self.device.set_kept(Some(0));
        self.statistics.set_front_end(None);
    }
}

impl<D: Device> Session<'_, D> {
    /// Carries out one request.
    fn handle(&mut self, mut message: Message) -> Result<Answer, SessionError> {
        let unsupported = SessionError::Unsupported(message.request);
        if message.request == stop::GET_VRING_BASE_SKIP_DRAIN {
            return self.get_base_skip_drain(&message);
        }
        let Ok(request) = FrontendReq::try_from(message.request) else {
            return Err(unsupported);
        };
        match request {
            FrontendReq::GET_FEATURES => Ok(Answer::object(self.offered_features())),
            FrontendReq::SET_FEATURES => self.set_features(message.object()?),
            FrontendReq::GET_PROTOCOL_FEATURES => {
                Ok(Answer::object(self.offered_protocol_features().bits()))
            }
            FrontendReq::SET_PROTOCOL_FEATURES => self.set_protocol_features(message.object()?),
            FrontendReq::GET_QUEUE_NUM => Ok(Answer::object(self.vrings.len() as u64)),
            FrontendReq::GET_MAX_MEM_SLOTS => Ok(Answer::object(MAX_REGIONS as u64)),
            FrontendReq::GET_STATUS => Ok(Answer::object(self.status)),
            FrontendReq::SET_STATUS => {
                self.status = message.object()?;
                Ok(Answer::Ack)
            }

            FrontendReq::SET_OWNER => Ok(self.begin()),
            FrontendReq::RESET_OWNER => self.disable_all(),
            FrontendReq::RESET_DEVICE => Ok(self.reset_device()),

            FrontendReq::SET_MEM_TABLE => self.set_memory_table(message),
            FrontendReq::ADD_MEM_REG => self.add_memory(message.object()?, message.file()?),
            FrontendReq::REM_MEM_REG => self.remove_memory(message.object()?),
            FrontendReq::SET_LOG_BASE => self.set_log(message),

            FrontendReq::SET_VRING_NUM => self.set_size(message.object()?),
            FrontendReq::SET_VRING_ADDR => self.set_addresses(message.object()?),
            FrontendReq::SET_VRING_BASE => self.set_base(message.object()?),
            FrontendReq::GET_VRING_BASE => self.get_base(message.object()?),
            FrontendReq::SET_VRING_ENABLE => self.set_enable(&message),
            FrontendReq::SET_VRING_KICK
            | FrontendReq::SET_VRING_CALL
            | FrontendReq::SET_VRING_ERR => self.set_vring_file(request, message),
            FrontendReq::GET_INFLIGHT_FD => self.get_inflight(&message),
            FrontendReq::SET_INFLIGHT_FD => self.set_inflight(message),

            FrontendReq::GET_CONFIG => self.get_config(&message),
            FrontendReq::SET_CONFIG => self.set_config(&message),
            FrontendReq::SET_DEVICE_STATE_FD => Ok(self.set_device_state(message)),
            FrontendReq::CHECK_DEVICE_STATE => Ok(Answer::object(self.check_device_state())),

            FrontendReq::SET_BACKEND_REQ_FD => {
                self.channel.set_socket(message.file()?);
                Ok(Answer::Ack)
            }
            FrontendReq::GET_SHMEM_CONFIG => {
                let config = self.channel.shared_memory_config().ok_or(unsupported)?;
                Ok(Answer::object(config))
            }
            FrontendReq::GPU_SET_SOCKET => {
                let socket = UnixStream::from(message.file()?);
                self.device
                    .handle_request(DeviceRequest::GpuSocket(socket))
                    .map_err(|_| SessionError::NotForDevice(request))?;
                Ok(Answer::Ack)
            }
            _ => Err(unsupported),
        }
    }

    /// Returns the feature bits for GET_FEATURES.
    fn offered_features(&self) -> u64 {
        let in_order = u64::from(D::IN_ORDER) << VIRTIO_F_IN_ORDER;
        let log = if D::LOGS { LOG_ALL } else { 0 };
        self.device.features() | TRANSPORT_FEATURES | in_order | log
    }

    /// SET_FEATURES.
    fn set_features(&mut self, wanted: u64) -> Result<Answer, SessionError> {
        let offered = self.offered_features();
        if wanted & !offered != 0 {
            // QEMU sets bits that the back-end did not offer, for some devices.
            log::debug!("features {:#x} were not offered", wanted & !offered);
        }
        let before = std::mem::replace(&mut self.accepted_features, wanted & offered);
        // To change only LOG_ALL while the driver runs, QEMU sends all features again.
        let is_at_work = self.vrings.iter().any(|vring| vring.worker.is_some());
        if !is_at_work || before ^ self.accepted_features != LOG_ALL {
            info_limited(format_args!(
                "features {:#x} accepted",
                self.accepted_features
            ));
            self.device.set_features(self.accepted_features & !LOG_ALL);
        }
        // A driver that chooses the other ring format does not continue the rings of the first.
        let other_rings = (before ^ self.accepted_features) & 1 << VIRTIO_F_RING_PACKED != 0;
        if other_rings && !is_at_work && self.vrings.iter().any(|vring| vring.base.is_some()) {
            self.vrings.iter_mut().for_each(Vring::forget_suspended);
            self.device.new_driver();
        }
        if self.accepted_features & PROTOCOL_FEATURES == 0 {
            for index in 0..self.vrings.len() {
                self.enable(index, true)?;
            }
        }
        self.apply_log()?;
        Ok(Answer::Ack)
    }

    fn has_feature(&self, bit: u32) -> bool {
        self.accepted_features & 1 << bit != 0
    }

    /// Returns the feature bits for GET_PROTOCOL_FEATURES.
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
        let shared_memory = Protocol::SHMEM | Protocol::BACKEND_SEND_FD;
        offered.set(shared_memory, self.channel.shared_memory_config().is_some());
        offered.set(stop::FEATURES, D::SUSPENDS);
        offered | Protocol::from_bits_retain(self.device.protocol_features())
    }

    /// SET_PROTOCOL_FEATURES.
    fn set_protocol_features(&mut self, wanted: u64) -> Result<Answer, SessionError> {
        let unknown = wanted & !self.offered_protocol_features().bits();
        if unknown != 0 {
            return Err(SessionError::Features(unknown));
        }
        // The session understands most messages whether their feature was accepted or not.
        self.channel
            .set_protocol_features(Protocol::from_bits_retain(wanted));
        self.device.expect_suspend(self.expects_suspend());
        Ok(Answer::Ack)
    }
}
