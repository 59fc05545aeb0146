// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A request of the driver (VIRTIO 1.3, 5.2.6): checked once, then cut into operations on the image.
//!
//! Layout: type u32, reserved u32, sector u64, then data that is readable or writable, then the
//! status u8 as the last writable byte. The driver may spread these over descriptors as it likes.

use std::collections::VecDeque;
use std::io;

use vhost_device_common::chain::{Chain, ChainError};
use vhost_device_common::statistics::Outcome;
use vhost_device_common::warn_limited;
use vhost_device_storage::image::SECTOR_SIZE;
use vhost_device_storage::image::discard::MAX_DISCARD_SECTORS;
use vhost_device_storage::operation::{IoRequest, MAX_BYTES, Memory, Operation, Range};
use vhost_device_storage::options::Discard;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::VolatileMemory;
use vm_memory::mmap::MmapRegion;

use crate::device::Disk;
use crate::options::SERIAL_LENGTH;

/// Most segments of one discard or write-zeroes request.
pub const MAX_SEGMENTS: u64 = 16;
/// Most bytes that one request moves: a driver has no use for more, and Linux moves a little less at once.
const MAX_TRANSFER: u64 = 2 << 30;
/// Most sectors of one write-zeroes segment: 64 MiB, should they have to be written.
pub const MAX_WRITE_ZEROES_SECTORS: u32 = 1 << 17;

/// Bytes of a segment: sector u64, sectors u32, flags u32.
const SEGMENT_SIZE: u64 = 16;
/// Bytes that are moved at a time by way of a buffer of our own.
const BOUNCE_SIZE: usize = 1 << 20;

/// Bytes from which a transfer is large: to copy so many takes longer than to wake another thread.
const LARGE: u64 = 64 << 10;

/// What the driver is told.
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

/// Types of requests, as they are counted.
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

/// What the driver asks for.
#[derive(Clone, Copy)]
pub struct Header {
    kind: Kind,
    sector: u64,
}

impl Header {
    /// Reads what is in front of the data, and sets the place of the status aside.
    pub fn read(chain: &mut Chain) -> Result<Self, Status> {
        chain.split_tail(1)?;
        chain.check()?;
        let kind = Kind::of(u32::from_le(chain.read_object()?));
        let _reserved: u32 = chain.read_object()?;
        let sector = u64::from_le(chain.read_object()?);
        Ok(Self { kind, sector })
    }

    /// The bytes that are moved between the image and the guest, for a request that the limits of a disk count.
    pub fn bytes(self, chain: &Chain, disk: &Disk) -> Option<u64> {
        let length = match self.kind {
            Kind::Read => chain.writable_len(),
            Kind::Write => chain.readable_len(),
            Kind::Discard | Kind::WriteZeroes => 0,
            Kind::Flush | Kind::GetId | Kind::Other => return None,
        };
        // What is outside the disk is not moved.
        Some(disk.locate(self.sector, length).map_or(0, |_| length))
    }
}

/// A request that needs the image.
pub struct Request {
    /// The queue that it came from.
    pub queue: u16,
    chain: Chain,
    kind: Kind,
    work: Work,
    /// Data bytes moved so far, or zeroed or given back.
    bytes: u64,
}

/// A request that is answered, or needs no image at all.
pub struct Answer {
    pub chain: Chain,
    /// Bytes written, the status among them.
    pub used: u32,
    pub outcome: Outcome,
}

enum Work {
    Transfer(Transfer),
    Flush,
    Ranges(Ranges),
}

struct Transfer {
    to_guest: bool,
    stable: bool,
    offset: u64,
    remaining: u64,
    bounce: Option<Bounce>,
}

/// A buffer between the guest and O_DIRECT, for memory that is not aligned.
struct Bounce {
    buffer: MmapRegion,
    /// The part of the buffer that comes next.
    part: std::ops::Range<usize>,
}

/// Discard or write-zeroes.
struct Ranges {
    discard: bool,
    stable: bool,
    list: VecDeque<Segment>,
    /// Bytes of all segments.
    bytes: u64,
    /// Zeroes to write, where the file system cannot make them by itself.
    zeroes: Option<MmapRegion>,
}

#[derive(Clone, Copy)]
struct Segment {
    how: Range,
    offset: u64,
    length: u64,
}

