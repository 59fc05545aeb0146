// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A disk, as all queues of a device share it: an image, where the disk's bytes are in it, and what may be done with it.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{SeekFrom, ftruncate, seek};
use rustix::io::Errno;
use thiserror::Error;
use vhost_device_common::chain::ChainError;
use vhost_device_common::device::{Access as FileAccess, Call, Needs, StartError};

use crate::access::Access;
use crate::image::{DiscardLimits, FOLDERS, Image, Measured, Source};
use crate::layout::Layout;
use crate::lock;
use crate::operation::{Operation, Range, discard_call, measure_calls};
use crate::options::{Discard, DiskOptions, IoEngine};

/// Why a disk does not start a request.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum DiskError {
    /// The request names bytes that the disk does not have.
    #[error("the request reaches beyond the end of the disk")]
    OutOfRange,
    /// The request changes a read-only disk.
    #[error("the disk is read-only")]
    ReadOnly,
    /// The request moves no data, or more than a request may: see [`MAX_TRANSFER`](crate::work::MAX_TRANSFER),
    /// [`MAX_DISCARD_SECTORS`](crate::image::MAX_DISCARD_SECTORS) and
    /// [`MAX_WRITE_ZEROES_SECTORS`](crate::image::MAX_WRITE_ZEROES_SECTORS).
    #[error("the request moves no data, or too much")]
    Length,
    /// The data of the request is not guest memory.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// The host has no memory for a buffer.
    #[error("no memory for a buffer")]
    NoMemory,
}

/// A disk that is open.
#[derive(Debug)]
pub struct Disk {
    /// The file or device that has the data.
    pub(crate) image: Arc<Image>,
    /// Where the bytes of the disk are in the image.
    pub(crate) layout: Layout,
    read_only: bool,
    discard: Discard,
    is_inline: bool,
    /// Data goes through buffers, so that requests can be suspended.
    expects_suspend: AtomicBool,
}

impl Disk {
    /// Opens and locks the image. With `incoming` another program may have it; see [`lock`].
    ///
    /// # Errors
    /// One line that names the image, what is wrong with it, and what to do.
    pub fn open(
        source: Source,
        options: &DiskOptions,
        incoming: bool,
        engine: IoEngine,
    ) -> Result<Self, StartError> {
        let image = Image::open(source, options, incoming)?;
        log::debug!(
            "{}: {} bytes{}",
            image.source,
            image.size(),
            if options.read_only { ", read-only" } else { "" }
        );
        Ok(Self {
            layout: Layout::Flat,
            read_only: options.read_only,
            discard: options.discard,
            // Operations on memory wait for nothing.
            is_inline: image.in_memory && engine == IoEngine::Auto,
            expects_suspend: AtomicBool::new(false),
            image: Arc::new(image),
        })
    }

    /// Returns the size of the disk in bytes: whole logical blocks. It only grows.
    #[inline]
    pub fn size(&self) -> u64 {
        self.image.size()
    }

    /// Returns the size of a physical block in bytes, to which the guest aligns.
    pub fn physical_block_size(&self) -> u32 {
        self.image.physical_block_size
    }

    /// Returns whether the medium rotates; `None` if the host does not tell.
    pub fn rotational(&self) -> Option<bool> {
        self.image.topology.rotational
    }

    /// Returns the best size of a transfer in bytes; 0 if there is none.
    pub fn optimal_io_size(&self) -> u32 {
        self.image.topology.optimal_io_size
    }

    /// Returns whether this program has the image: no other program has taken it over.
    pub fn has_image(&self) -> bool {
        self.image.lock.is_held()
    }

    /// Returns where the image comes from.
    pub fn source(&self) -> &Source {
        &self.image.source
    }

    /// Makes a serial number of twenty characters from the identity of the image.
    pub fn serial(&self) -> String {
        self.image.identity.serial()
    }

    /// Returns the access of a queue thread, which is not open yet.
    pub fn access(&self) -> Access {
        Access::new(&self.image.lock)
    }

    /// Carries out `operation` and waits for it. Returns the bytes that were read or written.
    ///
    /// # Errors
    /// It failed, or it is a flush or a write-through write and an earlier one failed.
    pub fn execute(&self, operation: Operation<'_>) -> io::Result<u64> {
        self.image.execute(operation)
    }

