// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Malicious front-ends, and front-ends that disconnect in the middle. Whatever they do, the next one is served, and they leave nothing behind: the
//! harness compares files, threads, mappings and memory at the end of each test with those at its start.
//!
//! Where the invalid parts of the protocol are tested:
//! - headers, sizes, short and long payloads, unexpected requests, files that no message uses, and disconnects in the middle: here;
//!   pieces of messages, and unknown requests: `framing`;
//! - files of the wrong kind, full, closed, blocking, too many to be received, and too many to be opened: `files`;
//! - many clients, silent ones, endless messages, and repeated settings: `clients`; killed front-ends: `killed` of
//!   the suite `ring`;
//! - memory tables and slots: `memory`; memory that is removed under rings and requests: `memory_changes` of the suite `ring`;
//! - vrings, by index, size, base, address and order: `rings`; features, status, reset and the channel of the back-end: `features`; the
//!   config space: `config`;
//! - the inflight region: `inflight`, and the suite `block`; the dirty log: `dirty_log`, and the suite of that name; the state of a
//!   device: `device_state`; the display of a GPU: `answers`, `display`, `fuzz` and `dmabuf` of the suite `gpu`.
//!
//! The module `corrupt` of the suite `ring` lists the attacks of guests on rings and requests.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use fastrand::Rng;
use rustix::event::{EventfdFlags, eventfd};
use vhost::vhost_user::message::FrontendReq;
use vhost_device_tests::front_end::connection::{
    NEED_REPLY, REPLY, VERSION, header, message, payload,
};
use vhost_device_tests::front_end::memory::Region;
use vhost_device_tests::front_end::{Error, RawConnection};
use vhost_device_tests::target::{Claim, Request, Target, claims};

use crate::{Message, PATIENCE, Peer, assert_refused};

/// Every request with a payload, and the size of the payload.
const PAYLOADS: [(FrontendReq, usize); 14] = [
    (FrontendReq::SET_FEATURES, 8),
    (FrontendReq::SET_PROTOCOL_FEATURES, 8),
    (FrontendReq::SET_VRING_NUM, 8),
    (FrontendReq::SET_VRING_ADDR, 40),
    (FrontendReq::SET_VRING_BASE, 8),
    (FrontendReq::GET_VRING_BASE, 8),
    (FrontendReq::SET_VRING_KICK, 8),
    (FrontendReq::SET_VRING_CALL, 8),
    (FrontendReq::SET_VRING_ERR, 8),
    (FrontendReq::SET_VRING_ENABLE, 8),
    (FrontendReq::SET_STATUS, 8),
    (FrontendReq::ADD_MEM_REG, 40),
    (FrontendReq::REM_MEM_REG, 40),
    (FrontendReq::SET_MEM_TABLE, 40),
];

fn a_short_payload_is_refused(target: &dyn Target) {
    assert_refused(target, |_| {
        PAYLOADS
            .into_iter()
            .filter(|&(request, _)| request != FrontendReq::GET_VRING_BASE)
            .flat_map(|(request, size)| {
                [0, 1, size - 1].map(|short| Message::new("too few bytes", request, vec![0; short]))
            })
            .collect()
    });
}

/// A back-end may ignore the bytes, or refuse the message.
fn a_payload_that_is_too_long_does_no_harm(target: &dyn Target) {
    let running = target.start();
    for (request, size) in PAYLOADS
        .into_iter()
        .chain([(FrontendReq::GET_FEATURES, 0), (FrontendReq::SET_OWNER, 0)])
    {
        for surplus in [1, 8, 4000] {
            let peer = Peer::new(&running);
            peer.connection
                .send(request, VERSION | NEED_REPLY, &vec![0; size + surplus], &[])
                .unwrap();
            match peer.connection.receive() {
                Ok(reply) => assert_eq!(
                    (reply.request, reply.flags),
                    (request as u32, VERSION | REPLY)
                ),
                Err(Error::Closed) => continue,
                Err(error) => panic!("{request:?} with {surplus} bytes too many: {error}"),
            }
            if target.claims(Claim::Refusal) {
                peer.assert_alive();
            }
        }
    }
    Peer::new(&running);
}

