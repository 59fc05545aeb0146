// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The rings of io_uring. They are created, and restricted to what the engine does, before the sandbox is entered: afterwards no thread
//! can create a ring or lift the restrictions of one. A queue thread takes a ring, and returns it when it ends.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, squeue};
use rustix::fs::{Mode, OFlags, fcntl_getfl};

use crate::image::Image;

/// Submission entries, which count as locked memory. Operations that do not fit are submitted early.
const ENTRIES: u32 = 64;
/// Completion entries: one for each operation that may be in flight. The kernel keeps what does not fit.
const COMPLETIONS: u32 = super::slots::DEPTH as u32;

/// Operations that a ring carries out. The kernel refuses others, which the filter of system calls does not see.
pub const OPERATIONS: [u8; 8] = [
    opcode::Read::CODE,
    opcode::Readv::CODE,
    opcode::Write::CODE,
    opcode::Writev::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
    opcode::PollAdd::CODE,
    opcode::PollRemove::CODE,
];

/// A ring. If the engine was opened for one image, that is its registered file 0.
pub struct Ring {
    pub uring: IoUring,
    /// A flag in shared memory shows that completions are waiting, so there is no need to ask the kernel.
    pub tells: bool,
}

impl Ring {
    fn new(image: Option<&File>, operations: &[u8]) -> io::Result<Self> {
        let mut builder = IoUring::builder();
        builder.setup_r_disabled().setup_cqsize(COMPLETIONS);
        let plain = builder.clone();
        builder.setup_coop_taskrun().setup_taskrun_flag();
        let (uring, tells) = match builder.build(ENTRIES) {
            // Kernels before 5.19 do not support these flags.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                (plain.build(ENTRIES)?, false)
            }
            built => (built?, true),
        };
        let submitter = uring.submitter();
        if let Some(image) = image {
            // The kernel reports lost data once for each open file. Of threads that share one, only one would notice.
            let own = reopen(image).or_else(|error| {
                log::debug!(
                    "cannot open the image once more, so rings share one open file: {error}"
                );
                image.try_clone()
            })?;
            submitter.register_files(&[own.as_raw_fd()])?;
        }
        let allowed = operations.iter().copied().map(Restriction::sqe_op);
        let mut restrictions = Vec::from_iter(allowed);
        restrictions.push(Restriction::sqe_flags_allowed(
            squeue::Flags::FIXED_FILE.bits(),
        ));
        submitter.register_restrictions(&mut restrictions)?;
        submitter.register_enable_rings()?;
        Ok(Self { uring, tells })
    }
}

/// Opens the same file again with the same flags, except O_NONBLOCK: operations must wait.
fn reopen(file: &File) -> io::Result<File> {
    let flags = fcntl_getfl(file)? - OFlags::NONBLOCK;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let opened = rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty())?;
    Ok(File::from(opened))
}

/// The rings of a device.
pub struct Rings {
    /// Rings that no thread uses now.
    idle: Mutex<Vec<Ring>>,
    /// The registered image of all rings, if they have one.
    pub(super) image: Option<Arc<Image>>,
}

impl Rings {
    /// Creates up to `most` rings, at least one, for these operations: on `image`, or on the disks that requests name. Returns their number
    /// too.
    ///
    /// # Errors
    /// This host refuses io_uring, or does not have all that the engine needs.
    pub(super) fn create(
        image: Option<&Arc<Image>>,
        most: u16,
        operations: &[u8],
    ) -> io::Result<(Arc<Self>, u16)> {
        let file = image.map(|image| &image.file);
        let mut rings = vec![Ring::new(file, operations)?];
        let mut count = 1;
        while count < most {
            match Ring::new(file, operations) {
                Ok(ring) => rings.push(ring),
                Err(error) => {
                    log::warn!(
                        "only {count} of {most} rings of io_uring could be created; queues share them: {}",
                        explain(&error)
                    );
                    break;
                }
            }
            count += 1;
        }
        let rings = Arc::new(Self {
            idle: Mutex::new(rings),
            image: image.cloned(),
        });
        Ok((rings, count))
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Ring>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a ring.
    pub fn take(&self) -> Option<Ring> {
        self.lock().pop()
    }

    /// Returns a ring that has nothing in flight.
    pub fn give_back(&self, ring: Ring) {
        self.lock().push(ring);
    }
}

/// Describes an error, and what to do if something can be done.
pub fn explain(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::ENOMEM) => {
            "no more memory may be locked; raise RLIMIT_MEMLOCK (ulimit -l, or LimitMEMLOCK= in a systemd unit)".to_owned()
        }
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    #[test]
    fn an_image_that_is_opened_again_does_not_refuse_to_wait() {
        let image = File::from(memfd_create("image", MemfdFlags::CLOEXEC).unwrap());
        let flags = fcntl_getfl(&image).unwrap();
        rustix::fs::fcntl_setfl(&image, flags | OFlags::NONBLOCK).unwrap();
        let flags = fcntl_getfl(reopen(&image).unwrap()).unwrap();
        assert!(!flags.contains(OFlags::NONBLOCK));
        assert_eq!(flags & OFlags::RWMODE, OFlags::RDWR);
    }
}
