// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A device that is killed after each step of taking and completing requests. Debug builds can kill themselves there.

use fastrand::Rng;
use vhost::VhostBackend;
use vhost_device_common::ring::crash_point::{KILL_AFTER, Step};

use crate::Variant;
use crate::crash::{Crashes, DEPTH, FLUSHES};

/// Occurrences of a step before the kill: in the first batch, after it, and later.
const PASSAGES: [u64; 4] = [1, 2, 64, 65];
/// Number of answers after which the device must have been killed, unless the step happens less often.
const MOST: u64 = 2 * DEPTH as u64;

/// State required for a device that is to perform a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Left {
    /// Requests.
    Work,
    /// A new inflight region.
    NewRegion,
    /// A batch that was published but not recorded.
    UnnotedBatch,
    /// Requests that another device has taken.
    TakenRequests,
}

fn needed_for(step: Step) -> Left {
    match step {
        Step::Sized | Step::Initialized => Left::NewRegion,
        Step::OneRecovered | Step::IndexRecovered => Left::UnnotedBatch,
        Step::TakenAgain => Left::TakenRequests,
        _ => Left::Work,
    }
}

impl Crashes {
    /// Starts a device that is killed when it has performed `step` for the `passage`th time. Returns whether it was.
    fn is_killed_after(&mut self, step: Step, passage: u64) -> bool {
        self.environment = vec![(KILL_AFTER, format!("{}:{passage}", step.name()))];
        // QEMU has it continue there.
        self.restart(self.load.queue().used_base());
        self.work(None, MOST);
        let is_killed = self.answered < MOST;
        if !is_killed {
            self.kill();
        }
        self.assert_killed();
        is_killed
    }
}

fn nothing_is_lost_by_a_kill_after_any_step(variant: Variant) {
    let mut random = Rng::with_seed(5);
    let mut crashes = Crashes::start(variant, FLUSHES);
    crashes.kill();
    crashes.assert_killed();
    for &step in Step::ALL {
        let others: [u64; 2] = std::array::from_fn(|_| random.u64(1..=200));
        let mut killed = Vec::new();
        for passage in PASSAGES.into_iter().chain(others) {
            match needed_for(step) {
                Left::Work => {}
                Left::NewRegion if passage > 1 => break,
                Left::NewRegion => {
                    crashes.environment.clear();
                    crashes.restart(crashes.load.queue().used_base());
                    crashes.begin_anew();
                }
                // Larger batches mean fewer publications before the device is stopped.
                Left::UnnotedBatch => {
                    while !crashes.is_killed_after(Step::Published, random.u64(1..=8)) {}
                }
                Left::TakenRequests => {
                    while !crashes.is_killed_after(Step::Taken, random.u64(1..=64)) {}
                }
            }
            if crashes.is_killed_after(step, passage) {
                killed.push(passage);
            }
        }
        println!("killed after {step:?}: {killed:?}");
        assert_eq!(killed.first(), Some(&1), "no device does {step:?}");
    }
    crashes.environment.clear();
    crashes.restart(crashes.load.queue().used_base());
    crashes.finish();
}

/// Such a ring has a normal base, so that unanswered requests would be lost.
fn a_ring_that_stops_before_it_is_enabled_answers_what_was_taken(variant: Variant) {
    let mut crashes = Crashes::start(variant, 0);
    crashes.begin_anew();
    assert!(crashes.is_killed_after(Step::Taken, 50));
    crashes.environment.clear();
    let front_end = crashes.replace().unwrap();
    let queue = crashes.load.queue();
    assert!(!queue.has_used(), "a request was answered before");
    front_end.configure(0, queue, queue.used_base()).unwrap();
    let kick = queue.kick_fd();
    front_end.call().set_vring_kick(0, kick).unwrap();
    let base = front_end.stop(0).unwrap();
    let queue = crashes.load.queue();
    assert!(queue.has_used(), "nothing was taken");
    front_end.start(0, queue, base).unwrap();
    crashes.front_end = Some(front_end);
    crashes.finish();
}

/// Limits keep waiting requests in the ring, but this one is no longer in it.
fn a_ring_with_limits_that_stops_answers_what_was_taken(variant: Variant) {
    let mut crashes = Crashes::start(variant, 0);
    crashes.begin_anew();
    assert!(crashes.is_killed_after(Step::Taken, 50));
    crashes.environment.clear();
    crashes.arguments = vec!["--iops=1"];
    crashes.restart(crashes.load.queue().used_base());
    let base = crashes.front_end.as_ref().unwrap().stop(0).unwrap();
    let mut answered = 0;
    while crashes.load.queue().has_used() {
        answered += u64::from(crashes.next(None).is_some());
    }
    assert!(answered > 2, "{answered}");
    assert_eq!(base, crashes.load.queue().used_base());
    crashes.kill();
    crashes.assert_killed();
    crashes.arguments.clear();
    crashes.restart(base);
    crashes.finish();
}

crate::for_each_variant![
    nothing_is_lost_by_a_kill_after_any_step,
    a_ring_that_stops_before_it_is_enabled_answers_what_was_taken,
    a_ring_with_limits_that_stops_answers_what_was_taken,
];
