// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The log of dirty pages (LOG_SHMFD, SET_LOG_BASE). The suite `dirty_log` tests its contents.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures as ProtocolFeatures};
use vhost_device_tests::front_end::connection::{NEED_REPLY, VERSION, payload};
use vhost_device_tests::front_end::{GuestMemory, Queue};
use vhost_device_tests::target::Target;

use crate::{Message, Peer, assert_refused_after, start};

/// Encodes SET_LOG_BASE.
fn description(size: u64, offset: u64) -> Vec<u8> {
    [size, offset].map(u64::to_ne_bytes).concat()
}

fn file(size: u64) -> OwnedFd {
    let file = memfd_create("dirty-log", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, size).unwrap();
    file
}

fn has_log(target: &dyn Target) -> bool {
    Peer::new(&target.start()).has(ProtocolFeatures::LOG_SHMFD, target)
}

/// With the same payload, which some front-ends require, once.
fn a_log_is_answered_whether_an_answer_is_asked_for_or_not(target: &dyn Target) {
    if !has_log(target) {
        return;
    }
    let (_running, peer) = start(target);
    for (size, offset) in [(1, 0), (4096, 0), (4096, 4096), (7, 13)] {
        for flags in [VERSION, VERSION | NEED_REPLY] {
            let (payload, file) = (description(size, offset), file(size + offset));
            let request = FrontendReq::SET_LOG_BASE;
            peer.connection
                .send(request, flags, &payload, &[file.as_fd()])
                .unwrap();
            let reply = peer.connection.receive().unwrap();
            assert_eq!(reply.request, u32::from(request));
            assert_eq!(reply.payload, payload);
            peer.assert_alive();
        }
    }
}

fn a_bad_log_is_refused(target: &dyn Target) {
    if !has_log(target) {
        return;
    }
    let memory = GuestMemory::new(&[(0, 0x20_0000)]);
    assert_refused_after(
        target,
        |peer| {
            let queue = Queue::new(&memory, peer.queue_options(256));
            peer.start_ring(&memory, &queue);
        },
        |_| {
            let set = |what, payload| Message::new(what, FrontendReq::SET_LOG_BASE, payload);
            vec![
                set("no file", description(64, 0)),
                set("a file of no bytes", description(64, 0)).with(file(0)),
                set("a file that is too short", description(64, 0)).with(file(63)),
                set("an offset past the end", description(64, 64)).with(file(127)),
                set("an offset that wraps", description(64, u64::MAX - 63)).with(file(64)),
                set("a size that wraps", description(u64::MAX, 1)).with(file(64)),
                set("no size", description(0, 0)).with(file(64)),
                set("no room for all memory", description(63, 0)).with(file(64)),
                set("a pipe", description(64, 0)).with(rustix::pipe::pipe().unwrap().0),
                set("half a description", vec![0; 8]).with(file(64)),
            ]
        },
    );
}

/// Without LOG_SHMFD the log would be in the memory of the front-end.
fn a_log_without_the_feature_is_refused(target: &dyn Target) {
    if !has_log(target) {
        return;
    }
    let accept = |peer: &Peer| {
        let features = peer.protocol_features - ProtocolFeatures::LOG_SHMFD;
        let features = payload::u64(features.bits());
        peer.done(FrontendReq::SET_PROTOCOL_FEATURES, &features, &[]);
    };
    assert_refused_after(target, accept, |_| {
        let set = |what, payload| Message::new(what, FrontendReq::SET_LOG_BASE, payload);
        vec![
            set("an address", payload::u64(0x1000)),
            set("a file all the same", description(64, 0)).with(file(64)),
        ]
    });
}

crate::for_each_target![
    a_log_is_answered_whether_an_answer_is_asked_for_or_not,
    a_bad_log_is_refused,
    a_log_without_the_feature_is_refused,
];
