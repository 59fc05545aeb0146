// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Discards, and zeroes that are written without data.

use std::collections::VecDeque;
use std::fmt;
use std::io;

use vm_memory::mmap::MmapRegion;

use super::buffer::{buffer, chunk};
use crate::disk::{Disk, DiskError};
use crate::image::{MAX_DISCARD_SECTORS, MAX_WRITE_ZEROES_SECTORS, SECTOR_SIZE};
use crate::layout::Piece;
use crate::operation::{Memory, Operation, Range};

/// Ranges of the disk to discard or to zero, in order.
#[derive(Default)]
pub struct Ranges {
    is_discard: bool,
    /// A flush follows.
    stable: bool,
    list: VecDeque<Segment>,
    /// Bytes of all ranges that there were.
    pub(super) bytes: u64,
    /// Zeroes to write, where the file system cannot make them by itself.
    zeroes: Option<MmapRegion>,
}

/// What is left of a range.
struct Segment {
    how: Range,
    offset: u64,
    length: u64,
    /// Where the first part of it is in the image.
    piece: Piece,
}

impl Ranges {
    /// Creates a list of ranges to discard: a hint, so what the storage cannot discard counts as done.
    pub fn discard() -> Self {
        Self {
            is_discard: true,
            ..Self::default()
        }
    }

    /// Creates a list of ranges to zero; if `stable`, the work is done when the zeroes are on stable storage.
    pub fn zero(stable: bool) -> Self {
        Self {
            stable,
            ..Self::default()
        }
    }

    /// Adds `length` bytes of the disk at `offset`. Zeroes with `unmap` give storage back to the host, if the options allow it. The caller
    /// bounds how many ranges there are.
    ///
    /// # Errors
    /// The disk is read-only, or does not have so many bytes there, or they are more than one range of this kind may have.
    pub fn push(
        &mut self,
        disk: &Disk,
        offset: u64,
        length: u64,
        unmap: bool,
    ) -> Result<(), DiskError> {
        disk.check_writable()?;
        disk.check_range(offset, length)?;
        let most = match self.is_discard {
            true => MAX_DISCARD_SECTORS,
            false => MAX_WRITE_ZEROES_SECTORS,
        };
        if length > u64::from(most) * SECTOR_SIZE {
            return Err(DiskError::Length);
        }
        let how = match self.is_discard {
            true => disk.discard(),
            false if unmap && disk.zeroes_may_unmap() => Some(Range::Punch),
            false => Some(Range::Zero),
        };
        if let Some(how) = how
            && length > 0
        {
            self.bytes = self.bytes.saturating_add(length);
            self.list.push_back(Segment {
                how,
                offset,
                length,
                piece: disk.layout.find(offset, length),
            });
        }
        Ok(())
    }

