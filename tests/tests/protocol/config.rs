// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The config space over GET_CONFIG and SET_CONFIG.

use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures as ProtocolFeatures};
use vhost_device_tests::front_end::Error;
use vhost_device_tests::front_end::connection::payload;
use vhost_device_tests::target::{Claim, Target};

use crate::{Message, Peer, assert_refused, start};

/// Front-ends ask for this size, whatever the size of the config space.
const LARGEST: u32 = 256;

/// Size of offset, size and flags before the data.
const FIELDS: usize = 12;

impl Peer {
    fn config(&self, offset: u32, size: u32, flags: u32) -> Vec<u8> {
        let asked = payload::config(offset, flags, &vec![0; size as usize]);
        let reply = self.ask(FrontendReq::GET_CONFIG, &asked);
        assert_eq!(
            reply.len(),
            asked.len(),
            "GET_CONFIG of {size} bytes at {offset}"
        );
        assert_eq!(reply[..8], asked[..8], "offset and size in the reply");
        reply[FIELDS..].to_vec()
    }
}

fn has_config(peer: &Peer, target: &dyn Target) -> bool {
    peer.has(ProtocolFeatures::CONFIG, target)
}

fn any_part_of_the_config_space_can_be_read(target: &dyn Target) {
    let (_running, peer) = start(target);
    if !has_config(&peer, target) {
        return;
    }
    let whole = peer.config(0, LARGEST, 0);
    for size in 1..=LARGEST {
        assert_eq!(
            peer.config(0, size, 0),
            whole[..size as usize],
            "{size} bytes"
        );
    }
    for offset in 0..LARGEST {
        let rest = LARGEST - offset;
        assert_eq!(
            peer.config(offset, rest, 0),
            whole[offset as usize..],
            "from {offset}"
        );
        assert_eq!(
            peer.config(offset, 1, 0),
            whole[offset as usize..][..1],
            "a byte at {offset}"
        );
    }
}

fn reads_past_the_end_give_zeroes(target: &dyn Target) {
    let (_running, peer) = start(target);
    if !has_config(&peer, target) {
        return;
    }
    // No device of ours has a config space of more than 136 bytes.
    assert_eq!(peer.config(200, 56, 0), [0; 56]);
}

fn flags_of_a_read_are_ignored(target: &dyn Target) {
    let (_running, peer) = start(target);
    if !has_config(&peer, target) {
        return;
    }
    let unknown = match target.claims(Claim::Refusal) {
        true => &[2, 3, 1 << 31, u32::MAX][..],
        false => &[],
    };
    for &flags in [1].iter().chain(unknown) {
        assert_eq!(
            peer.config(0, 60, flags),
            peer.config(0, 60, 0),
            "{flags:#x}"
        );
    }
}

/// The protocol has an empty reply for this.
fn a_read_far_outside_the_config_space_fails(target: &dyn Target) {
    let running = target.start();
    if !has_config(&Peer::new(&running), target) {
        return;
    }
    for (offset, size) in [
        (u32::MAX, 8u32),
        (u32::MAX - 3, 4),
        (0x1_0000, 4),
        (4096, 1),
    ] {
        let peer = Peer::new(&running);
        let asked = payload::config(offset, 0, &vec![0; size as usize]);
        match peer.connection.ask(FrontendReq::GET_CONFIG, &asked, &[]) {
            Ok(reply) => {
                assert!(
                    reply.payload.is_empty()
                        || reply.payload[FIELDS..].iter().all(|&byte| byte == 0),
                    "{reply:?}"
                );
                peer.assert_alive();
            }
            Err(Error::Closed) => assert!(
                !target.claims(Claim::Refusal),
                "{size} bytes at {offset:#x} ended the connection"
            ),
            Err(error) => panic!("{size} bytes at {offset:#x}: {error}"),
        }
    }
    Peer::new(&running);
}

/// Each way in which size field and payload can disagree.
fn a_config_read_shorter_than_its_size_fails(target: &dyn Target) {
    let running = target.start();
    if !has_config(&Peer::new(&running), target) {
        return;
    }
    let asked = payload::config(0, 0, &[0; 16]);
    for length in [0, 4, FIELDS - 1] {
        let peer = Peer::new(&running);
        match peer
            .connection
            .ask(FrontendReq::GET_CONFIG, &asked[..length], &[])
        {
            Ok(reply) => assert!(reply.payload.is_empty(), "{reply:?}"),
            Err(Error::Closed) => {}
            Err(error) => panic!("a payload of {length} bytes: {error}"),
        }
    }
    Peer::new(&running);
}

