// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! virtio-blk requests (VIRTIO 1.3, section 5.2.6), with their bytes in any framing.
//!
//! A request has bytes that the device reads (16 of header, then the data of a write) and bytes that it
//! writes (the data of a read, then one of status). VIRTIO leaves open how descriptors divide them.

use std::time::{Duration, Instant};

pub use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR as IOERR, VIRTIO_BLK_S_OK as OK, VIRTIO_BLK_S_UNSUPP as UNSUPP,
    VIRTIO_BLK_T_DISCARD as DISCARD, VIRTIO_BLK_T_FLUSH as FLUSH, VIRTIO_BLK_T_GET_ID as GET_ID,
    VIRTIO_BLK_T_IN as IN, VIRTIO_BLK_T_OUT as OUT, VIRTIO_BLK_T_WRITE_ZEROES as WRITE_ZEROES,
};

use super::descriptor::Buffer;
use super::error::{Error, Result};
use super::memory::GuestMemory;
use super::queue::Queue;

/// Bytes in a sector, the unit of request addresses whatever the block size is.
pub const SECTOR_SIZE: usize = 512;
/// Bytes in a request header.
pub const HEADER_SIZE: u32 = 16;
/// Bytes in the answer to GET_ID.
pub const ID_SIZE: usize = 20;
/// Flag of a discard or write-zeroes segment: unmap.
pub const UNMAP: u32 = 1;
/// Value of the status byte before a request is submitted; no device writes it.
pub const NO_STATUS: u8 = 0xee;

/// How the bytes of a request are divided among descriptors.
#[derive(Debug, Clone, Copy, Default)]
pub enum Framing<'a> {
    /// A descriptor each for header, data (if any) and status.
    #[default]
    Separate,
    /// Lengths of the pieces of the readable bytes (header and data to write) and of the writable bytes
    /// (data read and status); the remaining bytes are one more piece.
    Pieces {
        /// Header, then data to write.
        readable: &'a [u32],
        /// Data read, then status.
        writable: &'a [u32],
    },
}

/// A request as a driver specifies it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Request<'a> {
    /// Type: [`IN`], [`OUT`], [`FLUSH`]… or any other number.
    pub kind: u32,
    /// First sector.
    pub sector: u64,
    /// Bytes for the device to read after the header.
    pub data: &'a [u8],
    /// Number of bytes for the device to write before the status.
    pub reply_length: u32,
    /// Division over descriptors.
    pub framing: Framing<'a>,
}

/// The result of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Completion {
    /// The status byte, or [`NO_STATUS`].
    pub status: u8,
    /// The used length.
    pub length: u32,
    /// All bytes before the status that the device could write.
    pub data: Vec<u8>,
}

/// Returns the 16 bytes of a header.
pub fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}

/// Returns the 16 bytes of a segment of DISCARD or WRITE_ZEROES.
pub fn segment(sector: u64, sectors: u32, flags: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&sector.to_le_bytes());
    bytes[8..12].copy_from_slice(&sectors.to_le_bytes());
    bytes[12..].copy_from_slice(&flags.to_le_bytes());
    bytes
}

/// A request written to guest memory: its chain, and where the device answers.
#[derive(Debug, Clone)]
pub struct Prepared {
    /// The chain to add.
    pub chain: Vec<Buffer>,
    /// Guest address of the writable data.
    pub reply: u64,
    /// Length of the writable data.
    pub reply_length: u32,
    /// Guest address of the status byte.
    pub status: u64,
}

impl Prepared {
    /// Returns the result after the device used the chain with `length`.
    pub fn completion(&self, memory: &GuestMemory, length: u32) -> Completion {
        Completion {
            status: memory.read_u8(self.status),
            length,
            data: memory.read_vec(self.reply, self.reply_length as usize),
        }
    }
}

/// Guest memory for one request at a time: readable and writable bytes each contiguous, data page-aligned.
#[derive(Debug, Clone)]
pub struct RequestArea {
    readable: u64,
    writable: u64,
    size: u32,
}

impl RequestArea {
    /// Creates an area for `size` bytes of data in each direction.
    pub fn new(memory: &GuestMemory, size: u32) -> Self {
        let page = 4096;
        let room = u64::from(size).next_multiple_of(page);
        RequestArea {
            readable: memory.allocate(room + page, page) + page - u64::from(HEADER_SIZE),
            writable: memory.allocate(room + page, page),
            size,
        }
    }

    /// Writes a request into the area. The writable data starts as 0xdd, the status as [`NO_STATUS`].
    pub fn prepare(&self, memory: &GuestMemory, request: &Request) -> Prepared {
        let Request {
            kind,
            sector,
            data,
            reply_length,
            framing,
        } = *request;
        assert!(data.len() <= self.size as usize && reply_length <= self.size);
        let status = self.writable + u64::from(reply_length);
        memory.write(self.readable, &header(kind, sector));
        memory.write(self.readable + u64::from(HEADER_SIZE), data);
        memory.fill(self.writable, reply_length as usize, 0xdd);
        memory.write_u8(status, NO_STATUS);
        let readable = Buffer::readable(self.readable, HEADER_SIZE + data.len() as u32);
        let writable = Buffer::writable(self.writable, reply_length + 1);
        let chain = match framing {
            Framing::Separate if reply_length == 0 => {
                [readable.split(&[HEADER_SIZE]), vec![writable]].concat()
            }
            Framing::Separate => [
                readable.split(&[HEADER_SIZE]),
                writable.split(&[reply_length]),
            ]
            .concat(),
            Framing::Pieces {
                readable: head,
                writable: tail,
            } => [readable.split(head), writable.split(tail)].concat(),
        };
        Prepared {
            chain,
            reply: self.writable,
            reply_length,
            status,
        }
    }
}