    /// Returns whether operations are carried out at once, in the thread of the queue.
    #[inline]
    pub fn is_inline(&self) -> bool {
        self.is_inline
    }

    /// Sets whether requests that begin from now on may be suspended while an operation is in flight. Their data then goes through a
    /// buffer of this process, because the kernel cannot be stopped from writing guest memory.
    pub fn expect_suspend(&self, expected: bool) {
        self.expects_suspend.store(expected, Ordering::Relaxed);
    }

    /// Checks that the disk has `length` bytes at `offset`.
    ///
    /// # Errors
    /// It does not.
    #[inline]
    pub fn check_range(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        match offset.checked_add(length) {
            Some(end) if end <= self.size() => Ok(()),
            _ => Err(DiskError::OutOfRange),
        }
    }

    /// Checks that the disk may be written.
    ///
    /// # Errors
    /// It may not.
    #[inline]
    pub fn check_writable(&self) -> Result<(), DiskError> {
        match self.read_only {
            true => Err(DiskError::ReadOnly),
            false => Ok(()),
        }
    }

    /// Returns whether the kernel can and may use this memory for the image without a buffer.
    #[inline]
    pub(crate) fn is_direct(&self, iovecs: &[libc::iovec]) -> bool {
        if self.expects_suspend.load(Ordering::Relaxed) {
            return false;
        }
        let Some(direct) = self.image.direct else {
            return true;
        };
        iovecs.iter().all(|iovec| {
            iovec.iov_base.addr().is_multiple_of(direct.memory as usize)
                && iovec.iov_len.is_multiple_of(direct.offset as usize)
        })
    }

    /// Returns how a range is discarded; `None` if discards are ignored.
    pub(crate) fn discard(&self) -> Option<Range> {
        match (self.discard, self.image.is_device) {
            (Discard::Ignore, _) => None,
            (Discard::Unmap, true) => Some(Range::Discard),
            (Discard::Unmap, false) => Some(Range::Punch),
        }
    }

    /// Returns whether discards reach the storage: the host has them, and the options do not ignore them.
    pub fn discards(&self) -> bool {
        self.discard().is_some() && self.image.discard.is_some()
    }

    /// Returns whether bytes that were discarded are read as zeroes.
    pub fn discarded_reads_zeroes(&self) -> bool {
        self.discard() == Some(Range::Punch)
    }

    /// Returns whether zeroes that a guest writes may give storage back to the host.
    pub fn zeroes_may_unmap(&self) -> bool {
        self.discard == Discard::Unmap
    }

    /// Returns the limits of discards; `None` if the disk has no discards. Those that are ignored have the limits of a file.
    pub fn discard_limits(&self) -> Option<DiscardLimits> {
        let ignored = || DiscardLimits::of_file(self.image.physical_block_size);
        let limits = self.image.discard;
        limits.or_else(|| (self.discard == Discard::Ignore).then(ignored))
    }

    /// Returns whether the disk needs operations that are ioctls, which io_uring does not have.
    pub(crate) fn needs_ioctls(&self) -> bool {
        self.image.is_device && !self.read_only && self.discard == Discard::Unmap
    }

    /// Adds what the disk needs of the sandbox, besides what its engine needs.
    pub fn add_needs(&self, needs: &mut Needs) {
        if self.needs_ioctls() {
            needs.queue.push(discard_call());
            let helper = needs.helper.get_or_insert_default();
            helper.push(discard_call());
        }
        // The last queue that stops releases the image.
        needs.session.extend(lock::calls());
        needs.queue.extend(lock::calls());
        // A queue measures the image that it takes over.
        needs.queue.push(Call::new(libc::SYS_lseek));
        // `reload`.
        let control = [libc::SYS_lseek, libc::SYS_statx, libc::SYS_newfstatat];
        needs.control.extend(control.map(Call::new));
    }

