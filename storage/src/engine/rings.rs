// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The rings of io_uring. They are created, and restricted to what the engine does, before the sandbox is entered: afterwards no thread
//! can create a ring or lift the restrictions of one. A queue thread takes a ring, and returns it when it ends.

use std::convert::Infallible;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, squeue};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{Mode, OFlags, fcntl_getfl};
use vhost_device_common::worker::{Poller, Token};

use super::uring::UringEngine;
use crate::sync::Syncs;

/// Submission entries, which count as locked memory. Operations that do not fit are submitted early.
const ENTRIES: u32 = 64;
/// Completion entries: one for each operation that may be in flight. The kernel keeps what does not fit.
const COMPLETIONS: u32 = super::slots::DEPTH as u32;

/// Operations that a ring carries out. The kernel refuses others, which the filter of system calls does not see.
const OPERATIONS: [u8; 8] = [
    opcode::Read::CODE,
    opcode::Readv::CODE,
    opcode::Write::CODE,
    opcode::Writev::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
    opcode::PollAdd::CODE,
    opcode::PollRemove::CODE,
];

/// How long the kernel may take to report a file that is ready.
const PROBE: Duration = Duration::from_secs(1);

/// A ring. The image is its registered file 0.
pub struct Ring {
    pub uring: IoUring,
    /// A flag in shared memory shows that completions are waiting, so there is no need to ask the kernel.
    pub tells: bool,
}

