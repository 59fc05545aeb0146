// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A request of the driver (VIRTIO 1.3, 5.2.6): checked once, then turned into [`Work`] on the disk.
//!
//! Layout: type u32, reserved u32, sector u64, then data that is readable or writable, then the
//! status u8 as the last writable byte. The driver may spread these over descriptors as it likes.

use std::fmt;
use std::io;

use vhost_device_common::chain::{Chain, ChainError};
use vhost_device_common::statistics::Outcome;
use vhost_device_common::warn_limited;
use vhost_device_storage::disk::DiskError;
use vhost_device_storage::engine::{IoRequest, Label};
use vhost_device_storage::image::SECTOR_SIZE;
use vhost_device_storage::operation::{MAX_BYTES, Operation};
use vhost_device_storage::work::{Ranges, Work};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use crate::options::SERIAL_LENGTH;
use crate::shared::Shared;

/// The most segments of one discard or write-zeroes request.
pub const MAX_SEGMENTS: u64 = 16;

/// Bytes of a segment: sector u64, sectors u32, flags u32.
const SEGMENT_SIZE: u64 = 16;

/// The status of a request, as the driver reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    Ok = VIRTIO_BLK_S_OK as u8,
    IoError = VIRTIO_BLK_S_IOERR as u8,
    Unsupported = VIRTIO_BLK_S_UNSUPP as u8,
}

impl From<ChainError> for Status {
    fn from(_: ChainError) -> Self {
        Self::IoError
    }
}

impl From<DiskError> for Status {
    fn from(_: DiskError) -> Self {
        Self::IoError
    }
}

/// Types of requests, as the statistics count them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
    GetId,
    Other,
}

/// Their names, in the same order.
pub const KINDS: &[&str] = &[
    "read",
    "write",
    "flush",
    "discard",
    "write_zeroes",
    "get_id",
    "other",
];

impl Kind {
    fn of(number: u32) -> Self {
        match number {
            VIRTIO_BLK_T_IN => Self::Read,
            VIRTIO_BLK_T_OUT => Self::Write,
            VIRTIO_BLK_T_FLUSH => Self::Flush,
            VIRTIO_BLK_T_DISCARD => Self::Discard,
            VIRTIO_BLK_T_WRITE_ZEROES => Self::WriteZeroes,
            VIRTIO_BLK_T_GET_ID => Self::GetId,
            _ => Self::Other,
        }
    }
}

/// The header of a request.
#[derive(Clone, Copy)]
pub struct Header {
    kind: Kind,
    sector: u64,
}

impl Header {
    /// Reads the header, and sets the place of the status aside.
    pub fn read(chain: &mut Chain) -> Result<Self, Status> {
        chain.split_tail(1)?;
        chain.check()?;
        let kind = Kind::of(u32::from_le(chain.read_object()?));
        let _reserved: u32 = chain.read_object()?;
        let sector = u64::from_le(chain.read_object()?);
        Ok(Self { kind, sector })
    }

    /// Returns the bytes that the request moves between the disk and the guest; `None` if no limit counts requests of this type.
    pub fn bytes(self, chain: &Chain, shared: &Shared) -> Option<u64> {
        let length = match self.kind {
            Kind::Read => chain.writable_len(),
            Kind::Write => chain.readable_len(),
            Kind::Discard | Kind::WriteZeroes => 0,
            Kind::Flush | Kind::GetId | Kind::Other => return None,
        };
        // What is outside the disk is not moved.
        let is_inside = byte_offset(self.sector, length)
            .is_ok_and(|offset| shared.disk.check_range(offset, length).is_ok());
        Some(if is_inside { length } else { 0 })
    }
}

/// Returns the offset of `sector` in bytes, for `length` bytes that are whole sectors.
fn byte_offset(sector: u64, length: u64) -> Result<u64, Status> {
    let offset = sector.checked_mul(SECTOR_SIZE);
    let offset = offset.filter(|_| length.is_multiple_of(SECTOR_SIZE));
    offset.ok_or(Status::IoError)
}

/// A request that needs the disk.
pub struct Request {
    /// The queue that it came from.
    pub queue: u16,
    chain: Chain,
    kind: Kind,
    work: Work,
    is_abandoned: bool,
}

/// A request that is done.
pub struct Answer {
    pub chain: Chain,
    /// Bytes that were written, including the status.
    pub used: u32,
    pub outcome: Outcome,
}

/// What comes next for a request.
pub enum Next {
    /// An operation on the disk.
    Operation(Request),
    /// The answer.
    Done(Answer),
}

impl Next {
    /// Returns how many bytes the next operation moves, zeroes or discards.
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Operation(request) => request.remaining().min(MAX_BYTES as u64),
            Self::Done(_) => 0,
        }
    }
}

/// Answers a request that has moved so many bytes.
fn answer(mut chain: Chain, status: Status, kind: Kind, bytes: u64) -> Answer {
    let written = match kind {
        Kind::Read | Kind::GetId => u32::try_from(bytes).unwrap_or(u32::MAX),
        _ => 0,
    };
    let used = match chain.write_tail(&[status as u8]) {
        Ok(()) => written.saturating_add(1),
        // There is no place for a status.
        Err(_) => written,
    };
    let outcome = Outcome {
        request: kind as usize,
        bytes,
        failed: status != Status::Ok,
    };
    Answer {
        chain,
        used,
        outcome,
    }
}

