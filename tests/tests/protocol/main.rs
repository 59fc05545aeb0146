// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The vhost-user protocol as a front-end sees it: every request, well-formed and not.
//!
//! Nothing here depends on the device, so all tests run against several back-ends. Tests of properties that a target does not claim are
//! skipped, and the skips printed.

#![cfg(test)]

mod clients;
mod config;
mod device_state;
mod dirty_log;
mod features;
mod files;
mod framing;
mod hostile;
mod inflight;
mod memory;
mod rings;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures as ProtocolFeatures};
use vhost_device_tests::front_end::connection::{VERSION, payload};
use vhost_device_tests::front_end::device::{RING_PACKED, usual_format};
use vhost_device_tests::front_end::memory::Region;
use vhost_device_tests::front_end::queue::Layout;
use vhost_device_tests::front_end::{Error, GuestMemory, Queue, QueueOptions, RawConnection};
use vhost_device_tests::target::{Claim, Running, Target};
use vmm_sys_util::eventfd::EventFd;

/// Time limit for operations that normally finish at once; generous, for busy machines.
const PATIENCE: Duration = Duration::from_secs(10);

/// Feature bit 30: the back-end has protocol features.
const PROTOCOL_FEATURES: u64 = 1 << 30;

/// Returns the protocol features that these suites use.
fn known_protocol_features() -> ProtocolFeatures {
    ProtocolFeatures::MQ
        | ProtocolFeatures::REPLY_ACK
        | ProtocolFeatures::BACKEND_REQ
        | ProtocolFeatures::CONFIG
        | ProtocolFeatures::RESET_DEVICE
        | ProtocolFeatures::CONFIGURE_MEM_SLOTS
        | ProtocolFeatures::INFLIGHT_SHMFD
        | ProtocolFeatures::DEVICE_STATE
        | ProtocolFeatures::LOG_SHMFD
        | ProtocolFeatures::STATUS
}

/// Starts the target, with a front-end that has negotiated all that it supports.
fn start(target: &dyn Target) -> (Running, Peer) {
    let running = target.start();
    let peer = Peer::new(&running);
    (running, peer)
}

/// A front-end that has negotiated all that it supports.
struct Peer {
    connection: RawConnection,
    /// Features that the back-end offers.
    offered: u64,
    /// Negotiated features: all, but packed rings only if the environment asks for them.
    features: u64,
    /// Negotiated protocol features.
    protocol_features: ProtocolFeatures,
    /// Number of queues, one without MQ.
    queues: u32,
}

impl Peer {
    fn new(running: &Running) -> Self {
        let connection = RawConnection::connect(&running.socket).unwrap();
        let tell = |request, value| {
            connection
                .send(request, VERSION, &payload::u64(value), &[])
                .unwrap()
        };
        let ask = |request| connection.ask(request, &[], &[]).unwrap().u64();
        connection
            .send(FrontendReq::SET_OWNER, VERSION, &[], &[])
            .unwrap();
        let offered = ask(FrontendReq::GET_FEATURES);
        let features = offered & (usual_format() | !RING_PACKED);
        assert_ne!(
            features & PROTOCOL_FEATURES,
            0,
            "the back-end has protocol features"
        );
        let protocol_features =
            ProtocolFeatures::from_bits_retain(ask(FrontendReq::GET_PROTOCOL_FEATURES))
                & known_protocol_features();
        tell(FrontendReq::SET_PROTOCOL_FEATURES, protocol_features.bits());
        let queues = if protocol_features.contains(ProtocolFeatures::MQ) {
            ask(FrontendReq::GET_QUEUE_NUM) as u32
        } else {
            1
        };
        tell(FrontendReq::SET_FEATURES, features);
        Peer {
            connection,
            offered,
            features,
            protocol_features,
            queues,
        }
    }

    /// Returns whether the feature was negotiated; skips the test if not.
    fn has(&self, feature: ProtocolFeatures, target: &dyn Target) -> bool {
        let has = self.protocol_features.contains(feature);
        if !has {
            vhost_device_tests::target::skip(target, &format!("{feature:?}"));
        }
        has
    }

    /// Returns whether rings are packed.
    fn is_packed(&self) -> bool {
        self.features & RING_PACKED != 0
    }

    /// Returns the options of a ring of `size` descriptors for the negotiated features.
    fn queue_options(&self, size: u16) -> QueueOptions {
        QueueOptions {
            size,
            packed: self.is_packed(),
            event_idx: true,
            indirect: 0,
            base: if self.is_packed() { 1 << 15 } else { 0 },
        }
    }

