// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The io_uring engine: one ring per queue, on which the queue's thread also waits for kicks. So one
//! system call submits a batch and waits for whatever comes next.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::time::Duration;

use io_uring::register::Restriction;
use io_uring::types::{Fd, Fixed, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};
use vhost_device_common::device::{Call, Needs};
use vhost_device_common::worker::{Poller, Token};

use super::slots::Slots;
use super::{DEPTH, Finished, Operation};
use crate::request::Request;

/// Submission entries: all operations of a queue, and some to watch files.
const ENTRIES: u32 = DEPTH as u32;
/// Operations that are submitted together: the disk begins with the first of a batch while the rest is taken from the queue.
const PIECE: usize = 4;
/// The image, in the ring's table of registered files.
const IMAGE: Fixed = Fixed(0);
/// Marks the completion of the removal of a watch, which is of no interest. No token, and no watch, has this number.
const REMOVED: u64 = u64::MAX;
/// A watch is named by its token in these low bits, and by a number of its own above them.
const TOKEN_BITS: u32 = 40;

/// A file that is waited on.
struct Watch {
    fd: RawFd,
    token: Token,
    /// Tells its completions from those of an earlier watch with the same token, which may still come.
    name: u64,
}

// What is asked of io_uring_register, beside what is on the ring.
const REGISTER_FILES: u32 = 2;
const REGISTER_RESTRICTIONS: u32 = 11;
const REGISTER_ENABLE_RINGS: u32 = 12;

/// Operations that a ring carries out. The kernel refuses others: they are none of the system calls that the process is confined to.
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

/// Rings are made by the thread that serves the front-end, and used by those of the queues.
pub fn add_needs(needs: &mut Needs) {
    let register = |what| Call::new(libc::SYS_io_uring_register).with(1, what);
    needs.session.push(Call::new(libc::SYS_io_uring_setup));
    needs
        .session
        .extend([REGISTER_FILES, REGISTER_RESTRICTIONS].map(register));
    needs.queue.push(register(REGISTER_ENABLE_RINGS));
    needs.queue.push(Call::new(libc::SYS_io_uring_enter));
}

/// Carries operations out by io_uring.
pub struct UringEngine {
    ring: IoUring,
    /// The ring was made by another thread, and is enabled by the one that uses it.
    enabled: bool,
    /// Completions come only when they are asked for, and a flag in shared memory tells of them: there
    /// is no need to ask the kernel.
    tells: bool,
    slots: Slots,
    finished: VecDeque<Finished>,
    watched: Vec<Watch>,
    /// Watches that there have been.
    watches: u32,
    /// Storage for completions on their way out of the ring.
    completions: Vec<cqueue::Entry>,
}

impl UringEngine {
    pub fn new(image: &File) -> io::Result<Self> {
        let mut builder = IoUring::builder();
        builder.setup_r_disabled().setup_cqsize(2 * ENTRIES);
        let plain = builder.clone();
        builder
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag();
        let (ring, tells) = match builder.build(ENTRIES) {
            Ok(ring) => (ring, true),
            // Kernels before 6.1 have not these flags.
            Err(_) => (plain.build(ENTRIES)?, false),
        };
        ring.submitter().register_files(&[image.as_raw_fd()])?;
        restrict(&ring)?;
        Ok(Self {
            ring,
            enabled: false,
            tells,
            slots: Slots::new(),
            finished: VecDeque::new(),
            watched: Vec::new(),
            watches: 0,
            completions: Vec::new(),
        })
    }

    pub fn has_room(&self) -> bool {
        self.slots.has_room()
    }

    pub fn under_way(&self) -> usize {
        self.slots.len()
    }

    pub fn finished(&mut self) -> Option<Finished> {
        self.finished.pop_front()
    }

    pub fn submit(&mut self, request: Request) {
        let Some((number, request)) = self.slots.insert(request) else {
            return;
        };
        let entry = entry(&request.operation()).user_data(Token::Device(number).to_u64());
        // SAFETY: what the entry points to belongs to the request, which stays in its slot until
        // the completion of this entry is seen, or the ring is gone.
        let pushed = unsafe { self.push(&entry) };
        if let Err(error) = pushed {
            if let Some(request) = self.slots.remove(number) {
                self.finished.push_back((request, Err(error)));
            }
        } else if self.ring.submission().len() >= PIECE {
            self.begin();
        }
    }

    pub fn begin(&mut self) {
        if self.enabled {
            // What stays behind is submitted, and an error met again, when the thread waits.
            let _ = self.ring.submit();
        }
    }

