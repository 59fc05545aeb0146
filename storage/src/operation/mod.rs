// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One operation on the image, and the system calls that carry it out at once.

mod ioctl;

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use rustix::fs::{FallocateFlags, fallocate, fdatasync};
use rustix::io::retry_on_intr;
use vhost_device_common::chain::Chain;
use vm_memory::VolatileMemory;
use vm_memory::mmap::MmapRegion;

use ioctl::discard;
pub use ioctl::{discard_call, is_read_only};

/// Most pieces of memory that Linux takes for one read or write (UIO_MAXIOV).
const MAX_IOVECS: usize = 1024;
/// Most bytes of one read or write: the kernel may move them in the thread that asks for it, which is to hear the session soon.
/// What is left of a larger request is another operation.
pub const MAX_BYTES: usize = 2 << 20;

/// Memory that is read from or written to. It can only be made from what keeps the memory mapped.
#[derive(Clone, Copy)]
pub struct Memory<'a>(Kind<'a>);

#[derive(Clone, Copy)]
enum Kind<'a> {
    Many(&'a [libc::iovec]),
    One(libc::iovec, std::marker::PhantomData<&'a ()>),
}

impl<'a> Memory<'a> {
    /// What the device may still read of a chain; nothing if that is not guest memory.
    pub fn readable(chain: &'a Chain) -> Self {
        Self::of(chain.readable_iovecs().unwrap_or_default())
    }

    /// What the device may still write of a chain; nothing if that is not guest memory.
    pub fn writable(chain: &'a Chain) -> Self {
        Self::of(chain.writable_iovecs().unwrap_or_default())
    }

    /// As many of the first pieces as one operation takes, or a part of the first if that is too large.
    fn of(iovecs: &'a [libc::iovec]) -> Self {
        let mut bytes = 0_usize;
        let fits = |iovec: &&libc::iovec| {
            bytes = bytes.saturating_add(iovec.iov_len);
            bytes <= MAX_BYTES
        };
        let count = iovecs.iter().take(MAX_IOVECS).take_while(fits).count();
        match (count, iovecs.first()) {
            (0, Some(&libc::iovec { iov_base, .. })) => {
                let iov_len = MAX_BYTES;
                let part = libc::iovec { iov_base, iov_len };
                Self(Kind::One(part, std::marker::PhantomData))
            }
            _ => Self(Kind::Many(iovecs.get(..count).unwrap_or(iovecs))),
        }
    }

    /// A part of a buffer of our own; nothing if the buffer is smaller.
    pub fn bounce(buffer: &'a MmapRegion, part: std::ops::Range<usize>) -> Self {
        let valid = part.start <= part.end && part.end <= buffer.len();
        let part = if valid { part } else { 0..0 };
        let iovec = libc::iovec {
            iov_base: buffer.as_ptr().wrapping_add(part.start).cast(),
            iov_len: part.len(),
        };
        Self(Kind::One(iovec, std::marker::PhantomData))
    }

    /// The one piece that it is, or all pieces.
    pub fn pieces(&self) -> Result<libc::iovec, &'a [libc::iovec]> {
        match self.0 {
            Kind::One(iovec, _) | Kind::Many(&[iovec]) => Ok(iovec),
            Kind::Many(iovecs) => Err(iovecs),
        }
    }
}

/// What is to be done with the image. Offsets and lengths are in bytes.
#[derive(Clone, Copy)]
pub enum Operation<'a> {
    /// Reads into memory.
    Read {
        /// Where the data goes.
        to: Memory<'a>,
        /// Where it is in the file.
        offset: u64,
    },
    /// Writes memory; if `stable`, not ended before the data is on stable storage.
    Write {
        /// The data.
        from: Memory<'a>,
        /// Where it goes in the file.
        offset: u64,
        /// Whether it is on stable storage at the end.
        stable: bool,
    },
    /// Brings all that was written to stable storage.
    Flush,
    /// Changes a range without data.
    Allocate {
        /// What becomes of it.
        how: Range,
        /// Where it begins in the file.
        offset: u64,
        /// How long it is.
        length: u64,
    },
}

/// What becomes of a range of the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Range {
    /// Reads as zeroes; its storage goes back to the host.
    Punch,
    /// Reads as zeroes; its storage stays allocated.
    Zero,
    /// Reads as its block device likes; its storage goes back to the host.
    Discard,
}

impl Operation<'_> {
    /// Whether io_uring has no such operation, so that it takes a thread.
    pub fn is_ioctl(&self) -> bool {
        matches!(
            self,
            Operation::Allocate {
                how: Range::Discard,
                ..
            }
        )
    }
}

impl Range {
    /// The mode of fallocate.
    pub fn flags(self) -> FallocateFlags {
        FallocateFlags::KEEP_SIZE
            | match self {
                // The nearest to a discard that is no ioctl.
                Self::Punch | Self::Discard => FallocateFlags::PUNCH_HOLE,
                Self::Zero => FallocateFlags::ZERO_RANGE,
            }
    }
}

/// Carries `operation` out and waits for it. Gives the bytes that were read or written.
pub fn execute(file: &File, operation: Operation<'_>) -> io::Result<u64> {
    let done = |errno: Result<(), rustix::io::Errno>| errno.map(|()| 0).map_err(io::Error::from);
    match operation {
        Operation::Read { to, offset } => vectored(to, |iovecs, count| {
            // SAFETY: the iovecs point to memory that `to` keeps mapped, and that is shared with
            // the guest or ours alone.
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

/// Calls `call` with the pieces of `memory` until no signal interrupts it.
fn vectored(
    memory: Memory<'_>,
    call: impl Fn(*const libc::iovec, i32) -> isize,
) -> io::Result<u64> {
    let one;
    let iovecs = match memory.pieces() {
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

/// A request of a device, which an engine carries out one operation at a time.
pub trait IoRequest {
    /// What is to be done next. The operation borrows from the request, which stays unchanged until it has ended.
    fn operation(&self) -> Operation<'_>;
}

/// For engines without requests.
impl IoRequest for std::convert::Infallible {
    fn operation(&self) -> Operation<'_> {
        match *self {}
    }
}
