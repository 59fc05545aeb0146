// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The messages about rings: in any order, and with invalid values.

use std::os::fd::AsFd;

use rustix::event::{EventfdFlags, eventfd};
use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures as ProtocolFeatures};
use vhost_device_tests::front_end::connection::{VERSION, payload};
use vhost_device_tests::front_end::memory::Region;
use vhost_device_tests::front_end::queue::Layout;
use vhost_device_tests::front_end::{GuestMemory, Queue};
use vhost_device_tests::target::{Claim, Request, Target, claims, skip};

use crate::{Message, PATIENCE, Peer, assert_refused, ring_start, start};

/// In the messages about eventfds: there is none.
const NO_FD: u64 = 1 << 8;

fn an_eventfd() -> std::os::fd::OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC).unwrap()
}

/// Returns whether rings are split; skips the test if they are not.
fn is_split(target: &dyn Target) -> bool {
    let is_split = !Peer::new(&target.start()).is_packed();
    if !is_split {
        skip(target, "that of a packed ring");
    }
    is_split
}

fn the_number_of_queues_is_one_that_indices_reach(target: &dyn Target) {
    let (_running, peer) = start(target);
    if peer.has(ProtocolFeatures::MQ, target) {
        assert!((1..=256).contains(&peer.queues), "{} queues", peer.queues);
    }
}

fn an_index_without_a_queue_is_refused(target: &dyn Target) {
    assert_refused(target, |peer| {
        let past_the_end = [
            ("the first index past the end", peer.queues),
            ("an index of 16 bits", 0xffff),
            ("an index of 32 bits", u32::MAX),
        ];
        let mut bad = Vec::new();
        for (what, index) in past_the_end {
            let mut add = |request, payload| bad.push(Message::new(what, request, payload));
            add(FrontendReq::SET_VRING_NUM, payload::vring_state(index, 16));
            add(FrontendReq::SET_VRING_BASE, payload::vring_state(index, 0));
            add(
                FrontendReq::SET_VRING_ENABLE,
                payload::vring_state(index, 0),
            );
            let addresses = payload::vring_addresses(index, 0, 0, 0, 0, 0);
            add(FrontendReq::SET_VRING_ADDR, addresses);
        }
        for (what, index) in [
            ("the first index past the end", peer.queues),
            ("the last index", 0xff),
        ] {
            for request in [
                FrontendReq::SET_VRING_KICK,
                FrontendReq::SET_VRING_CALL,
                FrontendReq::SET_VRING_ERR,
            ] {
                bad.push(
                    Message::new(what, request, payload::u64(index.into())).with(an_eventfd()),
                );
            }
        }
        bad
    });
}

/// The protocol has no negative reply, so the connection may end; the next is served.
fn the_base_of_a_missing_ring_is_not_reported(target: &dyn Target) {
    let (running, peer) = start(target);
    let reply = peer.connection.ask(
        FrontendReq::GET_VRING_BASE,
        &payload::vring_state(peer.queues, 0),
        &[],
    );
    assert!(!reply.is_ok_and(|reply| reply.payload == payload::vring_state(peer.queues, 0)));
    drop(peer);
    Peer::new(&running);
}

fn an_invalid_ring_size_is_refused(target: &dyn Target) {
    if !claims(target, Claim::RingChecks) {
        return;
    }
    assert_refused(target, |peer| {
        let mut sizes = vec![
            ("no descriptors", 0),
            ("32769", 32769),
            ("65536", 65536),
            ("65537", 65537),
            ("2^31", 1 << 31),
        ];
        if !peer.is_packed() {
            sizes.extend([("3 descriptors", 3), ("1000", 1000)]);
        }
        let messages = sizes.into_iter().map(|(what, size)| {
            let payload = payload::vring_state(0, size);
            Message::new(what, FrontendReq::SET_VRING_NUM, payload)
        });
        messages.collect()
    });
}

fn every_power_of_two_up_to_32768_is_a_ring_size(target: &dyn Target) {
    let (_running, peer) = start(target);
    for exponent in 0..=15 {
        peer.done(
            FrontendReq::SET_VRING_NUM,
            &payload::vring_state(0, 1 << exponent),
            &[],
        );
    }
}

