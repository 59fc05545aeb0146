// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest memory: shared memfds, mapped here and described to the back-end.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use libc::{MAP_SHARED, PROT_READ, PROT_WRITE};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost::VhostUserMemoryRegionInfo;
use vm_memory::{
    Address, Bytes, FileOffset, GuestAddress, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress, MmapRegion,
};

/// One region: a range of guest addresses backed by (a part of) a memfd.
#[derive(Debug)]
pub struct Region {
    mapping: GuestRegionMmap,
    /// Bytes allocated so far.
    allocated: AtomicU64,
}

impl Region {
    /// Creates a region of `size` bytes at `guest_address`, in a memfd of its own.
    pub fn new(guest_address: u64, size: usize) -> Self {
        Self::at_offset(guest_address, size, 0)
    }

    /// Creates a region like [`Region::new`], with its first byte `mmap_offset` bytes into the memfd.
    pub fn at_offset(guest_address: u64, size: usize, mmap_offset: u64) -> Self {
        let memfd = memfd_create("guest-memory", MemfdFlags::CLOEXEC).expect("memfd_create");
        ftruncate(&memfd, mmap_offset + size as u64).expect("size the memfd");
        let file = FileOffset::new(File::from(memfd), mmap_offset);
        let mapping = MmapRegion::from_file(file, size).expect("map the memfd");
        Region {
            mapping: GuestRegionMmap::new(mapping, GuestAddress(guest_address))
                .expect("a region that ends below 2^64"),
            allocated: AtomicU64::new(0),
        }
    }

    /// Creates a region like [`Region::new`], in huge pages of 2 MiB, of which `size` is a multiple. `None` if the host has none.
    pub fn huge(guest_address: u64, size: usize) -> Option<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        let memfd = memfd_create("guest-memory", flags).ok()?;
        ftruncate(&memfd, size as u64).ok()?;
        let file = FileOffset::new(File::from(memfd), 0);
        // The pages are reserved, so that touching them cannot fail.
        let mapping =
            MmapRegion::build(Some(file), size, PROT_READ | PROT_WRITE, MAP_SHARED).ok()?;
        Some(Region {
            mapping: GuestRegionMmap::new(mapping, GuestAddress(guest_address))?,
            allocated: AtomicU64::new(0),
        })
    }

    /// Returns the first guest address.
    pub fn guest_address(&self) -> u64 {
        self.mapping.start_addr().raw_value()
    }

    /// Returns the size in bytes.
    pub fn size(&self) -> u64 {
        self.mapping.len()
    }

    /// Returns the address of the first byte in this process: the "user address" of the protocol.
    pub fn user_address(&self) -> u64 {
        self.mapping.as_ptr() as u64
    }

    /// Returns the region as SET_MEM_TABLE and ADD_MEM_REG describe it, with the memfd to send along.
    pub fn info(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo::from_guest_region(&self.mapping).expect("a region with a file")
    }

    /// Returns the memfd.
    pub fn file(&self) -> &File {
        self.mapping
            .file_offset()
            .expect("a region with a file")
            .file()
    }

    fn contains(&self, guest_address: u64, length: u64) -> bool {
        guest_address
            .checked_sub(self.guest_address())
            .and_then(|offset| offset.checked_add(length))
            .is_some_and(|end| end <= self.size())
    }

    fn offset(&self, guest_address: u64) -> MemoryRegionAddress {
        MemoryRegionAddress(guest_address - self.guest_address())
    }

    fn allocate(&self, size: u64, alignment: u64) -> Option<u64> {
        let start = |used: u64| (self.guest_address() + used).next_multiple_of(alignment);
        self.allocated
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
                let end = start(used) - self.guest_address() + size;
                (end <= self.size()).then_some(end)
            })
            .ok()
            .map(start)
    }
}

/// All regions of a guest. Clones share the regions that existed when they were made.
#[derive(Debug, Clone, Default)]
pub struct GuestMemory {
    regions: Vec<Arc<Region>>,
}

impl GuestMemory {
    /// Regions given as (guest address, size in bytes), each in a memfd of its own.
    pub fn new(layout: &[(u64, usize)]) -> Self {
        GuestMemory {
            regions: layout
                .iter()
                .map(|&(address, size)| Arc::new(Region::new(address, size)))
                .collect(),
        }
    }

    /// Returns the regions, in the order in which they were added.
    pub fn regions(&self) -> &[Arc<Region>] {
        &self.regions
    }

    /// Adds a region (tell the back-end with `FrontEnd::add_region` or a new table).
    pub fn add(&mut self, region: Region) -> Arc<Region> {
        let region = Arc::new(region);
        self.regions.push(region.clone());
        region
    }

    /// Removes the region that starts at `guest_address`. Rings and buffers in it stay mapped here.
    pub fn remove(&mut self, guest_address: u64) -> Arc<Region> {
        let index = self
            .regions
            .iter()
            .position(|region| region.guest_address() == guest_address)
            .expect("a region at this address");
        self.regions.remove(index)
    }

    /// Returns the same memory without the region that starts at `guest_address`.
    pub fn without(&self, guest_address: u64) -> GuestMemory {
        let mut rest = self.clone();
        rest.remove(guest_address);
        rest
    }

    /// Returns the region that holds all `length` bytes at `guest_address`. Panics when there is none.
    pub fn region(&self, guest_address: u64, length: u64) -> &Arc<Region> {
        self.regions
            .iter()
            .find(|region| region.contains(guest_address, length))
            .unwrap_or_else(|| panic!("no guest memory at {guest_address:#x}, {length} bytes"))
    }