/// What comes after an operation.
pub enum Next {
    /// Another one.
    Operation(Request),
    /// Nothing: the request is done.
    Done(Answer),
}

impl Next {
    /// Bytes that the next operation moves, or clears.
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Operation(request) => request.remaining().min(MAX_BYTES as u64),
            Self::Done(_) => 0,
        }
    }
}

/// Ends a request, for which so many bytes were moved.
fn answer(mut chain: Chain, status: Status, kind: Kind, bytes: u64) -> Answer {
    let written = match kind {
        Kind::Read | Kind::GetId => u32::try_from(bytes).unwrap_or(u32::MAX),
        _ => 0,
    };
    let used = match chain.write_tail(&[status as u8]) {
        Ok(()) => written.saturating_add(1),
        // Without room for a status there is nothing to tell.
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
    /// Understands what the driver asks of `disk` by a chain whose header is read.
    pub fn of(header: Result<Header, Status>, queue: u16, mut chain: Chain, disk: &Disk) -> Next {
        let kind = header.map_or(Kind::Other, |header| header.kind);
        match header.and_then(|header| parse(header, &mut chain, disk)) {
            Ok(Parsed::Work(work)) => Next::Operation(Self {
                queue,
                chain,
                kind,
                work,
                bytes: 0,
            }),
            Ok(Parsed::Answered(bytes)) => Next::Done(answer(chain, Status::Ok, kind, bytes)),
            Err(status) => Next::Done(answer(chain, status, kind, 0)),
        }
    }

    /// Whether it moves much data to the guest.
    pub fn is_large_read(&self) -> bool {
        matches!(&self.work, Work::Transfer(transfer) if transfer.to_guest && transfer.remaining >= LARGE)
    }

    /// Bytes that it has still to move, or to clear.
    pub fn remaining(&self) -> u64 {
        match &self.work {
            Work::Transfer(transfer) => transfer.remaining,
            Work::Flush => 0,
            Work::Ranges(ranges) => ranges.list.iter().map(|segment| segment.length).sum(),
        }
    }

    /// Goes on after an operation has ended with `outcome`.
    pub fn advance(mut self, outcome: io::Result<u64>) -> Next {
        let done = match &mut self.work {
            Work::Flush => outcome.map(|_| true),
            Work::Transfer(transfer) => outcome.and_then(|count| {
                transfer.advance(&mut self.chain, count)?;
                self.bytes += count;
                Ok(transfer.remaining == 0)
            }),
            Work::Ranges(ranges) => {
                let done = ranges.advance(outcome);
                self.bytes = if matches!(done, Ok(true)) {
                    ranges.bytes
                } else {
                    0
                };
                done
            }
        };
        match done {
            Ok(true) => Next::Done(answer(self.chain, Status::Ok, self.kind, self.bytes)),
            Ok(false) => Next::Operation(self),
            Err(error) => {
                warn_limited(format_args!("{} failed: {error}", self.describe()));
                Next::Done(answer(self.chain, Status::IoError, self.kind, self.bytes))
            }
        }
    }

    /// What failed, for the log.
    fn describe(&self) -> String {
        match &self.work {
            Work::Flush => "flush".to_owned(),
            Work::Transfer(transfer) => {
                let what = if transfer.to_guest { "read" } else { "write" };
                let (length, offset) = (transfer.remaining, transfer.offset);
                format!("{what} of {length} bytes at offset {offset}")
            }
            Work::Ranges(ranges) => {
                let what = if ranges.discard {
                    "discard"
                } else {
                    "write-zeroes"
                };
                format!("{what} of {} ranges", ranges.list.len())
            }
        }
    }
}

impl IoRequest for Request {
    fn operation(&self) -> Operation<'_> {
        match &self.work {
            Work::Flush => Operation::Flush,
            Work::Transfer(transfer) => {
                let offset = transfer.offset;
                let bounce = transfer
                    .bounce
                    .as_ref()
                    .map(|bounce| Memory::bounce(&bounce.buffer, bounce.part.clone()));
                if transfer.to_guest {
                    let to = bounce.unwrap_or_else(|| Memory::writable(&self.chain));
                    Operation::Read { to, offset }
                } else {
                    Operation::Write {
                        from: bounce.unwrap_or_else(|| Memory::readable(&self.chain)),
                        offset,
                        stable: transfer.stable,
                    }
                }
            }
            Work::Ranges(ranges) => match (ranges.list.front(), &ranges.zeroes) {
                (None, _) => Operation::Flush,
                (Some(segment), None) => Operation::Allocate {
                    how: segment.how,
                    offset: segment.offset,
                    length: segment.length,
                },
                (Some(segment), Some(zeroes)) => Operation::Write {
                    from: Memory::bounce(zeroes, 0..chunk(segment.length)),
                    offset: segment.offset,
                    stable: false,
                },
            },
        }
    }
}

