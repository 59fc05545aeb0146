// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! virtio-scsi requests, task management functions and events (VIRTIO 1.3, section 5.6.6).

use std::time::Duration;

pub use virtio_bindings::virtio_scsi::{
    VIRTIO_SCSI_S_ABORTED as ABORTED, VIRTIO_SCSI_S_BAD_TARGET as BAD_TARGET,
    VIRTIO_SCSI_S_BUSY as BUSY, VIRTIO_SCSI_S_FAILURE as FAILURE,
    VIRTIO_SCSI_S_FUNCTION_REJECTED as REJECTED, VIRTIO_SCSI_S_FUNCTION_SUCCEEDED as SUCCEEDED,
    VIRTIO_SCSI_S_INCORRECT_LUN as INCORRECT_LUN, VIRTIO_SCSI_S_OK as OK,
    VIRTIO_SCSI_S_OVERRUN as OVERRUN, VIRTIO_SCSI_S_RESET as RESET,
    VIRTIO_SCSI_T_TMF_ABORT_TASK as ABORT_TASK, VIRTIO_SCSI_T_TMF_ABORT_TASK_SET as ABORT_TASK_SET,
    VIRTIO_SCSI_T_TMF_CLEAR_ACA as CLEAR_ACA, VIRTIO_SCSI_T_TMF_CLEAR_TASK_SET as CLEAR_TASK_SET,
    VIRTIO_SCSI_T_TMF_I_T_NEXUS_RESET as NEXUS_RESET,
    VIRTIO_SCSI_T_TMF_LOGICAL_UNIT_RESET as UNIT_RESET, VIRTIO_SCSI_T_TMF_QUERY_TASK as QUERY_TASK,
    VIRTIO_SCSI_T_TMF_QUERY_TASK_SET as QUERY_TASK_SET,
};

use super::descriptor::Buffer;
use super::memory::GuestMemory;
use super::queue::Queue;

/// Indices of the queues that are not request queues, and of the first request queue.
pub const CONTROL_QUEUE: usize = 0;
/// The queue of events.
pub const EVENT_QUEUE: usize = 1;
/// The first request queue.
pub const REQUEST_QUEUE: usize = 2;

/// Bytes of a request before the CDB, and of a response before the sense data.
const REQUEST: usize = 19;
const RESPONSE: usize = 12;
/// Bytes of an event.
const EVENT_SIZE: u32 = 16;
/// The value of writable bytes before a request is submitted.
pub const UNTOUCHED: u8 = 0xdd;

/// The status GOOD.
pub const GOOD: u8 = 0;
/// The status CHECK CONDITION.
pub const CHECK_CONDITION: u8 = 2;

/// Returns the field `lun` for a logical unit.
pub fn address(target: u8, lun: u16) -> [u8; 8] {
    let [high, low] = lun.to_be_bytes();
    [1, target, 0x40 | high, low, 0, 0, 0, 0]
}

/// A request as a driver specifies it.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The field `lun`.
    pub lun: [u8; 8],
    /// The driver's name for it.
    pub id: u64,
    /// The command. Zeroes follow it up to the size of the field.
    pub cdb: &'a [u8],
    /// Data that the device reads.
    pub data: &'a [u8],
    /// Number of bytes that the device may write as data.
    pub reply_length: u32,
}

impl Default for Request<'_> {
    /// TEST UNIT READY for the first unit.
    fn default() -> Self {
        Self {
            lun: address(0, 0),
            id: 0,
            cdb: &[0; 6],
            data: &[],
            reply_length: 0,
        }
    }
}

/// The result of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The used length.
    pub used: u32,
    /// The response: [`OK`], [`BAD_TARGET`] and so on.
    pub response: u32,
    /// The status of the command.
    pub status: u8,
    /// Bytes of the data buffers that were not moved.
    pub residual: u32,
    /// The sense data.
    pub sense: Vec<u8>,
    /// All of the writable data.
    pub data: Vec<u8>,
}

impl Completion {
    /// Returns sense key, ASC and ASCQ of fixed sense data.
    pub fn sense_codes(&self) -> (u8, u8, u8) {
        match self.sense.as_slice() {
            [
                0x70 | 0xf0,
                _,
                key,
                _,
                _,
                _,
                _,
                _,
                _,
                _,
                _,
                _,
                asc,
                ascq,
                ..,
            ] => (key & 0xf, *asc, *ascq),
            other => panic!("no fixed sense data: {other:?}"),
        }
    }
}

/// A request in guest memory.
#[derive(Clone, Debug)]
pub struct Prepared {
    /// The chain to add.
    pub chain: Vec<Buffer>,
    response: u64,
    sense_size: u32,
    reply_length: u32,
}