/// A split ring counts in 16 bits. The base of a packed one has 32.
fn a_base_of_more_than_16_bits_is_refused(target: &dyn Target) {
    if !claims(target, Claim::RingChecks) || !is_split(target) {
        return;
    }
    assert_refused(target, |_| {
        let bases = [("2^16", 1 << 16), ("2^31", 1 << 31), ("2^32 - 1", u32::MAX)];
        bases
            .map(|(what, base)| {
                let payload = payload::vring_state(0, base);
                Message::new(what, FrontendReq::SET_VRING_BASE, payload)
            })
            .into()
    });
}

/// A ring is enabled or not.
fn an_enable_value_other_than_0_and_1_is_refused(target: &dyn Target) {
    if !claims(target, Claim::RingChecks) {
        return;
    }
    assert_refused(target, |_| {
        [("2", 2), ("all bits", u32::MAX)]
            .map(|(what, enable)| {
                let payload = payload::vring_state(0, enable);
                Message::new(what, FrontendReq::SET_VRING_ENABLE, payload)
            })
            .into()
    });
}

/// A base far from the driver's available index is a corrupt ring, whoever is wrong. The driver of a packed ring does not store
/// its index.
fn a_base_far_from_the_available_index_stops_its_ring(target: &dyn Target) {
    if !claims(target, Claim::BrokenRing) || !is_split(target) {
        return;
    }
    let running = target.start();
    for base in [1, 17, 0x7fff, 0xffef] {
        let peer = Peer::new(&running);
        let (memory, queue) = peer.ring(16);
        for mut message in ring_start(&peer, &memory, &queue) {
            if message.request == FrontendReq::SET_VRING_BASE {
                message.payload = payload::vring_state(0, base);
            }
            peer.deliver(&message);
        }
        assert!(queue.wait_error(PATIENCE), "base {base}: no ERR");
        assert_eq!(queue.split().used_index(), 0);
        let base_now = peer.stop(0);
        assert_eq!(base_now, base, "base {base}");
    }
}

/// One ring cannot start, because its guest chose invalid addresses, and all others can: a table that comes last
/// takes effect, and they start.
fn a_ring_that_cannot_start_does_not_stop_the_others(target: &dyn Target) {
    if !claims(target, Claim::RingChecks) {
        return;
    }
    let (_running, peer) = start(target);
    if peer.queues.min(target.request_queues() as u32) < 2 {
        return skip(target, "a second queue");
    }
    let memory = GuestMemory::new(&[(0, 1 << 20)]);
    let [bad, mut good] = [0, 1].map(|_| Queue::new(&memory, peer.queue_options(16)));
    let mut table = None;
    for (index, queue) in [(0, &bad), (1, &good)] {
        for mut message in ring_start(&peer, &memory, queue) {
            match message.request {
                FrontendReq::SET_FEATURES => continue,
                FrontendReq::SET_MEM_TABLE => {
                    table = Some(message);
                    continue;
                }
                _ => message.payload[0] = index,
            }
            if index == 0 && message.request == FrontendReq::SET_VRING_ADDR {
                message.payload = payload::vring_addresses(0, 0, 1, 1, 1, 0);
            }
            // Neither can start yet.
            let _ = peer.offer(&message).unwrap();
        }
    }
    let table = table.unwrap();
    peer.deliver(&table);
    assert!(bad.wait_error(PATIENCE), "ERR is not signalled");
    let mut request = Request::new(target, &memory);
    request.run(&mut good, 1);
}

/// Sends the messages that start ring 0 at `layout`, with an acknowledgement for each. Returns whether one was refused.
fn is_refused(peer: &Peer, memory: &GuestMemory, queue: &Queue, layout: Layout) -> bool {
    let first = &memory.regions()[0];
    let user = |address: u64| {
        address
            .wrapping_sub(first.guest_address())
            .wrapping_add(first.user_address())
    };
    let addresses = payload::vring_addresses(
        0,
        0,
        user(layout.descriptors),
        user(layout.used),
        user(layout.avail),
        0,
    );
    let mut refused = false;
    for mut message in ring_start(peer, memory, queue) {
        if message.request == FrontendReq::SET_VRING_ADDR {
            message.payload.clone_from(&addresses);
        }
        refused |= peer.offer(&message).unwrap() != 0;
    }
    refused
}

