// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Data on its way between the guest and the disk.

use std::fmt;
use std::io;
use std::ops::Range;

use vhost_device_common::chain::{Chain, ChainError};
use vm_memory::mmap::MmapRegion;
use vm_memory::{VolatileMemory, VolatileSlice};

use super::buffer::{buffer, chunk};
use crate::disk::{Disk, DiskError};
use crate::image::SECTOR_SIZE;
use crate::layout::Piece;
use crate::operation::{Memory, Operation};

/// The most bytes that one request reads or writes: drivers do not need more, and Linux moves a little less at once.
pub const MAX_TRANSFER: u64 = 2 << 30;

/// The direction of a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    ToGuest,
    /// If `stable`, up to stable storage.
    ToDisk {
        stable: bool,
    },
}

/// A read or a write.
pub struct Transfer {
    direction: Direction,
    /// Where the rest begins on the disk, and how many bytes that is.
    offset: u64,
    pub remaining: u64,
    /// Where the first part of the rest is in the image.
    piece: Piece,
    bounce: Option<Bounce>,
}

/// A buffer between the guest and the image: for memory that is not aligned for O_DIRECT, and for requests that may be suspended.
struct Bounce {
    buffer: MmapRegion,
    /// The part of the buffer that comes next.
    part: Range<usize>,
}

impl Transfer {
    /// Starts to move the next `length` bytes of `chain` in this direction.
    pub fn start(
        chain: &mut Chain,
        direction: Direction,
        offset: u64,
        length: u64,
        disk: &Disk,
    ) -> Result<Self, DiskError> {
        let (available, iovecs) = match direction {
            Direction::ToGuest => (chain.writable_len(), chain.writable_iovecs()?),
            Direction::ToDisk { .. } => (chain.readable_len(), chain.readable_iovecs()?),
        };
        disk.check_range(offset, length)?;
        if length == 0 || length > available.min(MAX_TRANSFER) {
            return Err(DiskError::Length);
        }
        let is_direct = disk.is_direct(iovecs);
        let mut transfer = Self {
            direction,
            offset,
            remaining: length,
            piece: disk.layout.find(offset, length),
            bounce: None,
        };
        if !is_direct {
            transfer.bounce = Some(Bounce {
                buffer: buffer(length)?,
                part: 0..0,
            });
            transfer.fill_bounce(chain)?;
        }
        Ok(transfer)
    }

    pub fn is_read(&self) -> bool {
        self.direction == Direction::ToGuest
    }

    /// Returns whether operations use guest memory.
    pub fn is_direct(&self) -> bool {
        self.bounce.is_none()
    }

    pub fn operation<'a>(&'a self, chain: &'a Chain) -> Operation<'a> {
        let Piece { offset, length } = self.piece;
        let bounce = self.bounce.as_ref().map(|Bounce { buffer, part }| {
            let most = usize::try_from(length).unwrap_or(usize::MAX);
            let end = part.end.min(part.start.saturating_add(most));
            Memory::buffer(buffer, part.start..end)
        });
        match self.direction {
            Direction::ToGuest => Operation::Read {
                to: bounce.unwrap_or_else(|| Memory::writable(chain, length)),
                offset,
            },
            Direction::ToDisk { stable } => Operation::Write {
                from: bounce.unwrap_or_else(|| Memory::readable(chain, length)),
                offset,
                stable,
            },
        }
    }