impl Prepared {
    /// Returns the result after the device used the chain with `used` bytes.
    pub fn completion(&self, memory: &GuestMemory, used: u32) -> Completion {
        let head = memory.read_vec(self.response, RESPONSE + self.sense_size as usize);
        let number =
            |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().expect("four bytes"));
        let sense = (number(0) as usize).min(self.sense_size as usize);
        Completion {
            used,
            response: head[11].into(),
            status: head[10],
            residual: number(4),
            sense: head[RESPONSE..RESPONSE + sense].to_vec(),
            data: memory.read_vec(
                self.response + head.len() as u64,
                self.reply_length as usize,
            ),
        }
    }
}

/// Memory for one request at a time, and the sizes in the config space.
#[derive(Clone, Debug)]
pub struct RequestArea {
    readable: u64,
    writable: u64,
    size: u32,
    /// Bytes of sense data in a response.
    pub sense_size: u32,
    /// Bytes of the CDB in a request.
    pub cdb_size: u32,
}

impl RequestArea {
    /// Creates an area for `size` bytes of data in each direction.
    pub fn new(memory: &GuestMemory, size: u32) -> Self {
        let room = u64::from(size) + 1024;
        Self {
            readable: memory.allocate(room, 4096),
            writable: memory.allocate(room, 4096),
            size,
            sense_size: 96,
            cdb_size: 32,
        }
    }

    /// Writes a request into the area: a readable and a writable buffer.
    pub fn prepare(&self, memory: &GuestMemory, request: &Request) -> Prepared {
        let Request {
            lun,
            id,
            cdb,
            data,
            reply_length,
        } = *request;
        assert!(data.len() <= self.size as usize && reply_length <= self.size);
        let mut bytes = lun.to_vec();
        bytes.extend(id.to_le_bytes());
        bytes.extend([0; 3]);
        bytes.extend(cdb);
        bytes.resize(REQUEST + self.cdb_size as usize, 0);
        bytes.extend(data);
        memory.write(self.readable, &bytes);
        let writable = RESPONSE as u32 + self.sense_size + reply_length;
        memory.fill(self.writable, writable as usize, UNTOUCHED);
        Prepared {
            chain: vec![
                Buffer::readable(self.readable, bytes.len() as u32),
                Buffer::writable(self.writable, writable),
            ],
            response: self.writable,
            sense_size: self.sense_size,
            reply_length,
        }
    }
}

/// One request at a time on one request queue.
#[derive(Debug)]
pub struct ScsiDriver {
    /// The queue; it may be used for anything between requests.
    pub queue: Queue,
    /// The memory that requests are written to.
    pub area: RequestArea,
    memory: GuestMemory,
    timeout: Duration,
}

impl ScsiDriver {
    /// Creates a driver for requests of up to `largest` bytes.
    pub fn new(memory: &GuestMemory, queue: Queue, largest: u32) -> Self {
        Self {
            queue,
            area: RequestArea::new(memory, largest),
            memory: memory.clone(),
            timeout: Duration::from_secs(10),
        }
    }

    /// Returns guest memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Submits a prepared request and waits for it.
    #[track_caller]
    pub fn run(&mut self, prepared: &Prepared) -> Completion {
        let head = self.queue.submit(&prepared.chain);
        let used = self.queue.take_used_within(self.timeout);
        assert_eq!(used.head, head);
        prepared.completion(&self.memory, used.length)
    }

    /// Writes a request, submits it and waits for it.
    #[track_caller]
    pub fn request(&mut self, request: &Request) -> Completion {
        let prepared = self.area.prepare(&self.memory, request);
        self.run(&prepared)
    }

    /// Sends a command that moves data to the driver, if any.
    #[track_caller]
    pub fn command(&mut self, lun: [u8; 8], cdb: &[u8], reply_length: u32) -> Completion {
        self.request(&Request {
            lun,
            cdb,
            reply_length,
            ..Request::default()
        })
    }

    /// Sends a command that moves data to the device.
    #[track_caller]
    pub fn send(&mut self, lun: [u8; 8], cdb: &[u8], data: &[u8]) -> Completion {
        self.request(&Request {
            lun,
            cdb,
            data,
            ..Request::default()
        })
    }

    /// Reads blocks of 512 bytes with READ(16).
    #[track_caller]
    pub fn read(&mut self, lun: [u8; 8], block: u64, blocks: u32) -> Completion {
        self.command(lun, &transfer(READ_16, block, blocks), blocks * 512)
    }

    /// Writes blocks of 512 bytes with WRITE(16).
    #[track_caller]
    pub fn write(&mut self, lun: [u8; 8], block: u64, data: &[u8]) -> Completion {
        let blocks = data.len() as u32 / 512;
        self.send(lun, &transfer(WRITE_16, block, blocks), data)
    }