    /// Allocates `size` unused bytes in the first region that has them, and returns their guest address. They are never freed.
    pub fn allocate(&self, size: u64, alignment: u64) -> u64 {
        self.regions
            .iter()
            .find_map(|region| region.allocate(size, alignment))
            .unwrap_or_else(|| panic!("no guest memory left for {size} bytes"))
    }

    /// Address in this process of `length` bytes at `guest_address`.
    /// It is valid for as long as [`GuestMemory::region`] of the same bytes is held.
    pub fn host_address(&self, guest_address: u64, length: u64) -> *mut u8 {
        let region = self.region(guest_address, length);
        region
            .mapping
            .get_host_address(region.offset(guest_address))
            .expect("checked by region()")
    }

    /// Copies bytes out of guest memory.
    pub fn read(&self, guest_address: u64, bytes: &mut [u8]) {
        let region = self.region(guest_address, bytes.len() as u64);
        region
            .mapping
            .read_slice(bytes, region.offset(guest_address))
            .expect("checked by region()");
    }

    /// Copies bytes into guest memory.
    pub fn write(&self, guest_address: u64, bytes: &[u8]) {
        let region = self.region(guest_address, bytes.len() as u64);
        region
            .mapping
            .write_slice(bytes, region.offset(guest_address))
            .expect("checked by region()");
    }

    /// Reads `length` bytes of guest memory into a vector.
    pub fn read_vec(&self, guest_address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.read(guest_address, &mut bytes);
        bytes
    }

    /// Sets `length` bytes of guest memory to `byte`.
    pub fn fill(&self, guest_address: u64, length: usize, byte: u8) {
        self.write(guest_address, &vec![byte; length]);
    }

    /// Reads a byte of guest memory.
    pub fn read_u8(&self, guest_address: u64) -> u8 {
        u8::from_le_bytes(self.read_array(guest_address))
    }

    /// Reads a little-endian 16-bit integer in guest memory.
    pub fn read_u16(&self, guest_address: u64) -> u16 {
        u16::from_le_bytes(self.read_array(guest_address))
    }

    /// Reads a little-endian 32-bit integer in guest memory.
    pub fn read_u32(&self, guest_address: u64) -> u32 {
        u32::from_le_bytes(self.read_array(guest_address))
    }

    /// Reads a little-endian 64-bit integer in guest memory.
    pub fn read_u64(&self, guest_address: u64) -> u64 {
        u64::from_le_bytes(self.read_array(guest_address))
    }

    /// Writes a byte.
    pub fn write_u8(&self, guest_address: u64, value: u8) {
        self.write(guest_address, &value.to_le_bytes());
    }

    /// Writes a little-endian 16-bit integer.
    pub fn write_u16(&self, guest_address: u64, value: u16) {
        self.write(guest_address, &value.to_le_bytes());
    }

    /// Writes a little-endian 32-bit integer.
    pub fn write_u32(&self, guest_address: u64, value: u32) {
        self.write(guest_address, &value.to_le_bytes());
    }

    /// Writes a little-endian 64-bit integer.
    pub fn write_u64(&self, guest_address: u64, value: u64) {
        self.write(guest_address, &value.to_le_bytes());
    }

    /// Returns the user address (address in this process) of a guest address, for SET_VRING_ADDR.
    pub fn user_address(&self, guest_address: u64) -> u64 {
        let region = self.region(guest_address, 1);
        region.user_address() + region.offset(guest_address).raw_value()
    }

    fn read_array<const N: usize>(&self, guest_address: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.read(guest_address, &mut bytes);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_written_in_one_region_are_read_back_there_and_in_its_memfd() {
        use std::os::unix::fs::FileExt;

        let mut memory = GuestMemory::new(&[(0, 0x1000)]);
        let region = memory.add(Region::at_offset(0x10_0000, 0x2000, 0x1000));
        memory.write_u32(0x10_0010, 0x1234_5678);
        memory.write_u64(0xff8, u64::MAX);
        assert_eq!(memory.read_u16(0x10_0010), 0x5678);
        let mut bytes = [0; 4];
        region.file().read_exact_at(&mut bytes, 0x1010).unwrap();
        assert_eq!(u32::from_le_bytes(bytes), 0x1234_5678);
        let info = region.info();
        assert_eq!(info.guest_phys_addr, 0x10_0000);
        assert_eq!(info.memory_size, 0x2000);
        assert_eq!(info.mmap_offset, 0x1000);
        assert_eq!(memory.user_address(0x10_0010), info.userspace_addr + 0x10);
    }

    #[test]
    fn allocations_are_aligned_apart_and_spill_into_the_next_region() {
        let memory = GuestMemory::new(&[(0x1000, 0x1000), (0x8000, 0x1000)]);
        assert_eq!(memory.allocate(10, 1), 0x1000);
        assert_eq!(memory.allocate(16, 16), 0x1010);
        assert_eq!(memory.allocate(0x1000, 0x1000), 0x8000);
        assert_eq!(memory.allocate(0xfe0, 8), 0x1020);
    }

    #[test]
    #[should_panic(expected = "no guest memory at 0xffc")]
    fn an_access_across_the_end_of_a_region_panics() {
        GuestMemory::new(&[(0, 0x1000)]).read_u64(0xffc);
    }
}
