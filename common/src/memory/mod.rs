// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest memory: the regions that the front-end shares, and checked access to them.
//!
//! A [`GuestMemory`] never changes. A new table from the front-end creates a new one, which shares the mappings that remain. Code that
//! still uses the old one keeps it and its mappings alive. The same applies to the dirty log, which is part of it.

mod dirty;
#[allow(unsafe_code)]
mod mapping;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{FileType, SealFlags, fcntl_add_seals, fstat};
use thiserror::Error;
use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::VolatileSlice;

pub use dirty::{DirtyLog, DirtyLogError};
pub(crate) use mapping::{LostMemory, Mapping, survive_lost_memory};

/// Most regions that a front-end may share at a time: as many as KVM gives QEMU, and as QEMU's own back-ends offer.
pub const MAX_REGIONS: usize = 509;

/// Why a region or an address is refused.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// No region may be empty.
    #[error("memory region at guest address {guest_address:#x} has size 0")]
    Empty {
        /// Where the guest would see the region.
        guest_address: u64,
    },
    /// An address or offset of the region, plus its size, does not fit in 64 bits.
    #[error("memory region at guest address {guest_address:#x} of {size:#x} bytes wraps around")]
    Wraps {
        /// Where the guest would see the region.
        guest_address: u64,
        /// Size in bytes.
        size: u64,
    },
    /// Two regions share guest or front-end addresses.
    #[error(
        "memory region at guest address {guest_address:#x} of {size:#x} bytes overlaps another"
    )]
    Overlaps {
        /// Where the guest would see the region.
        guest_address: u64,
        /// Size in bytes.
        size: u64,
    },
    /// The file is shorter than the region. Access beyond its end would raise SIGBUS.
    #[error("memory region needs {needed:#x} bytes of its file, which has {length:#x}")]
    FileTooShort {
        /// Offset plus size of the region.
        needed: u64,
        /// Length of the file in bytes.
        length: u64,
    },
    /// More regions than [`MAX_REGIONS`].
    #[error("all {MAX_REGIONS} memory slots are in use")]
    NoSlot,
    /// REM_MEM_REG named a region that does not exist.
    #[error("no memory region at guest address {guest_address:#x} of {size:#x} bytes to remove")]
    Unknown {
        /// Where the guest would see the region.
        guest_address: u64,
        /// Size in bytes.
        size: u64,
    },
    /// The file could not be examined.
    #[error("cannot examine the file of a memory region: {0}")]
    Stat(#[source] std::io::Error),
    /// The file could not be mapped.
    #[error("cannot map {size:#x} bytes of guest memory: {source}")]
    Map {
        /// Size in bytes.
        size: u64,
        /// Error of `mmap(2)`.
        source: std::io::Error,
    },
    /// An address range is not guest memory, or not all of it is in one region.
    #[error("{length:#x} bytes at address {address:#x} are not guest memory")]
    OutOfBounds {
        /// First address of the range.
        address: u64,
        /// Its length in bytes.
        length: u64,
    },
}

/// One region of guest memory, mapped into this process.
#[derive(Clone, Debug)]
struct Region {
    guest_address: u64,
    user_address: u64,
    size: u64,
    /// Bytes of the mapping before the region: `mmap(2)` maps whole pages, but a region can start anywhere.
    skip: usize,
    mapping: Arc<Mapping>,
}