fn a_header_with_a_huge_size_ends_its_connection_at_once(target: &dyn Target) {
    let running = target.start();
    for size in [u32::MAX, 1 << 31, 1 << 24, 0x1_0000] {
        let peer = Peer::new(&running);
        let header = header(FrontendReq::SET_MEM_TABLE, VERSION | NEED_REPLY, size);
        peer.connection.send_bytes(&header, &[]).unwrap();
        assert!(peer.connection.closed(PATIENCE), "{size} bytes");
    }
    Peer::new(&running);
    let peak = running.program.peak_resident_bytes().unwrap();
    assert!(peak < 128 << 20, "a header made it allocate: {peak} bytes");
}

/// Asserts that a message with these flags ends its connection, and the next connection is served.
fn assert_flags_end_a_connection(target: &dyn Target, flags: &[u32]) {
    let running = target.start();
    for flags in flags {
        let peer = Peer::new(&running);
        peer.connection
            .send(FrontendReq::GET_FEATURES, *flags, &[], &[])
            .unwrap();
        assert!(peer.connection.closed(PATIENCE), "flags {flags:#x}");
    }
    Peer::new(&running);
}

fn a_message_without_version_1_ends_its_connection(target: &dyn Target) {
    assert_flags_end_a_connection(target, &[0, 2, 3, NEED_REPLY, 2 | NEED_REPLY, !VERSION]);
}

/// Bits without a meaning: the message may be answered, or its connection may end.
fn reserved_flags_do_no_harm(target: &dyn Target) {
    let running = target.start();
    for bit in 4..32 {
        let peer = Peer::new(&running);
        peer.connection
            .send(FrontendReq::GET_FEATURES, VERSION | 1 << bit, &[], &[])
            .unwrap();
        match peer.connection.receive() {
            Ok(reply) => assert_eq!(reply.flags, VERSION | REPLY, "flag {bit}"),
            Err(Error::Closed) => continue,
            Err(error) => panic!("flag {bit}: {error}"),
        }
        peer.assert_alive();
    }
    Peer::new(&running);
}

fn a_message_with_the_reply_flag_ends_its_connection(target: &dyn Target) {
    if !claims(target, Claim::RingChecks) {
        return;
    }
    assert_flags_end_a_connection(target, &[VERSION | REPLY, VERSION | REPLY | NEED_REPLY]);
}

fn a_message_cut_short_ends_only_its_connection(target: &dyn Target) {
    let running = target.start();
    let region = Region::new(0, 4096);
    let table = message(
        FrontendReq::SET_MEM_TABLE,
        VERSION,
        &payload::memory_table(&[region.info()]),
    );
    for cut in 1..table.len() {
        let connection = RawConnection::connect(&running.socket).unwrap();
        connection
            .send_bytes(&table[..cut], &[region.file().as_fd()])
            .unwrap();
    }
    Peer::new(&running);
}

fn a_front_end_that_disconnects_before_the_reply_does_no_harm(target: &dyn Target) {
    let running = target.start();
    for _ in 0..50 {
        let connection = RawConnection::connect(&running.socket).unwrap();
        for _ in 0..10 {
            connection
                .send(FrontendReq::GET_FEATURES, VERSION, &[], &[])
                .unwrap();
        }
    }
    Peer::new(&running);
}

/// Sends until the socket is full, and disconnects.
fn a_front_end_that_never_reads_does_no_harm(target: &dyn Target) {
    let running = target.start();
    let mut connection = RawConnection::connect(&running.socket).unwrap();
    connection.set_timeout(Duration::from_millis(100)).unwrap();
    let requests = message(FrontendReq::GET_FEATURES, VERSION, &[]).repeat(100);
    let stuck = (0..100_000).find_map(|_| connection.send_bytes(&requests, &[]).err());
    assert!(matches!(stuck, Some(Error::Timeout(_))), "{stuck:?}");
    drop(connection);
    Peer::new(&running);
}

