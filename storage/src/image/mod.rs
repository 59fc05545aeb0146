// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The image of a disk: one open file or block device.

mod format;
mod limits;
mod source;
mod topology;

use std::cmp;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{AtFlags, StatxFlags, fstatfs, ioctl_blkpbszget, ioctl_blksszget, statx};
use vhost_device_common::device::StartError;

use crate::lock::Lock;
use crate::operation::{Operation, is_read_only};
use crate::options::DiskOptions;
use crate::sync::Syncs;
pub use limits::{DiscardLimits, MAX_DISCARD_SECTORS, MAX_WRITE_ZEROES_SECTORS, SECTOR_SIZE};
pub(crate) use source::Identity;
use source::Opened;
pub use source::Source;
pub(crate) use topology::FOLDERS;
use topology::Topology;

/// File systems whose files are in memory: I/O on them does not wait for a device.
const TMPFS_MAGIC: u64 = 0x0102_1994;
const RAMFS_MAGIC: u64 = 0x8584_58f6;

/// The alignment that O_DIRECT requires, in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DirectAlignment {
    /// Of memory.
    pub memory: u32,
    /// Of offsets in the file, and of lengths.
    pub offset: u32,
}

/// An image that is open and locked.
#[derive(Debug)]
pub(crate) struct Image {
    /// The file or device.
    pub file: File,
    /// Where it comes from.
    pub source: Source,
    /// Which file it is.
    pub identity: Identity,
    /// Whether storage keeps what was written.
    pub syncs: Arc<Syncs>,
    /// Bytes of the disk: whole logical blocks. It only grows.
    size: AtomicU64,
    /// Bytes of a logical block.
    block: u64,
    /// Bytes of a physical block, to which the guest aligns.
    pub physical_block_size: u32,
    /// The alignment that O_DIRECT requires; `None` without O_DIRECT.
    pub direct: Option<DirectAlignment>,
    /// Whether it is a block device rather than a file.
    pub is_device: bool,
    /// The limits of discards; `None` if the host does not support them.
    pub discard: Option<DiscardLimits>,
    /// Whether the file is in memory.
    pub in_memory: bool,
    /// What the kernel tells about its storage.
    pub topology: Topology,
    /// The lock. It is on a file of its own: io_uring closes `file` only some time after the process has ended, when a new process may
    /// need the lock already.
    pub lock: Arc<Lock>,
}

impl Image {
    /// Opens and locks the image. With `incoming` it waits for the lock instead, until the guest uses the disk.
    ///
    /// # Errors
    /// One line that names the image, what is wrong with it, and what to do.
    pub fn open(source: Source, options: &DiskOptions, incoming: bool) -> Result<Self, StartError> {
        let fail = |what: String| StartError(format!("{source}: {what}"));
        let logical = options.logical_block_size;
        if let Some(physical) = options.physical_block_size
            && physical < logical
        {
            return Err(fail(format!(
                "--physical-block-size={physical} is less than --logical-block-size={logical}; omit it or raise it"
            )));
        }
        let opened = source.open(options).map_err(fail)?;
        let Opened { file, metadata, .. } = opened;
        let is_device = metadata.file_type().is_block_device();
        if is_device && !options.read_only && is_read_only(&file).unwrap_or(false) {
            return Err(fail(
                "a block device that cannot be written; add --read-only".to_owned(),
            ));
        }
        let syncs = Arc::new(Syncs::new(opened.is_direct));
        let lock = Lock::new(
            opened.lock_holder,
            Arc::clone(&syncs),
            options.read_only,
            incoming,
        )
        .map_err(|why| fail(why.to_owned()))?;
        let length = length(&file).map_err(|error| fail(format!("cannot measure it: {error}")))?;
        let block = u64::from(options.logical_block_size);
        let size = whole(length, block);
        if size == 0 {
            return Err(fail(format!(
                "smaller than one logical block of {block} bytes; create an image with \
                 `truncate -s 1G {source}`"
            )));
        }
        if size != length {
            log::warn!(
                "{source}: the last {} bytes are not a whole block and stay unused",
                length - size
            );
        }
        if let Some(format) = format::other_than_raw(&file) {
            log::warn!(
                "{source}: it begins like {format}, and is served raw: the guest sees the bytes of the file, not the disk in that format; \
                 convert it (`qemu-img convert -O raw`), unless the guest has written the signature itself"
            );
        }
        let direct = opened.is_direct.then(|| direct_alignment(&file));
        if let Some(alignment) = direct
            && alignment.offset > options.logical_block_size
        {
            return Err(fail(format!(
                "its storage takes O_DIRECT only in blocks of {0} bytes; add \
                 --logical-block-size={0} or omit --direct",
                alignment.offset
            )));
        }
        let physical = match options.physical_block_size {
            Some(given) => given,
            None if is_device => ioctl_blkpbszget(&file).unwrap_or(options.logical_block_size),
            // Some file systems report the size that they prefer for I/O, which is larger.
            None => u32::try_from(metadata.blksize()).map_or(4096, |size| size.min(4096)),
        };
        let file_system = fstatfs(&file).map_or(0, |system| system.f_type as u64);
        let physical = physical
            .clamp(options.logical_block_size, 1 << 16)
            .next_power_of_two();
        let discard = if is_device {
            DiscardLimits::of_device(metadata.rdev(), options.logical_block_size)
        } else {
            Some(DiscardLimits::of_file(physical))
        };
        Ok(Self {
            size: AtomicU64::new(size),
            block,
            physical_block_size: physical,
            direct,
            is_device,
            discard,
            topology: Topology::of(&metadata),
            in_memory: !is_device && matches!(file_system, TMPFS_MAGIC | RAMFS_MAGIC),
            file,
            identity: Identity::of(&metadata),
            source,
            syncs,
            lock: Arc::new(lock),
        })
    }