enum Parsed {
    Work(Work),
    /// Answered already, with so many bytes of data.
    Answered(u64),
}

fn parse(header: Header, chain: &mut Chain, disk: &Disk) -> Result<Parsed, Status> {
    let Header { kind, sector } = header;
    let refuse_read_only = || {
        if disk.read_only {
            Err(Status::IoError)
        } else {
            Ok(())
        }
    };
    match kind {
        Kind::Read => {
            let length = chain.writable_len();
            let offset = disk.locate(sector, length)?;
            let aligned = disk.is_aligned(chain.writable_iovecs()?);
            Transfer::start(chain, true, offset, length, aligned, disk)
        }
        Kind::Write => {
            refuse_read_only()?;
            let length = chain.readable_len();
            let offset = disk.locate(sector, length)?;
            let aligned = disk.is_aligned(chain.readable_iovecs()?);
            Transfer::start(chain, false, offset, length, aligned, disk)
        }
        Kind::Flush => Ok(Parsed::Work(Work::Flush)),
        Kind::GetId => {
            let mut id = [0; SERIAL_LENGTH];
            for (place, byte) in id.iter_mut().zip(disk.serial.bytes()) {
                *place = byte;
            }
            chain.write(&id)?;
            Ok(Parsed::Answered(SERIAL_LENGTH as u64))
        }
        Kind::Discard | Kind::WriteZeroes => {
            refuse_read_only()?;
            Ranges::parse(chain, kind == Kind::Discard, disk)
        }
        Kind::Other => Err(Status::Unsupported),
    }
}

/// How much of `remaining` goes through a buffer at once.
fn chunk(remaining: u64) -> usize {
    usize::try_from(remaining).map_or(BOUNCE_SIZE, |remaining| remaining.min(BOUNCE_SIZE))
}

fn buffer(remaining: u64) -> Result<MmapRegion, Status> {
    MmapRegion::new(chunk(remaining)).map_err(|error| {
        log::debug!("no memory for a bounce buffer: {error}");
        Status::IoError
    })
}

impl Transfer {
    fn start(
        chain: &mut Chain,
        to_guest: bool,
        offset: u64,
        remaining: u64,
        aligned: bool,
        disk: &Disk,
    ) -> Result<Parsed, Status> {
        if remaining == 0 || remaining > MAX_TRANSFER {
            // No data, or none that lies in the direction of the transfer; or more than is carried out.
            return Err(Status::IoError);
        }
        let mut transfer = Self {
            to_guest,
            stable: !to_guest && disk.is_write_through(),
            offset,
            remaining,
            bounce: None,
        };
        if !aligned {
            transfer.bounce = Some(Bounce {
                buffer: buffer(remaining)?,
                part: 0..0,
            });
            transfer.fill_bounce(chain)?;
        }
        Ok(Parsed::Work(Work::Transfer(transfer)))
    }

    /// Makes the bounce buffer ready for the next operation, if all of the last one went through.
    fn fill_bounce(&mut self, chain: &mut Chain) -> Result<(), ChainError> {
        let Some(bounce) = &mut self.bounce else {
            return Ok(());
        };
        if self.remaining == 0 || !bounce.part.is_empty() {
            return Ok(());
        }
        bounce.part = 0..chunk(self.remaining);
        if self.to_guest {
            return Ok(());
        }
        copy(&bounce.buffer, bounce.part.clone(), |piece, memory| {
            chain.read(piece)?;
            memory.copy_from(piece);
            Ok(())
        })
    }

