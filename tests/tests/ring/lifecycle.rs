// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Rings that are started, disabled, stopped, started again, and lose their front-end.

use vhost::VhostBackend;
use vhost::vhost_user::message::FrontendReq;
use vhost_device_tests::front_end::connection::payload;
use vhost_device_tests::front_end::{FrontEnd, Queue};
use vhost_device_tests::target::{Claim, Request, Target, assert_works, claims, skip};

use crate::{Load, QUIET, assert_quiet, modes, push, usual, while_repeating};

fn requests_available_before_the_start_need_no_kick(target: &dyn Target) {
    let running = target.start();
    for mode in modes(target) {
        let front_end = mode.connect(&running);
        let mut queue = Queue::new(front_end.memory(), mode.options(16, 0));
        let mut load = Load::new(target, front_end.memory(), &queue, 5);
        load.fill(&mut queue);
        front_end.start(0, &queue, queue.options().start()).unwrap();
        load.drain(&mut queue);
        assert_eq!(queue.kicks(), 0);
    }
}

fn a_ring_does_nothing_before_it_is_enabled(target: &dyn Target) {
    let running = target.start();
    for mode in modes(target) {
        let front_end = mode.connect(&running);
        let mut queue = Queue::new(front_end.memory(), mode.options(16, 0));
        front_end
            .configure(0, &queue, queue.options().start())
            .unwrap();
        front_end.call().set_vring_kick(0, queue.kick_fd()).unwrap();
        let mut request = Request::new(target, front_end.memory());
        push(&mut queue, &request.write(1));
        assert_quiet(&queue);
        request.assert_untouched();
        front_end.enable(0, true).unwrap();
        request.finish(&mut queue);
    }
}

fn a_disabled_ring_does_nothing_until_it_is_enabled_again(target: &dyn Target) {
    let running = target.start();
    for mode in modes(target) {
        let (front_end, mut queue) = mode.start(&running, 16, 0);
        let mut request = Request::new(target, front_end.memory());
        for tag in 0..3 {
            assert_works(target, front_end.memory(), &mut queue);
            front_end.enable(0, false).unwrap();
            push(&mut queue, &request.write(tag));
            assert_quiet(&queue);
            request.assert_untouched();
            front_end.enable(0, true).unwrap();
            request.finish(&mut queue);
        }
    }
}

/// Enabling an enabled ring, as some front-ends do, changes nothing.
fn enabling_twice_changes_nothing(target: &dyn Target) {
    let running = target.start();
    for mode in usual(target) {
        let (front_end, mut queue) = mode.start(&running, 16, 0);
        for _ in 0..5 {
            front_end.enable(0, true).unwrap();
            assert_works(target, front_end.memory(), &mut queue);
        }
    }
}

fn a_stop_returns_the_index_after_the_last_request(target: &dyn Target) {
    let running = target.start();
    for mode in modes(target) {
        let front_end = mode.connect(&running);
        for base in [0, 5, 0xfffd] {
            for count in [0, 1, 7, 40] {
                let mut queue = mode.queue(&front_end, 16, base);
                Load::new(target, front_end.memory(), &queue, 4).run(&mut queue, count);
                assert_eq!(
                    front_end.stop(0).unwrap(),
                    queue.used_base(),
                    "{mode:?}: {count} requests from {base}"
                );
            }
        }
    }
}

/// Requests that are available when a ring stops are either carried out before the answer, or not touched until it is started again.
fn a_stop_leaves_no_request_half_done(target: &dyn Target) {
    const REQUESTS: usize = 64;
    let running = target.start();
    for mode in modes(target) {
        let (front_end, mut queue) = mode.start(&running, 256, 0);
        let memory = front_end.memory();
        let mut load = Load::new(target, memory, &queue, REQUESTS);
        for round in 0..30 {
            load.fill(&mut queue);
            queue.kick_anyway();
            let base = front_end.stop(0).unwrap();
            let region = memory.region(0, 1);
            let before = memory.read_vec(0, region.size() as usize / 8);
            load.take(&mut queue);
            assert_eq!(
                queue.used_base(),
                base,
                "{mode:?}, round {round}: requests that were taken and not returned"
            );
            assert!(
                memory.read_vec(0, before.len()) == before,
                "{mode:?}, round {round}: guest memory changed after the stop"
            );
            assert!(!queue.has_used());
            // The remaining requests are carried out without a kick.
            front_end.start(0, &queue, base).unwrap();
            load.drain(&mut queue);
        }
    }
}