    /// Carries out `operation` and waits for it. Returns the bytes that were read or written.
    ///
    /// # Errors
    /// As for [`Syncs::execute`].
    pub fn execute(&self, operation: Operation<'_>) -> io::Result<u64> {
        self.syncs.execute(&self.file, operation)
    }

    /// Returns the size of the disk in bytes.
    #[inline]
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    /// Describes what the path names now, if it is not the file that was opened.
    pub fn path_change(&self) -> Option<&'static str> {
        match self.source.current()? {
            Ok(found) if found == self.identity => None,
            Ok(_) => Some("another file now"),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Some("no file any more"),
            // Permissions have changed, for example.
            Err(_) => None,
        }
    }

    /// Measures the image again. The disk grows with it.
    ///
    /// # Errors
    /// The host cannot measure it.
    pub fn measure(&self) -> io::Result<Measured> {
        let now = whole(length(&self.file)?, self.block);
        let before = self.size.fetch_max(now, Ordering::Relaxed);
        Ok(match now.cmp(&before) {
            cmp::Ordering::Greater => Measured::Grown { before, now },
            cmp::Ordering::Equal => Measured::Same,
            cmp::Ordering::Less => Measured::Smaller { now },
        })
    }
}

/// The size of an image that was measured again, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Measured {
    /// It is the same.
    Same,
    /// It has grown, and the disk with it.
    Grown {
        /// What it was.
        before: u64,
        /// What it is.
        now: u64,
    },
    /// It has shrunk. The disk has not: the guest may use all of it.
    Smaller {
        /// The length of the image in whole blocks.
        now: u64,
    },
}

/// Returns the length of a file or block device, in bytes. Changes its position, which nothing else uses.
fn length(mut file: &File) -> io::Result<u64> {
    file.seek(SeekFrom::End(0))
}

/// Rounds `length` down to whole blocks.
fn whole(length: u64, block: u64) -> u64 {
    length / block * block
}

/// Returns the alignment that the kernel requires for O_DIRECT on this file.
fn direct_alignment(file: &File) -> DirectAlignment {
    let told = statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)
        .ok()
        .filter(|told| told.stx_mask & StatxFlags::DIOALIGN.bits() != 0)
        .filter(|told| told.stx_dio_offset_align > 0 && told.stx_dio_mem_align > 0);
    match told {
        Some(told) => DirectAlignment {
            memory: told.stx_dio_mem_align,
            offset: told.stx_dio_offset_align,
        },
        // Kernels before 6.1 do not tell. Block devices with sectors of 512 bytes accept this.
        None => DirectAlignment {
            memory: 4096,
            offset: ioctl_blksszget(file).unwrap_or(512),
        },
    }
}