    /// Returns whether there is nothing to do: the ranges have no bytes, or discards are ignored.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    pub(super) fn remaining(&self) -> u64 {
        let lengths = self.list.iter().map(|segment| segment.length);
        lengths.fold(0, u64::saturating_add)
    }

    pub(super) fn operation(&self) -> Operation<'_> {
        let Some(segment) = self.list.front() else {
            return Operation::Flush;
        };
        let Piece { offset, length } = segment.piece;
        match &self.zeroes {
            None => Operation::Allocate {
                how: segment.how,
                offset,
                length,
            },
            Some(zeroes) => Operation::Write {
                from: Memory::buffer(zeroes, 0..chunk(length)),
                offset,
                stable: false,
            },
        }
    }

    /// Returns whether all is done.
    pub(super) fn advance(&mut self, disk: &Disk, outcome: io::Result<u64>) -> io::Result<bool> {
        let Some(segment) = self.list.front_mut() else {
            // The flush at the end.
            return outcome.map(|_| true);
        };
        let length = segment.piece.length;
        match (outcome, &self.zeroes) {
            (Ok(0), Some(_)) => return Err(io::ErrorKind::WriteZero.into()),
            (Ok(count), Some(_)) => self.move_on(disk, count.min(length)),
            (Ok(_), None) => self.move_on(disk, length),
            (Err(error), None) if is_unsupported(&error) => match segment.how {
                _ if self.is_discard => _ = self.list.pop_front(),
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

    /// Continues after `count` bytes of the first range.
    fn move_on(&mut self, disk: &Disk, count: u64) {
        if let Some(segment) = self.list.front_mut()
            && count < segment.length
        {
            segment.offset += count;
            segment.length -= count;
            segment.piece = disk.layout.find(segment.offset, segment.length);
        } else {
            self.list.pop_front();
            self.zeroes = None;
        }
    }
}

impl fmt::Display for Ranges {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.is_discard {
            true => "discard",
            false => "write-zeroes",
        };
        write!(formatter, "{what} of {} ranges", self.list.len())
    }
}

fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL)
    )
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::testing::{BLOCK, SIZE, content, disk};
    use super::*;
    use crate::layout::Layout;

    fn ones() -> Disk {
        disk(false, |_| 1)
    }

    /// Carries out all that is left to do. Returns the number of operations.
    fn finish(ranges: &mut Ranges, disk: &Disk) -> usize {
        for count in 1..100 {
            let outcome = disk.execute(ranges.operation());
            if ranges.advance(disk, outcome).unwrap() {
                return count;
            }
        }
        panic!("it does not end");
    }

    /// Checks that bytes of the disk, and no others, are zero.
    fn assert_zero(disk: &Disk, zero: std::ops::Range<u64>) {
        for (offset, byte) in (0..SIZE).zip(content(disk)) {
            assert_eq!(byte == 0, zero.contains(&offset), "byte {offset}");
        }
    }

    #[test]
    fn a_range_is_zeroed_wherever_its_pieces_are() {
        let disk = ones();
        let mut ranges = Ranges::zero(false);
        ranges.push(&disk, 512, BLOCK * 2, true).unwrap();
        assert_eq!(finish(&mut ranges, &disk), 3);
        assert_zero(&disk, 512..512 + BLOCK * 2);
    }

    #[test]
    fn zeroes_that_the_file_system_cannot_make_are_written_piece_by_piece() {
        let disk = ones();
        let mut ranges = Ranges::zero(true);
        ranges.push(&disk, BLOCK - 512, BLOCK + 1024, true).unwrap();
        // It can neither punch a hole nor zero a range.
        for _ in 0..2 {
            let unsupported = io::Error::from_raw_os_error(libc::EOPNOTSUPP);
            assert!(!ranges.advance(&disk, Err(unsupported)).unwrap());
        }
        assert!(matches!(ranges.operation(), Operation::Write { .. }));
        // Three pieces and a flush.
        assert_eq!(finish(&mut ranges, &disk), 4);
        assert_zero(&disk, BLOCK - 512..BLOCK * 2 + 512);
    }

    #[test]
    fn a_range_beyond_the_end_is_refused() {
        let disk = ones();
        let mut ranges = Ranges::discard();
        assert!(ranges.push(&disk, SIZE, 0, false).is_ok());
        for (offset, length) in [(SIZE, 512), (u64::MAX, 512), (512, u64::MAX), (0, SIZE + 1)] {
            let refused = ranges.push(&disk, offset, length, false);
            assert_eq!(refused, Err(DiskError::OutOfRange));
        }
        assert!(ranges.is_empty());
    }

    #[test]
    fn a_range_that_is_longer_than_the_limit_of_its_kind_is_refused() {
        let mut disk = disk(false, |_| 1);
        let image = Arc::get_mut(&mut disk.image).unwrap();
        image.file.set_len(2 << 30).unwrap();
        image.measure().unwrap();
        disk.layout = Layout::Flat;
        for (mut ranges, sectors) in [
            (Ranges::discard(), MAX_DISCARD_SECTORS),
            (Ranges::zero(false), MAX_WRITE_ZEROES_SECTORS),
        ] {
            let most = u64::from(sectors) * SECTOR_SIZE;
            assert_eq!(ranges.push(&disk, 0, most, false), Ok(()));
            let refused = ranges.push(&disk, 0, most + 512, false);
            assert_eq!(refused, Err(DiskError::Length));
        }
    }

    #[test]
    fn a_range_of_a_read_only_disk_is_refused() {
        let disk = disk(true, |_| 1);
        for mut ranges in [Ranges::discard(), Ranges::zero(false)] {
            let refused = ranges.push(&disk, 0, 512, false);
            assert_eq!(refused, Err(DiskError::ReadOnly));
            assert!(ranges.is_empty());
        }
    }
}