    fn acknowledged(
        &self,
        request: FrontendReq,
        payload: &[u8],
        fds: &[BorrowedFd],
    ) -> Result<u64, Error> {
        self.connection.acknowledged(request, payload, fds)
    }

    /// Sends a request that must be carried out.
    #[track_caller]
    fn done(&self, request: FrontendReq, payload: &[u8], fds: &[BorrowedFd]) {
        self.connection.done(request, payload, fds);
    }

    /// Sends a message that must be carried out.
    #[track_caller]
    fn deliver(&self, message: &Message) {
        self.done(message.request, &message.payload, &message.fds());
    }

    /// Sends a message that may be refused. Returns the acknowledgement.
    fn offer(&self, message: &Message) -> Result<u64, Error> {
        self.acknowledged(message.request, &message.payload, &message.fds())
    }

    /// Creates guest memory, and a ring of `size` descriptors in it that is not set up.
    fn ring(&self, size: u16) -> (GuestMemory, Queue) {
        let memory = GuestMemory::new(&[(0, 1 << 20)]);
        let queue = Queue::new(&memory, self.queue_options(size));
        (memory, queue)
    }

    /// Sets the memory, and starts `queue` as ring 0.
    #[track_caller]
    fn start_ring(&self, memory: &GuestMemory, queue: &Queue) {
        for message in ring_start(self, memory, queue) {
            self.deliver(&message);
        }
    }

    /// Stops a ring. Returns its base (GET_VRING_BASE).
    #[track_caller]
    fn stop(&self, index: u32) -> u32 {
        let reply = self.ask(FrontendReq::GET_VRING_BASE, &payload::vring_state(index, 0));
        let (of, base) = reply.split_at(4);
        assert_eq!(of, index.to_ne_bytes(), "the ring of the reply");
        u32::from_ne_bytes(base.try_into().unwrap())
    }

    /// Sends a request that has a reply of its own. Returns the payload of the reply.
    fn ask(&self, request: FrontendReq, payload: &[u8]) -> Vec<u8> {
        let reply = self.connection.ask(request, payload, &[]);
        reply
            .unwrap_or_else(|error| panic!("{request:?}: {error}"))
            .payload
    }

    /// Asserts that the connection is in step: the next reply is the one that was asked for.
    fn assert_alive(&self) {
        let reply = self.connection.ask(FrontendReq::GET_FEATURES, &[], &[]);
        assert_eq!(
            reply
                .unwrap_or_else(|error| panic!("GET_FEATURES: {error}"))
                .u64(),
            self.offered
        );
    }
}

/// A request with its files.
struct Message {
    what: &'static str,
    request: FrontendReq,
    payload: Vec<u8>,
    files: Vec<OwnedFd>,
}

impl Message {
    fn new(what: &'static str, request: FrontendReq, payload: Vec<u8>) -> Self {
        Message {
            what,
            request,
            payload,
            files: Vec::new(),
        }
    }

    /// Creates SET_MEM_TABLE with these regions.
    fn memory_table(what: &'static str, regions: &[Arc<Region>]) -> Self {
        let infos: Vec<_> = regions.iter().map(|region| region.info()).collect();
        let payload = payload::memory_table(&infos);
        regions.iter().fold(
            Self::new(what, FrontendReq::SET_MEM_TABLE, payload),
            |message, region| message.with(region.file().try_clone().unwrap()),
        )
    }

    fn with(mut self, file: impl Into<OwnedFd>) -> Self {
        self.files.push(file.into());
        self
    }

    fn fds(&self) -> Vec<BorrowedFd<'_>> {
        self.files.iter().map(AsFd::as_fd).collect()
    }
}

/// Asserts that each of the requests that `bad` gives is refused, like in [`assert_refused_after`].
fn assert_refused(target: &dyn Target, bad: impl Fn(&Peer) -> Vec<Message>) {
    assert_refused_after(target, |_| {}, bad);
}