fn a_stopped_ring_does_nothing(target: &dyn Target) {
    let running = target.start();
    for mode in usual(target) {
        let (front_end, mut queue) = mode.start(&running, 16, 0);
        assert_works(target, front_end.memory(), &mut queue);
        let base = front_end.stop(0).unwrap();
        let mut request = Request::new(target, front_end.memory());
        push(&mut queue, &request.write(1));
        front_end.enable(0, true).unwrap();
        assert_quiet(&queue);
        request.assert_untouched();
        assert_eq!(front_end.stop(0).unwrap(), base, "a second stop");
        front_end.start(0, &queue, base).unwrap();
        request.finish(&mut queue);
    }
}

fn a_ring_continues_where_it_stopped(target: &dyn Target) {
    let running = target.start();
    for mode in modes(target) {
        let (front_end, mut queue) = mode.start(&running, 16, 0xfff0);
        let mut load = Load::new(target, front_end.memory(), &queue, 4);
        for _ in 0..20 {
            load.run(&mut queue, 7);
            let base = front_end.stop(0).unwrap();
            front_end.start(0, &queue, base).unwrap();
        }
    }
}

/// As after a reset of the guest: all settings of the ring are new.
fn a_ring_can_be_started_elsewhere_with_another_size(target: &dyn Target) {
    let running = target.start();
    for mode in usual(target) {
        let front_end = mode.connect(&running);
        for size in [16, 256, 4, 1024, 16] {
            let mut queue = mode.queue(&front_end, size, 0);
            Load::new(target, front_end.memory(), &queue, 2).run(&mut queue, 50);
            front_end.stop(0).unwrap();
        }
    }
}

fn the_stop_of_a_ring_leaves_the_others_running(target: &dyn Target) {
    let running = target.start();
    for mode in usual(target) {
        let front_end = mode.connect(&running);
        if front_end.queue_count().min(target.request_queues()) < 2 {
            return skip(target, "a second queue");
        }
        let first = mode.queue(&front_end, 16, 0);
        let mut second = front_end.queue_with(1, mode.options(16, 0)).unwrap();
        let mut load = Load::new(target, front_end.memory(), &second, 4);
        while_repeating(
            || load.run(&mut second, 20),
            || {
                for _ in 0..100 {
                    let base = front_end.stop(0).unwrap();
                    front_end.start(0, &first, base).unwrap();
                }
            },
        );
    }
}

/// libkrun resets a device without GET_VRING_BASE: its rings are disabled, and set up again, often at the same addresses.
fn a_disabled_ring_that_is_set_up_again_begins_anew(target: &dyn Target) {
    if !claims(target, Claim::RingChecks) {
        return;
    }
    let running = target.start();
    for mode in modes(target) {
        let (front_end, mut queue) = mode.start(&running, 16, 0);
        for round in 0..3 {
            Load::new(target, front_end.memory(), &queue, 4).run(&mut queue, 41);
            front_end.enable(0, false).unwrap();
            match round {
                0 => queue.reset(),
                _ => queue = Queue::new(front_end.memory(), mode.options(8 << round, 0)),
            }
            front_end.start(0, &queue, queue.options().start()).unwrap();
        }
        Load::new(target, front_end.memory(), &queue, 4).run(&mut queue, 41);
    }
}

/// Sends SET_VRING_BASE of ring 0. Returns whether it was accepted.
fn set_base(front_end: &FrontEnd, base: u32) -> bool {
    let request = FrontendReq::SET_VRING_BASE;
    let payload = payload::vring_state(0, base);
    let raw = front_end.raw().unwrap();
    raw.acknowledged(request, &payload, &[]).unwrap() == 0
}