fn written_config_bytes_are_read_back(target: &dyn Target) {
    let (_running, peer) = start(target);
    if !has_config(&peer, target) {
        return;
    }
    let (offset, size) = target.writable_config();
    // 0 for writes of the driver, 1 for migration by the specification and for any write by rust-vmm.
    for flags in [0, 1] {
        for byte in [0, 1, 0] {
            let bytes = vec![byte; size];
            peer.done(
                FrontendReq::SET_CONFIG,
                &payload::config(offset, flags, &bytes),
                &[],
            );
            assert_eq!(peer.config(offset, size as u32, 0), bytes, "flags {flags}");
        }
    }
}

/// There are two kinds of writes; other bits have no meaning.
fn flags_of_a_write_do_no_harm(target: &dyn Target) {
    let running = target.start();
    if !has_config(&Peer::new(&running), target) {
        return;
    }
    let (offset, size) = target.writable_config();
    for flags in [2, 3, 1 << 31, u32::MAX] {
        let peer = Peer::new(&running);
        let payload = payload::config(offset, flags, &vec![0; size]);
        match peer.acknowledged(FrontendReq::SET_CONFIG, &payload, &[]) {
            Ok(_) if target.claims(Claim::Refusal) => peer.assert_alive(),
            Err(Error::Closed) if target.claims(Claim::Refusal) => {
                panic!("flags {flags:#x} ended the connection")
            }
            _ => {}
        }
    }
    Peer::new(&running);
}

fn a_write_changes_nothing_else(target: &dyn Target) {
    let (_running, peer) = start(target);
    if !has_config(&peer, target) {
        return;
    }
    let (offset, size) = target.writable_config();
    let range = offset as usize..offset as usize + size;
    let mut expected = peer.config(0, LARGEST, 0);
    for byte in [1, 0] {
        peer.done(
            FrontendReq::SET_CONFIG,
            &payload::config(offset, 0, &vec![byte; size]),
            &[],
        );
        expected[range.clone()].fill(byte);
        assert_eq!(peer.config(0, LARGEST, 0), expected);
    }
}

/// It is refused or ignored, but has no effect.
fn read_only_config_fields_cannot_be_changed(target: &dyn Target) {
    let running = target.start();
    let peer = Peer::new(&running);
    if !has_config(&peer, target) {
        return;
    }
    let whole = peer.config(0, LARGEST, 0);
    drop(peer);
    let (start, size) = target.writable_config();
    let writable = start as usize..start as usize + size;
    for offset in (0..LARGEST as usize).filter(|offset| !writable.contains(offset)) {
        let peer = Peer::new(&running);
        let result = peer.acknowledged(
            FrontendReq::SET_CONFIG,
            &payload::config(offset as u32, 0, &[!whole[offset]]),
            &[],
        );
        match result {
            Ok(_) if !target.claims(Claim::Refusal) => {}
            Ok(_) => assert_eq!(
                peer.config(0, LARGEST, 0),
                whole,
                "after a write at {offset}"
            ),
            Err(Error::Closed) => assert!(
                !target.claims(Claim::Refusal),
                "a write at {offset} ended the connection"
            ),
            Err(error) => panic!("{error}"),
        }
    }
}

fn a_write_that_is_malformed_is_refused(target: &dyn Target) {
    if !has_config(&Peer::new(&target.start()), target) {
        return;
    }
    let (offset, size) = target.writable_config();
    let bytes = payload::config(offset, 0, &vec![1; size]);
    let with_size = |claimed: u32| {
        let mut bytes = bytes.clone();
        bytes[4..8].copy_from_slice(&claimed.to_ne_bytes());
        bytes
    };
    assert_refused(target, |_| {
        let bad = |what, payload| Message::new(what, FrontendReq::SET_CONFIG, payload);
        vec![
            bad("nothing", Vec::new()),
            bad("half of its fields", bytes[..6].to_vec()),
            bad("fewer bytes than it says", with_size(size as u32 + 1)),
            bad("fewer bytes than 4 GiB", with_size(u32::MAX)),
            bad(
                "an offset that overflows",
                payload::config(u32::MAX, 0, &[1, 1]),
            ),
        ]
    });
}

crate::for_each_target![
    any_part_of_the_config_space_can_be_read,
    reads_past_the_end_give_zeroes,
    flags_of_a_read_are_ignored,
    a_read_far_outside_the_config_space_fails,
    a_config_read_shorter_than_its_size_fails,
    written_config_bytes_are_read_back,
    flags_of_a_write_do_no_harm,
    a_write_changes_nothing_else,
    read_only_config_fields_cannot_be_changed,
    a_write_that_is_malformed_is_refused,
];
