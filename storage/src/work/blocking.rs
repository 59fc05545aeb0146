// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Reads and writes of memory of this process, for threads that may block.

use std::io;

use vm_memory::VolatileMemory;

use super::buffer::{buffer, chunk};
use crate::disk::Disk;
use crate::operation::{Memory, Operation};

/// Fills `bytes` from `offset` of the disk.
///
/// # Errors
/// The disk does not have so many bytes there, there is no memory for a buffer, or the image cannot be read.
pub fn read(disk: &Disk, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
    pieces(disk, offset, bytes.len(), |range, part, memory| {
        let to = Memory::buffer(memory, 0..part.end - part.start);
        let count = disk.execute(Operation::Read { to, offset: range })?;
        let count = count as usize;
        let bytes = bytes.get_mut(part.start..part.start + count);
        let source = memory.get_slice(0, count).map_err(io::Error::other)?;
        source.copy_to(bytes.unwrap_or_default());
        Ok(count)
    })
}

/// Writes all `bytes` at `offset` of the disk.
///
/// # Errors
/// The disk is read-only, does not have so many bytes there, there is no memory for a buffer, or the image cannot be written.
pub fn write(disk: &Disk, offset: u64, bytes: &[u8]) -> io::Result<()> {
    disk.check_writable().map_err(io::Error::other)?;
    pieces(disk, offset, bytes.len(), |range, part, memory| {
        let length = part.end - part.start;
        let target = memory.get_slice(0, length).map_err(io::Error::other)?;
        target.copy_from(bytes.get(part).unwrap_or_default());
        let operation = Operation::Write {
            from: Memory::buffer(memory, 0..length),
            offset: range,
            stable: false,
        };
        disk.execute(operation).map(|count| count as usize)
    })
}

/// Calls `each` with the pieces of `length` bytes at `offset`: where each is in the image, which of the bytes it has, and a buffer for it.
/// `each` returns how many bytes it has moved.
fn pieces(
    disk: &Disk,
    offset: u64,
    length: usize,
    mut each: impl FnMut(u64, std::ops::Range<usize>, &vm_memory::mmap::MmapRegion) -> io::Result<usize>,
) -> io::Result<()> {
    let total = length as u64;
    disk.check_range(offset, total).map_err(io::Error::other)?;
    if length == 0 {
        return Ok(());
    }
    let memory = buffer(total).map_err(io::Error::other)?;
    let mut done = 0;
    while done < length {
        let left = (length - done) as u64;
        let piece = disk.layout.find(offset + done as u64, left);
        let end = done + chunk(piece.length);
        match each(piece.offset, done..end, &memory)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => done += count.min(end - done),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::testing::{BLOCK, SIZE, content, disk};
    use super::*;

    #[test]
    fn memory_is_read_and_written_wherever_the_pieces_are() {
        let disk = disk(false, |offset| (offset / 512) as u8);
        let mut bytes = vec![0; (BLOCK * 2) as usize];
        read(&disk, 512, &mut bytes).unwrap();
        let expected: Vec<u8> = (512..512 + BLOCK * 2).map(|at| (at / 512) as u8).collect();
        assert!(bytes == expected);
        bytes.iter_mut().for_each(|byte| *byte = !*byte);
        write(&disk, 512, &bytes).unwrap();
        let seen = content(&disk);
        assert!(seen[512..512 + bytes.len()] == bytes);
        assert_eq!(seen[..512], [0; 512]);
    }

    #[test]
    fn memory_beyond_the_end_or_on_a_read_only_disk_is_refused() {
        let writable = disk(false, |_| 1);
        assert!(read(&writable, SIZE - 511, &mut [0; 512]).is_err());
        assert!(write(&writable, u64::MAX, &[0; 512]).is_err());
        assert!(write(&disk(true, |_| 1), 0, &[0; 512]).is_err());
    }
}
