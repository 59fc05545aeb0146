// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The file that records requests in flight (INFLIGHT_SHMFD).

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures as ProtocolFeatures};
use vhost_device_tests::target::{Request, Target};

use crate::{Message, PATIENCE, Peer, assert_refused, ring_start, start};

/// Encodes GET_INFLIGHT_FD and SET_INFLIGHT_FD.
fn description(size: u64, offset: u64, queues: u16, queue_size: u16) -> Vec<u8> {
    let mut payload = [size, offset].map(u64::to_ne_bytes).concat();
    payload.extend([queues, queue_size].map(u16::to_ne_bytes).concat());
    payload
}

/// Returns the size of the region of a ring, a multiple of 64 bytes.
fn region(peer: &Peer, queue_size: u64) -> u64 {
    let entry = if peer.is_packed() { 32 } else { 16 };
    (entry + entry * queue_size).next_multiple_of(64)
}

/// Size of the note of a device after the regions, in bytes.
const NOTE: u64 = 64;

/// Creates a file of this length.
fn sized(length: u64) -> OwnedFd {
    let file = memfd_create("inflight", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, length).unwrap();
    file
}

fn has_inflight(target: &dyn Target) -> bool {
    Peer::new(&target.start()).has(ProtocolFeatures::INFLIGHT_SHMFD, target)
}

fn a_file_has_room_for_what_was_asked_and_is_empty(target: &dyn Target) {
    if !has_inflight(target) {
        return;
    }
    let (_running, peer) = start(target);
    for (queues, size) in [(1, 1), (1, 128), (peer.queues as u16, 256)] {
        let payload = description(0, 0, queues, size);
        // Some front-ends pad it.
        for payload in [payload.clone(), [payload, vec![0; 4]].concat()] {
            let reply = peer
                .connection
                .ask(FrontendReq::GET_INFLIGHT_FD, &payload, &[])
                .unwrap();
            let length = u64::from(queues) * region(&peer, size.into()) + NOTE;
            let mut expected = description(length, 0, queues, size);
            expected.resize(payload.len(), 0);
            assert_eq!(reply.payload, expected);
            let [file] = <[_; 1]>::try_from(reply.fds).unwrap();
            let mut contents = vec![1; length as usize];
            let read = rustix::io::pread(&file, &mut contents[..], 0).unwrap();
            assert_eq!(read as u64, length);
            assert!(contents.iter().all(|byte| *byte == 0));
            peer.done(FrontendReq::SET_INFLIGHT_FD, &expected, &[file.as_fd()]);
        }
    }
}

fn a_malformed_description_is_refused(target: &dyn Target) {
    if !has_inflight(target) {
        return;
    }
    let queues = Peer::new(&target.start()).queues as u16;
    assert_refused(target, |peer| {
        let set = |what, payload| Message::new(what, FrontendReq::SET_INFLIGHT_FD, payload);
        let good = region(peer, 64);
        let mut bad = vec![
            set("no queues", description(good, 0, 0, 64)).with(sized(good)),
            set(
                "queues that are not there",
                description(1 << 30, 0, queues + 1, 64),
            )
            .with(sized(1 << 30)),
            set("no descriptors", description(good, 0, 1, 0)).with(sized(good)),
            set("a file that is too short", description(good, 0, 1, 64)).with(sized(good - 1)),
            set("a size that is too small", description(good - 1, 0, 1, 64)).with(sized(good)),
            set("an offset past the end", description(good, 64, 1, 64)).with(sized(good)),
            set(
                "an offset that wraps",
                description(good, u64::MAX - 7, 1, 64),
            )
            .with(sized(good)),
            set("an odd offset", description(good, 1, 1, 64)).with(sized(2 * good)),
            set("no file", description(good, 0, 1, 64)),
            set("half a description", vec![0; 10]).with(sized(good)),
        ];
        if !peer.is_packed() {
            bad.push(set("63 descriptors", description(good, 0, 1, 63)).with(sized(good)));
        }
        bad
    });
}

