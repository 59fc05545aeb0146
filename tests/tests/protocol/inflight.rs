// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The file in which requests under way are noted (INFLIGHT_SHMFD).

use std::os::fd::AsFd;

use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures as ProtocolFeatures};
use vhost_device_tests::target::Target;

use crate::{Message, Peer, assert_refused, start};

/// The payload of GET_INFLIGHT_FD and SET_INFLIGHT_FD.
fn description(size: u64, offset: u64, queues: u16, queue_size: u16) -> Vec<u8> {
    let mut payload = [size, offset].map(u64::to_ne_bytes).concat();
    payload.extend([queues, queue_size].map(u16::to_ne_bytes).concat());
    payload
}

/// Bytes of the region of a split ring, which begins at a multiple of 64.
fn region(queue_size: u64) -> u64 {
    (16 + 16 * queue_size).next_multiple_of(64)
}

fn has_inflight(target: &dyn Target, test: &str) -> bool {
    Peer::new(&target.start()).has(ProtocolFeatures::INFLIGHT_SHMFD, target, test)
}

fn a_file_has_room_for_what_was_asked_and_is_empty(target: &dyn Target) {
    if !has_inflight(target, "a_file_has_room_for_what_was_asked_and_is_empty") {
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
            let length = u64::from(queues) * region(size.into());
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
    const TEST: &str = "a_malformed_description_is_refused";
    if !has_inflight(target, TEST) {
        return;
    }
    let queues = Peer::new(&target.start()).queues as u16;
    let file = || rustix::fs::memfd_create("inflight", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let sized = |length| {
        let file = file();
        rustix::fs::ftruncate(&file, length).unwrap();
        file
    };
    assert_refused(
        target,
        |_| {},
        |_| {
            let set = |what, payload| Message::new(what, FrontendReq::SET_INFLIGHT_FD, payload);
            let good = region(64);
            vec![
                set("no queues", description(good, 0, 0, 64)).with(sized(good)),
                set(
                    "queues that are not there",
                    description(1 << 30, 0, queues + 1, 64),
                )
                .with(sized(1 << 30)),
                set("no descriptors", description(good, 0, 1, 0)).with(sized(good)),
                set("63 descriptors", description(good, 0, 1, 63)).with(sized(good)),
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
            ]
        },
    );
}

crate::for_each_target![
    a_file_has_room_for_what_was_asked_and_is_empty,
    a_malformed_description_is_refused,
];