impl Request {
    /// Parses the rest of a chain whose header was read.
    pub fn parse(
        header: Result<Header, Status>,
        queue: u16,
        mut chain: Chain,
        shared: &Shared,
    ) -> Next {
        let kind = header.map_or(Kind::Other, |header| header.kind);
        match header.and_then(|header| parse(header, &mut chain, shared)) {
            Ok(Parsed::Work(work)) => Next::Operation(Self {
                queue,
                chain,
                kind,
                work,
                is_abandoned: false,
            }),
            Ok(Parsed::Done(bytes)) => Next::Done(answer(chain, Status::Ok, kind, bytes)),
            Err(status) => Next::Done(answer(chain, status, kind, 0)),
        }
    }

    /// Creates a flush without a chain to answer.
    pub fn flush() -> Self {
        Self {
            queue: 0,
            chain: Chain::default(),
            kind: Kind::Flush,
            work: Work::flush(),
            is_abandoned: true,
        }
    }

    /// Returns whether the request was suspended while an operation was in flight.
    pub fn is_abandoned(&self) -> bool {
        self.is_abandoned
    }

    /// Returns whether the request moves much data to the guest.
    pub fn is_large_read(&self) -> bool {
        self.work.is_large_read()
    }

    /// Returns how many bytes are left to move, to zero or to discard.
    pub fn remaining(&self) -> u64 {
        self.work.remaining()
    }

    /// Continues after an operation has ended with `outcome`.
    pub fn advance(mut self, outcome: io::Result<u64>, shared: &Shared) -> Next {
        let is_done = self.work.advance(&mut self.chain, &shared.disk, outcome);
        let status = match is_done {
            Ok(false) => return Next::Operation(self),
            Ok(true) => Status::Ok,
            Err(error) => {
                warn_limited(format_args!("{} failed: {error}", self.work));
                Status::IoError
            }
        };
        Next::Done(answer(self.chain, status, self.kind, self.work.bytes()))
    }
}

/// What is left to do, for the log.
impl fmt::Display for Request {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.work.fmt(formatter)
    }
}

// SAFETY: operations refer to guest memory, which the chain keeps mapped, or to buffers of the work, which stays in the request. The
// chain is taken out only if the operation does not refer to guest memory.
#[allow(unsafe_code)]
unsafe impl IoRequest for Request {
    fn operation(&self) -> Operation<'_> {
        self.work.operation(&self.chain)
    }

    fn label(&self) -> Label {
        Label {
            queue: self.queue,
            is_change: self.work.is_change(),
            is_abandoned: self.is_abandoned,
        }
    }

    fn abandon(&mut self) -> Option<Chain> {
        if self.is_abandoned || self.work.is_direct() {
            return None;
        }
        self.is_abandoned = true;
        Some(std::mem::take(&mut self.chain))
    }

    fn restore(&mut self, chain: Chain) {
        self.chain = chain;
        self.is_abandoned = false;
    }

    fn into_chain(self) -> Option<Chain> {
        (!self.is_abandoned).then_some(self.chain)
    }
}

enum Parsed {
    Work(Work),
    /// There is nothing to do on the disk; so many bytes were given to the guest.
    Done(u64),
}

fn parse(header: Header, chain: &mut Chain, shared: &Shared) -> Result<Parsed, Status> {
    let Header { kind, sector } = header;
    let disk = &shared.disk;
    let work = match kind {
        Kind::Read => {
            let length = chain.writable_len();
            let offset = byte_offset(sector, length)?;
            Work::read(chain, offset, length, disk)?
        }
        Kind::Write => {
            let length = chain.readable_len();
            let offset = byte_offset(sector, length)?;
            let stable = shared.caching.is_write_through();
            Work::write(chain, offset, length, stable, disk)?
        }
        Kind::Flush => Work::flush(),
        Kind::GetId => {
            let mut id = [0; SERIAL_LENGTH];
            for (place, byte) in id.iter_mut().zip(shared.serial.bytes()) {
                *place = byte;
            }
            chain.write(&id)?;
            return Ok(Parsed::Done(SERIAL_LENGTH as u64));
        }
        Kind::Discard | Kind::WriteZeroes => {
            // Before flags that the driver must not set: on a read-only disk all of them fail alike.
            disk.check_writable()?;
            let ranges = parse_ranges(chain, kind, shared)?;
            if ranges.is_empty() {
                return Ok(Parsed::Done(0));
            }
            Work::ranges(ranges)
        }
        Kind::Other => return Err(Status::Unsupported),
    };
    Ok(Parsed::Work(work))
}

/// Parses the segments of a discard or write-zeroes request (VIRTIO 1.3, 5.2.6.2).
fn parse_ranges(chain: &mut Chain, kind: Kind, shared: &Shared) -> Result<Ranges, Status> {
    let length = chain.readable_len();
    if length == 0 || !length.is_multiple_of(SEGMENT_SIZE) || length / SEGMENT_SIZE > MAX_SEGMENTS {
        return Err(Status::IoError);
    }
    let (mut ranges, allowed) = match kind {
        Kind::Discard => (Ranges::discard(), 0),
        _ => (
            Ranges::zero(shared.caching.is_write_through()),
            VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
        ),
    };
    while chain.readable_len() > 0 {
        let sector = u64::from_le(chain.read_object()?);
        let sectors = u32::from_le(chain.read_object()?);
        let flags = u32::from_le(chain.read_object()?);
        if flags & !allowed != 0 {
            return Err(Status::Unsupported);
        }
        let length = u64::from(sectors) * SECTOR_SIZE;
        let offset = byte_offset(sector, length)?;
        ranges.push(&shared.disk, offset, length, flags != 0)?;
    }
    Ok(ranges)
}