/// Random bytes, and valid headers before random bytes.
fn garbage_ends_only_its_connection(target: &dyn Target) {
    const CONNECTIONS: u64 = 100;
    let running = target.start();
    for seed in 0..CONNECTIONS {
        let mut random = Rng::with_seed(seed);
        let connection = RawConnection::connect(&running.socket).unwrap();
        for _ in 0..random.usize(1..20) {
            let mut bytes = vec![0; random.usize(1..600)];
            random.fill(&mut bytes);
            if random.u8(..) < 200 && bytes.len() > 12 {
                let request = random.u32(0..46);
                let flags = VERSION | if random.u8(..) < 230 { NEED_REPLY } else { 0 };
                let size = bytes.len() as u32 - 12;
                bytes[..12].copy_from_slice(&header(request, flags, size));
            }
            let region = Region::new(0, 4096);
            let files = vec![region.file().as_fd(); random.usize(0..4)];
            if connection.send_bytes(&bytes, &files).is_err() {
                break;
            }
        }
    }
    Peer::new(&running);
}

fn files_that_a_message_does_not_use_are_closed(target: &dyn Target) {
    if !claims(target, Claim::NoLeak) {
        return;
    }
    let mut running = target.start();
    let peer = Peer::new(&running);
    peer.assert_alive();
    // These are stored once, and replaced later.
    let region = Region::new(0, 4096);
    let eventfd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let needs_one = [
        (FrontendReq::SET_VRING_CALL, payload::u64(0)),
        (FrontendReq::SET_VRING_ERR, payload::u64(0)),
        (FrontendReq::SET_VRING_KICK, payload::u64(0)),
    ];
    for (request, payload) in &needs_one {
        peer.done(*request, payload, &[eventfd.as_fd()]);
    }
    peer.done(
        FrontendReq::SET_MEM_TABLE,
        &payload::memory_table(&[region.info()]),
        &[region.file().as_fd()],
    );
    // They take one file. A message brings more (CVE-2022-0669), or none.
    let inflight = [
        [4096u64, 0].map(u64::to_ne_bytes).concat(),
        vec![1, 0, 64, 0],
    ]
    .concat();
    let log = [4096u64, 0].map(u64::to_ne_bytes).concat();
    for (request, payload) in [
        (FrontendReq::SET_INFLIGHT_FD, &inflight),
        (FrontendReq::SET_LOG_BASE, &log),
    ] {
        let files = [region.file().as_fd()];
        peer.connection.answer(request, payload, &files).unwrap();
    }
    let before = running.program.resources().unwrap();
    for count in [1, 3, 32, 253] {
        let files: Vec<BorrowedFd> = vec![region.file().as_fd(); count];
        for (request, payload) in [
            (FrontendReq::GET_FEATURES, Vec::new()),
            (FrontendReq::SET_VRING_NUM, payload::vring_state(0, 16)),
            (FrontendReq::SET_VRING_CALL, payload::u64(1 << 8)),
            (FrontendReq::SET_STATUS, payload::u64(1)),
            (FrontendReq::SET_INFLIGHT_FD, inflight.clone()),
            (FrontendReq::GET_INFLIGHT_FD, inflight.clone()),
            (FrontendReq::SET_LOG_BASE, log.clone()),
            (
                FrontendReq::ADD_MEM_REG,
                payload::single_region(&region.info()),
            ),
            (
                FrontendReq::REM_MEM_REG,
                payload::single_region(&region.info()),
            ),
        ] {
            peer.connection.answer(request, &payload, &files).unwrap();
        }
        for (request, payload) in &needs_one {
            let files = vec![eventfd.as_fd(); count];
            peer.connection.answer(*request, payload, &files).unwrap();
        }
        // The back-end decides whether this is too many.
        let table = payload::memory_table(&[region.info()]);
        peer.connection
            .answer(FrontendReq::SET_MEM_TABLE, &table, &files)
            .unwrap();
        peer.assert_alive();
    }
    running.program.wait_for_resources(before).unwrap();
}

