// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The block limits page of a disk of the host (VPD page B0; SBC-3, 6.5.3). A guest learns from it how much one command may move, and the
//! host may take less than the disk.

use std::fs::File;
use std::io;

use super::sg_io::{self, Direction, Outcome};

/// Operation codes.
const INQUIRY: u8 = 0x12;
const READ_CAPACITY: u8 = 0x25;
/// The page.
const PAGE: u8 = 0xb0;
/// The places of MAXIMUM TRANSFER LENGTH and of OPTIMAL TRANSFER LENGTH, in blocks.
const MAXIMUM: std::ops::Range<usize> = 8..12;
const OPTIMAL: std::ops::Range<usize> = 12..16;

/// Returns whether a command asks for the page.
pub fn is_asked(cdb: &[u8]) -> bool {
    matches!(cdb, [INQUIRY, 1, PAGE, ..])
}

/// Has a device carry out a command that asks for the page. Returns the page, of `room` bytes at most, with limits of `max_bytes`.
///
/// # Errors
/// The host does not take the command.
pub fn inquire(
    device: &File,
    cdb: &[u8],
    room: u64,
    max_bytes: u64,
) -> io::Result<(Vec<u8>, Outcome)> {
    let room = u16::try_from(room).unwrap_or(u16::MAX);
    let (mut page, outcome) = read(device, cdb, room)?;
    if outcome.status == 0 && outcome.host_status == 0 {
        lower(&mut page, max_bytes / block_size(device));
    }
    Ok((page, outcome))
}

/// Has a device carry out a command that returns data. Returns the data that it has moved.
fn read(device: &File, cdb: &[u8], room: u16) -> io::Result<(Vec<u8>, Outcome)> {
    let mut data = vec![0; room.into()];
    let part = libc::iovec {
        iov_base: data.as_mut_ptr().cast(),
        iov_len: data.len(),
    };
    let outcome = sg_io::execute(device, cdb, Direction::FromDevice, &[part], room.into())?;
    let moved = u64::from(room).saturating_sub(outcome.residual);
    data.truncate(usize::try_from(moved).unwrap_or(0));
    Ok((data, outcome))
}

/// Returns the bytes of a block of a disk.
fn block_size(device: &File) -> u64 {
    let cdb = [READ_CAPACITY, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let data = read(device, &cdb, 8).map(|(data, _)| data);
    let size = data.ok().and_then(|data| field(&data, 4..8));
    size.filter(|size| *size >= 512).unwrap_or(512).into()
}

fn field(data: &[u8], place: std::ops::Range<usize>) -> Option<u32> {
    Some(u32::from_be_bytes(data.get(place)?.try_into().ok()?))
}

/// Lowers the limits in a page to so many blocks. In MAXIMUM TRANSFER LENGTH, 0 means no limit.
fn lower(page: &mut [u8], blocks: u64) {
    let blocks = u32::try_from(blocks).unwrap_or(u32::MAX).max(1);
    let mut set = |place: std::ops::Range<usize>, is_above: fn(u32, u32) -> bool| {
        if let Some(value) = field(page, place.clone())
            && is_above(value, blocks)
            && let Some(bytes) = page.get_mut(place)
        {
            bytes.copy_from_slice(&blocks.to_be_bytes());
        }
    };
    set(MAXIMUM, |value, blocks| value == 0 || value > blocks);
    set(OPTIMAL, |value, blocks| value > blocks);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(maximum: u32, optimal: u32) -> Vec<u8> {
        let mut page = vec![0, PAGE, 0, 60, 0, 0, 0, 0];
        page.extend(maximum.to_be_bytes());
        page.extend(optimal.to_be_bytes());
        page.resize(64, 0);
        page
    }

    #[test]
    fn limits_are_lowered_to_what_the_host_takes_and_never_raised() {
        for (before, after) in [
            ((0, 0), (64, 0)),
            ((65535, 128), (64, 64)),
            ((32, 16), (32, 16)),
        ] {
            let mut found = page(before.0, before.1);
            lower(&mut found, 64);
            assert_eq!(found, page(after.0, after.1));
        }
        // A part of the page.
        let mut short = page(0, 0);
        short.truncate(10);
        lower(&mut short, 64);
        assert_eq!(short, page(0, 0)[..10]);
    }

    #[test]
    fn only_the_block_limits_are_changed() {
        assert!(is_asked(&[0x12, 1, 0xb0, 0, 64, 0]));
        assert!(!is_asked(&[0x12, 0, 0xb0, 0, 64, 0]));
        assert!(!is_asked(&[0x12, 1, 0x83, 0, 64, 0]));
        assert!(!is_asked(&[]));
    }
}
