// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A device's handle for its front-end, and the channel behind it (SET_BACKEND_REQ_FD).
//!
//! Nothing here waits. Any thread sends a request if the channel has room. The session reads the replies while it waits for messages,
//! and hands each to the [`Replies`] of the request.

use std::collections::VecDeque;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use rustix::io::{Errno, retry_on_intr};
use rustix::net::{RecvFlags, recv};
use vhost::vhost_user::message::{
    BackendReq, VhostUserMMap, VhostUserMMapFlags, VhostUserProtocolFeatures as Protocol,
    VhostUserShMemConfig,
};
use vm_memory::ByteValued;

use super::message::{BackEndRequest, FLAG_REPLY, HEADER_SIZE, VERSION, leading_object};
use super::shared_memory::{
    Mapping, Replies, SharedMemoryError, SharedRange, SharedRegion, is_whole_pages,
};
use crate::log_limit::warn_limited;

/// Requests that may wait for replies at the same time.
const MAX_PENDING: usize = 64;
/// Bytes of a reply: a header and a u64.
const REPLY_SIZE: usize = HEADER_SIZE + size_of::<u64>();

/// A device's handle for its front-end. It is cheap to clone, works on every thread, and does nothing once the connection has ended.
/// The default handle has no front-end.
#[derive(Clone, Debug, Default)]
pub struct FrontEnd(Weak<Channel>);

impl FrontEnd {
    /// Returns the protocol features that the front-end accepted; 0 without a front-end.
    pub fn protocol_features(&self) -> u64 {
        let channel = self.0.upgrade();
        channel.map_or(0, |channel| channel.protocol_features().bits())
    }

    /// Tells the front-end that the config space has changed (CONFIG_CHANGE_MSG). Never waits: if the channel is full, the front-end has
    /// unread notifications already, or gets this one later.
    pub fn config_changed(&self) {
        if let Some(channel) = self.0.upgrade() {
            channel.state().notify();
        }
    }

    /// Asks the front-end to map a part of a file into a shared memory region (SHMEM_MAP), where nothing may be mapped yet. Never waits:
    /// the reply comes to `replies` under `number`, when the front-end finds the time. Until then the guest must not be told that the
    /// memory is there.
    ///
    /// When a queue stops, the requests without a reply fail, because the front-end replies to none until the queue has stopped: what it
    /// maps nevertheless is unmapped. A front-end unmaps all when its driver resets the device, and when it goes away: a device forgets
    /// its mappings in [`Device::reset`](crate::device::Device::reset) and [`Device::new_driver`](crate::device::Device::new_driver).
    ///
    /// # Errors
    /// Nothing was sent, and no reply will come: the range is not in a region of the device, or the front-end cannot take the request.
    pub fn map(
        &self,
        mapping: &Mapping<'_>,
        replies: &Replies,
        number: u64,
    ) -> Result<(), SharedMemoryError> {
        let channel = self.0.upgrade().ok_or(SharedMemoryError::Closed)?;
        if !is_whole_pages(mapping.file_offset) {
            return Err(SharedMemoryError::Range);
        }
        channel.check(mapping.range)?;
        let mut state = channel.state();
        match state.is_stopping {
            true => Err(SharedMemoryError::Stopped),
            false => state.ask(Ask::Map(mapping), Some((replies.clone(), number))),
        }
    }

    /// Asks the front-end to unmap exactly what [`FrontEnd::map`] mapped (SHMEM_UNMAP). Never waits: the reply comes to `replies` under
    /// `number`. Requests are carried out in order, so that the range can be mapped again at once.
    ///
    /// # Errors
    /// As for [`FrontEnd::map`].
    pub fn unmap(
        &self,
        range: SharedRange,
        replies: &Replies,
        number: u64,
    ) -> Result<(), SharedMemoryError> {
        let channel = self.0.upgrade().ok_or(SharedMemoryError::Closed)?;
        channel.check(range)?;
        let mut state = channel.state();
        let is_stopping = state.is_stopping;
        let reply = (!is_stopping).then(|| (replies.clone(), number));
        state.ask(Ask::Unmap(range), reply)?;
        if is_stopping {
            replies.add(number, Err(SharedMemoryError::Stopped));
        }
        Ok(())
    }
}

