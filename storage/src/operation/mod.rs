// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One operation on an image, and the system calls that carry it out at once.

mod ioctl;

use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::os::fd::AsRawFd;

use rustix::fs::{FallocateFlags, fallocate, fdatasync};
use rustix::io::retry_on_intr;
use vhost_device_common::chain::Chain;
use vm_memory::VolatileMemory;
use vm_memory::mmap::MmapRegion;

use ioctl::discard;
pub(crate) use ioctl::{discard_call, is_read_only, measure_calls};

/// The most iovecs that Linux takes for one read or write (UIO_MAXIOV).
const MAX_IOVECS: usize = 1024;
/// The most bytes of one read or write. The kernel may move them in the calling thread, which must not keep the session waiting; a larger
/// request takes several operations.
pub const MAX_BYTES: usize = 2 << 20;

/// Memory to read from or to write to. It can only be made from what keeps the memory mapped.
#[derive(Clone, Copy)]
pub struct Memory<'a>(Kind<'a>);

#[derive(Clone, Copy)]
enum Kind<'a> {
    Many(&'a [libc::iovec]),
    One(libc::iovec, PhantomData<&'a ()>),
}

impl<'a> Memory<'a> {
    /// Returns the first bytes that the device may still read of a chain, at most `most`; nothing if they are not guest memory.
    pub fn readable(chain: &'a Chain, most: u64) -> Self {
        Self::first(chain.readable_iovecs().unwrap_or_default(), most)
    }

    /// Returns the first bytes that the device may still write of a chain, at most `most`; nothing if they are not guest memory.
    pub fn writable(chain: &'a Chain, most: u64) -> Self {
        Self::first(chain.writable_iovecs().unwrap_or_default(), most)
    }

    /// Returns as many of the first iovecs as one operation takes, or a part of the first one if that is too large.
    fn first(iovecs: &'a [libc::iovec], most: u64) -> Self {
        let most = usize::try_from(most).map_or(MAX_BYTES, |most| most.min(MAX_BYTES));
        let mut bytes = 0_usize;
        let fits = |iovec: &&libc::iovec| {
            bytes = bytes.saturating_add(iovec.iov_len);
            bytes <= most
        };
        let count = iovecs.iter().take(MAX_IOVECS).take_while(fits).count();
        match (count, iovecs.first()) {
            (0, Some(&libc::iovec { iov_base, .. })) => {
                let iov_len = most;
                Self(Kind::One(libc::iovec { iov_base, iov_len }, PhantomData))
            }
            _ => Self(Kind::Many(iovecs.get(..count).unwrap_or(iovecs))),
        }
    }

    /// Returns a part of a buffer of this process; nothing if the buffer is smaller.
    pub fn buffer(buffer: &'a MmapRegion, part: std::ops::Range<usize>) -> Self {
        let valid = part.start <= part.end && part.end <= buffer.len();
        let part = if valid { part } else { 0..0 };
        let iovec = libc::iovec {
            iov_base: buffer.as_ptr().wrapping_add(part.start).cast(),
            iov_len: part.len(),
        };
        Self(Kind::One(iovec, PhantomData))
    }

    /// Returns the only iovec, or all of them.
    pub(crate) fn iovecs(&self) -> Result<libc::iovec, &'a [libc::iovec]> {
        match self.0 {
            Kind::One(iovec, _) | Kind::Many(&[iovec]) => Ok(iovec),
            Kind::Many(iovecs) => Err(iovecs),
        }
    }
}

/// What to do with the image. Offsets and lengths are in bytes.
#[derive(Clone, Copy)]
pub enum Operation<'a> {
    /// Read into memory.
    Read {
        /// Where the data goes.
        to: Memory<'a>,
        /// Where it is in the image.
        offset: u64,
    },
    /// Write memory.
    Write {
        /// The data.
        from: Memory<'a>,
        /// Where it goes in the image.
        offset: u64,
        /// Whether the operation ends only when the data is on stable storage.
        stable: bool,
    },
    /// Bring all that was written to stable storage.
    Flush,
    /// Change a range without data.
    Allocate {
        /// What to change.
        how: Range,
        /// Where the range begins in the image.
        offset: u64,
        /// How long it is.
        length: u64,
    },
}

/// How a range of the image is changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Range {
    /// It reads as zeroes, and its storage goes back to the host.
    Punch,
    /// It reads as zeroes, and its storage stays allocated.
    Zero,
    /// It reads as the block device likes, and its storage goes back to the host.
    Discard,
}

