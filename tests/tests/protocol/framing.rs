// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Messages on the stream: in pieces, several at once, with and without acknowledgements.

use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures as ProtocolFeatures};
use vhost_device_tests::front_end::connection::{NEED_REPLY, REPLY, VERSION, message, payload};
use vhost_device_tests::front_end::{Error, GuestMemory, Queue};
use vhost_device_tests::target::{Claim, Target, assert_works, claims};

use crate::{Message, PATIENCE, Peer, ring_start, start, wait_until_read};

/// Creates memory and a ring for a whole session.
fn ring(peer: &Peer) -> (GuestMemory, Queue, Vec<Message>) {
    let (memory, queue) = peer.ring(16);
    let messages = ring_start(peer, &memory, &queue);
    (memory, queue, messages)
}

/// Returns the negotiated requests that have a reply of their own.
fn questions(peer: &Peer) -> Vec<(FrontendReq, Vec<u8>)> {
    let mut questions = vec![
        (FrontendReq::GET_FEATURES, Vec::new()),
        (FrontendReq::GET_PROTOCOL_FEATURES, Vec::new()),
        (FrontendReq::GET_VRING_BASE, payload::vring_state(0, 0)),
    ];
    for (feature, request, payload) in [
        (ProtocolFeatures::MQ, FrontendReq::GET_QUEUE_NUM, Vec::new()),
        (
            ProtocolFeatures::CONFIG,
            FrontendReq::GET_CONFIG,
            payload::config(0, 0, &[0; 8]),
        ),
        (
            ProtocolFeatures::CONFIGURE_MEM_SLOTS,
            FrontendReq::GET_MAX_MEM_SLOTS,
            Vec::new(),
        ),
        (
            ProtocolFeatures::STATUS,
            FrontendReq::GET_STATUS,
            Vec::new(),
        ),
    ] {
        if peer.protocol_features.contains(feature) {
            questions.push((request, payload));
        }
    }
    questions
}

fn a_ring_is_set_up_with_an_acknowledgement_for_each_message(target: &dyn Target) {
    let (_running, peer) = start(target);
    let (memory, mut queue, messages) = ring(&peer);
    for message in &messages {
        peer.deliver(message);
    }
    assert_works(target, &memory, &mut queue);
}

fn a_ring_is_set_up_without_any_acknowledgement(target: &dyn Target) {
    let (_running, peer) = start(target);
    let (memory, mut queue, messages) = ring(&peer);
    for message in &messages {
        peer.connection
            .send(message.request, VERSION, &message.payload, &message.fds())
            .unwrap();
    }
    // The reply to this would not be the first if one of the others had been answered.
    peer.assert_alive();
    assert_works(target, &memory, &mut queue);
}

fn a_request_with_a_reply_of_its_own_is_answered_once(target: &dyn Target) {
    let (_running, peer) = start(target);
    for (request, payload) in questions(&peer) {
        let plain = peer.ask(request, &payload);
        peer.connection
            .send(request, VERSION | NEED_REPLY, &payload, &[])
            .unwrap();
        let reply = peer.connection.receive().unwrap();
        assert_eq!(
            (reply.request, reply.flags),
            (request as u32, VERSION | REPLY)
        );
        assert_eq!(
            reply.payload, plain,
            "{request:?} with and without NEED_REPLY"
        );
        peer.assert_alive();
    }
}

fn replies_have_the_sizes_of_the_protocol(target: &dyn Target) {
    let (_running, peer) = start(target);
    for (request, payload) in questions(&peer) {
        let size = if request == FrontendReq::GET_CONFIG {
            payload.len()
        } else {
            8
        };
        assert_eq!(peer.ask(request, &payload).len(), size, "{request:?}");
    }
}

fn messages_sent_at_once_are_answered_in_order(target: &dyn Target) {
    const ROUNDS: usize = 20;
    let (_running, peer) = start(target);
    let questions = questions(&peer);
    let bytes: Vec<u8> = questions
        .iter()
        .flat_map(|(request, payload)| message(*request, VERSION, payload))
        .collect();
    peer.connection
        .send_bytes(&bytes.repeat(ROUNDS), &[])
        .unwrap();
    for _ in 0..ROUNDS {
        for (request, _) in &questions {
            assert_eq!(peer.connection.receive().unwrap().request, *request as u32);
        }
    }
}

fn a_message_may_come_byte_by_byte(target: &dyn Target) {
    if !claims(target, Claim::Pieces) {
        return;
    }
    let (_running, peer) = start(target);
    let (memory, mut queue, messages) = ring(&peer);
    for Message {
        request,
        payload,
        files,
        ..
    } in &messages
    {
        let bytes = message(*request, VERSION | NEED_REPLY, payload);
        for (index, byte) in bytes.iter().enumerate() {
            let files = if index == 0 { files.as_slice() } else { &[] };
            let fds: Vec<_> = files.iter().map(std::os::fd::AsFd::as_fd).collect();
            peer.connection.send_bytes(&[*byte], &fds).unwrap();
            wait_until_read(&peer.connection);
        }
        assert_eq!(peer.connection.receive().unwrap().u64(), 0, "{request:?}");
    }
    assert_works(target, &memory, &mut queue);
}

