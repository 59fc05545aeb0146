// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The memory of a guest that lives as long as the process, and is as good as new for each input.

use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};

use arbitrary::{Arbitrary, Unstructured};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost::vhost_user::message::VhostUserMemoryRegion;
use vhost_device_common::memory::{GuestMemory, MemoryError};

/// What the guest's first address is in the front-end.
pub const USER: u64 = 0x7f00_0000_0000;
/// Guest address, address in the front-end and size of each region. The second begins where the first ends, but not for the
/// front-end; the third ends with the last address that a region may have.
pub const REGIONS: [(u64, u64, u64); 3] = [
    (0, USER, 0x1_0000),
    (0x1_0000, 2 * USER, 0x8000),
    (HIGH, 3 * USER, 0x1fff),
];
/// Where the third region begins.
const HIGH: u64 = u64::MAX - 0x1fff;
/// Memory that is no ring: in the first region, and all of the second.
pub const DATA: std::ops::Range<u64> = 0x8000..0x1_8000;

/// A file for guest memory.
pub fn file(size: u64) -> OwnedFd {
    let file = memfd_create("guest", MemfdFlags::CLOEXEC).expect("a file in memory");
    ftruncate(&file, size).expect("a file in memory can have any size");
    file
}

/// The files that the memory of all guests is in.
pub fn files() -> &'static [OwnedFd; 3] {
    static FILES: OnceLock<[OwnedFd; 3]> = OnceLock::new();
    FILES.get_or_init(|| REGIONS.map(|(_, _, size)| file(size)))
}

/// A piece of guest memory, or not of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    pub address: u64,
    pub length: u32,
}

impl Piece {
    pub fn new(address: u64, length: u32) -> Self {
        Self { address, length }
    }
}

/// The memory of a guest, and what should be in it.
pub struct Guest {
    pub memory: Arc<GuestMemory>,
    /// All regions behind each other: what the driver wrote.
    shadow: Vec<u8>,
}

impl Guest {
    /// Memory that is all zero.
    pub fn new() -> Self {
        static MEMORY: OnceLock<Arc<GuestMemory>> = OnceLock::new();
        let memory = MEMORY.get_or_init(|| {
            let memory = GuestMemory::default();
            let mut regions = REGIONS.iter().zip(files());
            let all = regions.try_fold(memory, |memory, (&(guest, user, size), file)| {
                let info = VhostUserMemoryRegion::new(guest, size, user, 0);
                let file = file.try_clone().map_err(MemoryError::Stat)?;
                memory.with_region(&info, file)
            });
            Arc::new(all.expect("memory of three regions"))
        });
        let memory = Arc::clone(memory);
        let shadow = vec![0; REGIONS.iter().map(|region| region.2 as usize).sum()];
        let mut place = 0;
        for (address, _, size) in REGIONS {
            let region = memory.slice(address, size as usize).expect("a region");
            region.copy_from(&shadow[place..place + size as usize]);
            place += size as usize;
        }
        Self { memory, shadow }
    }

    /// Where in the shadow the bytes at `address` are, as far as they are in one region.
    fn place(address: u64, length: usize) -> Option<std::ops::Range<usize>> {
        let mut start = 0;
        for (guest, _, size) in REGIONS {
            match address.checked_sub(guest) {
                Some(into) if into < size => {
                    let length = length.min((size - into) as usize);
                    let start = start + into as usize;
                    return Some(start..start + length);
                }
                _ => start += size as usize,
            }
        }
        None
    }

    /// The driver writes, as far as there is memory.
    pub fn write(&mut self, address: u64, bytes: &[u8]) {
        let (mut address, mut left) = (address, bytes);
        while let Some(slice) = self.memory.slice_up_to(address, left.len())
            && !left.is_empty()
        {
            let (front, rest) = left.split_at(slice.len());
            slice.copy_from(front);
            self.expect(address, front);
            address = address.wrapping_add(front.len() as u64);
            left = rest;
        }
    }

    /// The device should write this, as far as there is memory. Returns whether there is.
    pub fn expect(&mut self, address: u64, bytes: &[u8]) -> bool {
        let (mut address, mut bytes) = (address, bytes);
        while !bytes.is_empty() {
            let Some(place) = Self::place(address, bytes.len()) else {
                return false;
            };
            let (front, rest) = bytes.split_at(place.len());
            self.shadow[place].copy_from_slice(front);
            address = address.wrapping_add(front.len() as u64);
            bytes = rest;
        }
        true
    }

    /// What is there; `None` if it is not all memory.
    pub fn read(&self, address: u64, length: usize) -> Option<Vec<u8>> {
        let mut bytes = vec![0; length];
        let mut done = 0;
        while done < length {
            let address = address.checked_add(done as u64)?;
            let slice = self.memory.slice_up_to(address, length - done)?;
            slice.copy_to(&mut bytes[done..]);
            done += slice.len();
        }
        Some(bytes)
    }

    /// The little-endian number at an address of a ring, which is all in the first region.
    pub fn number<const N: usize>(&self, address: u64) -> u64 {
        let mut bytes = [0; 8];
        let slice = self.memory.slice(address, N).expect("a ring's address");
        slice.copy_to(&mut bytes[..N]);
        u64::from_le_bytes(bytes)
    }

    /// The device may write here from now on: whatever is there is right.
    pub fn give(&mut self, address: u64, length: u64) {
        let (mut address, mut left) = (address, length as usize);
        while let Some(slice) = self.memory.slice_up_to(address, left)
            && left > 0
        {
            let place = Self::place(address, slice.len()).expect("what is memory has a shadow");
            slice.copy_to(&mut self.shadow[place]);
            address = address.wrapping_add(slice.len() as u64);
            left -= slice.len();
        }
    }

    /// Whether the memory is what the driver wrote.
    pub fn assert_untouched(&self) {
        let mut place = 0;
        for (address, _, size) in REGIONS {
            let mut now = vec![0; size as usize];
            let region = self.memory.slice(address, now.len()).expect("a region");
            region.copy_to(&mut now);
            let then = &self.shadow[place..place + now.len()];
            if now != then {
                let first = now.iter().zip(then).position(|(now, then)| now != then);
                let first = address + first.unwrap_or(0) as u64;
                panic!("the device wrote at {first:#x}, which it was not given");
            }
            place += now.len();
        }
    }
}

/// An address that a hostile driver would choose.
#[derive(Clone, Copy, Debug)]
pub struct Address(pub u64);

impl<'a> Arbitrary<'a> for Address {
    fn arbitrary(bytes: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        let kind = bytes.int_in_range(0..=7)?;
        let offset = u64::from(bytes.arbitrary::<u16>()?);
        Ok(Self(match kind {
            0 => bytes.arbitrary()?,
            1 => REGIONS[1].0 + offset,
            2 => HIGH + offset % 0x2000,
            // About the end of a region.
            3 => [0x1_0000, 0x1_8000, u64::MAX][offset as usize % 3] - (offset >> 8),
            4 => offset % 0x4000,
            _ => DATA.start + offset % 0x8000,
        }))
    }

    fn size_hint(_: usize) -> (usize, Option<usize>) {
        (3, Some(11))
    }
}