impl Region {
    fn map(info: &VhostUserMemoryRegion, file: OwnedFd) -> Result<Self, MemoryError> {
        let VhostUserMemoryRegion {
            guest_phys_addr: guest_address,
            memory_size: size,
            user_addr: user_address,
            mmap_offset,
        } = *info;
        if size == 0 {
            return Err(MemoryError::Empty { guest_address });
        }
        let wraps = || MemoryError::Wraps {
            guest_address,
            size,
        };
        guest_address.checked_add(size).ok_or_else(wraps)?;
        user_address.checked_add(size).ok_or_else(wraps)?;
        let needed = mmap_offset.checked_add(size).ok_or_else(wraps)?;
        // If the front-end allows seals, it cannot truncate the file from now on.
        let _ = fcntl_add_seals(&file, SealFlags::SHRINK);
        let stat = fstat(&file).map_err(|errno| MemoryError::Stat(errno.into()))?;
        let length = u64::try_from(stat.st_size).unwrap_or(0);
        let is_device = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice;
        // `fstat(2)` does not tell the length of a device (devdax); `mmap(2)` refuses what is beyond its end.
        if !is_device && length < needed {
            return Err(MemoryError::FileTooShort { needed, length });
        }
        let page = rustix::param::page_size() as u64;
        let map = |alignment: u64| {
            let skip = mmap_offset & (alignment - 1);
            let mapped = size
                .checked_add(skip)
                .and_then(|bytes| bytes.checked_next_multiple_of(alignment))
                .and_then(|bytes| usize::try_from(bytes).ok())
                .ok_or_else(wraps)?;
            let mapping = Mapping::new(&file, mmap_offset - skip, mapped)
                .map_err(|source| MemoryError::Map { size, source })?;
            Ok(Self {
                guest_address,
                user_address,
                size,
                skip: skip as usize,
                mapping: Arc::new(mapping),
            })
        };
        if is_device {
            // It does not tell the page size either.
            return map(page)
                .or_else(|_| map(2 << 20))
                .or_else(|_| map(1 << 30));
        }
        // Huge pages are mapped as a whole. This is their size.
        let block = u64::try_from(stat.st_blksize).unwrap_or(page);
        map(if block.is_power_of_two() {
            block.max(page)
        } else {
            page
        })
    }

    fn overlaps(&self, other: &Region) -> bool {
        // Region::map checked that neither end wraps.
        let meet = |a: u64, b: u64| a < b + other.size && b < a + self.size;
        meet(self.guest_address, other.guest_address) || meet(self.user_address, other.user_address)
    }

    /// Returns the offset in the mapping of the byte at offset `into` of the region. The caller has checked that it is inside.
    fn offset(&self, into: u64) -> usize {
        self.skip + into as usize
    }

    /// Returns the guest address of the byte that is mapped at `pointer`; `None` outside this region.
    fn guest_address(&self, pointer: usize) -> Option<u64> {
        let into = pointer.checked_sub(self.mapping.start() + self.skip)? as u64;
        (into < self.size).then(|| self.guest_address + into)
    }
}

/// The guest's memory, as described by one memory table of the front-end.
#[derive(Clone, Debug, Default)]
pub struct GuestMemory {
    /// Sorted by guest address; no two overlap.
    regions: Vec<Region>,
    /// Where pages that the device writes to are marked during a migration.
    log: Option<Arc<DirtyLog>>,
}

impl GuestMemory {
    /// Returns this memory with one more region (ADD_MEM_REG, or one entry of SET_MEM_TABLE).
    ///
    /// # Errors
    /// The region is empty, wraps around, overlaps another, is longer than its file, or cannot be mapped.
    pub fn with_region(
        &self,
        info: &VhostUserMemoryRegion,
        file: OwnedFd,
    ) -> Result<Self, MemoryError> {
        if self.regions.len() >= MAX_REGIONS {
            return Err(MemoryError::NoSlot);
        }
        let region = Region::map(info, file)?;
        if self.regions.iter().any(|other| other.overlaps(&region)) {
            return Err(MemoryError::Overlaps {
                guest_address: region.guest_address,
                size: region.size,
            });
        }
        let mut regions = self.regions.clone();
        let place = regions.partition_point(|other| other.guest_address < region.guest_address);
        regions.insert(place, region);
        Ok(self.with_regions(regions))
    }

    /// Returns this memory without one region (REM_MEM_REG), which is named by its addresses and size.
    ///
    /// # Errors
    /// There is no such region.
    pub fn without_region(&self, info: &VhostUserMemoryRegion) -> Result<Self, MemoryError> {
        let VhostUserMemoryRegion {
            guest_phys_addr: guest_address,
            memory_size: size,
            user_addr: user_address,
            ..
        } = *info;
        let mut regions = self.regions.clone();
        let place = regions
            .iter()
            .position(|region| {
                (region.guest_address, region.user_address, region.size)
                    == (guest_address, user_address, size)
            })
            .ok_or(MemoryError::Unknown {
                guest_address,
                size,
            })?;
        regions.remove(place);
        Ok(self.with_regions(regions))
    }