fn a_message_may_be_cut_anywhere(target: &dyn Target) {
    if !claims(target, Claim::Pieces) {
        return;
    }
    let (_running, peer) = start(target);
    for (request, payload) in questions(&peer) {
        let bytes = message(request, VERSION, &payload);
        for cut in 1..bytes.len() {
            peer.connection.send_bytes(&bytes[..cut], &[]).unwrap();
            wait_until_read(&peer.connection);
            peer.connection.send_bytes(&bytes[cut..], &[]).unwrap();
            assert_eq!(
                peer.connection.receive().unwrap().request,
                request as u32,
                "{request:?} cut at {cut}"
            );
        }
    }
}

/// A message ends where its header says, not at the end of a write.
fn a_piece_may_hold_the_end_of_one_message_and_the_start_of_the_next(target: &dyn Target) {
    if !claims(target, Claim::Pieces) {
        return;
    }
    let (_running, peer) = start(target);
    let set = message(
        FrontendReq::SET_VRING_BASE,
        VERSION | NEED_REPLY,
        &payload::vring_state(0, 3),
    );
    let get = message(
        FrontendReq::GET_VRING_BASE,
        VERSION,
        &payload::vring_state(0, 0),
    );
    let both = [set, get].concat();
    for cut in 1..both.len() {
        peer.connection.send_bytes(&both[..cut], &[]).unwrap();
        wait_until_read(&peer.connection);
        peer.connection.send_bytes(&both[cut..], &[]).unwrap();
        assert_eq!(peer.connection.receive().unwrap().u64(), 0);
        assert_eq!(
            peer.connection.receive().unwrap().payload,
            payload::vring_state(0, 3)
        );
    }
}

/// Numbers that no request has, and that of GET_VRING_BASE_SKIP_DRAIN, which these suites never agree on.
const UNASSIGNED: [u32; 12] = [
    0,
    45,
    46,
    47,
    64,
    255,
    256,
    1000,
    0x1_0001,
    0x7fff_ffff,
    0x8000_0000,
    u32::MAX,
];

/// Requests of features that these suites never negotiate.
const NOT_AGREED_ON: [FrontendReq; 17] = [
    FrontendReq::SET_LOG_BASE,
    FrontendReq::SET_LOG_FD,
    FrontendReq::SEND_RARP,
    FrontendReq::NET_SET_MTU,
    FrontendReq::IOTLB_MSG,
    FrontendReq::SET_VRING_ENDIAN,
    FrontendReq::CREATE_CRYPTO_SESSION,
    FrontendReq::CLOSE_CRYPTO_SESSION,
    FrontendReq::POSTCOPY_ADVISE,
    FrontendReq::POSTCOPY_LISTEN,
    FrontendReq::POSTCOPY_END,
    FrontendReq::GET_INFLIGHT_FD,
    FrontendReq::SET_INFLIGHT_FD,
    FrontendReq::GPU_SET_SOCKET,
    FrontendReq::VRING_KICK,
    FrontendReq::GET_SHARED_OBJECT,
    FrontendReq::GET_SHMEM_CONFIG,
];

/// Returns the requests that the target should not know.
fn unknown_requests(target: &dyn Target) -> Vec<u32> {
    let mut requests = UNASSIGNED.to_vec();
    if target.claims(Claim::Unknown) {
        requests.extend(NOT_AGREED_ON.map(|request| request as u32));
    }
    requests
}

fn an_unknown_request_is_refused_if_an_acknowledgement_was_asked_for(target: &dyn Target) {
    if !claims(target, Claim::Unknown) {
        return;
    }
    let (_running, peer) = start(target);
    for request in unknown_requests(target) {
        for payload in [&[][..], &[0; 8], &[0xff; 40]] {
            let acknowledgement = peer.connection.acknowledged(request, payload, &[]);
            assert!(
                acknowledgement.as_ref().is_ok_and(|&value| value != 0),
                "request {request}: {acknowledgement:?}"
            );
            peer.assert_alive();
        }
    }
}

fn an_unknown_request_ends_only_its_connection(target: &dyn Target) {
    let running = target.start();
    for request in unknown_requests(target) {
        let peer = Peer::new(&running);
        match peer.connection.send(request, VERSION, &[0; 8], &[]) {
            Ok(()) | Err(Error::Closed) => assert!(
                peer.connection.closed(PATIENCE),
                "request {request} left the connection open"
            ),
            Err(error) => panic!("{error}"),
        }
    }
    Peer::new(&running);
}

crate::for_each_target![
    a_ring_is_set_up_with_an_acknowledgement_for_each_message,
    a_ring_is_set_up_without_any_acknowledgement,
    a_request_with_a_reply_of_its_own_is_answered_once,
    replies_have_the_sizes_of_the_protocol,
    messages_sent_at_once_are_answered_in_order,
    a_message_may_come_byte_by_byte,
    a_message_may_be_cut_anywhere,
    a_piece_may_hold_the_end_of_one_message_and_the_start_of_the_next,
    an_unknown_request_is_refused_if_an_acknowledgement_was_asked_for,
    an_unknown_request_ends_only_its_connection,
];