/// A set-up without a kick eventfd loses nothing.
fn a_disabled_ring_that_gets_its_own_base_continues_when_enabled(target: &dyn Target) {
    if !claims(target, Claim::RingChecks) {
        return;
    }
    let running = target.start();
    for mode in modes(target) {
        let (front_end, mut queue) = mode.start(&running, 16, 0);
        let mut load = Load::new(target, front_end.memory(), &queue, 4);
        for _ in 0..3 {
            load.run(&mut queue, 7);
            front_end.enable(0, false).unwrap();
            assert!(set_base(&front_end, queue.used_base()), "{mode:?}");
            load.fill(&mut queue);
            queue.kick_anyway();
            assert_quiet(&queue);
            front_end.enable(0, true).unwrap();
            load.drain(&mut queue);
        }
    }
}

fn a_base_other_than_the_position_of_an_enabled_ring_is_refused(target: &dyn Target) {
    if !claims(target, Claim::RingChecks) {
        return;
    }
    let running = target.start();
    for mode in modes(target) {
        let (front_end, mut queue) = mode.start(&running, 16, 0);
        let mut load = Load::new(target, front_end.memory(), &queue, 4);
        for _ in 0..3 {
            load.run(&mut queue, 7);
            assert!(set_base(&front_end, queue.used_base()), "{mode:?}");
            for base in [queue.options().start(), queue.used_base() ^ 1] {
                assert!(!set_base(&front_end, base), "{mode:?}: {base:#x}");
            }
        }
        load.run(&mut queue, 7);
    }
}

/// Front-ends send the whole table again when memory is added, while the rings run.
fn the_memory_table_can_be_sent_again_while_requests_run(target: &dyn Target) {
    let running = target.start();
    for mode in modes(target) {
        let (front_end, mut queue) = mode.start(&running, 64, 0);
        let mut load = Load::new(target, front_end.memory(), &queue, 16);
        while_repeating(
            || load.run(&mut queue, 50),
            || (0..50).for_each(|_| front_end.send_memory_table().unwrap()),
        );
    }
}

fn a_disconnect_with_requests_in_flight_does_no_harm(target: &dyn Target) {
    let running = target.start();
    for mode in modes(target) {
        for _ in 0..5 {
            let (front_end, mut queue) = mode.start(&running, 256, 0);
            let mut load = Load::new(target, front_end.memory(), &queue, 64);
            load.fill(&mut queue);
            queue.kick_anyway();
        }
        let (front_end, mut queue) = mode.start(&running, 16, 0);
        assert_works(target, front_end.memory(), &mut queue);
    }
}

/// Memory that outlives the connection, as it does in a VMM.
fn nothing_is_written_to_guest_memory_after_the_next_connection_is_served(target: &dyn Target) {
    let running = target.start();
    let modes: Vec<_> = usual(target).collect();
    for mode in modes.into_iter().cycle().take(6) {
        let front_end = mode.connect(&running);
        let memory = front_end.memory().clone();
        let mut queue = mode.queue(&front_end, 256, 0);
        let mut load = Load::new(target, &memory, &queue, 64);
        load.fill(&mut queue);
        queue.kick_anyway();
        drop(front_end);
        let _next = mode.connect(&running);
        let size = memory.regions()[0].size() as usize / 8;
        let before = memory.read_vec(0, size);
        std::thread::sleep(QUIET);
        assert!(
            memory.read_vec(0, size) == before,
            "guest memory of the last connection changed"
        );
    }
}

crate::for_each_target![
    requests_available_before_the_start_need_no_kick,
    a_ring_does_nothing_before_it_is_enabled,
    a_disabled_ring_does_nothing_until_it_is_enabled_again,
    enabling_twice_changes_nothing,
    a_stop_returns_the_index_after_the_last_request,
    a_stop_leaves_no_request_half_done,
    a_stopped_ring_does_nothing,
    a_ring_continues_where_it_stopped,
    a_ring_can_be_started_elsewhere_with_another_size,
    a_disabled_ring_that_is_set_up_again_begins_anew,
    a_disabled_ring_that_gets_its_own_base_continues_when_enabled,
    a_base_other_than_the_position_of_an_enabled_ring_is_refused,
    the_stop_of_a_ring_leaves_the_others_running,
    the_memory_table_can_be_sent_again_while_requests_run,
    a_disconnect_with_requests_in_flight_does_no_harm,
    nothing_is_written_to_guest_memory_after_the_next_connection_is_served,
];