fn files_with_a_later_piece_of_a_message_are_closed(target: &dyn Target) {
    if !claims(target, Claim::NoLeak) {
        return;
    }
    let mut running = target.start();
    let peer = Peer::new(&running);
    peer.assert_alive();
    let before = running.program.resources().unwrap();
    let region = Region::new(0, 4096);
    let bytes = message(
        FrontendReq::SET_VRING_NUM,
        VERSION | NEED_REPLY,
        &payload::vring_state(0, 16),
    );
    for cut in 1..bytes.len() {
        peer.connection.send_bytes(&bytes[..cut], &[]).unwrap();
        peer.connection
            .send_bytes(&bytes[cut..], &[region.file().as_fd(); 3])
            .unwrap();
        peer.connection.receive().unwrap();
    }
    running.program.wait_for_resources(before).unwrap();
}

fn eventfds_that_are_replaced_are_closed(target: &dyn Target) {
    if !claims(target, Claim::NoLeak) {
        return;
    }
    let mut running = target.start();
    let front_end = running.connect();
    let queue = front_end.queue(0, 16).unwrap();
    let before = running.program.resources().unwrap();
    let raw = front_end.raw().unwrap();
    for _ in 0..20 {
        for (request, eventfd) in [
            (FrontendReq::SET_VRING_CALL, queue.call_fd()),
            (FrontendReq::SET_VRING_ERR, queue.error_fd()),
            (FrontendReq::SET_VRING_KICK, queue.kick_fd()),
        ] {
            let file = crate::owned(eventfd);
            raw.done(request, &payload::u64(0), &[file.as_fd()]);
        }
    }
    running.program.wait_for_resources(before).unwrap();
}

fn a_connection_leaves_no_resources_behind(target: &dyn Target) {
    if !claims(target, Claim::NoLeak) {
        return;
    }
    let mut running = target.start();
    let peer = Peer::new(&running);
    let before = running.program.resources().unwrap();
    drop(peer);
    let whole_session = || {
        let front_end = running.connect();
        let mut queues: Vec<_> = (0..front_end.queue_count().min(target.request_queues()).min(4))
            .map(|index| front_end.queue(index, 64).unwrap())
            .collect();
        let _channel = front_end.back_end_channel();
        let mut request = Request::new(target, front_end.memory());
        for queue in &mut queues {
            request.run(queue, 1);
        }
    };
    for _ in 0..20 {
        whole_session();
        drop(RawConnection::connect(&running.socket).unwrap());
        let connection = RawConnection::connect(&running.socket).unwrap();
        connection
            .send_bytes(&[1, 0, 0], &[Region::new(0, 4096).file().as_fd()])
            .unwrap();
    }
    // Compared in the same situation: one front-end that has only negotiated.
    let _peer = Peer::new(&running);
    running.program.wait_for_resources(before).unwrap();
}

crate::for_each_target![
    a_short_payload_is_refused,
    a_payload_that_is_too_long_does_no_harm,
    a_header_with_a_huge_size_ends_its_connection_at_once,
    a_message_without_version_1_ends_its_connection,
    reserved_flags_do_no_harm,
    a_message_with_the_reply_flag_ends_its_connection,
    a_message_cut_short_ends_only_its_connection,
    a_front_end_that_disconnects_before_the_reply_does_no_harm,
    a_front_end_that_never_reads_does_no_harm,
    garbage_ends_only_its_connection,
    files_that_a_message_does_not_use_are_closed,
    files_with_a_later_piece_of_a_message_are_closed,
    eventfds_that_are_replaced_are_closed,
    a_connection_leaves_no_resources_behind,
];