/// The session's end of all [`FrontEnd`] handles of its device.
#[derive(Debug)]
pub struct Channel {
    regions: Vec<SharedRegion>,
    protocol_features: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Kept open for as long as the front-end is there: QEMU takes its end for an error.
    socket: Option<Arc<OwnedFd>>,
    /// Replies are read. Not any more once one of them made no sense.
    is_read: bool,
    /// Requests that have no reply yet, in the order in which they were sent.
    pending: VecDeque<Pending>,
    /// The part of a reply that has come, and its length.
    received: [u8; REPLY_SIZE],
    received_size: usize,
    /// There was no room for a notification.
    is_notification_due: bool,
    /// The front-end waits for a queue to stop.
    is_stopping: bool,
}

#[derive(Debug)]
struct Pending {
    request: BackendReq,
    range: SharedRange,
    /// Who waits for the reply, and by which number; `None` once nobody does.
    reply: Option<(Replies, u64)>,
}

/// A request that is acknowledged.
enum Ask<'a> {
    Map(&'a Mapping<'a>),
    Unmap(SharedRange),
}

impl Channel {
    /// A channel of a device that declares `regions`, until the front-end provides a socket.
    pub fn new(regions: Vec<SharedRegion>) -> Arc<Self> {
        Arc::new(Self {
            regions,
            protocol_features: AtomicU64::new(0),
            state: Mutex::default(),
        })
    }

    /// Returns a handle for the device.
    pub fn handle(self: &Arc<Self>) -> FrontEnd {
        FrontEnd(Arc::downgrade(self))
    }

    pub fn set_protocol_features(&self, accepted: Protocol) {
        self.protocol_features
            .store(accepted.bits(), Ordering::Relaxed);
    }

    pub fn protocol_features(&self) -> Protocol {
        Protocol::from_bits_retain(self.protocol_features.load(Ordering::Relaxed))
    }

    /// Returns the reply to GET_SHMEM_CONFIG: the size of each region, by its id.
    pub fn shared_memory_config(&self) -> Option<VhostUserShMemConfig> {
        let mut sizes = [0; 256];
        for region in &self.regions {
            if let Some(size) = sizes.get_mut(usize::from(region.id)) {
                *size = region.size;
            }
        }
        let count = sizes.iter().filter(|size| **size > 0).count();
        (count > 0).then(|| VhostUserShMemConfig::new(count as u32, &sizes))
    }

    /// Uses another socket from now on. Requests without a reply fail.
    pub fn set_socket(&self, socket: OwnedFd) {
        let mut state = self.state();
        state.end();
        state.socket = Some(Arc::new(socket));
        // Only requests for shared memory have replies.
        state.is_read = !self.regions.is_empty();
    }

    /// The front-end goes away. Requests without a reply fail.
    pub fn close(&self) {
        let mut state = self.state();
        state.end();
        state.socket = None;
    }

    /// Returns the socket, if replies are to be read from it.
    pub fn readable(&self) -> Option<Arc<OwnedFd>> {
        let state = self.state();
        state.socket.clone().filter(|_| state.is_read)
    }

    /// Fails all requests without a reply, and new ones, until [`Channel::resume`]: the front-end waits for a queue to stop, and replies
    /// to nothing meanwhile.
    pub fn give_up(&self) {
        let mut state = self.state();
        state.is_stopping = true;
        for (replies, number) in state.pending.iter_mut().filter_map(|one| one.reply.take()) {
            replies.add(number, Err(SharedMemoryError::Stopped));
        }
    }

    /// Ends [`Channel::give_up`].
    pub fn resume(&self) {
        self.state().is_stopping = false;
    }

    /// Reads the replies that have come. Never waits.
    pub fn read(&self) {
        let mut state = self.state();
        // There are no more than this.
        for _ in 0..=2 * MAX_PENDING {
            match state.read() {
                Ok(true) => {}
                Ok(false) => return,
                Err(problem) => {
                    if let Some(problem) = problem {
                        warn_limited(format_args!(
                            "front-end: {problem} on the back-end channel; no further shared memory can be mapped"
                        ));
                    }
                    return state.end();
                }
            }
        }
    }