    fn with_regions(&self, regions: Vec<Region>) -> Self {
        let log = self.log.clone();
        Self { regions, log }
    }

    /// Returns this memory with another dirty log, or with none.
    pub fn with_log(&self, log: Option<Arc<DirtyLog>>) -> Self {
        let regions = self.regions.clone();
        Self { regions, log }
    }

    /// Returns the log in which pages that the device writes to are marked.
    #[inline]
    pub(crate) fn log(&self) -> Option<&DirtyLog> {
        self.log.as_deref()
    }

    /// Whether writes are logged, because the guest migrates.
    pub fn is_logged(&self) -> bool {
        self.log.is_some()
    }

    /// Returns the first address after all regions.
    pub(crate) fn end(&self) -> u64 {
        let end = |region: &Region| region.guest_address + region.size;
        self.regions.last().map_or(0, end)
    }

    /// Returns the guest address of the byte that is mapped at `pointer`; `None` if it is not guest memory.
    pub(crate) fn guest_address(&self, pointer: usize) -> Option<u64> {
        let mut regions = self.regions.iter();
        regions.find_map(|region| region.guest_address(pointer))
    }

    /// Returns the memory from guest address `address` on: `length` bytes, or fewer if the region ends before. `None` if there is no
    /// memory at `address`.
    #[inline]
    pub fn slice_up_to(&self, address: u64, length: usize) -> Option<VolatileSlice<'_>> {
        let after = self
            .regions
            .partition_point(|region| region.guest_address <= address);
        let region = self.regions.get(after.checked_sub(1)?)?;
        let into = address - region.guest_address;
        let left = region.size.checked_sub(into)?;
        if left == 0 {
            return None;
        }
        let count = usize::try_from(left).unwrap_or(usize::MAX).min(length);
        region.mapping.slice(region.offset(into), count)
    }

    /// Returns `length` bytes at guest address `address`.
    ///
    /// # Errors
    /// They are not all in one region.
    #[inline]
    pub fn slice(&self, address: u64, length: usize) -> Result<VolatileSlice<'_>, MemoryError> {
        self.slice_up_to(address, length)
            .filter(|slice| slice.len() == length)
            .ok_or(MemoryError::OutOfBounds {
                address,
                length: length as u64,
            })
    }

    /// Returns `length` bytes at `address` in the address space of the front-end, which stay mapped as long as the result lives. Front-ends
    /// name rings by such addresses (SET_VRING_ADDR).
    ///
    /// # Errors
    /// They are not all in one region.
    pub fn pin_user_range(&self, address: u64, length: usize) -> Result<PinnedRange, MemoryError> {
        self.regions
            .iter()
            .find_map(|region| {
                let into = address.checked_sub(region.user_address)?;
                let left = region.size.checked_sub(into)?;
                (left >= length as u64).then(|| PinnedRange {
                    mapping: Arc::clone(&region.mapping),
                    offset: region.offset(into),
                    length,
                })
            })
            .ok_or(MemoryError::OutOfBounds {
                address,
                length: length as u64,
            })
    }
}

/// A range of guest memory that stays mapped as long as this value lives.
#[derive(Debug)]
pub struct PinnedRange {
    mapping: Arc<Mapping>,
    offset: usize,
    length: usize,
}