    /// `count` bytes went between the image and memory.
    fn advance(&mut self, chain: &mut Chain, count: u64) -> io::Result<()> {
        if count == 0 || count > self.remaining {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        match &mut self.bounce {
            None if self.to_guest => chain.skip_writable(count),
            None => chain.skip_readable(count),
            Some(bounce) if self.to_guest => {
                let part = 0..count as usize;
                bounce.part = 0..0;
                copy(&bounce.buffer, part, |piece, memory| {
                    memory.copy_to(piece);
                    chain.write(piece)
                })
            }
            Some(bounce) => {
                bounce.part.start += count as usize;
                Ok(())
            }
        }
        .map_err(io::Error::other)?;
        self.offset += count;
        self.remaining -= count;
        self.fill_bounce(chain).map_err(io::Error::other)
    }
}

/// Hands a part of the buffer to `each` piece by piece, with room to copy it.
fn copy(
    buffer: &MmapRegion,
    part: std::ops::Range<usize>,
    mut each: impl FnMut(&mut [u8], &vm_memory::VolatileSlice<'_>) -> Result<(), ChainError>,
) -> Result<(), ChainError> {
    let mut room = [0; 4096];
    let mut start = part.start;
    while start < part.end {
        let length = room.len().min(part.end - start);
        let memory = buffer
            .get_slice(start, length)
            .map_err(|_| ChainError::NotMemory)?;
        each(room.get_mut(..length).unwrap_or_default(), &memory)?;
        start += length;
    }
    Ok(())
}

impl Ranges {
    fn parse(chain: &mut Chain, discard: bool, disk: &Disk) -> Result<Parsed, Status> {
        let length = chain.readable_len();
        if length == 0
            || !length.is_multiple_of(SEGMENT_SIZE)
            || length / SEGMENT_SIZE > MAX_SEGMENTS
        {
            return Err(Status::IoError);
        }
        let most = if discard {
            MAX_DISCARD_SECTORS
        } else {
            MAX_WRITE_ZEROES_SECTORS
        };
        let mut list = VecDeque::new();
        let mut bytes = 0;
        while chain.readable_len() > 0 {
            let sector = u64::from_le(chain.read_object()?);
            let sectors = u32::from_le(chain.read_object()?);
            let flags = u32::from_le(chain.read_object()?);
            let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
            if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 || (discard && unmap) {
                return Err(Status::Unsupported);
            }
            if sectors > most {
                return Err(Status::IoError);
            }
            let length = u64::from(sectors) * SECTOR_SIZE;
            let offset = disk.locate(sector, length)?;
            let how = if discard && disk.image.is_device {
                Range::Discard
            } else if discard || (unmap && disk.discard == Discard::Unmap) {
                Range::Punch
            } else {
                Range::Zero
            };
            if length > 0 {
                bytes += length;
                list.push_back(Segment {
                    how,
                    offset,
                    length,
                });
            }
        }
        if list.is_empty() || (discard && disk.discard == Discard::Ignore) {
            return Ok(Parsed::Answered(0));
        }
        Ok(Parsed::Work(Work::Ranges(Self {
            discard,
            stable: !discard && disk.is_write_through(),
            list,
            bytes,
            zeroes: None,
        })))
    }

    /// Returns whether all is done.
    fn advance(&mut self, outcome: io::Result<u64>) -> io::Result<bool> {
        let Some(segment) = self.list.front_mut() else {
            // The flush at the end.
            return outcome.map(|_| true);
        };
        match (outcome, &self.zeroes) {
            (Ok(0), Some(_)) => return Err(io::ErrorKind::WriteZero.into()),
            (Ok(count), Some(_)) if count < segment.length => {
                segment.offset += count;
                segment.length -= count;
                return Ok(false);
            }
            (Ok(_), _) => {
                self.list.pop_front();
                self.zeroes = None;
            }
            (Err(error), None) if is_unsupported(&error) => match segment.how {
                // A discard is a hint; where storage cannot be given back, all is well.
                _ if self.discard => {
                    self.list.pop_front();
                }
                Range::Punch => segment.how = Range::Zero,
                Range::Zero | Range::Discard => {
                    let zeroes = buffer(segment.length);
                    self.zeroes = Some(zeroes.map_err(|_| io::ErrorKind::OutOfMemory)?);
                }
            },
            (Err(error), _) => return Err(error),
        }
        Ok(self.list.is_empty() && !self.stable)
    }
}

fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL)
    )
}