/// The guest chooses them, so the connection must survive.
fn ring_addresses_that_cannot_be_are_refused(target: &dyn Target) {
    if !claims(target, Claim::RingChecks) {
        return;
    }
    let running = target.start();
    let memory = GuestMemory::new(&[(0x10_0000, 0x1_0000), (0x20_0000, 0x1000)]);
    let options = Peer::new(&running).queue_options(256);
    let mut queue = Queue::new(&memory, options);
    let good = *queue.layout();
    let end = 0x11_0000;
    // An event suppression structure is too small for that, so it is outside.
    let across = |bytes: u64| end - if options.packed { 0 } else { bytes };
    for (what, layout) in [
        (
            "unaligned descriptors",
            Layout {
                descriptors: good.descriptors + 8,
                ..good
            },
        ),
        (
            "an unaligned avail ring",
            Layout {
                avail: good.avail + 1,
                ..good
            },
        ),
        (
            "an unaligned used ring",
            Layout {
                used: good.used + 2,
                ..good
            },
        ),
        (
            "descriptors outside",
            Layout {
                descriptors: 0x18_0000,
                ..good
            },
        ),
        (
            "an avail ring outside",
            Layout {
                avail: 0x8_0000,
                ..good
            },
        ),
        ("a used ring outside", Layout { used: 0, ..good }),
        (
            "descriptors across the end",
            Layout {
                descriptors: end - 256 * 16 + 16,
                ..good
            },
        ),
        (
            "an avail ring across the end",
            Layout {
                avail: across(2 * 256 + 2),
                ..good
            },
        ),
        (
            "a used ring across the end",
            Layout {
                used: across(8 * 256),
                ..good
            },
        ),
        (
            "descriptors at the end of all addresses",
            Layout {
                descriptors: 0u64.wrapping_sub(16),
                ..good
            },
        ),
    ] {
        let peer = Peer::new(&running);
        assert!(
            is_refused(&peer, &memory, &queue, layout),
            "{what}: accepted"
        );
        peer.assert_alive();
        // Nothing is left of it: the same ring can be set up correctly.
        peer.stop(0);
        queue.reset();
        assert!(
            !is_refused(&peer, &memory, &queue, good),
            "{what}: a good ring after it was refused"
        );
        println!("a good ring after {what}");
        let mut request = Request::new(target, &memory);
        request.run(&mut queue, 1);
        queue.reset();
    }
}

/// The same without acknowledgements: a guest that chooses such addresses must not end the connection, which could end its front-end.
fn ring_addresses_that_cannot_be_spare_the_connection(target: &dyn Target) {
    if !claims(target, Claim::RingChecks) {
        return;
    }
    let (_running, peer) = start(target);
    let (memory, queue) = peer.ring(16);
    for mut message in ring_start(&peer, &memory, &queue) {
        if message.request == FrontendReq::SET_VRING_ADDR {
            message.payload = payload::vring_addresses(0, 0, 1, 1, 1, 0);
        }
        peer.connection
            .send(message.request, VERSION, &message.payload, &message.fds())
            .unwrap();
    }
    peer.assert_alive();
    assert!(queue.wait_error(PATIENCE), "ERR is not signalled");
}

/// The settings of a ring cannot change while it runs.
fn a_running_ring_cannot_be_changed(target: &dyn Target) {
    if !claims(target, Claim::RingChecks) {
        return;
    }
    let (_running, peer) = start(target);
    let (memory, mut queue) = peer.ring(16);
    let other = Queue::new(&memory, peer.queue_options(16));
    peer.start_ring(&memory, &queue);
    let mut request = Request::new(target, &memory);
    for mut message in ring_start(&peer, &memory, &other) {
        match message.request {
            FrontendReq::SET_VRING_NUM => message.payload = payload::vring_state(0, 8),
            FrontendReq::SET_VRING_BASE => message.payload = payload::vring_state(0, 5),
            FrontendReq::SET_VRING_ADDR => {}
            _ => continue,
        }
        println!("{:?} while the ring runs", message.request);
        assert_ne!(peer.offer(&message).unwrap(), 0);
        request.run(&mut queue, 1);
    }
}

fn a_file_that_is_no_eventfd_is_refused(target: &dyn Target) {
    if !claims(target, Claim::RingChecks) {
        return;
    }
    assert_refused(target, |_| {
        [
            FrontendReq::SET_VRING_KICK,
            FrontendReq::SET_VRING_CALL,
            FrontendReq::SET_VRING_ERR,
        ]
        .into_iter()
        .flat_map(|request| {
            let message = |what| Message::new(what, request, payload::u64(0));
            let region = Region::new(0, 4096);
            [
                message("a regular file").with(region.file().try_clone().unwrap()),
                message("no file"),
            ]
        })
        .collect()
    });
}