impl Operation<'_> {
    /// Returns whether the operation is an ioctl, which io_uring does not have.
    pub(crate) fn is_ioctl(&self) -> bool {
        matches!(
            self,
            Operation::Allocate {
                how: Range::Discard,
                ..
            }
        )
    }

    /// Returns whether the operation ends only when data is on stable storage.
    pub(crate) fn is_sync(&self) -> bool {
        matches!(
            self,
            Operation::Flush | Operation::Write { stable: true, .. }
        )
    }
}

impl Range {
    /// Returns the mode of fallocate.
    pub(crate) fn flags(self) -> FallocateFlags {
        FallocateFlags::KEEP_SIZE
            | match self {
                // The nearest to a discard that is not an ioctl.
                Self::Punch | Self::Discard => FallocateFlags::PUNCH_HOLE,
                Self::Zero => FallocateFlags::ZERO_RANGE,
            }
    }
}

/// Carries out `operation` and waits for it. Returns the bytes that were read or written.
///
/// # Errors
/// The system call failed.
pub(crate) fn execute(file: &File, operation: Operation<'_>) -> io::Result<u64> {
    let done = |errno: Result<(), rustix::io::Errno>| errno.map(|()| 0).map_err(io::Error::from);
    match operation {
        Operation::Read { to, offset } => vectored(to, |iovecs, count| {
            // SAFETY: the iovecs point to memory that `to` keeps mapped, and that at most the
            // guest uses too.
            unsafe { libc::preadv2(file.as_raw_fd(), iovecs, count, offset as i64, 0) }
        }),
        Operation::Write {
            from,
            offset,
            stable,
        } => vectored(from, |iovecs, count| {
            let flags = if stable { libc::RWF_DSYNC } else { 0 };
            // SAFETY: as above; the kernel only reads.
            unsafe { libc::pwritev2(file.as_raw_fd(), iovecs, count, offset as i64, flags) }
        }),
        Operation::Flush => done(retry_on_intr(|| fdatasync(file))),
        Operation::Allocate {
            how: Range::Discard,
            offset,
            length,
        } => done(retry_on_intr(|| discard(file, offset, length))),
        Operation::Allocate {
            how,
            offset,
            length,
        } => done(retry_on_intr(|| {
            fallocate(file, how.flags(), offset, length)
        })),
    }
}

/// Calls `call` with the iovecs of `memory`, again if a signal interrupts it.
fn vectored(
    memory: Memory<'_>,
    call: impl Fn(*const libc::iovec, i32) -> isize,
) -> io::Result<u64> {
    let one;
    let iovecs = match memory.iovecs() {
        Ok(iovec) => {
            one = [iovec];
            one.as_slice()
        }
        Err(many) => many,
    };
    loop {
        match u64::try_from(call(iovecs.as_ptr(), iovecs.len() as i32)) {
            Ok(count) => return Ok(count),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the lengths of the iovecs that one operation takes.
    fn lengths(iovecs: &[usize], most: u64) -> Vec<usize> {
        let iovec = |&iov_len: &usize| libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len,
        };
        let iovecs: Vec<_> = iovecs.iter().map(iovec).collect();
        match Memory::first(&iovecs, most).iovecs() {
            Ok(one) => vec![one.iov_len],
            Err(many) => many.iter().map(|iovec| iovec.iov_len).collect(),
        }
    }

    #[test]
    fn an_operation_takes_no_more_memory_than_it_may() {
        assert_eq!(lengths(&[100, 200, 300], 600), [100, 200, 300]);
        assert_eq!(lengths(&[100, 200, 300], u64::MAX), [100, 200, 300]);
        assert_eq!(lengths(&[100, 200, 300], 599), [100, 200]);
        assert_eq!(lengths(&[100, 200, 300], 100), [100]);
        assert_eq!(lengths(&[100, 200, 300], 99), [99]);
        assert_eq!(lengths(&[MAX_BYTES + 1], u64::MAX), [MAX_BYTES]);
        assert_eq!(lengths(&[MAX_BYTES, 1], u64::MAX), [MAX_BYTES]);
        assert_eq!(lengths(&[1; MAX_IOVECS + 1], u64::MAX), [1; MAX_IOVECS]);
        assert!(lengths(&[], 1).is_empty());
    }
}