impl PinnedRange {
    /// Returns the memory.
    #[inline]
    pub fn slice(&self) -> VolatileSlice<'_> {
        // The range was checked when it was pinned. Every access to an empty slice fails.
        self.mapping
            .slice(self.offset, self.length)
            .unwrap_or_else(|| VolatileSlice::from(<&mut [u8]>::default()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = 4096;

    fn file(length: u64) -> OwnedFd {
        let file = tempfile::tempfile().unwrap();
        file.set_len(length).unwrap();
        file.into()
    }

    fn info(guest: u64, size: u64, user: u64, offset: u64) -> VhostUserMemoryRegion {
        VhostUserMemoryRegion::new(guest, size, user, offset)
    }

    fn memory(regions: &[(u64, u64, u64)]) -> GuestMemory {
        regions
            .iter()
            .fold(GuestMemory::default(), |memory, &(guest, size, user)| {
                memory
                    .with_region(&info(guest, size, user, 0), file(size))
                    .unwrap()
            })
    }

    #[test]
    fn a_file_that_can_be_sealed_does_not_become_shorter() {
        use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
        let file = memfd_create("memory", MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&file, PAGE).unwrap();
        let shared = file.try_clone().unwrap();
        let memory = GuestMemory::default().with_region(&info(0, PAGE, 0, 0), shared);
        assert_eq!(ftruncate(&file, 0), Err(rustix::io::Errno::PERM));
        drop(memory);
    }

    #[test]
    fn a_slice_ends_where_its_region_ends() {
        let memory = memory(&[(0x10_000, PAGE, 0), (0x1_000, PAGE, 0x100_000)]);
        assert_eq!(memory.slice_up_to(0x1_ff0, 64).unwrap().len(), 16);
        assert_eq!(memory.slice_up_to(0x10_000, 64).unwrap().len(), 64);
        for address in [0, 0xfff, 0x2_000, 0x11_000, u64::MAX] {
            assert!(memory.slice_up_to(address, 1).is_none(), "{address:#x}");
        }
        assert!(memory.slice(0x1_ff0, 17).is_err());
    }

    #[test]
    fn an_unaligned_offset_maps_the_right_bytes() {
        use std::os::unix::fs::FileExt;
        let backing = tempfile::tempfile().unwrap();
        backing.set_len(2 * PAGE).unwrap();
        backing.write_all_at(b"here", 100).unwrap();
        let memory = GuestMemory::default()
            .with_region(&info(0x1_000, PAGE, 0, 100), backing.into())
            .unwrap();
        let mut bytes = [0; 4];
        memory.slice(0x1_000, 4).unwrap().copy_to(&mut bytes);
        assert_eq!(&bytes, b"here");
    }

    #[test]
    fn bad_regions_are_refused() {
        let one = memory(&[(0x1_000, PAGE, 0x1_000)]);
        let refused =
            |info: VhostUserMemoryRegion, length| one.with_region(&info, file(length)).unwrap_err();
        assert!(matches!(
            refused(info(0, 0, 0, 0), PAGE),
            MemoryError::Empty { .. }
        ));
        assert!(matches!(
            refused(info(u64::MAX, PAGE, 0, 0), PAGE),
            MemoryError::Wraps { .. }
        ));
        assert!(matches!(
            refused(info(0x9_000, PAGE, 0x9_000, u64::MAX), PAGE),
            MemoryError::Wraps { .. }
        ));
        assert!(matches!(
            refused(info(0x1_800, PAGE, 0x9_000, 0), PAGE),
            MemoryError::Overlaps { .. }
        ));
        assert!(matches!(
            refused(info(0x9_000, PAGE, 0x800, 0), PAGE),
            MemoryError::Overlaps { .. }
        ));
        assert!(matches!(
            refused(info(0x9_000, PAGE, 0x9_000, 1), PAGE),
            MemoryError::FileTooShort { .. }
        ));
    }

    #[test]
    fn a_removed_region_stays_mapped_for_its_users() {
        let with = memory(&[(0x1_000, PAGE, 0x5_000)]);
        let pinned = with.pin_user_range(0x5_010, 16).unwrap();
        let without = with
            .without_region(&info(0x1_000, PAGE, 0x5_000, 77))
            .unwrap();
        drop(with);
        assert!(without.slice_up_to(0x1_000, 1).is_none());
        assert!(without.pin_user_range(0x5_010, 16).is_err());
        pinned.slice().copy_from(b"still mapped    ");
        assert!(
            without
                .without_region(&info(0x1_000, PAGE, 0x5_000, 0))
                .is_err()
        );
    }
}