fn no_eventfd_is_needed(target: &dyn Target) {
    let (_running, peer) = start(target);
    for request in [
        FrontendReq::SET_VRING_CALL,
        FrontendReq::SET_VRING_ERR,
        FrontendReq::SET_VRING_KICK,
    ] {
        peer.done(request, &payload::u64(NO_FD), &[]);
    }
    peer.assert_alive();
}

fn rings_can_be_enabled_and_disabled_before_anything_else(target: &dyn Target) {
    let (_running, peer) = start(target);
    for index in 0..peer.queues {
        for enable in [1, 1, 0, 0, 1] {
            peer.done(
                FrontendReq::SET_VRING_ENABLE,
                &payload::vring_state(index, enable),
                &[],
            );
        }
    }
}

fn a_kick_before_the_addresses_is_accepted(target: &dyn Target) {
    let (_running, peer) = start(target);
    peer.done(
        FrontendReq::SET_VRING_KICK,
        &payload::u64(0),
        &[an_eventfd().as_fd()],
    );
    peer.done(
        FrontendReq::SET_VRING_ENABLE,
        &payload::vring_state(0, 1),
        &[],
    );
    peer.assert_alive();
}

/// The last message of the set-up starts the ring, whichever that is.
fn a_ring_works_whatever_the_order_of_its_messages(target: &dyn Target) {
    if !claims(target, Claim::RingChecks) {
        return;
    }
    let running = target.start();
    // The first two are features and memory; each of the others is the last one in one of the rounds.
    const FIXED: usize = 2;
    for rotation in 0..7 {
        let peer = Peer::new(&running);
        let (memory, mut queue) = peer.ring(16);
        let mut messages = ring_start(&peer, &memory, &queue);
        messages[FIXED..].rotate_left(rotation);
        let mut request = Request::new(target, &memory);
        queue.add(&request.write(rotation as u32)).unwrap();
        queue.publish();
        for message in &messages {
            peer.deliver(message);
        }
        println!("{:?} as the last message", messages.last().unwrap().request);
        request.finish(&mut queue);
    }
}

fn the_base_is_what_was_set(target: &dyn Target) {
    let (_running, peer) = start(target);
    let mut bases = vec![0, 1, 0x7fff, 0x8000, 0xffff];
    if peer.is_packed() {
        bases.extend([0x8000_8000, 0x1_0000, u32::MAX]);
    }
    for base in bases {
        for index in 0..peer.queues {
            peer.done(
                FrontendReq::SET_VRING_BASE,
                &payload::vring_state(index, base),
                &[],
            );
            for _ in 0..2 {
                let reply = peer.ask(FrontendReq::GET_VRING_BASE, &payload::vring_state(index, 0));
                assert_eq!(reply, payload::vring_state(index, base));
            }
        }
    }
}

/// With wrap counters of one, if it is packed.
fn the_base_of_a_ring_that_never_started_is_its_beginning(target: &dyn Target) {
    let (_running, peer) = start(target);
    let start = peer.queue_options(16).start();
    for index in 0..peer.queues {
        assert_eq!(
            peer.ask(FrontendReq::GET_VRING_BASE, &payload::vring_state(index, 0)),
            payload::vring_state(index, start)
        );
    }
}

crate::for_each_target![
    the_number_of_queues_is_one_that_indices_reach,
    an_index_without_a_queue_is_refused,
    the_base_of_a_missing_ring_is_not_reported,
    an_invalid_ring_size_is_refused,
    a_base_of_more_than_16_bits_is_refused,
    a_base_far_from_the_available_index_stops_its_ring,
    an_enable_value_other_than_0_and_1_is_refused,
    a_ring_that_cannot_start_does_not_stop_the_others,
    every_power_of_two_up_to_32768_is_a_ring_size,
    ring_addresses_that_cannot_be_are_refused,
    ring_addresses_that_cannot_be_spare_the_connection,
    a_running_ring_cannot_be_changed,
    a_file_that_is_no_eventfd_is_refused,
    no_eventfd_is_needed,
    rings_can_be_enabled_and_disabled_before_anything_else,
    a_kick_before_the_addresses_is_accepted,
    a_ring_works_whatever_the_order_of_its_messages,
    the_base_is_what_was_set,
    the_base_of_a_ring_that_never_started_is_its_beginning,
];
