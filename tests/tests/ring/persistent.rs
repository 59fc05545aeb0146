// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Malicious drivers and front-ends, for longer: repeatedly, and at random.

use std::os::fd::AsFd;

use fastrand::Rng;
use vhost::vhost_user::message::FrontendReq;
use vhost_device_tests::front_end::connection::payload;
use vhost_device_tests::front_end::descriptor::Descriptor;
use vhost_device_tests::front_end::{Buffer, GuestMemory, Queue};
use vhost_device_tests::target::{Claim, Request, Running, Target, assert_works, claims};

use crate::corrupt::{HOLE, SIZE, Scene};
use crate::{Mode, PATIENCE, USUAL, usual};

/// Neither with invalid requests, nor with corrupt rings.
fn a_guest_cannot_fill_the_log(target: &dyn Target) {
    if !claims(target, Claim::ShortLog) {
        return;
    }
    let running = target.start();
    usual(target).for_each(|mode| fill_the_log(target, &running, mode));
}

fn fill_the_log(target: &dyn Target, running: &Running, mode: Mode) {
    const REQUESTS: usize = 3000;
    const RESTARTS: usize = 50;
    const LINES: usize = 100;
    let mut scene = Scene::new(target, running, mode);
    let (readable, _) = target.request_size();
    let before = running.program.stderr().lines().count();
    for _ in 0..REQUESTS {
        scene.victim.submit(&[
            Buffer::readable(HOLE, readable as u32),
            Buffer::writable(HOLE, 513),
        ]);
        scene.victim.take_used_within(PATIENCE);
    }
    let lines = running.program.stderr().lines().count() - before;
    assert!(lines < LINES, "{lines} lines for {REQUESTS} bad requests");
    // A line for each start and stop of a ring helps to find the cause.
    let warnings = || {
        running
            .program
            .stderr()
            .lines()
            .filter(|line| line.contains("warn"))
            .count()
    };
    let before = warnings();
    for _ in 0..RESTARTS {
        scene.victim.publish_nonsense();
        assert!(scene.victim.wait_error(PATIENCE));
        scene.restart();
    }
    let lines = warnings() - before;
    assert!(
        lines < RESTARTS / 2,
        "{lines} lines for {RESTARTS} bad rings"
    );
}

/// The front-end removes the memory of ring 0, and adds it again.
fn a_ring_whose_memory_is_taken_away_does_no_harm(target: &dyn Target) {
    if !claims(target, Claim::BrokenRing) {
        return;
    }
    let running = target.start();
    for mode in usual(target) {
        let front_end = mode.connect(&running);
        let memory = front_end.memory().clone();
        let high = memory.without(0);
        let low = memory.without(high.regions()[0].guest_address());
        let mut scene = Scene::with_rings_in(target, front_end, mode, &high, &low);
        assert_works(target, &low, &mut scene.victim);
        let raw = scene.front_end.raw().unwrap();
        let table = |memory: &GuestMemory| {
            let infos: Vec<_> = memory
                .regions()
                .iter()
                .map(|region| region.info())
                .collect();
            let files: Vec<_> = memory
                .regions()
                .iter()
                .map(|region| region.file().as_fd())
                .collect();
            let payload = payload::memory_table(&infos);
            raw.acknowledged(FrontendReq::SET_MEM_TABLE, &payload, &files)
                .unwrap()
        };
        assert_eq!(table(&low), 0);
        let mut request = Request::new(target, &low);
        scene.victim.submit(&request.write(1));
        scene.assert_others_live(target, "a ring without memory");
        assert_eq!(table(&memory), 0);
        scene.assert_restarts(target, "a ring without memory");
    }
}

pub fn random_descriptor(random: &mut Rng, area: u64) -> Descriptor {
    let address = match random.u8(0..10) {
        0 => random.u64(..),
        1 => HOLE,
        _ => area + random.u64(0..0x1_0000),
    };
    let length = match random.u8(0..10) {
        0 => random.u32(..),
        1 => 0,
        2 => 32,
        _ => random.u32(0..2048),
    };
    let flags = if random.u8(..) < 8 {
        random.u16(..)
    } else {
        random.u16(0..8)
    };
    let next = if random.u8(..) < 8 {
        random.u16(..)
    } else {
        random.u16(0..SIZE)
    };
    Descriptor {
        address,
        length,
        flags,
        next,
    }
}

/// Random descriptors in the whole ring, repeatedly.
fn random_rings_do_no_harm(target: &dyn Target) {
    const ROUNDS: u64 = 300;
    if !claims(target, Claim::BrokenRing) {
        return;
    }
    let running = target.start();
    let mut scene = Scene::new(target, &running, USUAL);
    // The device may write anything here; the bystander is elsewhere.
    let area = scene.front_end.memory().regions()[1].guest_address();
    for seed in 0..ROUNDS {
        let mut random = Rng::with_seed(seed);
        for index in 0..SIZE {
            scene
                .victim
                .split()
                .set_descriptor(index, random_descriptor(&mut random, area));
        }
        for slot in 0..SIZE {
            let head = if random.u8(..) < 8 {
                random.u16(..)
            } else {
                random.u16(0..SIZE)
            };
            scene.victim.split().set_avail_entry(slot, head);
        }
        scene.victim.split().set_avail_index(if random.u8(..) < 8 {
            random.u16(..)
        } else {
            random.u16(1..=SIZE)
        });
        scene.victim.kick_anyway();
        scene.assert_others_live(target, &format!("seed {seed}"));
        scene.restart();
    }
    scene.assert_restarts(target, "random rings");
}

/// A front-end can truncate the file that it has shared: an access to the lost part raises SIGBUS.
fn truncated_memory_ends_only_its_connection(target: &dyn Target) {
    if !claims(target, Claim::LostMemory) {
        return;
    }
    let running = target.start();
    let cuts = |mode| [true, false, true].map(|cuts_the_ring| (mode, cuts_the_ring));
    for (mode, cuts_the_ring) in usual(target).flat_map(cuts) {
        let front_end = mode.connect(&running);
        // Nothing that this process uses may be in the truncated part.
        let cut = front_end.memory().without(0);
        let kept = front_end.memory().without(cut.regions()[0].guest_address());
        let [ring, buffers] = match cuts_the_ring {
            true => [&cut, &kept],
            false => [&kept, &cut],
        };
        let mut queue = Queue::new(ring, mode.options(SIZE, 0));
        let mut request = Request::new(target, buffers);
        queue.add(&request.write(1)).unwrap();
        queue.publish();
        let region = cut.regions()[0].clone();
        region.file().set_len(0).unwrap();
        // The back-end reads a ring as soon as it starts, or no longer answers. It may fail the request without touching the buffers.
        let _ = front_end.start(0, &queue, queue.options().start());
        if cuts_the_ring {
            let raw = front_end.raw().unwrap();
            assert!(
                raw.closed(PATIENCE),
                "the connection continues without its memory"
            );
        }
        drop(front_end);
        let (front_end, mut queue) = mode.start(&running, SIZE, 0);
        assert_works(target, front_end.memory(), &mut queue);
    }
}

crate::for_each_target![
    truncated_memory_ends_only_its_connection,
    a_guest_cannot_fill_the_log,
    a_ring_whose_memory_is_taken_away_does_no_harm,
    random_rings_do_no_harm,
];