    /// Continues after `count` bytes went between the image and memory. Returns how many of them are done.
    pub fn advance(&mut self, chain: &mut Chain, disk: &Disk, count: u64) -> io::Result<u64> {
        let count = self.whole(count);
        if count == 0 || count > self.piece.length {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let is_read = self.is_read();
        match &mut self.bounce {
            None if is_read => chain.skip_writable(count),
            None => chain.skip_readable(count),
            Some(bounce) if is_read => {
                let part = 0..count as usize;
                bounce.part = 0..0;
                copy(&bounce.buffer, part, |bytes, memory| {
                    memory.copy_to(bytes);
                    chain.write(bytes)
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
        if self.remaining > 0 {
            self.piece = disk.layout.find(self.offset, self.remaining);
            self.fill_bounce(chain).map_err(io::Error::other)?;
        }
        Ok(count)
    }

    /// Returns how many of `count` bytes are done. After a short read into the buffer these are whole sectors, because decryption, for
    /// example, needs whole sectors. The rest is read again.
    fn whole(&self, count: u64) -> u64 {
        match &self.bounce {
            Some(bounce) if self.is_read() => {
                let length = self.piece.length.min(bounce.part.len() as u64);
                let is_short = count < length;
                count - if is_short { count % SECTOR_SIZE } else { 0 }
            }
            _ => count,
        }
    }

    /// Prepares the buffer, if there is one, for the next operation, unless the last one left something in it.
    fn fill_bounce(&mut self, chain: &mut Chain) -> Result<(), ChainError> {
        let Some(bounce) = &mut self.bounce else {
            return Ok(());
        };
        if !bounce.part.is_empty() {
            return Ok(());
        }
        bounce.part = 0..chunk(self.remaining);
        if self.direction == Direction::ToGuest {
            return Ok(());
        }
        copy(&bounce.buffer, bounce.part.clone(), |bytes, memory| {
            chain.read(bytes)?;
            memory.copy_from(bytes);
            Ok(())
        })
    }
}

impl fmt::Display for Transfer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = if self.is_read() { "read" } else { "write" };
        let (length, offset) = (self.remaining, self.offset);
        write!(formatter, "{what} of {length} bytes at offset {offset}")
    }
}

/// Hands a part of the buffer to `each` piece by piece, with room to copy it.
fn copy(
    buffer: &MmapRegion,
    part: Range<usize>,
    mut each: impl FnMut(&mut [u8], &VolatileSlice<'_>) -> Result<(), ChainError>,
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::Work;
    use super::super::testing::{BLOCK, Guest, SIZE, content, disk};
    use super::*;
    use crate::image::DirectAlignment;

    /// The segments of the guest's memory. Their borders are not those of the blocks.
    const SEGMENTS: [u64; 4] = [BLOCK / 2, BLOCK, 512, BLOCK];
    const LENGTH: u64 = BLOCK * 5 / 2 + 512;

    fn byte(offset: u64) -> u8 {
        (offset / 512 * 3 + offset % 7) as u8
    }

    /// Opens a disk that transfers directly or through a buffer.
    fn disk_for(is_bounced: bool) -> Disk {
        let mut disk = disk(false, byte);
        if is_bounced {
            // No memory of the guest has this alignment.
            let image = Arc::get_mut(&mut disk.image).unwrap();
            image.direct = Some(DirectAlignment {
                memory: 1 << 30,
                offset: 1 << 30,
            });
        }
        disk
    }

    /// Carries out the rest of `work`. Each operation reports at most `most` bytes. Returns how many were moved.
    fn finish(work: &mut Work, chain: &mut Chain, disk: &Disk, most: u64) -> u64 {
        for _ in 0..1000 {
            let outcome = disk.execute(work.operation(chain));
            let outcome = outcome.map(|count| count.min(most));
            if work.advance(chain, disk, outcome).unwrap() {
                assert_eq!(work.remaining(), 0);
                return work.bytes();
            }
        }
        panic!("it does not end");
    }

    /// Calls `each` for transfers that are direct or not, and complete or short.
    fn for_each_way(each: impl Fn(bool, u64)) {
        for is_bounced in [false, true] {
            for most in [u64::MAX, 4096, 512] {
                each(is_bounced, most);
            }
        }
    }

    #[test]
    fn a_read_up_to_the_end_collects_the_pieces_of_the_layout() {
        for_each_way(|is_bounced, most| {
            let (disk, guest) = (disk_for(is_bounced), Guest::new());
            let mut chain = guest.chain(&SEGMENTS, true);
            let mut work = Work::read(&mut chain, SIZE - LENGTH, LENGTH, &disk).unwrap();
            assert_eq!(finish(&mut work, &mut chain, &disk, most), LENGTH);
            let expected: Vec<u8> = (SIZE - LENGTH..SIZE).map(byte).collect();
            assert!(guest.data(LENGTH) == expected, "{is_bounced} {most}");
        });
    }

    #[test]
    fn a_write_up_to_the_end_distributes_the_data_over_the_pieces_of_the_layout() {
        for_each_way(|is_bounced, most| {
            let (disk, guest) = (disk_for(is_bounced), Guest::new());
            let data: Vec<u8> = (0..LENGTH).map(|offset| !byte(offset)).collect();
            guest.write_data(&data);
            let mut chain = guest.chain(&SEGMENTS, false);
            let mut work = Work::write(&mut chain, SIZE - LENGTH, LENGTH, false, &disk).unwrap();
            assert_eq!(finish(&mut work, &mut chain, &disk, most), LENGTH);
            let mut expected: Vec<u8> = (0..SIZE - LENGTH).map(byte).collect();
            expected.extend(data);
            assert!(content(&disk) == expected, "{is_bounced} {most}");
        });
    }

    #[test]
    fn a_transfer_moves_only_the_bytes_that_were_asked_for() {
        const SHORT: u64 = BLOCK + 512;
        for_each_way(|is_bounced, most| {
            let (disk, guest) = (disk_for(is_bounced), Guest::new());
            let mut chain = guest.chain(&SEGMENTS, true);
            let mut work = Work::read(&mut chain, SIZE - SHORT, SHORT, &disk).unwrap();
            assert_eq!(finish(&mut work, &mut chain, &disk, most), SHORT);
            assert_eq!(chain.writable_len(), LENGTH - SHORT);
            let mut expected: Vec<u8> = (SIZE - SHORT..SIZE).map(byte).collect();
            expected.resize(LENGTH as usize, 0);
            assert!(guest.data(LENGTH) == expected, "{is_bounced} {most}");

            let mut chain = guest.chain(&SEGMENTS, false);
            let mut work = Work::write(&mut chain, 0, SHORT, false, &disk).unwrap();
            assert_eq!(finish(&mut work, &mut chain, &disk, most), SHORT);
            expected.truncate(SHORT as usize);
            expected.extend((SHORT..SIZE).map(byte));
            assert!(content(&disk) == expected, "{is_bounced} {most}");
        });
    }

    #[test]
    fn a_transfer_of_nothing_or_of_more_than_the_request_has_is_refused() {
        let (disk, guest) = (disk_for(false), Guest::new());
        for length in [0, LENGTH + 512] {
            let mut chain = guest.chain(&SEGMENTS, true);
            let refused = Work::read(&mut chain, 0, length, &disk);
            assert_eq!(refused.err(), Some(DiskError::Length));
            let mut chain = guest.chain(&SEGMENTS, false);
            let refused = Work::write(&mut chain, 0, length, false, &disk);
            assert_eq!(refused.err(), Some(DiskError::Length));
        }
    }

    #[test]
    fn a_read_through_a_buffer_continues_at_a_whole_sector_after_a_short_one() {
        let (disk, guest) = (disk_for(true), Guest::new());
        let mut chain = guest.chain(&SEGMENTS, true);
        let mut work = Work::read(&mut chain, SIZE - LENGTH, LENGTH, &disk).unwrap();
        for (count, moved) in [(512, 512), (1023, 1024), (1025, 2048)] {
            let outcome = disk.execute(work.operation(&chain));
            assert!(outcome.unwrap() > count);
            assert!(!work.advance(&mut chain, &disk, Ok(count)).unwrap());
            assert_eq!(work.bytes(), moved);
        }
        assert_eq!(finish(&mut work, &mut chain, &disk, 700), LENGTH);
        let expected: Vec<u8> = (SIZE - LENGTH..SIZE).map(byte).collect();
        assert!(guest.data(LENGTH) == expected);
    }

    #[test]
    fn a_read_through_a_buffer_of_less_than_a_sector_fails() {
        let (disk, guest) = (disk_for(true), Guest::new());
        let mut chain = guest.chain(&SEGMENTS, true);
        let mut work = Work::read(&mut chain, SIZE - LENGTH, LENGTH, &disk).unwrap();
        let failed = work.advance(&mut chain, &disk, Ok(511));
        assert_eq!(failed.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!((work.bytes(), work.remaining()), (0, LENGTH));
    }

    #[test]
    fn a_write_to_a_read_only_disk_is_refused() {
        let (disk, guest) = (disk(true, byte), Guest::new());
        let mut chain = guest.chain(&SEGMENTS, false);
        let refused = Work::write(&mut chain, 0, LENGTH, false, &disk);
        assert_eq!(refused.err(), Some(DiskError::ReadOnly));
    }
}
