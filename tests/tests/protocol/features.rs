// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Negotiation, status, reset, and the channel for requests of the back-end.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures as ProtocolFeatures};
use vhost_device_tests::front_end::connection::{VERSION, payload};
use vhost_device_tests::front_end::device::{EVENT_IDX, INDIRECT_DESC, VERSION_1};
use vhost_device_tests::front_end::{FrontEnd, GuestMemory, Options, Queue, RawConnection};
use vhost_device_tests::target::{Claim, Request, Target, assert_works, claims};

use crate::{Message, PATIENCE, PROTOCOL_FEATURES, Peer, assert_refused, start};

/// VIRTIO_F_RING_RESET, which some front-ends set even if it was not offered.
const FORCED_FEATURES: u64 = 1 << 40;

fn virtio_1_and_protocol_features_are_offered(target: &dyn Target) {
    let (_running, peer) = start(target);
    let expected = VERSION_1 | EVENT_IDX | INDIRECT_DESC | PROTOCOL_FEATURES;
    assert_eq!(peer.offered & expected, expected);
}

fn features_are_the_same_each_time(target: &dyn Target) {
    let running = target.start();
    let peer = Peer::new(&running);
    peer.assert_alive();
    let features = peer.offered;
    drop(peer);
    assert_eq!(Peer::new(&running).offered, features);
}

/// A front-end may negotiate protocol features before the virtio features.
fn protocol_features_can_be_set_before_features(target: &dyn Target) {
    let running = target.start();
    let connection = RawConnection::connect(&running.socket).unwrap();
    let features = connection
        .ask(FrontendReq::GET_FEATURES, &[], &[])
        .unwrap()
        .u64();
    let protocol = connection
        .ask(FrontendReq::GET_PROTOCOL_FEATURES, &[], &[])
        .unwrap()
        .u64();
    connection
        .send(
            FrontendReq::SET_PROTOCOL_FEATURES,
            VERSION,
            &payload::u64(protocol & 1 << 3),
            &[],
        )
        .unwrap();
    assert_eq!(
        connection
            .acknowledged(FrontendReq::SET_FEATURES, &payload::u64(features), &[])
            .unwrap(),
        0
    );
}

fn features_can_be_set_again(target: &dyn Target) {
    let (_running, peer) = start(target);
    peer.done(
        FrontendReq::SET_FEATURES,
        &payload::u64(peer.features & !EVENT_IDX),
        &[],
    );
    peer.done(FrontendReq::SET_FEATURES, &payload::u64(peer.features), &[]);
}

/// QEMU's vhost-user-gpu sets such bits; a disconnect would end the guest.
fn features_that_were_not_offered_are_not_turned_on(target: &dyn Target) {
    if !claims(target, Claim::Refusal) {
        return;
    }
    let running = target.start();
    let front_end = running.connect();
    assert_eq!(
        front_end.offered() & FORCED_FEATURES,
        0,
        "this test needs bits that are not offered"
    );
    let raw = front_end.raw().unwrap();
    raw.send(
        FrontendReq::SET_FEATURES,
        VERSION,
        &payload::u64(front_end.features() | FORCED_FEATURES),
        &[],
    )
    .unwrap();
    let mut queue = front_end.queue(0, 16).unwrap();
    assert_works(target, front_end.memory(), &mut queue);
}

/// Features that are negotiated while a ring runs apply to rings that start later.
fn features_that_change_while_a_ring_runs_leave_it_alone(target: &dyn Target) {
    if !claims(target, Claim::RingChecks) {
        return;
    }
    let running = target.start();
    let front_end = running.connect();
    let mut queue = front_end.queue(0, 16).unwrap();
    let mut request = Request::new(target, front_end.memory());
    let raw = front_end.raw().unwrap();
    let features = front_end.features();
    for other in [
        features & !EVENT_IDX & !INDIRECT_DESC,
        features & !VERSION_1,
        0,
        u64::MAX,
        features & !PROTOCOL_FEATURES,
        features,
    ] {
        println!("features {other:#x}");
        let payload = payload::u64(other);
        raw.acknowledged(FrontendReq::SET_FEATURES, &payload, &[])
            .unwrap();
        request.run(&mut queue, 1);
    }
}

fn protocol_features_can_be_any_of_those_offered(target: &dyn Target) {
    let (_running, peer) = start(target);
    for bit in 0..64 {
        let wanted = peer.protocol_features.bits() & 1 << bit;
        let payload = payload::u64(wanted);
        peer.connection
            .send(FrontendReq::SET_PROTOCOL_FEATURES, VERSION, &payload, &[])
            .unwrap();
        peer.assert_alive();
    }
}