    /// Whether the front-end can be asked for something in this range.
    fn check(&self, range: SharedRange) -> Result<(), SharedMemoryError> {
        let needed = Protocol::SHMEM | Protocol::BACKEND_REQ | Protocol::REPLY_ACK;
        if !range.is_in(&self.regions) {
            Err(SharedMemoryError::Range)
        } else if !self.protocol_features().contains(needed) {
            Err(SharedMemoryError::Unsupported)
        } else {
            Ok(())
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        self.close();
    }
}

impl State {
    /// Sends a request whose reply is to come to `reply`, if anybody waits for it.
    fn ask(
        &mut self,
        ask: Ask<'_>,
        reply: Option<(Replies, u64)>,
    ) -> Result<(), SharedMemoryError> {
        if !self.is_read {
            return Err(SharedMemoryError::Closed);
        }
        if self.pending.len() >= MAX_PENDING {
            return Err(SharedMemoryError::Busy);
        }
        let (request, range) = match ask {
            Ask::Map(mapping) => (BackendReq::SHMEM_MAP, mapping.range),
            Ask::Unmap(range) => (BackendReq::SHMEM_UNMAP, range),
        };
        let mut payload = VhostUserMMap {
            shmid: range.region,
            shm_offset: range.offset,
            len: range.length,
            ..VhostUserMMap::default()
        };
        let mut file = None;
        if let Ask::Map(mapping) = ask {
            payload.fd_offset = mapping.file_offset;
            if mapping.writable {
                payload.flags = VhostUserMMapFlags::WRITABLE.bits();
            }
            file = Some(mapping.file);
        }
        self.send(request, true, payload.as_slice(), file)?;
        self.pending.push_back(Pending {
            request,
            range,
            reply,
        });
        Ok(())
    }

    /// Tells of a change in the config space. No reply is asked for: QEMU reads the config space, by the very socket that the session
    /// serves, before it would reply.
    fn notify(&mut self) {
        let outcome = self.send(BackendReq::CONFIG_CHANGE_MSG, false, &[], None);
        self.is_notification_due = outcome == Err(SharedMemoryError::Busy);
        if let Err(error) = outcome {
            log::debug!("the front-end was not told of a change in the config space: {error}");
        }
    }

    fn send(
        &mut self,
        request: BackendReq,
        need_reply: bool,
        payload: &[u8],
        file: Option<BorrowedFd<'_>>,
    ) -> Result<(), SharedMemoryError> {
        let socket = self.socket.as_ref().ok_or(SharedMemoryError::Closed)?;
        let message = BackEndRequest {
            request: request.into(),
            need_reply,
            payload,
            file,
        };
        match message.send(socket) {
            Ok(true) => Ok(()),
            Err(
                Errno::AGAIN | Errno::TOOMANYREFS | Errno::NOBUFS | Errno::NOMEM | Errno::MFILE,
            ) => Err(SharedMemoryError::Busy),
            // Whatever comes after a part of a message makes no sense to the front-end; nor does any other error pass.
            Ok(false) | Err(_) => {
                self.end();
                self.socket = None;
                Err(SharedMemoryError::Closed)
            }
        }
    }

    /// Reads a part of a reply, or the whole. Returns whether there may be more. Fails at the end of the channel, for no other reason
    /// than that the front-end closed it, or for one.
    fn read(&mut self) -> Result<bool, Option<String>> {
        let Some(socket) = self.socket.clone().filter(|_| self.is_read) else {
            return Ok(false);
        };
        let room = self.received.get_mut(self.received_size..);
        let room = room.unwrap_or_default();
        match retry_on_intr(|| recv(&socket, &mut *room, RecvFlags::DONTWAIT)) {
            Ok((_, 0)) => return Err(None),
            Ok((_, count)) => self.received_size = self.received_size.saturating_add(count),
            Err(Errno::AGAIN) => return Ok(false),
            Err(errno) => return Err(Some(errno.to_string())),
        }
        if self.received_size < HEADER_SIZE {
            return Ok(true);
        }
        let [request, flags, size] = leading_object::<[u32; 3]>(&self.received).unwrap_or_default();
        let expected = self.pending.front().map(|pending| pending.request.into());
        if expected != Some(request) || flags != VERSION | FLAG_REPLY || size != 8 {
            let reply = format!("unexpected reply {request} with flags {flags:#x}, {size} bytes,");
            return Err(Some(reply));
        }
        if self.received_size == REPLY_SIZE {
            self.received_size = 0;
            let value = self.received.get(HEADER_SIZE..).and_then(leading_object);
            if let Some(pending) = self.pending.pop_front() {
                self.conclude(pending, value == Some(0u64));
            }
        }
        Ok(true)
    }

