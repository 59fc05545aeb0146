// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The io_uring engine. A thread has one ring, on which it also waits for kicks: one system call submits a batch of operations
//! and waits for the next event.

use std::collections::VecDeque;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::types::{Fd, Fixed, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{cqueue, opcode, squeue};
use vhost_device_common::chain::Chain;
use vhost_device_common::warn_limited;
use vhost_device_common::worker::{Poller, Token};

use super::request::{IoRequest, Label};
use super::rings::{Ring, Rings};
use super::slots::{Finished, Slots};
use super::slow;
use crate::image::Image;
use crate::operation::Operation;

/// Operations that are submitted together: the disk works on the first ones of a batch while the rest is taken from the queue.
const PIECE: usize = 4;
/// The image of a device with one disk, in the ring's table of registered files.
const IMAGE: Fixed = Fixed(0);
/// A watch is named by its token in these low bits, and by a number of its own above them.
const TOKEN_BITS: u32 = 40;
/// Marks, in the name of a watch, the completion of its removal. No token has this bit.
const REMOVAL: u64 = 1 << (TOKEN_BITS - 1);
/// How long to wait before a failed watch is armed again. Meanwhile its file counts as ready.
const RETRY: Duration = Duration::from_millis(1);
/// Time limit for the end of all watches.
const PATIENCE: Duration = Duration::from_secs(1);

/// A watched file.
struct Watch {
    fd: RawFd,
    token: Token,
    /// Distinguishes its completions from late ones of an earlier watch with the same token.
    name: u64,
}

/// Carries out operations by io_uring.
pub struct UringEngine<R: IoRequest> {
    /// Returned to `rings` at the end.
    ring: ManuallyDrop<Ring>,
    rings: Arc<Rings>,
    slots: Slots<R>,
    /// Operations that have ended. Their requests keep their slots until they are taken, because the next operation needs one.
    finished: VecDeque<(u32, io::Result<u64>)>,
    /// Slots of operations that the kernel could not start. This thread carries them out, one each time it waits.
    left: VecDeque<u32>,
    /// Slots of operations that begin late, and when: see [`slow`].
    slow: Vec<(Instant, u32)>,
    watched: Vec<Watch>,
    /// Number of watches so far.
    watches: u32,
    /// Number of polls and removals in flight.
    polls: usize,
    /// The engine only tests whether the kernel can watch files. Failures are not worth a warning.
    pub is_probe: bool,
    /// Names of watches that have failed.
    failed: Vec<u64>,
    /// Storage for completions on their way out of the ring.
    completions: Vec<cqueue::Entry>,
}

impl<R: IoRequest> UringEngine<R> {
    /// Takes a ring for an engine.
    ///
    /// # Errors
    /// All rings are in use.
    pub fn new(rings: &Arc<Rings>) -> io::Result<Self> {
        let ring = rings.take();
        let ring = ring.ok_or_else(|| io::Error::other("no ring of io_uring is left"))?;
        Ok(Self {
            ring: ManuallyDrop::new(ring),
            rings: Arc::clone(rings),
            slots: Slots::new(),
            finished: VecDeque::new(),
            left: VecDeque::new(),
            slow: Vec::new(),
            watched: Vec::new(),
            watches: 0,
            polls: 0,
            is_probe: false,
            failed: Vec::new(),
            completions: Vec::new(),
        })
    }

    pub fn has_room(&self) -> bool {
        self.slots.has_room()
    }

    pub fn under_way(&self) -> usize {
        self.slots.len().saturating_sub(self.finished.len())
    }

    pub fn finished(&mut self) -> Option<Finished<R>> {
        let (number, outcome) = self.finished.pop_front()?;
        Some((self.slots.remove(number)?, outcome))
    }

    /// Starts the next operation of `request`. Returns the request if there is no room.
    pub fn submit(&mut self, request: R) -> Option<R> {
        let (number, request) = match self.slots.insert(request) {
            Ok(inserted) => inserted,
            Err(request) => return Some(request),
        };
        if let Some(delay) = slow::delay() {
            self.slow.push((Instant::now() + delay, number));
            return None;
        }
        let entry = entry(request).user_data(Token::Device(number).to_u64());
        self.start(number, &entry);
        None
    }

    /// Starts the operation of the request in slot `number`.
    fn start(&mut self, number: u32, entry: &squeue::Entry) {
        // SAFETY: what the entry points to belongs to the request, which stays in its slot until
        // the completion of this entry is seen, or the ring is gone.
        let pushed = unsafe { self.push(entry) };
        if let Err(error) = pushed {
            log::debug!("an operation cannot be submitted: {error}");
            self.left.push_back(number);
        } else if self.ring.uring.submission().len() >= PIECE {
            self.begin();
        }
    }

    /// Starts the operations that are due. Returns how long the next one waits.
    fn start_slow(&mut self) -> Option<Duration> {
        let now = Instant::now();
        let due: Vec<_> = self.slow.extract_if(.., |(due, _)| *due <= now).collect();
        for (_, number) in due {
            if let Some(request) = self.slots.get(number) {
                let entry = entry(request).user_data(Token::Device(number).to_u64());
                self.start(number, &entry);
            }
        }
        let next = self.slow.iter().map(|(due, _)| *due).min();
        next.map(|due| due.saturating_duration_since(now))
    }

    /// As [`super::Engine::suspend`].
    pub fn suspend(
        &mut self,
        is_one: impl Fn(Label) -> bool,
        mut give: impl FnMut(Chain),
    ) -> usize {
        let is_one = |label: Label| !label.is_abandoned && is_one(label);
        let slots = &mut self.slots;
        self.left.retain(|number| {
            let request = slots.get(*number);
            let keep = !request.is_some_and(|request| is_one(request.label()));
            if !keep {
                let chain = slots.remove(*number).and_then(IoRequest::into_chain);
                chain.into_iter().for_each(&mut give);
            }
            keep
        });
        // Those with operations that continue without the chain.
        let requests = self.slots.iter_mut();
        let picked = requests.filter(|request| is_one(request.label()));
        picked.filter_map(IoRequest::abandon).map(give).count()
    }

    pub fn begin(&mut self) {
        // If this fails, the thread submits the rest when it waits, and handles the error there.
        let _ = self.ring.uring.submit();
    }

    /// # Safety
    /// Everything that the entry points to must stay valid until its completion has been seen.
    unsafe fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        loop {
            // SAFETY: the caller's promise.
            if unsafe { self.ring.uring.submission().push(entry) }.is_ok() {
                return Ok(());
            }
            // The ring is full of entries that were not submitted yet.
            self.ring.uring.submit()?;
        }
    }

    fn push_watch(&mut self, fd: RawFd, name: u64) -> io::Result<()> {
        let entry = opcode::PollAdd::new(Fd(fd), libc::POLLIN as u32)
            .multi(true)
            .build()
            .user_data(name);
        self.push_poll(&entry)
    }

    fn push_removal(&mut self, name: u64) -> io::Result<()> {
        let entry = opcode::PollRemove::new(name)
            .build()
            .user_data(name | REMOVAL);
        self.push_poll(&entry)
    }

    fn push_poll(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        // SAFETY: the entry points to nothing.
        unsafe { self.push(entry) }?;
        self.polls += 1;
        Ok(())
    }

    /// Returns whether no watch has failed.
    pub fn is_watching(&self) -> bool {
        self.failed.is_empty()
    }

    /// Submits everything that was pushed, and waits for one completion unless `timeout` is zero.
    fn enter(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        if timeout == Some(Duration::ZERO) && self.ring.tells {
            let submission = self.ring.uring.submission();
            if submission.is_empty() && !submission.taskrun() && !submission.cq_overflow() {
                return Ok(());
            }
        }
        let submitter = self.ring.uring.submitter();
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

    /// Handles one completion. Returns the token of a watched file that is ready.
    fn reap(&mut self, completion: &cqueue::Entry) -> Option<Token> {
        let (number, result) = (completion.user_data(), completion.result());
        // This is not the name of a watch, which has a number in its upper bits.
        if let Token::Device(slot) = Token::from_u64(number) {
            self.end(slot, result);
            return None;
        }
        let continues = cqueue::more(completion.flags());
        self.polls = self.polls.saturating_sub(usize::from(!continues));
        if number & REMOVAL != 0 {
            // The watch was about to complete, so the kernel did not remove it.
            if result == -libc::EALREADY {
                let _ = self.push_removal(number & !REMOVAL);
            }
            return None;
        }
        let watch = self.watched.iter().find(|watch| watch.name == number)?;
        let (fd, token) = (watch.fd, watch.token);
        let outcome = match result {
            error @ ..0 => Err(io::Error::from_raw_os_error(-error)),
            _ if continues => Ok(()),
            _ => self.push_watch(fd, number),
        };
        if let Err(error) = outcome {
            if self.is_probe {
                log::debug!("cannot watch a file by io_uring: {error}");
            } else {
                warn_limited(format_args!(
                    "cannot wait for kicks: {error}; polling instead, and trying again"
                ));
            }
            self.failed.push(number);
        }
        Some(token)
    }

    /// Arms the first `count` failed watches again.
    fn watch_again(&mut self, count: usize) {
        for name in self.failed.drain(..count).collect::<Vec<_>>() {
            let watch = self.watched.iter().find(|watch| watch.name == name);
            if let Some(fd) = watch.map(|watch| watch.fd)
                && self.push_watch(fd, name).is_err()
            {
                self.failed.push(name);
            }
        }
    }

    /// Carries out an operation that the kernel could not start.
    fn do_here(&mut self) {
        let Some(number) = self.left.pop_front() else {
            return;
        };
        if let Some(request) = self.slots.get(number) {
            let outcome = match self.image(request) {
                Some(image) => image.execute(request.operation()),
                None => Err(io::ErrorKind::NotFound.into()),
            };
            self.finished.push_back((number, outcome));
        }
    }

    /// Returns the image that the operation of `request` is for.
    #[inline]
    fn image<'a>(&'a self, request: &'a R) -> Option<&'a Image> {
        match request.disk() {
            Some(disk) => Some(&disk.image),
            None => self.rings.image.as_deref(),
        }
    }

    /// Waits until no operation is in flight, and removes all watches.
    fn end_all(&mut self) -> io::Result<()> {
        while let Some(watch) = self.watched.pop() {
            self.push_removal(watch.name)?;
        }
        let mut deadline = None;
        loop {
            while self.finished().is_some() {}
            if !self.slots.is_empty() {
                self.wait(&mut Vec::new(), None)?;
            } else if self.polls == 0 {
                return Ok(());
            } else if *deadline.get_or_insert_with(|| Instant::now() + PATIENCE) > Instant::now() {
                self.wait(&mut Vec::new(), Some(PATIENCE))?;
            } else {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
    }

    /// Records that the operation of the request in `slot` has ended.
    fn end(&mut self, slot: u32, result: i32) {
        let outcome = match (u64::try_from(result), -result) {
            (Ok(count), _) => Ok(count),
            // The kernel could not start a thread for it.
            (_, libc::ECANCELED | libc::EAGAIN) => return self.left.push_back(slot),
            (_, errno) => Err(io::Error::from_raw_os_error(errno)),
        };
        if let Some(request) = self.slots.get(slot) {
            let outcome = match self.image(request) {
                Some(image) => image.syncs.check(request.operation(), outcome),
                None => outcome,
            };
            self.finished.push_back((slot, outcome));
        }
    }
}

/// Makes the submission entry of the operation of `request`.
#[inline]
fn entry(request: &impl IoRequest) -> squeue::Entry {
    let operation = request.operation();
    match request.disk() {
        None => entry_on(IMAGE, &operation),
        // Without the flag for registered files, the number is that of a descriptor.
        Some(disk) => {
            let descriptor = disk.image.file.as_raw_fd();
            entry_on(Fixed(descriptor as u32), &operation).clear_flags()
        }
    }
}

/// Makes the submission entry of an operation on a registered file.
fn entry_on(file: Fixed, operation: &Operation<'_>) -> squeue::Entry {
    match *operation {
        Operation::Read { to, offset } => match to.iovecs() {
            Ok(one) => opcode::Read::new(file, one.iov_base.cast(), one.iov_len as u32)
                .offset(offset)
                .build(),
            Err(many) => opcode::Readv::new(file, many.as_ptr(), many.len() as u32)
                .offset(offset)
                .build(),
        },
        Operation::Write {
            from,
            offset,
            stable,
        } => {
            let flags = if stable { libc::RWF_DSYNC } else { 0 };
            match from.iovecs() {
                Ok(one) => opcode::Write::new(file, one.iov_base.cast(), one.iov_len as u32)
                    .offset(offset)
                    .rw_flags(flags)
                    .build(),
                Err(many) => opcode::Writev::new(file, many.as_ptr(), many.len() as u32)
                    .offset(offset)
                    .rw_flags(flags)
                    .build(),
            }
        }
        Operation::Flush => opcode::Fsync::new(file).flags(FsyncFlags::DATASYNC).build(),
        Operation::Allocate {
            how,
            offset,
            length,
        } => opcode::Fallocate::new(file, length)
            .offset(offset)
            .mode(how.flags().bits() as i32)
            .build(),
    }
}

impl<R: IoRequest> Poller for UringEngine<R> {
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
        self.push_removal(watch.name)
    }

    fn wait(&mut self, ready: &mut Vec<Token>, timeout: Option<Duration>) -> io::Result<()> {
        // Do not wait while operations have ended, or while this thread has to carry some out.
        let timeout = if self.finished.is_empty() && self.left.is_empty() {
            timeout
        } else {
            Some(Duration::ZERO)
        };
        let timeout = match self.slow.is_empty() {
            true => timeout,
            false => match (self.start_slow(), timeout) {
                (Some(next), Some(timeout)) => Some(next.min(timeout)),
                (next, timeout) => next.or(timeout),
            },
        };
        let failed = self.failed.len();
        let timeout = match failed {
            0 => timeout,
            _ => Some(timeout.map_or(RETRY, |timeout| timeout.min(RETRY))),
        };
        self.enter(timeout)?;
        // Reaping may push, so the queue is emptied first.
        let mut completions = std::mem::take(&mut self.completions);
        completions.extend(self.ring.uring.completion());
        for completion in completions.drain(..) {
            ready.extend(self.reap(&completion));
        }
        self.completions = completions;
        self.do_here();
        if !self.finished.is_empty() {
            ready.push(Token::Device(0));
        }
        self.watch_again(failed);
        Ok(())
    }
}

impl<R: IoRequest> Drop for UringEngine<R> {
    /// Waits for all operations, because closing a ring does not, and their memory must stay until they end. The next engine that takes
    /// the ring must find nothing of this one.
    fn drop(&mut self) {
        let ended = self.end_all();
        if let Err(error) = &ended {
            log::debug!("a ring of io_uring is abandoned: {error}");
            if !self.slots.is_empty() {
                log::error!("cannot wait for operations in flight: {error}");
                // The kernel may still use their memory, so it is never freed.
                std::mem::forget(std::mem::replace(&mut self.slots, Slots::new()));
            }
        }
        // SAFETY: the ring is not used after this.
        let ring = unsafe { ManuallyDrop::take(&mut self.ring) };
        if ended.is_ok() {
            self.rings.give_back(ring);
        }
    }
}
