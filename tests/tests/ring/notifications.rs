// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Kicks and calls: none is lost, and none is sent that is not wanted.

use std::time::{Duration, Instant};

use fastrand::Rng;
use vhost::VhostBackend;
use vhost::vhost_user::message::FrontendReq;
use vhost_device_tests::front_end::Queue;
use vhost_device_tests::front_end::connection::payload;
use vhost_device_tests::target::{Claim, Request, Target, assert_works, claims};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::{Load, Mode, PATIENCE, QUIET, calls, modes, poll_requests};

/// Modes of split rings with and without EVENT_IDX; indirect tables make no difference here.
const WITH_EVENT_IDX: Mode = Mode {
    packed: false,
    event_idx: true,
    indirect: false,
};
const WITHOUT_EVENT_IDX: Mode = Mode {
    packed: false,
    event_idx: false,
    indirect: false,
};

/// Waits for a signal. Returns the number of signals since the last read.
fn wait_calls(queue: &Queue) -> u64 {
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end {
        let calls = calls(queue);
        if calls > 0 {
            return calls;
        }
        std::thread::yield_now();
    }
    panic!("no call");
}

fn each_used_request_is_signalled_once(target: &dyn Target) {
    const COUNT: u64 = 100;
    let running = target.start();
    for mode in modes(target) {
        let (front_end, mut queue) = mode.start(&running, 16, 0);
        let mut request = Request::new(target, front_end.memory());
        for tag in 0..COUNT {
            assert!(!queue.arm_interrupt());
            queue.submit(&request.write(tag as u32));
            assert!(
                queue.wait_call(PATIENCE),
                "{mode:?}: no call for request {tag}"
            );
            request.assert_done(
                queue
                    .take_used()
                    .expect("a call means that a request was used"),
            );
        }
        assert!(!queue.wait_call(QUIET), "{mode:?}: a call too many");
        assert_eq!(queue.calls(), COUNT, "{mode:?}");
    }
}

/// The signals of a device that ignores the flag would have come before the expected one.
fn the_no_interrupt_flag_is_respected(target: &dyn Target) {
    if !claims(target, Claim::NoInterrupt) {
        return;
    }
    let running = target.start();
    let (front_end, mut queue) = WITHOUT_EVENT_IDX.start(&running, 16, 0);
    let mut request = Request::new(target, front_end.memory());
    queue.split().set_no_interrupt(true);
    poll_requests(&mut request, &mut queue, 50);
    queue.split().set_no_interrupt(false);
    poll_requests(&mut request, &mut queue, 1);
    assert_eq!(wait_calls(&queue), 1);
}

fn a_call_comes_when_the_used_index_passes_used_event_and_only_then(target: &dyn Target) {
    let running = target.start();
    let front_end = WITH_EVENT_IDX.connect(&running);
    for (base, silent) in [(0, 0), (0, 1), (0, 10), (0xfff8, 10), (0xfffe, 1)] {
        let mut queue = WITH_EVENT_IDX.queue(&front_end, 16, base);
        let mut request = Request::new(target, front_end.memory());
        // Some devices signal the first request after the start whatever the event.
        poll_requests(&mut request, &mut queue, 1);
        wait_calls(&queue);
        let event = queue.split().used_index().wrapping_add(silent);
        queue.split().set_used_event(event);
        poll_requests(&mut request, &mut queue, silent);
        assert_eq!(
            calls(&queue),
            0,
            "from {base}, event {event}: a call before it"
        );
        poll_requests(&mut request, &mut queue, 1);
        assert_eq!(wait_calls(&queue), 1, "from {base}, event {event}");
        // Further signals would have come before the next expected one.
        poll_requests(&mut request, &mut queue, 20);
        queue.split().set_used_event(queue.split().used_index());
        poll_requests(&mut request, &mut queue, 1);
        assert_eq!(
            wait_calls(&queue),
            1,
            "from {base}, event {event}: after it"
        );
        front_end.stop(0).unwrap();
    }
}

/// An event inside a batch is passed when the batch is published.
fn a_call_comes_for_an_event_in_the_middle_of_a_batch(target: &dyn Target) {
    let running = target.start();
    let (front_end, mut queue) = WITH_EVENT_IDX.start(&running, 64, 0);
    let mut load = Load::new(target, front_end.memory(), &queue, 20);
    for round in 0..50 {
        let start = queue.split().used_index();
        queue.split().set_used_event(start.wrapping_add(round % 20));
        load.fill(&mut queue);
        queue.kick_anyway();
        assert!(queue.wait_call(PATIENCE), "round {round}");
        assert!(queue.wait_used_index(start.wrapping_add(20), PATIENCE));
        load.take(&mut queue);
        calls(&queue);
    }
}