fn protocol_features_that_were_not_offered_are_refused(target: &dyn Target) {
    if !claims(target, Claim::Refusal) {
        return;
    }
    assert_refused(target, |peer| {
        let agreed = peer.protocol_features.bits();
        let set = |what, features| {
            let payload = payload::u64(features);
            Message::new(what, FrontendReq::SET_PROTOCOL_FEATURES, payload)
        };
        vec![
            set("in-band notifications", agreed | 1 << 14),
            set("in-band notifications alone", 1 << 14),
            set("an unknown bit", agreed | 1 << 63),
            set("all bits", u64::MAX),
        ]
    });
}

fn a_new_connection_starts_without_what_the_last_one_negotiated(target: &dyn Target) {
    let running = target.start();
    let peer = Peer::new(&running);
    peer.done(
        FrontendReq::SET_VRING_BASE,
        &payload::vring_state(0, 7),
        &[],
    );
    drop(peer);
    let peer = Peer::new(&running);
    assert_eq!(
        peer.ask(FrontendReq::GET_VRING_BASE, &payload::vring_state(0, 0)),
        payload::vring_state(0, peer.queue_options(16).start())
    );
}

fn the_status_is_what_was_set(target: &dyn Target) {
    let (_running, peer) = start(target);
    if !peer.has(ProtocolFeatures::STATUS, target) {
        return;
    }
    let status = || u64::from_ne_bytes(peer.ask(FrontendReq::GET_STATUS, &[]).try_into().unwrap());
    assert_eq!(status(), 0, "at the start");
    for value in [1, 3, 8, 0xb, 0xf, 0x80, 0] {
        peer.done(FrontendReq::SET_STATUS, &payload::u64(value), &[]);
        assert_eq!(status(), value);
    }
}

/// Asserts that a request on a new ring is carried out.
fn assert_starts(target: &dyn Target, front_end: &FrontEnd) {
    let mut queue = front_end.queue(0, 16).unwrap();
    assert_works(target, front_end.memory(), &mut queue);
}

/// Asserts that after `request`, which may stop the rings, the device can be set up again on the same connection.
fn assert_usable_after(target: &dyn Target, request: FrontendReq) {
    let running = target.start();
    let front_end = running.connect();
    assert_starts(target, &front_end);
    let raw = front_end.raw().unwrap();
    raw.done(request, &[], &[]);
    raw.send(
        FrontendReq::SET_FEATURES,
        VERSION,
        &payload::u64(front_end.features()),
        &[],
    )
    .unwrap();
    front_end.stop(0).unwrap();
    assert_starts(target, &front_end);
}

fn the_device_can_be_used_again_after_reset_device(target: &dyn Target) {
    let (_running, peer) = start(target);
    if !peer.has(ProtocolFeatures::RESET_DEVICE, target) {
        return;
    }
    assert_usable_after(target, FrontendReq::RESET_DEVICE);
}

fn reset_device_disables_the_rings(target: &dyn Target) {
    let running = target.start();
    if !Peer::new(&running).has(ProtocolFeatures::RESET_DEVICE, target) {
        return;
    }
    let front_end = running.connect();
    let mut queue = front_end.queue(0, 16).unwrap();
    // A back-end may call once when a ring starts.
    let _ = queue.call_fd().read();
    let mut request = Request::new(target, front_end.memory());
    let raw = front_end.raw().unwrap();
    raw.done(FrontendReq::RESET_DEVICE, &[], &[]);
    queue.add(&request.write(1)).unwrap();
    queue.publish();
    queue.kick_anyway();
    assert!(!queue.wait_call(Duration::from_millis(100)));
    request.assert_untouched();
}

fn the_status_is_zero_after_reset_device(target: &dyn Target) {
    let (_running, peer) = start(target);
    if !(peer.has(ProtocolFeatures::RESET_DEVICE, target)
        && peer.has(ProtocolFeatures::STATUS, target))
    {
        return;
    }
    peer.done(FrontendReq::SET_STATUS, &payload::u64(0xf), &[]);
    peer.done(FrontendReq::RESET_DEVICE, &[], &[]);
    assert_eq!(peer.ask(FrontendReq::GET_STATUS, &[]), payload::u64(0));
}

fn reset_owner_leaves_the_connection_usable(target: &dyn Target) {
    if !claims(target, Claim::Refusal) {
        return;
    }
    assert_usable_after(target, FrontendReq::RESET_OWNER);
}