    /// Sends TEST UNIT READY until no unit attention is left.
    #[track_caller]
    pub fn clear_attentions(&mut self, lun: [u8; 8]) {
        for _ in 0..16 {
            let completion = self.command(lun, &[0; 6], 0);
            if completion.status == GOOD {
                return;
            }
            assert_eq!(completion.sense_codes().0, 6, "UNIT ATTENTION");
        }
        panic!("the unit attentions do not end");
    }
}

/// The operation code of READ(16).
pub const READ_16: u8 = 0x88;
/// The operation code of WRITE(16).
pub const WRITE_16: u8 = 0x8a;

/// Returns the CDB of READ(16), WRITE(16) or another command of this layout.
pub fn transfer(operation: u8, block: u64, blocks: u32) -> [u8; 16] {
    let mut cdb = [0; 16];
    cdb[0] = operation;
    cdb[2..10].copy_from_slice(&block.to_be_bytes());
    cdb[10..14].copy_from_slice(&blocks.to_be_bytes());
    cdb
}

/// Returns the readable bytes of a task management function.
pub fn function(subtype: u32, lun: [u8; 8], id: u64) -> Vec<u8> {
    let mut bytes = [0, subtype].map(u32::to_le_bytes).concat();
    bytes.extend(lun);
    bytes.extend(id.to_le_bytes());
    bytes
}

/// The control queue.
#[derive(Debug)]
pub struct ControlDriver {
    /// The queue; it may be used for anything between requests.
    pub queue: Queue,
    memory: GuestMemory,
    readable: u64,
    writable: u64,
}

impl ControlDriver {
    /// Creates a driver.
    pub fn new(memory: &GuestMemory, queue: Queue) -> Self {
        Self {
            queue,
            memory: memory.clone(),
            readable: memory.allocate(4096, 64),
            writable: memory.allocate(4096, 64),
        }
    }

    /// Makes a request available, with room for an answer of `length` bytes.
    pub fn submit(&mut self, request: &[u8], length: u32) {
        self.memory.write(self.readable, request);
        self.memory.fill(self.writable, length as usize, UNTOUCHED);
        self.queue.submit(&[
            Buffer::readable(self.readable, request.len() as u32),
            Buffer::writable(self.writable, length),
        ]);
    }

    /// Waits for the answer to the last request.
    #[track_caller]
    pub fn answer(&mut self, limit: Duration) -> Vec<u8> {
        let used = self.queue.take_used_within(limit);
        self.memory.read_vec(self.writable, used.length as usize)
    }

    /// Sends a request, and waits for its answer of at most `length` bytes.
    #[track_caller]
    pub fn request(&mut self, request: &[u8], length: u32) -> Vec<u8> {
        self.submit(request, length);
        self.answer(Duration::from_secs(10))
    }

    /// Makes a task management function available.
    pub fn submit_function(&mut self, subtype: u32, lun: [u8; 8], id: u64) {
        self.submit(&function(subtype, lun, id), 1);
    }

    /// Sends a task management function. Returns its response.
    #[track_caller]
    pub fn function(&mut self, subtype: u32, lun: [u8; 8], id: u64) -> u32 {
        match self.request(&function(subtype, lun, id), 1).as_slice() {
            [response] => (*response).into(),
            other => panic!("an answer of {} bytes", other.len()),
        }
    }
}

/// An event: its type with flags, the address and the reason.
pub type Event = (u32, [u8; 8], u32);

/// The event queue.
#[derive(Debug)]
pub struct EventDriver {
    /// The queue.
    pub queue: Queue,
    memory: GuestMemory,
    buffers: Vec<(u16, u64)>,
}

impl EventDriver {
    /// Creates a driver without buffers.
    pub fn new(memory: &GuestMemory, queue: Queue) -> Self {
        Self {
            queue,
            memory: memory.clone(),
            buffers: Vec::new(),
        }
    }

    /// Makes so many buffers available.
    pub fn add(&mut self, count: usize) {
        for _ in 0..count {
            let address = self.memory.allocate(EVENT_SIZE.into(), 16);
            let buffer = [Buffer::writable(address, EVENT_SIZE)];
            let head = self.queue.add(&buffer).expect("free descriptors");
            self.buffers.push((head, address));
        }
        self.queue.publish();
        self.queue.kick();
    }

    /// Returns the next event; `None` if there is none within the limit.
    pub fn next(&mut self, limit: Duration) -> Option<Event> {
        if !self.queue.wait_used(limit) {
            return None;
        }
        let used = self.queue.take_used()?;
        let place = self.buffers.iter().position(|(head, _)| *head == used.head);
        let (_, address) = self.buffers.remove(place.expect("a buffer of this driver"));
        assert_eq!(used.length, EVENT_SIZE);
        let bytes = self.memory.read_vec(address, EVENT_SIZE as usize);
        let number =
            |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let lun = bytes[4..12].try_into().expect("eight bytes");
        Some((number(0), lun, number(12)))
    }
}