/// The driver kicks only if the device asks for it, and at unexpected moments.
fn no_kick_is_lost(target: &dyn Target) {
    const TIME: Duration = Duration::from_secs(1);
    let running = target.start();
    for mode in modes(target) {
        let (front_end, mut queue) = mode.start(&running, 64, 0);
        let mut load = Load::new(target, front_end.memory(), &queue, 24);
        let mut random = Rng::with_seed(7);
        let end = Instant::now() + TIME;
        while Instant::now() < end {
            for _ in 0..random.u32(1..4) {
                for _ in 0..random.u32(1..8) {
                    load.add(&mut queue);
                }
                queue.publish();
                queue.kick();
                for _ in 0..random.u32(0..2000) {
                    std::hint::spin_loop();
                }
            }
            if random.bool() {
                load.drain(&mut queue);
            } else {
                load.take(&mut queue);
            }
            if random.u8(..) < 4 {
                std::thread::sleep(Duration::from_micros(random.u64(..300)));
            }
        }
        load.drain(&mut queue);
        assert!(load.sent > 100, "{mode:?}: {} requests", load.sent);
    }
}

/// The driver makes the next request available just when the device has polled for one and is about to wait. That is
/// some time after the previous one was made available, or was returned.
fn no_kick_is_lost_when_the_device_goes_to_sleep(target: &dyn Target) {
    const TIME: Duration = Duration::from_secs(1);
    const REQUESTS: usize = 3;
    let running = target.start();
    for mode in modes(target) {
        let (front_end, mut queue) = mode.start(&running, 16, 0);
        queue.disarm_interrupt();
        let mut load = Load::new(target, front_end.memory(), &queue, REQUESTS);
        let mut random = Rng::with_seed(11);
        let end = Instant::now() + TIME;
        while Instant::now() < end {
            for _ in 0..REQUESTS {
                // Short pauses are as likely as long ones, of some microseconds.
                let magnitude = random.u32(..14);
                for _ in 0..random.u32(..1 << magnitude) {
                    std::hint::spin_loop();
                }
                load.add(&mut queue);
                queue.publish();
                queue.kick();
            }
            let limit = Instant::now() + PATIENCE;
            while load.idle.len() < REQUESTS {
                assert!(Instant::now() < limit, "{mode:?}: a kick was lost");
                load.take(&mut queue);
            }
        }
    }
}

/// A device may suppress kicks at any time, but not while it waits for one.
fn an_idle_device_wants_a_kick(target: &dyn Target) {
    let running = target.start();
    for mode in modes(target) {
        let (front_end, mut queue) = mode.start(&running, 16, 0);
        for _ in 0..20 {
            assert_works(target, front_end.memory(), &mut queue);
            let end = Instant::now() + PATIENCE;
            let wants = |queue: &Queue| {
                if mode.packed {
                    let (position, flags) = queue.packed().device_event();
                    match mode.event_idx {
                        true => flags == 2 && position == queue.packed().next_available().bits(),
                        false => flags == 0,
                    }
                } else if mode.event_idx {
                    queue.split().avail_event() == queue.split().avail_index()
                } else {
                    queue.split().used_flags() & 1 == 0
                }
            };
            while !wants(&queue) {
                assert!(
                    Instant::now() < end,
                    "{mode:?}: an idle device asks for no kick"
                );
                std::thread::yield_now();
            }
        }
    }
}

fn kicks_for_nothing_do_nothing(target: &dyn Target) {
    let running = target.start();
    for mode in modes(target) {
        let (front_end, mut queue) = mode.start(&running, 16, 0);
        for _ in 0..100 {
            queue.kick_anyway();
        }
        assert!(!queue.wait_call(QUIET), "{mode:?}: a call for nothing");
        assert!(!queue.has_used(), "{mode:?}");
        assert_works(target, front_end.memory(), &mut queue);
    }
}

fn the_call_eventfd_can_be_replaced_while_the_ring_runs(target: &dyn Target) {
    let running = target.start();
    let (front_end, mut queue) = WITHOUT_EVENT_IDX.start(&running, 16, 0);
    let mut request = Request::new(target, front_end.memory());
    for _ in 0..10 {
        let other = EventFd::new(EFD_NONBLOCK).unwrap();
        front_end.call().set_vring_call(0, &other).unwrap();
        poll_requests(&mut request, &mut queue, 1);
        let end = Instant::now() + PATIENCE;
        while other.read().is_err() {
            assert!(Instant::now() < end, "the new eventfd was not signalled");
        }
        assert_eq!(calls(&queue), 0, "the old eventfd was signalled");
        front_end.call().set_vring_call(0, queue.call_fd()).unwrap();
        poll_requests(&mut request, &mut queue, 1);
        wait_calls(&queue);
        assert!(
            other.read().is_err(),
            "the eventfd that was taken away was signalled"
        );
    }
}

