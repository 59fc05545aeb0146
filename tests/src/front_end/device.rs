// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A negotiated device with started rings, through the `vhost` crate's `Frontend`.
//!
//! That crate is an independent implementation of the protocol, so that ours is not only tested against itself.

use std::ops::{Deref, DerefMut};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use vhost::vhost_user::message::{
    FrontendReq, VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures,
    VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_config::{VIRTIO_F_IN_ORDER, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::connection::{DEFAULT_TIMEOUT, RawConnection, VERSION};
use super::dirty_log::{DirtyLog, LOG_ALL, LOG_RING};
use super::error::{Error, Result};
use super::memory::{GuestMemory, Region};
use super::queue::{Queue, QueueOptions};
use super::watchdog::Watchdog;

/// Feature bit 30: the back-end has protocol features.
pub const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
/// Feature bit 32: VIRTIO 1.
pub const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
/// Feature bit 29: used_event and avail_event.
pub const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
/// Feature bit 28: indirect descriptor tables.
pub const INDIRECT_DESC: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC;
/// Feature bit 34: packed rings.
pub const RING_PACKED: u64 = 1 << VIRTIO_F_RING_PACKED;

/// Feature bit 35: requests are returned in the order in which they were made available.
pub const IN_ORDER: u64 = 1 << VIRTIO_F_IN_ORDER;

/// Environment variable with the default ring format: `split` (if it is not set) or `packed`.
const RING: &str = "VHOST_DEVICE_RING";

/// Returns [`RING_PACKED`] if packed rings are the default, else 0.
pub fn usual_format() -> u64 {
    match std::env::var(RING).as_deref() {
        Ok("packed") => RING_PACKED,
        Err(_) | Ok("split") => 0,
        Ok(other) => panic!("{RING}={other}: must be split or packed"),
    }
}

/// How a front-end negotiates.
#[derive(Debug, Clone)]
pub struct Options {
    /// VIRTIO features to accept of those offered.
    pub features: u64,
    /// Protocol features to accept of those offered.
    pub protocol_features: VhostUserProtocolFeatures,
    /// With REPLY_ACK accepted, ask for an acknowledgement of every message.
    pub need_reply: bool,
    /// Announce the memory with ADD_MEM_REG (needs CONFIGURE_MEM_SLOTS) instead of SET_MEM_TABLE.
    pub memory_slots: bool,
    /// Regions of guest memory: guest address, size in bytes.
    pub memory: Vec<(u64, usize)>,
    /// Time limit for the answer to a message, and for the socket to appear.
    pub timeout: Duration,
}

impl Default for Options {
    /// All features except ring reset (40), logging, and packed rings (34) unless the environment asks for them; the protocol features that
    /// this front-end uses; 64 MiB of memory in two regions with a hole between them.
    fn default() -> Self {
        Options {
            features: !(RING_PACKED | 1 << 40 | LOG_ALL) | usual_format(),
            protocol_features: VhostUserProtocolFeatures::MQ
                | VhostUserProtocolFeatures::REPLY_ACK
                | VhostUserProtocolFeatures::CONFIG
                | VhostUserProtocolFeatures::BACKEND_REQ
                | VhostUserProtocolFeatures::RESET_DEVICE
                | VhostUserProtocolFeatures::INFLIGHT_SHMFD
                | VhostUserProtocolFeatures::DEVICE_STATE
                | VhostUserProtocolFeatures::LOG_SHMFD
                | VhostUserProtocolFeatures::STATUS
                | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS,
            need_reply: true,
            memory_slots: false,
            memory: vec![(0, 32 << 20), (1 << 32, 32 << 20)],
            timeout: DEFAULT_TIMEOUT,
        }
    }
}

impl Options {
    /// The default options with one region of memory of `size` bytes, which is announced with ADD_MEM_REG.
    pub fn with_slots(size: usize) -> Self {
        Options {
            memory: vec![(0, size)],
            memory_slots: true,
            ..Options::default()
        }
    }
}

/// A connection to a back-end, with negotiated features and memory.
pub struct FrontEnd {
    frontend: Frontend,
    socket: UnixStream,
    watchdog: Arc<Watchdog>,
    timeout: Duration,
    memory: GuestMemory,
    offered: u64,
    features: u64,
    protocol_features: VhostUserProtocolFeatures,
    queue_count: usize,
}

/// The `vhost` crate's front-end during one call; a call that is not answered in time ends with an error.
pub struct Call {
    frontend: Frontend,
    watchdog: Arc<Watchdog>,
}

impl Deref for Call {
    type Target = Frontend;

    fn deref(&self) -> &Frontend {
        &self.frontend
    }
}

impl DerefMut for Call {
    fn deref_mut(&mut self) -> &mut Frontend {
        &mut self.frontend
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.watchdog.disarm();
    }
}

impl FrontEnd {
    /// Connects to the socket at `path` (waiting for it) and negotiates.
    pub fn connect(path: &Path, options: &Options) -> Result<Self> {
        let connection = RawConnection::connect_within(path, options.timeout)?;
        Self::from_stream(connection.socket().try_clone()?, options)
    }

    /// Like [`FrontEnd::connect`], with the memory of another connection.
    pub fn connect_with_memory(
        path: &Path,
        options: &Options,
        memory: GuestMemory,
    ) -> Result<Self> {
        let connection = RawConnection::connect_within(path, options.timeout)?;
        Self::with_memory(connection.socket().try_clone()?, options, memory)
    }

    /// Negotiates on a connected socket.
    pub fn from_stream(socket: UnixStream, options: &Options) -> Result<Self> {
        Self::with_memory(socket, options, GuestMemory::new(&options.memory))
    }

    fn with_memory(socket: UnixStream, options: &Options, memory: GuestMemory) -> Result<Self> {
        // The vhost crate repeats a read that timed out, so the watchdog limits it instead.
        socket.set_read_timeout(None)?;
        let mut front_end = FrontEnd {
            frontend: Frontend::from_stream(socket.try_clone()?, 1),
            watchdog: Arc::new(Watchdog::new(socket.try_clone()?)),
            socket,
            timeout: options.timeout,
            memory,
            offered: 0,
            features: 0,
            protocol_features: VhostUserProtocolFeatures::empty(),
            queue_count: 1,
        };
        front_end.negotiate(options)?;
        Ok(front_end)
    }

    fn negotiate(&mut self, options: &Options) -> Result<()> {
        self.call().set_owner()?;
        self.offered = self.call().get_features()?;
        self.features = self.offered & options.features;
        if self.features & PROTOCOL_FEATURES != 0 {
            let offered = self.call().get_protocol_features()?;
            self.protocol_features = offered & options.protocol_features;
            self.call().set_protocol_features(self.protocol_features)?;
        }
        if options.need_reply && self.has(VhostUserProtocolFeatures::REPLY_ACK) {
            self.frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        if self.has(VhostUserProtocolFeatures::MQ) {
            self.queue_count = self.call().get_queue_num()? as usize;
        }
        self.call().set_features(self.features)?;
        if options.memory_slots {
            for region in self.memory.regions() {
                self.call().add_mem_region(&region.info())?;
            }
            Ok(())
        } else {
            self.send_memory_table()
        }
    }

    /// Closes the connection. The memory stays.
    pub fn disconnect(&self) {
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }

    /// Returns the `vhost` crate's front-end, for one call: `front_end.call().get_features()`.
    pub fn call(&self) -> Call {
        self.watchdog.arm(self.timeout);
        Call {
            frontend: self.frontend.clone(),
            watchdog: self.watchdog.clone(),
        }
    }

    /// Returns a raw connection on the same socket, for messages that the `vhost` crate does not have, or would not send.
    pub fn raw(&self) -> Result<RawConnection> {
        let mut raw = RawConnection::from_stream(self.socket.try_clone()?)?;
        raw.set_timeout(self.timeout)?;
        Ok(raw)
    }

    /// Returns guest memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Returns all VIRTIO features that the back-end offered.
    pub fn offered(&self) -> u64 {
        self.offered
    }

    /// Returns the VIRTIO features agreed on.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Returns the protocol features agreed on.
    pub fn protocol_features(&self) -> VhostUserProtocolFeatures {
        self.protocol_features
    }

    /// Negotiates these features, of those offered, for a driver that starts again. No ring may run.
    pub fn set_features(&mut self, features: u64) -> Result<()> {
        self.features = self.offered & features;
        self.call().set_features(self.features)?;
        Ok(())
    }

    /// Returns the number of queues that the back-end has (1 without MQ).
    pub fn queue_count(&self) -> usize {
        self.queue_count
    }

    /// Sends the whole memory table again.
    pub fn send_memory_table(&self) -> Result<()> {
        let regions: Vec<VhostUserMemoryRegionInfo> = self
            .memory
            .regions()
            .iter()
            .map(|region| region.info())
            .collect();
        self.call().set_mem_table(&regions)?;
        Ok(())
    }

    /// Replaces guest memory, and tells the back-end with SET_MEM_TABLE.
    pub fn replace_memory(&mut self, memory: GuestMemory) -> Result<()> {
        self.memory = memory;
        self.send_memory_table()
    }

    /// Adds a region of memory and tells the back-end with ADD_MEM_REG.
    pub fn add_region(&mut self, guest_address: u64, size: usize) -> Result<()> {
        let region = self.memory.add(Region::new(guest_address, size));
        self.call().add_mem_region(&region.info())?;
        Ok(())
    }

    /// Removes a region of memory and tells the back-end with REM_MEM_REG.
    pub fn remove_region(&mut self, guest_address: u64) -> Result<()> {
        let region = self.memory.remove(guest_address);
        self.call().remove_mem_region(&region.info())?;
        Ok(())
    }

    /// Returns the options of a queue of this size for the negotiated features; chains of two or more
    /// buffers are indirect if that was negotiated.
    pub fn queue_options(&self, size: u16) -> QueueOptions {
        QueueOptions {
            size,
            packed: self.features & RING_PACKED != 0,
            event_idx: self.features & EVENT_IDX != 0,
            indirect: if self.features & INDIRECT_DESC != 0 {
                size.min(130)
            } else {
                0
            },
            base: if self.features & RING_PACKED != 0 {
                1 << 15
            } else {
                0
            },
        }
    }

    /// Creates a queue of `size` descriptors for the negotiated features, and starts it as ring `index`.
    pub fn queue(&self, index: usize, size: u16) -> Result<Queue> {
        self.queue_with(index, self.queue_options(size))
    }

    /// Creates a queue and starts it as ring `index`.
    pub fn queue_with(&self, index: usize, options: QueueOptions) -> Result<Queue> {
        let queue = Queue::new(&self.memory, options);
        self.start(index, &queue, options.start())?;
        Ok(queue)
    }

    /// Starts `queue` as ring `index` at `base`: sends all vring messages, then enables it.
    pub fn start(&self, index: usize, queue: &Queue, base: u32) -> Result<()> {
        self.configure(index, queue, base)?;
        self.call().set_vring_kick(index, queue.kick_fd())?;
        if self.features & PROTOCOL_FEATURES != 0 {
            self.enable(index, true)?;
        }
        Ok(())
    }

    /// Enables or disables ring `index` (SET_VRING_ENABLE).
    pub fn enable(&self, index: usize, enabled: bool) -> Result<()> {
        Ok(self.call().set_vring_enable(index, enabled)?)
    }

    /// Sends the vring messages of [`FrontEnd::start`] up to, but without, the kick eventfd.
    pub fn configure(&self, index: usize, queue: &Queue, base: u32) -> Result<()> {
        self.call().set_vring_num(index, queue.options().size)?;
        self.set_base(index, base)?;
        self.call()
            .set_vring_addr(index, &self.ring_addresses(queue))?;
        self.call().set_vring_err(index, queue.error_fd())?;
        self.call().set_vring_call(index, queue.call_fd())?;
        Ok(())
    }

    /// Sends SET_VRING_BASE. The `vhost` crate supports it for split rings only.
    fn set_base(&self, index: usize, base: u32) -> Result<()> {
        if let Ok(base) = u16::try_from(base) {
            return Ok(self.call().set_vring_base(index, base)?);
        }
        let payload = [index as u32, base].map(u32::to_ne_bytes).concat();
        let request = FrontendReq::SET_VRING_BASE;
        if !self.has(VhostUserProtocolFeatures::REPLY_ACK) {
            return self.raw()?.send(request, VERSION, &payload, &[]);
        }
        match self.raw()?.acknowledged(request, &payload, &[])? {
            0 => Ok(()),
            refusal => Err(Error::Malformed(format!("{refusal} for SET_VRING_BASE"))),
        }
    }

    /// Returns the addresses of a ring for SET_VRING_ADDR.
    pub fn ring_addresses(&self, queue: &Queue) -> VringConfigData {
        let layout = queue.layout();
        VringConfigData {
            queue_max_size: queue.options().size,
            queue_size: queue.options().size,
            flags: 0,
            desc_table_addr: self.memory.user_address(layout.descriptors),
            used_ring_addr: self.memory.user_address(layout.used),
            avail_ring_addr: self.memory.user_address(layout.avail),
            log_addr: None,
        }
    }

    /// Sets another log of dirty pages.
    pub fn set_log(&self, log: &DirtyLog) -> Result<()> {
        assert!(self.has(VhostUserProtocolFeatures::LOG_SHMFD));
        self.call().set_log_base(0, Some(log.region()))?;
        Ok(())
    }

    /// Switches logging of writes on or off, except for rings: [`FrontEnd::log_ring`].
    pub fn log_writes(&self, on: bool) -> Result<()> {
        let log = if on { LOG_ALL } else { 0 };
        self.call().set_features(self.features | log)?;
        Ok(())
    }

    /// Switches logging of writes to the used ring of ring `index`, at guest address `log`, on or off.
    pub fn log_ring(&self, index: usize, ring: &VringConfigData, log: Option<u64>) -> Result<()> {
        let ring = VringConfigData {
            flags: if log.is_some() { LOG_RING } else { 0 },
            log_addr: log,
            ..*ring
        };
        self.call().set_vring_addr(index, &ring)?;
        Ok(())
    }

    /// Stops ring `index` with GET_VRING_BASE and returns where to start it again.
    pub fn stop(&self, index: usize) -> Result<u32> {
        Ok(self.call().get_vring_base(index)?)
    }

    /// Reads `size` bytes of the configuration space at `offset`.
    pub fn config(&self, offset: u32, size: u32) -> Result<Vec<u8>> {
        let room = vec![0; size as usize];
        let (_, bytes) =
            self.call()
                .get_config(offset, size, VhostUserConfigFlags::WRITABLE, &room)?;
        Ok(bytes)
    }

    /// Writes `bytes` into the configuration space at `offset`.
    pub fn set_config(&self, offset: u32, bytes: &[u8]) -> Result<()> {
        self.call()
            .set_config(offset, VhostUserConfigFlags::WRITABLE, bytes)?;
        Ok(())
    }

    /// Reads the device status (protocol feature STATUS).
    pub fn status(&self) -> Result<u64> {
        assert!(self.has(VhostUserProtocolFeatures::STATUS));
        Ok(self.raw()?.ask(FrontendReq::GET_STATUS, &[], &[])?.u64())
    }

    /// Writes the device status (protocol feature STATUS, with REPLY_ACK).
    pub fn set_status(&self, status: u64) -> Result<()> {
        assert!(self.has(VhostUserProtocolFeatures::STATUS));
        match self
            .raw()?
            .acknowledged(FrontendReq::SET_STATUS, &status.to_ne_bytes(), &[])?
        {
            0 => Ok(()),
            refusal => Err(Error::Malformed(format!("{refusal} for SET_STATUS"))),
        }
    }

    /// Sets up a channel for the back-end's own requests; this end receives them
    /// (CONFIG_CHANGE_MSG is request 2). Close it by dropping it.
    pub fn back_end_channel(&self) -> Result<RawConnection> {
        let (ours, theirs) = UnixStream::pair()?;
        self.call()
            .set_backend_request_fd(&theirs as &dyn AsRawFd)?;
        RawConnection::from_stream(ours)
    }

    fn has(&self, feature: VhostUserProtocolFeatures) -> bool {
        self.protocol_features.contains(feature)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_back_end_that_does_not_answer_ends_the_negotiation_with_an_error() {
        let (ours, _silent) = UnixStream::pair().unwrap();
        let options = Options {
            timeout: Duration::from_millis(50),
            memory: vec![(0, 0x1000)],
            ..Default::default()
        };
        assert!(matches!(
            FrontEnd::from_stream(ours, &options),
            Err(Error::Vhost(_))
        ));
    }
}