    /// # Safety
    /// All that the entry points to must stay valid until its completion was seen.
    unsafe fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        loop {
            // SAFETY: the caller's promise.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return Ok(());
            }
            // The ring is full of entries that the kernel has not seen yet.
            self.enable()?;
            self.ring.submit()?;
        }
    }

    fn push_watch(&mut self, fd: RawFd, name: u64) -> io::Result<()> {
        let entry = opcode::PollAdd::new(Fd(fd), libc::POLLIN as u32)
            .multi(true)
            .build()
            .user_data(name);
        // SAFETY: the entry points to nothing.
        unsafe { self.push(&entry) }
    }

    fn enable(&mut self) -> io::Result<()> {
        if !self.enabled {
            self.ring.submitter().register_enable_rings()?;
            self.enabled = true;
        }
        Ok(())
    }

    /// Submits what was pushed, and waits for one completion unless `timeout` is zero.
    fn enter(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.enable()?;
        if timeout == Some(Duration::ZERO) && self.tells {
            let submission = self.ring.submission();
            if submission.is_empty() && !submission.taskrun() && !submission.cq_overflow() {
                return Ok(());
            }
        }
        let submitter = self.ring.submitter();
        let result = match timeout {
            None => submitter.submit_and_wait(1),
            Some(Duration::ZERO) => submitter.submit(),
            Some(timeout) => {
                let timespec = Timespec::from(timeout);
                submitter.submit_with_args(1, &SubmitArgs::new().timespec(&timespec))
            }
        };
        match result {
            Err(error)
                if !matches!(
                    error.raw_os_error(),
                    Some(libc::EINTR | libc::ETIME | libc::EBUSY | libc::EAGAIN)
                ) =>
            {
                Err(error)
            }
            _ => Ok(()),
        }
    }

    /// Takes one completion; returns the token of a watched file that is ready.
    fn reap(&mut self, completion: &cqueue::Entry) -> Option<Token> {
        let number = completion.user_data();
        if number == REMOVED {
            return None;
        }
        let result = completion.result();
        match Token::from_u64(number & ((1 << TOKEN_BITS) - 1)) {
            Token::Device(slot) => {
                let request = self.slots.remove(slot)?;
                let outcome =
                    u64::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result));
                self.finished.push_back((request, outcome));
                None
            }
            _ => {
                let watch = self.watched.iter().find(|watch| watch.name == number)?;
                let (fd, token) = (watch.fd, watch.token);
                let outcome = match result {
                    error @ ..0 => Err(io::Error::from_raw_os_error(-error)),
                    _ if cqueue::more(completion.flags()) => Ok(()),
                    _ => self.push_watch(fd, number),
                };
                if let Err(error) = outcome {
                    log::error!("cannot wait for kicks any more: {error}");
                }
                (result >= 0).then_some(token)
            }
        }
    }
}

/// Has the kernel refuse, on this ring, all that the engine does not do: io_uring can open files and make sockets too.
fn restrict(ring: &IoUring) -> io::Result<()> {
    let mut restrictions = Vec::from(OPERATIONS.map(Restriction::sqe_op));
    restrictions.push(Restriction::register_op(REGISTER_ENABLE_RINGS as u8));
    restrictions.push(Restriction::sqe_flags_allowed(
        squeue::Flags::FIXED_FILE.bits(),
    ));
    ring.submitter().register_restrictions(&mut restrictions)
}

/// The operation as the kernel takes it.
fn entry(operation: &Operation<'_>) -> squeue::Entry {
    match *operation {
        Operation::Read { to, offset } => match to.pieces() {
            Ok(one) => opcode::Read::new(IMAGE, one.iov_base.cast(), one.iov_len as u32)
                .offset(offset)
                .build(),
            Err(many) => opcode::Readv::new(IMAGE, many.as_ptr(), many.len() as u32)
                .offset(offset)
                .build(),
        },
        Operation::Write {
            from,
            offset,
            stable,
        } => {
            let flags = if stable { libc::RWF_DSYNC } else { 0 };
            match from.pieces() {
                Ok(one) => opcode::Write::new(IMAGE, one.iov_base.cast(), one.iov_len as u32)
                    .offset(offset)
                    .rw_flags(flags)
                    .build(),
                Err(many) => opcode::Writev::new(IMAGE, many.as_ptr(), many.len() as u32)
                    .offset(offset)
                    .rw_flags(flags)
                    .build(),
            }
        }
        Operation::Flush => opcode::Fsync::new(IMAGE)
            .flags(FsyncFlags::DATASYNC)
            .build(),
        Operation::Allocate {
            how,
            offset,
            length,
        } => opcode::Fallocate::new(IMAGE, length)
            .offset(offset)
            .mode(how.flags().bits() as i32)
            .build(),
    }
}

impl Poller for UringEngine {
    fn watch(&mut self, fd: BorrowedFd<'_>, token: Token) -> io::Result<()> {
        let fd = fd.as_raw_fd();
        self.watches = self.watches.wrapping_add(1);
        let name = token.to_u64() | u64::from(self.watches) << TOKEN_BITS;
        self.push_watch(fd, name)?;
        self.watched.push(Watch { fd, token, name });
        Ok(())
    }

    fn forget(&mut self, fd: BorrowedFd<'_>, token: Token) -> io::Result<()> {
        let is_it = |watch: &Watch| (watch.fd, watch.token) == (fd.as_raw_fd(), token);
        let place = self.watched.iter().position(is_it);
        let place = place.ok_or(io::ErrorKind::NotFound)?;
        let watch = self.watched.swap_remove(place);
        let entry = opcode::PollRemove::new(watch.name)
            .build()
            .user_data(REMOVED);
        // SAFETY: the entry points to nothing.
        unsafe { self.push(&entry) }
    }

    fn wait(&mut self, ready: &mut Vec<Token>, timeout: Option<Duration>) -> io::Result<()> {
        // A request that could not be submitted is reported at once.
        let timeout = if self.finished.is_empty() {
            timeout
        } else {
            Some(Duration::ZERO)
        };
        self.enter(timeout)?;
        // Reaping may push, so the queue is emptied first.
        let mut completions = std::mem::take(&mut self.completions);
        completions.extend(self.ring.completion());
        for completion in completions.drain(..) {
            ready.extend(self.reap(&completion));
        }
        self.completions = completions;
        if !self.finished.is_empty() {
            ready.push(Token::Device(0));
        }
        Ok(())
    }
}

impl Drop for UringEngine {
    /// Closing a ring does not wait for its operations; their memory must not go before they end.
    fn drop(&mut self) {
        while !self.slots.is_empty() {
            if let Err(error) = self.wait(&mut Vec::new(), None) {
                log::error!("cannot wait for operations that are under way: {error}");
                // Their memory stays for ever rather than go before they end.
                std::mem::forget(std::mem::replace(&mut self.slots, Slots::new()));
            }
        }
    }
}