    /// Adds what [`Disk::open`] needs of the sandbox for a file that was passed to this program ([`Source::Passed`]), and what all that is
    /// done with such disks needs: see [`Disk::add_needs`]. For the control thread.
    pub fn add_needs_to_open(needs: &mut Needs) {
        needs.queue.push(discard_call());
        let helper = needs.helper.get_or_insert_default();
        helper.push(discard_call());
        // `extent`.
        helper.push(Call::new(libc::SYS_lseek));
        // The last thread that uses a removed disk releases its image.
        helper.extend(lock::calls());
        needs.session.extend(lock::calls());
        needs.queue.extend(lock::calls());
        needs.queue.push(Call::new(libc::SYS_lseek));
        let plain = [
            libc::SYS_lseek,
            libc::SYS_statx,
            libc::SYS_newfstatat,
            libc::SYS_fstat,
            libc::SYS_fstatfs,
            libc::SYS_pread64,
            libc::SYS_ftruncate,
            libc::SYS_fdatasync,
        ];
        needs.control.extend(plain.map(Call::new));
        needs.control.extend(lock::calls());
        let commands = [libc::F_GETFL, libc::F_SETFL, libc::F_DUPFD_CLOEXEC];
        let fcntl = |command: i32| Call::new(libc::SYS_fcntl).with(1, command as u32);
        needs.control.extend(commands.map(fcntl));
        needs.control.extend(measure_calls());
        // The limits of a block device are in sysfs.
        const NO_READING: u64 = (libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC) as u64;
        let read = Call::new(libc::SYS_openat).with_bits(2, NO_READING, 0);
        needs.control.push(read);
        let folders = FOLDERS.map(|folder| (folder.into(), FileAccess::READ));
        needs.files.extend(folders);
    }

    /// Makes the image of a raw file larger, and the disk with it: both have `size` bytes afterwards, or more.
    ///
    /// # Errors
    /// What is wrong: the image cannot grow, or is larger already.
    pub fn grow(&self, size: u64) -> Result<(), String> {
        let source = &self.image.source;
        if self.image.is_device {
            return Err(format!(
                "{source}: a block device; change its size with its own tools, then repeat this command without a size"
            ));
        }
        if size < self.size() {
            return Err(format!(
                "{source}: the disk has {} bytes, and cannot shrink",
                self.size()
            ));
        }
        let failed = |errno: Errno| format!("{source}: cannot change its length: {errno}");
        let length = seek(&self.image.file, SeekFrom::End(0)).map_err(failed)?;
        if size > length {
            ftruncate(self.image.file.as_fd(), size).map_err(failed)?;
        }
        Ok(())
    }

    /// Returns whether the image has storage for the bytes at `offset`, which is inside the disk, and for how many bytes from there the
    /// same is true. May block.
    ///
    /// # Errors
    /// The host cannot tell.
    pub fn extent(&self, offset: u64) -> io::Result<(bool, u64)> {
        let left = self.size().saturating_sub(offset);
        if left == 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let piece = self.layout.find(offset, left);
        let distance = |found: u64| found.saturating_sub(piece.offset).min(piece.length);
        let file = &self.image.file;
        let (is_mapped, length) = match seek(file, SeekFrom::Data(piece.offset)) {
            Err(Errno::NXIO) => (false, piece.length),
            Ok(data) if data > piece.offset => (false, distance(data)),
            Ok(_) => (true, distance(seek(file, SeekFrom::Hole(piece.offset))?)),
            Err(errno) => return Err(errno.into()),
        };
        match length {
            // Somebody has changed the file in between.
            0 => Err(io::Error::other("the file has changed")),
            length => Ok((is_mapped, length)),
        }
    }

    /// Measures the image again, and logs the result; with `silent` only if the size has changed. Returns whether the disk has grown.
    pub fn measure(&self, silent: bool) -> bool {
        let source = &self.image.source;
        match self.image.measure() {
            Ok(Measured::Same) if silent => {}
            Ok(Measured::Same) => {
                log::info!("{source}: the disk keeps its size of {} bytes", self.size())
            }
            Ok(Measured::Grown { before, now }) => {
                log::info!("{source}: the disk grows from {before} to {now} bytes");
                return true;
            }
            Ok(Measured::Smaller { now }) => log::warn!(
                "{source}: the image has only {now} bytes now, but the disk keeps the {} that its guest knows; I/O beyond the end of \
                 the image fails; restore the length of the image, or restart this program and the guest",
                self.size()
            ),
            Err(error) => log::warn!("{source}: cannot measure it: {error}"),
        }
        false
    }

    /// Checks again which file the path names, and measures the image (SIGHUP). Returns whether the disk has grown.
    pub fn reload(&self) -> bool {
        if let Some(what) = self.image.path_change() {
            log::warn!(
                "{}: {what}; the guest keeps the disk that was opened at the start until this program is restarted",
                self.image.source
            );
        }
        self.measure(false)
    }
}
