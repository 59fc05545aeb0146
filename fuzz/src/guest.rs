// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The memory of a guest. It is mapped once per process, and cleared for each input.

use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};

use arbitrary::{Arbitrary, Unstructured};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost::vhost_user::message::VhostUserMemoryRegion;
use vhost_device_common::memory::{GuestMemory, MemoryError};

/// The address of guest address 0 in the front-end.
pub const USER: u64 = 0x7f00_0000_0000;
/// The guest address, address in the front-end and size of each region. The second region follows the first one in the guest, but not in
/// the front-end. The third region ends at the highest possible address.
pub const REGIONS: [(u64, u64, u64); 3] = [
    (0, USER, 0x1_0000),
    (0x1_0000, 2 * USER, 0x8000),
    (HIGH, 3 * USER, 0x1fff),
];
/// The guest address of the third region.
const HIGH: u64 = u64::MAX - 0x1fff;
/// The memory for requests, which is a part of the first region and the whole second region.
pub const DATA: std::ops::Range<u64> = 0x8000..0x1_8000;

/// Creates a file for guest memory.
pub fn file(size: u64) -> OwnedFd {
    let file = memfd_create("guest", MemfdFlags::CLOEXEC).expect("a file in memory");
    ftruncate(&file, size).expect("a file in memory can have any size");
    file
}

/// Returns the files of the memory of all guests.
pub fn files() -> &'static [OwnedFd; 3] {
    static FILES: OnceLock<[OwnedFd; 3]> = OnceLock::new();
    FILES.get_or_init(|| REGIONS.map(|(_, _, size)| file(size)))
}

/// A range of guest addresses, which need not be memory.
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

/// The memory of a guest, and its expected content.
pub struct Guest {
    pub memory: Arc<GuestMemory>,
    /// The expected content of all regions, concatenated.
    shadow: Vec<u8>,
}

impl Guest {
    /// Clears the memory.
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

    /// Returns the place in the shadow of the bytes at `address`, up to the end of the region.
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

    /// Writes as the driver, up to the first address that is not memory.
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

    /// Expects that the device writes this, up to the first address that is not memory. Returns whether all of it is memory.
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

    /// Reads memory. Returns `None` if some of it is not memory.
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

    /// Reads a little-endian number of a ring, which is in the first region.
    pub fn number<const N: usize>(&self, address: u64) -> u64 {
        let mut bytes = [0; 8];
        let slice = self.memory.slice(address, N).expect("a ring's address");
        slice.copy_to(&mut bytes[..N]);
        u64::from_le_bytes(bytes)
    }

    /// Accepts the current content of memory that the device may write.
    pub fn give(&mut self, address: u64, length: u64) {
        let (mut address, mut left) = (address, length as usize);
        while let Some(slice) = self.memory.slice_up_to(address, left)
            && left > 0
        {
            let place = Self::place(address, slice.len()).expect("memory has a shadow");
            slice.copy_to(&mut self.shadow[place]);
            address = address.wrapping_add(slice.len() as u64);
            left -= slice.len();
        }
    }

    /// Checks that the memory has the expected content.
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
                panic!("the device wrote at {first:#x}, where it must not write");
            }
            place += now.len();
        }
    }
}

/// An address that a malicious driver would choose.
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
            // Near the end of a region.
            3 => [0x1_0000, 0x1_8000, u64::MAX][offset as usize % 3] - (offset >> 8),
            4 => offset % 0x4000,
            _ => DATA.start + offset % 0x8000,
        }))
    }

    fn size_hint(_: usize) -> (usize, Option<usize>) {
        (3, Some(11))
    }
}