    /// The reply to the oldest request has come.
    fn conclude(&mut self, pending: Pending, is_done: bool) {
        match pending.reply {
            Some((replies, number)) => replies.add(
                number,
                is_done.then_some(()).ok_or(SharedMemoryError::Refused),
            ),
            // Nobody knows of it any more.
            None if is_done && pending.request == BackendReq::SHMEM_MAP => {
                if let Err(error) = self.ask(Ask::Unmap(pending.range), None) {
                    warn_limited(format_args!(
                        "shared memory that nobody uses stays mapped: {error}"
                    ));
                }
            }
            None => {}
        }
        if self.is_notification_due {
            self.notify();
        }
    }

    /// Reads no more replies. Requests without one fail.
    fn end(&mut self) {
        self.is_read = false;
        self.received_size = 0;
        for (replies, number) in self.pending.drain(..).filter_map(|one| one.reply) {
            replies.add(number, Err(SharedMemoryError::Closed));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    /// The front-end's end of a channel: reads requests, and replies to them.
    struct Peer {
        socket: UnixStream,
        requests: Vec<u8>,
    }

    impl Peer {
        fn new(channel: &Channel) -> Self {
            let (socket, theirs) = UnixStream::pair().unwrap();
            socket.set_nonblocking(true).unwrap();
            channel.set_socket(theirs.into());
            Self {
                socket,
                requests: Vec::new(),
            }
        }

        /// Replies to the next request, if there is one, with a part of the reply at a time.
        fn reply(&mut self, value: u64, piece: usize, channel: &Channel) {
            let _ = self.socket.read_to_end(&mut self.requests);
            let size = HEADER_SIZE + size_of::<VhostUserMMap>();
            if self.requests.len() < size {
                return;
            }
            let request: Vec<u8> = self.requests.drain(..size).collect();
            let mut reply = request[..4].to_vec();
            reply.extend([VERSION | FLAG_REPLY, 8].map(u32::to_ne_bytes).concat());
            reply.extend(value.to_ne_bytes());
            for piece in reply.chunks(piece) {
                let _ = self.socket.write_all(piece);
                channel.read();
            }
        }
    }

    #[test]
    fn each_request_has_exactly_one_reply_whatever_the_front_end_does() {
        let region = SharedRegion {
            id: 3,
            size: 1 << 30,
        };
        let channel = Channel::new(vec![region]);
        channel.set_protocol_features(Protocol::all());
        let front_end = channel.handle();
        let replies = Replies::new().unwrap();
        let page = rustix::param::page_size() as u64;
        let mut peer = Peer::new(&channel);
        let (mut asked, mut heard) = (Vec::new(), Vec::new());
        // Numbers that are always the same, and look like any (the generator of Numerical Recipes).
        let mut state = 1u32;
        let mut random = |below: u32| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 16) % below
        };
        for number in 0..20_000 {
            let range = SharedRange {
                region: 3,
                offset: u64::from(random(100)) * page,
                length: page,
            };
            let outcome = match random(100) {
                0..40 => front_end.map(
                    &Mapping {
                        range,
                        file: replies.as_fd(),
                        file_offset: 0,
                        writable: false,
                    },
                    &replies,
                    number,
                ),
                40..60 => front_end.unmap(range, &replies, number),
                what => {
                    match what {
                        60..95 => {
                            let (value, piece) = (random(2), random(20) + 1);
                            peer.reply(value.into(), piece as usize, &channel);
                        }
                        95 => channel.give_up(),
                        96..98 => channel.resume(),
                        98 if random(4) == 0 => {
                            let _ = peer.socket.write_all(&[random(256) as u8; 21]);
                            channel.read();
                        }
                        98 => front_end.config_changed(),
                        _ => peer = Peer::new(&channel),
                    }
                    continue;
                }
            };
            if outcome.is_ok() {
                asked.push(number);
            }
            heard.extend(replies.take());
        }
        channel.close();
        heard.extend(replies.take());
        let done = heard.iter().filter(|reply| reply.outcome.is_ok()).count();
        assert!(done > 1000, "{done} requests were carried out");
        let mut numbers: Vec<u64> = heard.iter().map(|reply| reply.number).collect();
        numbers.sort_unstable();
        assert_eq!(numbers, asked);
    }
}