/// One request at a time on one queue.
#[derive(Debug)]
pub struct BlockDriver {
    /// The queue; it may be used for anything between requests.
    pub queue: Queue,
    memory: GuestMemory,
    area: RequestArea,
    timeout: Duration,
}

impl BlockDriver {
    /// Creates a driver for requests of up to `largest` bytes.
    pub fn new(memory: &GuestMemory, queue: Queue, largest: u32) -> Self {
        BlockDriver {
            queue,
            memory: memory.clone(),
            area: RequestArea::new(memory, largest),
            timeout: Duration::from_secs(10),
        }
    }

    /// Sets the time limit of a request.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// Returns guest memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Returns the memory that requests are written to.
    pub fn area(&self) -> &RequestArea {
        &self.area
    }

    /// Writes a request to guest memory without submitting it, so that it can be changed first.
    pub fn prepare(&self, request: &Request) -> Prepared {
        self.area.prepare(&self.memory, request)
    }

    /// Submits a prepared request and waits for it.
    pub fn run(&mut self, prepared: &Prepared) -> Result<Completion> {
        let head = self.queue.submit(&prepared.chain);
        let deadline = Instant::now() + self.timeout;
        loop {
            if let Some(used) = self.queue.take_used() {
                if used.head != head {
                    return Err(Error::Malformed(format!("{used:?}, not head {head}")));
                }
                return Ok(prepared.completion(&self.memory, used.length));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if !self.queue.wait_used(left) {
                return Err(Error::Timeout(self.timeout));
            }
        }
    }

    /// Writes a request, submits it and waits for it.
    pub fn request(&mut self, request: &Request) -> Result<Completion> {
        let prepared = self.prepare(request);
        self.run(&prepared)
    }

    /// Reads `length` bytes.
    pub fn read(&mut self, sector: u64, length: u32) -> Result<Completion> {
        self.request(&Request {
            kind: IN,
            sector,
            reply_length: length,
            ..Default::default()
        })
    }

    /// Writes `data`.
    pub fn write(&mut self, sector: u64, data: &[u8]) -> Result<Completion> {
        self.request(&Request {
            kind: OUT,
            sector,
            data,
            ..Default::default()
        })
    }

    /// Flushes.
    pub fn flush(&mut self) -> Result<Completion> {
        self.request(&Request {
            kind: FLUSH,
            ..Default::default()
        })
    }

    /// Reads the serial number (GET_ID).
    pub fn get_id(&mut self) -> Result<Completion> {
        self.request(&Request {
            kind: GET_ID,
            reply_length: ID_SIZE as u32,
            ..Default::default()
        })
    }

    /// Discards one range of sectors.
    pub fn discard(&mut self, sector: u64, sectors: u32) -> Result<Completion> {
        self.request(&Request {
            kind: DISCARD,
            data: &segment(sector, sectors, 0),
            ..Default::default()
        })
    }

    /// Zeroes one range of sectors; `flags` may be [`UNMAP`].
    pub fn write_zeroes(&mut self, sector: u64, sectors: u32, flags: u32) -> Result<Completion> {
        self.request(&Request {
            kind: WRITE_ZEROES,
            data: &segment(sector, sectors, flags),
            ..Default::default()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_lies_in_guest_memory_in_the_framing_asked_for() {
        let memory = GuestMemory::new(&[(0, 0x10_0000)]);
        let area = RequestArea::new(&memory, 4096);
        let separate = area.prepare(
            &memory,
            &Request {
                kind: OUT,
                sector: 7,
                data: &[5; 512],
                ..Default::default()
            },
        );
        let lengths = |prepared: &Prepared| -> Vec<(u32, bool)> {
            let of = |buffer: &Buffer| (buffer.length, buffer.writable);
            prepared.chain.iter().map(of).collect()
        };
        assert_eq!(lengths(&separate), [(16, false), (512, false), (1, true)]);
        assert_eq!(separate.chain[1].address % 4096, 0);
        assert_eq!(memory.read_u64(separate.chain[0].address + 8), 7);
        assert_eq!(memory.read_u8(separate.chain[1].address + 511), 5);

        let pieces = area.prepare(
            &memory,
            &Request {
                kind: IN,
                reply_length: 512,
                framing: Framing::Pieces {
                    readable: &[1],
                    writable: &[500],
                },
                ..Default::default()
            },
        );
        assert_eq!(
            lengths(&pieces),
            [(1, false), (15, false), (500, true), (13, true)]
        );
        assert_eq!(memory.read_u8(pieces.status), NO_STATUS);
        assert_eq!(pieces.status, pieces.reply + 512);
    }
}
