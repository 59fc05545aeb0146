// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory that the front-end removes while rings run: under a ring, and under requests in flight.

use std::time::Duration;

use vhost::vhost_user::VhostUserFrontend;
use vhost_device_tests::front_end::{FrontEnd, GuestMemory, Options, Queue};
use vhost_device_tests::target::{Claim, Request, Running, Target, assert_works, claims};

use crate::corrupt::{SIZE, Scene};
use crate::{Load, Mode, PATIENCE, QUIET, assert_quiet, modes, usual};

/// Address and size of the second region of guest memory.
const HIGH: u64 = 1 << 32;
const HIGH_SIZE: usize = 4 << 20;

/// Connects a front-end with memory slots, and returns views of its two regions.
fn connect(running: &Running, mode: Mode) -> (FrontEnd, GuestMemory, GuestMemory) {
    let options = Options {
        memory_slots: true,
        memory: vec![(0, 4 << 20), (HIGH, HIGH_SIZE)],
        ..mode.front_end()
    };
    let front_end = running.connect_with(&options);
    let memory = front_end.memory();
    let (low, high) = (memory.without(HIGH), memory.without(0));
    (front_end, low, high)
}

/// REM_MEM_REG of the region with a ring. After the answer the device writes nothing there.
fn a_ring_whose_region_is_removed_pauses(target: &dyn Target) {
    let running = target.start();
    usual(target).for_each(|mode| remove_the_region_of_a_ring(target, &running, mode));
}

fn remove_the_region_of_a_ring(target: &dyn Target, running: &Running, mode: Mode) {
    let (front_end, low, high) = connect(running, mode);
    let mut scene = Scene::with_rings_in(target, front_end, mode, &high, &low);
    assert_works(target, &low, &mut scene.victim);
    // This process keeps the region mapped.
    scene.front_end.remove_region(HIGH).unwrap();
    let mut request = Request::new(target, &low);
    scene.victim.submit(&request.write(1));
    scene.victim.kick_anyway();
    let before = high.read_vec(HIGH, 1 << 16);
    scene.assert_others_live(target, "a ring without memory");
    std::thread::sleep(QUIET);
    request.assert_untouched();
    assert!(
        high.read_vec(HIGH, before.len()) == before,
        "the device writes to memory that was removed"
    );
    assert!(!scene.victim.wait_error(Duration::ZERO), "ERR is signalled");
    scene.front_end.stop(0).unwrap();
    // Other memory is added at that address.
    scene.front_end.add_region(HIGH, HIGH_SIZE).unwrap();
    let fresh = scene.front_end.memory().without(0);
    scene.victim = Queue::new(&fresh, mode.options(SIZE, 0));
    scene.start_victim();
    scene.assert_restarts(target, "a ring without memory");
    assert!(
        high.read_vec(HIGH, before.len()) == before,
        "the device writes to memory that was replaced"
    );
}

/// The same memory is added again: the ring continues with the requests that became available meanwhile.
fn a_ring_whose_region_returns_continues(target: &dyn Target) {
    let running = target.start();
    for mode in modes(target) {
        let (front_end, low, high) = connect(&running, mode);
        let mut queue = Queue::new(&high, mode.options(SIZE, 0));
        front_end.start(0, &queue, queue.options().start()).unwrap();
        let region = high.region(HIGH, 1).info();
        let mut load = Load::new(target, &low, &queue, 4);
        for is_kicked in [true, false, true] {
            load.run(&mut queue, 7);
            front_end.call().remove_mem_region(&region).unwrap();
            load.fill(&mut queue);
            if is_kicked {
                queue.kick_anyway();
            }
            assert_quiet(&queue);
            front_end.call().add_mem_region(&region).unwrap();
            load.drain(&mut queue);
        }
        assert!(!queue.wait_error(Duration::ZERO), "{mode:?}: ERR");
        // A ring without memory stops like any other.
        front_end.call().remove_mem_region(&region).unwrap();
        assert_eq!(front_end.stop(0).unwrap(), queue.used_base(), "{mode:?}");
    }
}

/// Each request is either carried out, in the memory that it still holds, or fails because of the missing memory; all are returned.
fn requests_whose_memory_goes_are_answered(target: &dyn Target) {
    if !claims(target, Claim::BadBuffer) {
        return;
    }
    let running = target.start();
    usual(target).for_each(|mode| remove_the_memory_of_requests(target, &running, mode));
}

fn remove_the_memory_of_requests(target: &dyn Target, running: &Running, mode: Mode) {
    const REQUESTS: usize = 64;
    const ROUNDS: usize = 20;
    let (mut front_end, low, mut high) = connect(running, mode);
    let mut queue = Queue::new(&low, mode.options(256, 0));
    front_end.start(0, &queue, queue.options().start()).unwrap();
    for round in 0..ROUNDS {
        let mut requests: Vec<_> = (0..REQUESTS).map(|_| Request::new(target, &high)).collect();
        for request in &mut requests {
            queue.add(&request.write(1)).unwrap();
        }
        queue.publish();
        queue.kick_anyway();
        front_end.remove_region(HIGH).unwrap();
        for _ in 0..REQUESTS {
            assert!(
                queue.wait_used(PATIENCE),
                "round {round}: a request is lost"
            );
            let used = queue.take_used().unwrap();
            // Without room for the status, the used length is 0.
            assert!(used.length == 0 || used.length == requests[0].writable().length);
        }
        assert!(!queue.wait_error(Duration::ZERO), "round {round}: ERR");
        front_end.add_region(HIGH, HIGH_SIZE).unwrap();
        high = front_end.memory().without(0);
        assert_works(target, &high, &mut queue);
    }
}

/// The table is replaced as fast as possible, with and without the memory of requests and rings, while requests run.
fn constant_memory_changes_do_no_harm(target: &dyn Target) {
    if !claims(target, Claim::BadBuffer) {
        return;
    }
    let running = target.start();
    usual(target).for_each(|mode| change_tables(target, &running, mode));
}

fn change_tables(target: &dyn Target, running: &Running, mode: Mode) {
    const ROUNDS: usize = 60;
    let (mut front_end, low, high) = connect(running, mode);
    let mut queue = Queue::new(&low, mode.options(256, 0));
    front_end.start(0, &queue, queue.options().start()).unwrap();
    let mut requests: Vec<_> = (0..16).map(|_| Request::new(target, &high)).collect();
    for round in 0..ROUNDS {
        for request in &mut requests {
            queue.add(&request.write(1)).unwrap();
        }
        queue.publish();
        queue.kick_anyway();
        front_end.remove_region(HIGH).unwrap();
        front_end.add_region(HIGH, HIGH_SIZE).unwrap();
        front_end.send_memory_table().unwrap();
        for _ in &requests {
            let is_answered = queue.wait_used(PATIENCE);
            assert!(is_answered, "round {round}: requests are lost");
            queue.take_used().unwrap();
        }
    }
    assert_works(target, &low, &mut queue);
    assert!(!queue.wait_error(Duration::ZERO));
}

crate::for_each_target![
    Claim::BrokenRing =>
    a_ring_whose_region_is_removed_pauses,
    a_ring_whose_region_returns_continues,
    requests_whose_memory_goes_are_answered,
    constant_memory_changes_do_no_harm,
];
