// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A device's handle for its front-end, and the channel behind it (SET_BACKEND_REQ_FD).
//!
//! No call blocks. Any thread can send a request if the channel has room. The session reads the replies while it waits for messages, and
//! adds each to the [`Replies`] of the request.

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

/// Maximum number of requests without a reply.
const MAX_PENDING: usize = 64;
/// Size of a reply in bytes: a header and a u64.
const REPLY_SIZE: usize = HEADER_SIZE + size_of::<u64>();

/// A device's handle for its front-end. It is cheap to clone and works on every thread. Once the connection has ended, its requests fail.
/// The default handle has no front-end.
#[derive(Clone, Debug, Default)]
pub struct FrontEnd(Weak<Channel>);

impl FrontEnd {
    /// Returns the protocol features that the front-end accepted; 0 without a front-end.
    pub fn protocol_features(&self) -> u64 {
        let channel = self.0.upgrade();
        channel.map_or(0, |channel| channel.protocol_features().bits())
    }

    /// Notifies the front-end of a change in the config space (CONFIG_CHANGE_MSG). Never blocks: if the channel is full, the front-end
    /// has an unread notification, or receives this one with the next reply to a request or on the next channel.
    pub fn config_changed(&self) {
        if let Some(channel) = self.0.upgrade() {
            channel.state().notify();
        }
    }

    /// Asks the front-end to map a part of a file into a free part of a shared memory region (SHMEM_MAP). Never blocks: the reply arrives
    /// in `replies` under `number`. The device must not tell the driver about the memory before that.
    ///
    /// When a queue stops, all requests without a reply fail, because the front-end sends no replies until the queue has stopped. If it
    /// maps the file afterwards, the core has it unmapped; until then it may refuse to map the range again. The front-end removes all
    /// mappings when the driver resets the device, and when it disconnects: the device discards its list of mappings in [`Device::reset`](crate::device::Device::reset) and
    /// [`Device::new_driver`](crate::device::Device::new_driver).
    ///
    /// # Errors
    /// The range is not in a region of the device, or the front-end cannot take the request. Nothing was sent, and no reply will arrive.
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

    /// Asks the front-end to remove a mapping of [`FrontEnd::map`] with exactly this range (SHMEM_UNMAP). Never blocks: the reply arrives
    /// in `replies` under `number`. The front-end handles requests in order, so the device can map the range again at once.
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
    /// Stays open until the front-end disconnects: QEMU reports an error when it closes.
    socket: Option<Arc<OwnedFd>>,
    /// The session reads replies. False after an invalid reply.
    is_read: bool,
    /// Requests without a reply, oldest first.
    pending: VecDeque<Pending>,
    /// The first bytes of the next reply, and their number.
    received: [u8; REPLY_SIZE],
    received_size: usize,
    /// A notification is still to be sent: there was no room for it.
    is_notification_due: bool,
    /// The front-end waits for a queue to stop.
    is_stopping: bool,
}

#[derive(Debug)]
struct Pending {
    request: BackendReq,
    range: SharedRange,
    /// Where the reply goes, and the number of the request; `None` once the request has failed.
    reply: Option<(Replies, u64)>,
}

/// A request that the front-end acknowledges.
enum Ask<'a> {
    Map(&'a Mapping<'a>),
    Unmap(SharedRange),
}

impl Channel {
    /// Creates the channel of a device with these shared memory regions. The front-end provides the socket later.
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

    /// Stores the protocol features that the front-end accepted.
    pub fn set_protocol_features(&self, accepted: Protocol) {
        self.protocol_features
            .store(accepted.bits(), Ordering::Relaxed);
    }

    /// Returns the protocol features that the front-end accepted.
    pub fn protocol_features(&self) -> Protocol {
        Protocol::from_bits_retain(self.protocol_features.load(Ordering::Relaxed))
    }

    /// Returns the reply to GET_SHMEM_CONFIG, the size of each region by its id; `None` for a device without regions.
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

    /// SET_BACKEND_REQ_FD: replaces the socket. Requests without a reply fail.
    pub fn set_socket(&self, socket: OwnedFd) {
        let mut state = self.state();
        state.end();
        state.socket = Some(Arc::new(socket));
        // Only requests for shared memory have replies.
        state.is_read = !self.regions.is_empty();
        if state.is_notification_due {
            state.notify();
        }
    }

    /// Closes the socket. Requests without a reply fail.
    pub fn close(&self) {
        let mut state = self.state();
        state.end();
        state.socket = None;
    }

    /// Returns the socket if the session must read replies from it.
    pub fn readable(&self) -> Option<Arc<OwnedFd>> {
        let state = self.state();
        state.socket.clone().filter(|_| state.is_read)
    }

    /// Fails all requests without a reply, and new ones until [`Channel::resume`]: the front-end waits for a queue to stop, and sends no
    /// replies meanwhile.
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

    /// Reads the replies that have arrived. Never blocks.
    pub fn read(&self) {
        let mut state = self.state();
        // A reply can arrive in pieces; the session reads the rest the next time.
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

    /// Checks that the front-end can handle a request for this range.
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
    /// Sends a request. Its reply goes to `reply`, if that is given.
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

    /// Sends a notification of a change in the config space. It asks for no reply: QEMU reads the config space, through the socket that the
    /// session serves, before it replies.
    fn notify(&mut self) {
        let outcome = self.send(BackendReq::CONFIG_CHANGE_MSG, false, &[], None);
        self.is_notification_due = outcome == Err(SharedMemoryError::Busy);
        if let Err(error) = outcome {
            log::debug!("cannot notify the front-end of a change in the config space: {error}");
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
            // The rest of a message cannot follow, and no other error is temporary.
            Ok(false) | Err(_) => {
                self.end();
                self.socket = None;
                Err(SharedMemoryError::Closed)
            }
        }
    }

    /// Reads a reply, or a part of one. Returns whether there may be more. Fails with what is wrong, or with `None` if the front-end has
    /// closed the channel.
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

    /// Passes on the reply to a request.
    fn conclude(&mut self, pending: Pending, is_done: bool) {
        match pending.reply {
            Some((replies, number)) => replies.add(
                number,
                is_done.then_some(()).ok_or(SharedMemoryError::Refused),
            ),
            // The device knows nothing of this mapping.
            None if is_done && pending.request == BackendReq::SHMEM_MAP => {
                if let Err(error) = self.ask(Ask::Unmap(pending.range), None) {
                    warn_limited(format_args!("cannot unmap unused shared memory: {error}"));
                }
            }
            None => {}
        }
        if self.is_notification_due {
            self.notify();
        }
    }

    /// Stops reading replies. Requests without a reply fail.
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

    /// The front-end's end of a channel.
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

        /// Replies to the next request, if there is one, in pieces.
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
        // The generator of Numerical Recipes, always with the same seed.
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