fn a_ring_works_without_a_call_eventfd(target: &dyn Target) {
    const NO_FD: u64 = 1 << 8;
    let running = target.start();
    let (front_end, mut queue) = WITHOUT_EVENT_IDX.start(&running, 16, 0);
    let mut request = Request::new(target, front_end.memory());
    let raw = front_end.raw().unwrap();
    raw.done(FrontendReq::SET_VRING_CALL, &payload::u64(NO_FD), &[]);
    poll_requests(&mut request, &mut queue, 20);
    assert!(
        !queue.wait_call(QUIET),
        "the eventfd that was taken away was signalled"
    );
    front_end.call().set_vring_call(0, queue.call_fd()).unwrap();
    assert_works(target, front_end.memory(), &mut queue);
}

/// SET_VRING_KICK without an eventfd requests polling.
fn a_ring_without_a_kick_eventfd_is_polled(target: &dyn Target) {
    const NO_FD: u64 = 1 << 8;
    if !claims(target, Claim::Polling) {
        return;
    }
    let running = target.start();
    let front_end = WITH_EVENT_IDX.connect(&running);
    let mut queue = Queue::new(front_end.memory(), WITH_EVENT_IDX.options(16, 0));
    front_end
        .configure(0, &queue, queue.options().start())
        .unwrap();
    let raw = front_end.raw().unwrap();
    raw.done(FrontendReq::SET_VRING_KICK, &payload::u64(NO_FD), &[]);
    front_end.enable(0, true).unwrap();
    let mut load = Load::new(target, front_end.memory(), &queue, 4);
    for _ in 0..20 {
        load.fill(&mut queue);
        load.drain(&mut queue);
    }
}

/// The next process that serves the ring waits for a kick.
fn a_ring_that_stops_while_its_thread_polls_asks_for_kicks(target: &dyn Target) {
    if !claims(target, Claim::RingChecks) {
        return;
    }
    let running = target.start_with(&|_, command| {
        command.arg("--poll-us=1000000");
    });
    for mode in modes(target) {
        let (front_end, mut queue) = mode.start(&running, 16, 0);
        assert_works(target, front_end.memory(), &mut queue);
        let base = front_end.stop(0).unwrap();
        let mut request = Request::new(target, front_end.memory());
        queue.add(&request.write(1)).unwrap();
        queue.publish();
        assert!(queue.kick(), "{mode:?}: no kick is asked for");
        front_end.start(0, &queue, base).unwrap();
        request.finish(&mut queue);
    }
}

/// An earlier call may have gone to the previous file. QEMU's own tests wait for one too.
fn a_call_file_is_signalled_once_when_it_is_first_used(target: &dyn Target) {
    if !claims(target, Claim::RingChecks) {
        return;
    }
    let running = target.start();
    for mode in modes(target) {
        let front_end = mode.connect(&running);
        let queue = front_end.queue_with(0, mode.options(16, 0)).unwrap();
        assert_eq!(wait_calls(&queue), 1, "{mode:?}: as the ring starts");
        for _ in 0..3 {
            front_end.call().set_vring_call(0, queue.call_fd()).unwrap();
            assert_eq!(wait_calls(&queue), 1, "{mode:?}: while the ring runs");
        }
        std::thread::sleep(QUIET);
        assert_eq!(calls(&queue), 0, "{mode:?}: a call for nothing");
    }
}

crate::for_each_target![
    a_ring_that_stops_while_its_thread_polls_asks_for_kicks,
    a_call_file_is_signalled_once_when_it_is_first_used,
    each_used_request_is_signalled_once,
    the_no_interrupt_flag_is_respected,
    a_call_comes_when_the_used_index_passes_used_event_and_only_then,
    a_call_comes_for_an_event_in_the_middle_of_a_batch,
    no_kick_is_lost,
    no_kick_is_lost_when_the_device_goes_to_sleep,
    an_idle_device_wants_a_kick,
    kicks_for_nothing_do_nothing,
    the_call_eventfd_can_be_replaced_while_the_ring_runs,
    a_ring_works_without_a_call_eventfd,
    a_ring_without_a_kick_eventfd_is_polled,
];