impl Ring {
    fn new(image: &File, operations: &[u8]) -> io::Result<Self> {
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
        // The kernel reports lost data once for each open file. Of threads that share one, only one would notice.
        let own = reopen(image).or_else(|error| {
            log::debug!("cannot open the image once more, so rings share one open file: {error}");
            image.try_clone()
        })?;
        submitter.register_files(&[own.as_raw_fd()])?;
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

/// The rings for one image.
pub struct Rings {
    /// Rings that no thread uses now.
    idle: Mutex<Vec<Ring>>,
    /// The image, for operations that a ring cannot carry out.
    pub image: File,
    /// Gets the outcome of operations on the image.
    pub syncs: Arc<Syncs>,
}

impl Rings {
    /// Creates up to `most` rings, at least one, for operations on `image`. Returns their number too.
    ///
    /// # Errors
    /// This host refuses io_uring, or does not have all that the engine needs.
    pub fn open(image: &File, syncs: &Arc<Syncs>, most: u16) -> io::Result<(Arc<Self>, u16)> {
        Self::open_for(image, syncs, most, &OPERATIONS)
    }

    fn open_for(
        image: &File,
        syncs: &Arc<Syncs>,
        most: u16,
        operations: &[u8],
    ) -> io::Result<(Arc<Self>, u16)> {
        let mut rings = vec![Ring::new(image, operations)?];
        let mut count = 1;
        while count < most {
            match Ring::new(image, operations) {
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
            image: image.try_clone()?,
            syncs: Arc::clone(syncs),
        });
        probe(&rings)?;
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

/// Does what the engine does all the time: watches a file, and waits with a timeout. Kernels before 5.13 cannot, though they know of
/// restrictions.
fn probe(rings: &Arc<Rings>) -> io::Result<()> {
    let mut engine = UringEngine::<Infallible>::new(rings)?;
    engine.is_probe = true;
    let event = eventfd(1, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    engine.watch(event.as_fd(), Token::Control)?;
    let mut ready = Vec::new();
    engine.wait(&mut ready, Some(PROBE))?;
    if ready != [Token::Control] || !engine.is_watching() {
        return Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "the kernel cannot watch files by io_uring until told otherwise, as Linux 5.13 can",
        ));
    }
    Ok(())
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
    use std::io::Write;
    use std::os::fd::OwnedFd;

    use rustix::fs::{MemfdFlags, memfd_create};
    use rustix::io::{fcntl_dupfd_cloexec, write};

    use super::*;

    /// Numbers of files from here on are used by no other test.
    const HIGH: i32 = 900;
    /// Long enough for what is to come, and short for what is not.
    const SHORT: Duration = Duration::from_millis(20);

    fn image() -> File {
        File::from(memfd_create("image", MemfdFlags::CLOEXEC).unwrap())
    }

    fn syncs() -> Arc<Syncs> {
        Arc::new(Syncs::new(false))
    }

    /// One ring. Where this host has no io_uring the line that `cargo xtask test` counts is written past the capture of the test's output.
    fn ring() -> Option<Arc<Rings>> {
        match Rings::open(&image(), &syncs(), 1) {
            Ok((rings, _)) => Some(rings),
            Err(error) => {
                let _ = writeln!(io::stderr(), "SKIPPED a test: no io_uring: {error}");
                None
            }
        }
    }

    fn event() -> OwnedFd {
        eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
    }

    fn signal(event: &OwnedFd) {
        write(event, &1u64.to_ne_bytes()).unwrap();
    }

    fn wait(engine: &mut UringEngine<Infallible>) -> Vec<Token> {
        let mut ready = Vec::new();
        engine.wait(&mut ready, Some(SHORT)).unwrap();
        ready
    }

    #[test]
    fn an_image_that_is_opened_again_does_not_refuse_to_wait() {
        let image = image();
        let flags = fcntl_getfl(&image).unwrap();
        rustix::fs::fcntl_setfl(&image, flags | OFlags::NONBLOCK).unwrap();
        let flags = fcntl_getfl(reopen(&image).unwrap()).unwrap();
        assert!(!flags.contains(OFlags::NONBLOCK));
        assert_eq!(flags & OFlags::RWMODE, OFlags::RDWR);
    }

    #[test]
    fn a_kernel_that_cannot_watch_files_is_refused() {
        let without = OPERATIONS.map(|operation| match operation {
            opcode::PollAdd::CODE => opcode::PollRemove::CODE,
            other => other,
        });
        if ring().is_some() {
            assert!(Rings::open_for(&image(), &syncs(), 1, &without).is_err());
        }
    }

    #[test]
    fn who_takes_a_ring_finds_nothing_of_who_had_it() {
        let Some(rings) = ring() else { return };
        for event in [event(), event(), event()] {
            let mut engine = UringEngine::<Infallible>::new(&rings).unwrap();
            assert!(
                UringEngine::<Infallible>::new(&rings).is_err(),
                "it is in use"
            );
            assert_eq!(wait(&mut engine), []);
            engine.watch(event.as_fd(), Token::Kick(1)).unwrap();
            assert_eq!(wait(&mut engine), []);
            for _ in 0..2 {
                signal(&event);
                assert_eq!(wait(&mut engine), [Token::Kick(1)]);
            }
            // Neither this, which nobody has waited for, nor what comes next is heard of.
            signal(&event);
            drop(engine);
            signal(&event);
        }
    }

    #[test]
    fn a_file_that_is_forgotten_is_not_heard_of() {
        let Some(rings) = ring() else { return };
        let mut engine = UringEngine::<Infallible>::new(&rings).unwrap();
        let event = event();
        engine.watch(event.as_fd(), Token::Control).unwrap();
        assert_eq!(wait(&mut engine), []);
        engine.forget(event.as_fd(), Token::Control).unwrap();
        assert_eq!(wait(&mut engine), []);
        signal(&event);
        assert_eq!(wait(&mut engine), []);
    }

    #[test]
    fn a_watch_that_failed_counts_as_ready_until_it_is_armed_again() {
        let Some(rings) = ring() else { return };
        let mut engine = UringEngine::<Infallible>::new(&rings).unwrap();
        let event = event();
        let closed = fcntl_dupfd_cloexec(&event, HIGH).unwrap();
        engine.watch(closed.as_fd(), Token::Kick(1)).unwrap();
        drop(closed);
        assert_eq!(wait(&mut engine), [Token::Kick(1)]);
        assert!(!engine.is_watching());
        // Now its number is that of an open file.
        let _open = fcntl_dupfd_cloexec(&event, HIGH).unwrap();
        assert_eq!(wait(&mut engine), []);
        assert!(engine.is_watching());
        for _ in 0..2 {
            signal(&event);
            assert_eq!(wait(&mut engine), [Token::Kick(1)]);
        }
    }
}
