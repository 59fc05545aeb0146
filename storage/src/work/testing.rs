// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A disk with a layout, and requests in the memory of a guest, for tests.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost::vhost_user::message::VhostUserMemoryRegion;
use vhost_device_common::chain::Chain;
use vhost_device_common::memory::GuestMemory;
use vhost_device_common::ring::{Ring, RingSetup};

use crate::disk::Disk;
use crate::image::Source;
use crate::layout::Layout;
use crate::options::{Discard, DiskOptions, IoEngine};

/// The size of the disk, and of one of its blocks, in bytes.
pub const SIZE: u64 = 64 << 10;
pub const BLOCK: u64 = 16 << 10;

pub fn memfd(name: &str) -> File {
    File::from(memfd_create(name, MemfdFlags::CLOEXEC).unwrap())
}

/// Opens a disk whose blocks are in reverse order in the image. `byte` returns the content at an offset of the disk.
pub fn disk(read_only: bool, byte: impl Fn(u64) -> u8) -> Disk {
    let file = memfd("image");
    let layout = Layout::Reversed {
        block: BLOCK,
        size: SIZE,
    };
    let mut bytes = vec![0; SIZE as usize];
    for offset in 0..SIZE {
        bytes[layout.find(offset, 1).offset as usize] = byte(offset);
    }
    file.write_all_at(&bytes, 0).unwrap();
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let options = DiskOptions {
        read_only,
        logical_block_size: 512,
        physical_block_size: None,
        direct: false,
        discard: Discard::Unmap,
        iops: None,
        bps: None,
        iops_burst: None,
        bps_burst: None,
    };
    let mut disk = Disk::open(Source::Path(path.into()), &options, false, IoEngine::Auto).unwrap();
    disk.layout = layout;
    disk
}

/// Returns the content of the disk.
pub fn content(disk: &Disk) -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    disk.image.file.read_exact_at(&mut bytes, 0).unwrap();
    let byte = |offset| bytes[disk.layout.find(offset, 1).offset as usize];
    (0..SIZE).map(byte).collect()
}

/// The guest addresses of the parts of a ring, which are also the addresses of the front-end.
const DESCRIPTORS: u64 = 0;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
/// The guest address of the data.
const DATA: u64 = 0x1_0000;
const MEMORY_SIZE: u64 = DATA + 2 * SIZE;
/// Bits of the flags of a descriptor (VIRTIO 1.3, 2.7.5).
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// The memory of a guest.
pub struct Guest(Arc<GuestMemory>);

impl Guest {
    pub fn new() -> Self {
        let file = memfd("guest");
        ftruncate(&file, MEMORY_SIZE).unwrap();
        let region = VhostUserMemoryRegion::new(0, MEMORY_SIZE, 0, 0);
        let memory = GuestMemory::default().with_region(&region, file.into());
        Self(Arc::new(memory.unwrap()))
    }

    pub fn write(&self, address: u64, bytes: &[u8]) {
        let memory = self.0.slice(address, bytes.len()).unwrap();
        memory.copy_from(bytes);
    }

    /// Writes the data of requests.
    pub fn write_data(&self, bytes: &[u8]) {
        self.write(DATA, bytes);
    }

    /// Returns the first `length` bytes of the data.
    pub fn data(&self, length: u64) -> Vec<u8> {
        let mut bytes = vec![0; length as usize];
        self.0.slice(DATA, bytes.len()).unwrap().copy_to(&mut bytes);
        bytes
    }

    /// Returns a request whose data is in segments of these lengths, one after the other.
    pub fn chain(&self, lengths: &[u64], is_writable: bool) -> Chain {
        let mut address = DATA;
        for (index, &length) in lengths.iter().enumerate() {
            let is_last = index + 1 == lengths.len();
            let flags = if is_last { 0 } else { NEXT } | if is_writable { WRITE } else { 0 };
            let mut descriptor = address.to_le_bytes().to_vec();
            descriptor.extend((length as u32).to_le_bytes());
            descriptor.extend(flags.to_le_bytes());
            descriptor.extend((index as u16 + 1).to_le_bytes());
            self.write(DESCRIPTORS + 16 * index as u64, &descriptor);
            address += length;
        }
        // Flags, index and the first entry of the available ring.
        self.write(AVAILABLE, &[0, 0, 1, 0, 0, 0]);
        let setup = RingSetup {
            size: 16,
            descriptors: DESCRIPTORS,
            available: AVAILABLE,
            used: USED,
            ..RingSetup::default()
        };
        let mut ring = Ring::new(setup, Arc::clone(&self.0), 0, None, 0).unwrap();
        ring.take().unwrap().unwrap()
    }
}