/// Its requests would be lost silently in a crash.
fn a_ring_larger_than_its_inflight_region_does_not_start(target: &dyn Target) {
    if !has_inflight(target) {
        return;
    }
    let (_running, peer) = start(target);
    let keep = |size: u16| {
        let file = sized(region(&peer, size.into()));
        let description = description(region(&peer, size.into()), 0, 1, size);
        let files = [file.as_fd()];
        peer.done(FrontendReq::SET_INFLIGHT_FD, &description, &files);
    };
    let (memory, queue) = peer.ring(64);
    keep(32);
    let mut refused = Vec::new();
    for message in ring_start(&peer, &memory, &queue) {
        let outcome = peer.offer(&message);
        if outcome.unwrap() != 0 {
            refused.push(message.request);
        }
    }
    assert_eq!(refused, [FrontendReq::SET_VRING_KICK]);
    assert!(queue.wait_error(PATIENCE), "ERR is not signalled");
    keep(64);
    peer.start_ring(&memory, &queue);
    assert!(!queue.wait_error(Duration::ZERO));
}

/// The front-end controls the contents of the file: none of it is trusted.
fn invalid_contents_of_the_inflight_file_do_no_harm(target: &dyn Target) {
    const SIZE: u16 = 64;
    if !has_inflight(target) {
        return;
    }
    let running = target.start();
    let mut random = fastrand::Rng::with_seed(3);
    for _ in 0..50 {
        let peer = Peer::new(&running);
        let (memory, queue) = peer.ring(SIZE);
        let length = region(&peer, SIZE.into());
        let mut contents = vec![0; length as usize];
        random.fill(&mut contents);
        // Version 1, and as many descriptors as the ring has.
        contents[8..12].copy_from_slice(&[1u16, SIZE].map(u16::to_ne_bytes).concat());
        let file = sized(length);
        assert_eq!(rustix::io::pwrite(&file, &contents, 0), Ok(contents.len()));
        peer.done(
            FrontendReq::SET_INFLIGHT_FD,
            &description(length, 0, 1, SIZE),
            &[file.as_fd()],
        );
        peer.start_ring(&memory, &queue);
        peer.stop(0);
        peer.assert_alive();
    }
}

/// A front-end can truncate the file that it has shared: an access to the lost part raises SIGBUS.
fn a_truncated_inflight_file_ends_only_its_connection(target: &dyn Target) {
    const SIZE: u16 = 64;
    if !has_inflight(target) {
        return;
    }
    let running = target.start();
    for is_running in [false, true] {
        let peer = Peer::new(&running);
        let (memory, mut ring) = peer.ring(SIZE);
        let length = region(&peer, SIZE.into());
        let file = sized(length);
        peer.done(
            FrontendReq::SET_INFLIGHT_FD,
            &description(length, 0, 1, SIZE),
            &[file.as_fd()],
        );
        let start = || {
            ring_start(&peer, &memory, &ring)
                .into_iter()
                .try_for_each(|message| {
                    let (request, payload) = (message.request, &message.payload);
                    peer.acknowledged(request, payload, &message.fds())
                        .map(drop)
                })
        };
        if is_running {
            start().unwrap();
            ftruncate(&file, 0).unwrap();
            let mut request = Request::new(target, &memory);
            ring.submit(&request.write(1));
        } else {
            ftruncate(&file, 0).unwrap();
            // The connection may end before all messages are sent.
            let _ = start();
        }
        assert!(
            peer.connection.closed(PATIENCE),
            "the connection continues without its inflight region"
        );
        drop(peer);
        let peer = Peer::new(&running);
        ring.reset();
        peer.start_ring(&memory, &ring);
        let mut request = Request::new(target, &memory);
        request.run(&mut ring, 2);
    }
}

crate::for_each_target![
    a_truncated_inflight_file_ends_only_its_connection,
    invalid_contents_of_the_inflight_file_do_no_harm,
    a_ring_larger_than_its_inflight_region_does_not_start,
    a_file_has_room_for_what_was_asked_and_is_empty,
    a_malformed_description_is_refused,
];