/// QEMU's device_del and device_add use the same connection: the memory and the rings of the new device are set up from the beginning.
fn set_owner_begins_a_session(target: &dyn Target) {
    let running = target.start();
    if !claims(target, Claim::RingChecks) {
        return;
    }
    let options = Options::with_slots(1 << 20);
    let mut front_end = running.connect_with(&options);
    for _ in 0..3 {
        assert_starts(target, &front_end);
        let stop = front_end.stop(0).unwrap();
        let start = front_end.queue_options(16).start();
        assert_ne!(stop, start);
        let raw = front_end.raw().unwrap();
        raw.done(FrontendReq::SET_OWNER, &[], &[]);
        raw.send(
            FrontendReq::SET_FEATURES,
            VERSION,
            &payload::u64(front_end.features()),
            &[],
        )
        .unwrap();
        assert_eq!(front_end.stop(0).unwrap(), start, "where the ring was");
        let memory = GuestMemory::new(&options.memory);
        let region = memory.regions()[0].info();
        let added = front_end.call().add_mem_region(&region);
        added.expect("the memory of the session before is in the way");
        front_end.replace_memory(memory).unwrap();
    }
}

/// Some front-ends send it twice, or late.
fn set_owner_changes_nothing_at_the_start_or_while_a_ring_runs(target: &dyn Target) {
    let running = target.start();
    if !claims(target, Claim::RingChecks) {
        return;
    }
    let front_end = running.connect();
    let raw = front_end.raw().unwrap();
    let mut queue = Queue::new(front_end.memory(), front_end.queue_options(16));
    let own = || {
        let answer = raw.acknowledged(FrontendReq::SET_OWNER, &[], &[]);
        assert_eq!(answer.unwrap(), 0);
    };
    own();
    front_end
        .configure(0, &queue, queue.options().start())
        .unwrap();
    own();
    front_end.call().set_vring_kick(0, queue.kick_fd()).unwrap();
    front_end.enable(0, true).unwrap();
    for tag in 0..3 {
        let mut request = Request::new(target, front_end.memory());
        request.run(&mut queue, tag);
        own();
    }
}

fn the_back_end_keeps_its_channel_open(target: &dyn Target) {
    let running = target.start();
    let peer = Peer::new(&running);
    if !peer.has(ProtocolFeatures::BACKEND_REQ, target) {
        return;
    }
    let (ours, theirs) = UnixStream::pair().unwrap();
    peer.done(FrontendReq::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]);
    drop(theirs);
    let channel = RawConnection::from_stream(ours).unwrap();
    peer.assert_alive();
    assert!(
        !channel.closed(Duration::from_millis(50)),
        "the channel was closed while the connection is open"
    );
    drop(peer);
    assert!(
        channel.closed(PATIENCE),
        "the channel is still open after the connection"
    );
}

fn a_new_channel_replaces_the_old_one(target: &dyn Target) {
    let running = target.start();
    let peer = Peer::new(&running);
    if !peer.has(ProtocolFeatures::BACKEND_REQ, target) {
        return;
    }
    let channel = || {
        let (ours, theirs) = UnixStream::pair().unwrap();
        peer.done(FrontendReq::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]);
        RawConnection::from_stream(ours).unwrap()
    };
    let first = channel();
    let second = channel();
    assert!(first.closed(PATIENCE), "the first channel is still open");
    // A front-end that drops its end does no harm.
    drop(second);
    peer.assert_alive();
    let _third = channel();
    peer.assert_alive();
}

fn a_channel_without_a_socket_is_refused(target: &dyn Target) {
    if !Peer::new(&target.start()).has(ProtocolFeatures::BACKEND_REQ, target) {
        return;
    }
    assert_refused(target, |_| {
        vec![Message::new(
            "no file",
            FrontendReq::SET_BACKEND_REQ_FD,
            Vec::new(),
        )]
    });
}

crate::for_each_target![
    virtio_1_and_protocol_features_are_offered,
    features_are_the_same_each_time,
    protocol_features_can_be_set_before_features,
    features_can_be_set_again,
    features_that_were_not_offered_are_not_turned_on,
    features_that_change_while_a_ring_runs_leave_it_alone,
    protocol_features_can_be_any_of_those_offered,
    protocol_features_that_were_not_offered_are_refused,
    a_new_connection_starts_without_what_the_last_one_negotiated,
    the_status_is_what_was_set,
    the_device_can_be_used_again_after_reset_device,
    reset_device_disables_the_rings,
    the_status_is_zero_after_reset_device,
    reset_owner_leaves_the_connection_usable,
    set_owner_begins_a_session,
    set_owner_changes_nothing_at_the_start_or_while_a_ring_runs,
    the_back_end_keeps_its_channel_open,
    a_new_channel_replaces_the_old_one,
    a_channel_without_a_socket_is_refused,
];