/// Asserts that each of the requests that `bad` gives, sent after `prepare`, is refused: with a NAK if an acknowledgement was asked for, else by the end
/// of the connection. Either way the next connection is served.
fn assert_refused_after(
    target: &dyn Target,
    prepare: impl Fn(&Peer),
    bad: impl Fn(&Peer) -> Vec<Message>,
) {
    let running = target.start();
    let count = bad(&Peer::new(&running)).len();
    for index in 0..count {
        let peer = Peer::new(&running);
        prepare(&peer);
        let case = bad(&peer).swap_remove(index);
        let what = format!("{:?} with {}", case.request, case.what);
        match peer.offer(&case) {
            Ok(acknowledgement) => assert_ne!(acknowledgement, 0, "{what} was accepted"),
            Err(Error::Closed) => assert!(
                !target.claims(Claim::Refusal),
                "{what} ended the connection instead of a NAK"
            ),
            Err(error) => panic!("{what}: {error}"),
        }
        if target.claims(Claim::Refusal) {
            peer.assert_alive();
        }
        drop(peer);

        let peer = Peer::new(&running);
        prepare(&peer);
        let case = bad(&peer).swap_remove(index);
        peer.connection
            .send(case.request, VERSION, &case.payload, &case.fds())
            .unwrap();
        assert!(
            peer.connection.closed(PATIENCE),
            "{what}, no acknowledgement asked for, should end the connection"
        );
    }
    Peer::new(&running);
}

/// Returns the messages that set `peer`'s memory to `memory` and start and enable `queue` as ring 0.
fn ring_start(peer: &Peer, memory: &GuestMemory, queue: &Queue) -> Vec<Message> {
    let table = Message::memory_table("all memory", memory.regions());
    let (size, start) = (queue.options().size, queue.options().start());
    let Layout {
        descriptors,
        avail,
        used,
    } = *queue.layout();
    let user = |address| memory.user_address(address);
    let addresses = payload::vring_addresses(0, 0, user(descriptors), user(used), user(avail), 0);
    let plain = |request, payload| Message::new("ring 0", request, payload);
    let eventfd = |request, eventfd: &EventFd| plain(request, payload::u64(0)).with(owned(eventfd));
    vec![
        plain(FrontendReq::SET_FEATURES, payload::u64(peer.features)),
        table,
        plain(
            FrontendReq::SET_VRING_NUM,
            payload::vring_state(0, size.into()),
        ),
        plain(FrontendReq::SET_VRING_BASE, payload::vring_state(0, start)),
        plain(FrontendReq::SET_VRING_ADDR, addresses),
        eventfd(FrontendReq::SET_VRING_CALL, queue.call_fd()),
        eventfd(FrontendReq::SET_VRING_ERR, queue.error_fd()),
        eventfd(FrontendReq::SET_VRING_KICK, queue.kick_fd()),
        plain(FrontendReq::SET_VRING_ENABLE, payload::vring_state(0, 1)),
    ]
}

#[allow(unsafe_code)]
fn owned(eventfd: &EventFd) -> OwnedFd {
    // SAFETY: open for as long as `eventfd` is borrowed, which is longer than this borrow.
    let borrowed = unsafe { BorrowedFd::borrow_raw(eventfd.as_raw_fd()) };
    borrowed.try_clone_to_owned().unwrap()
}

/// Waits until the back-end has read everything, so that later bytes arrive as a separate piece. A back-end that leaves incomplete
/// messages in the socket is not waited for.
#[allow(unsafe_code)]
fn wait_until_read(connection: &RawConnection) {
    let deadline = Instant::now() + Duration::from_millis(50);
    let mut unread: libc::c_int = 1;
    while unread != 0 && Instant::now() < deadline {
        // SAFETY: TIOCOUTQ writes an int, which `unread` is.
        let result = unsafe {
            libc::ioctl(
                connection.socket().as_raw_fd(),
                libc::TIOCOUTQ,
                &raw mut unread,
            )
        };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
        std::thread::yield_now();
    }
}

/// Turns each function that takes a [`Target`] into a test for each back-end.
macro_rules! for_each_target {
    ($($tests:tt)+) => {
        vhost_device_tests::tests_with!(block, Block { io_engine: "auto" }, $($tests)+);
        vhost_device_tests::tests_with!(console, Console, $($tests)+);
        vhost_device_tests::tests_with!(gpu, Gpu, $($tests)+);
        vhost_device_tests::tests_with!(reference, Reference, $($tests)+);
        vhost_device_tests::tests_with!(rng, Rng, $($tests)+);
        vhost_device_tests::tests_with!(scsi, Scsi, $($tests)+);
        vhost_device_tests::tests_with!(sound, Sound, $($tests)+);
    };
}
use for_each_target;
