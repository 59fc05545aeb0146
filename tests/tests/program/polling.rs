// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `--poll-us`: how long the thread of a queue polls for requests.

use std::time::{Duration, Instant};

use vhost_device_tests::front_end::{Buffer, FrontEnd, Options, Queue};
use vhost_device_tests::process::{PATIENCE, Program};

use crate::{Binary, Setup, for_each_program_with_a_file, read_request};

/// How long to watch for something that must not happen.
const QUIET: Duration = Duration::from_millis(100);

/// A program with a started ring, and a request for it.
struct Running {
    program: Program,
    _front_end: FrontEnd,
    queue: Queue,
    chain: Vec<Buffer>,
}

impl Running {
    fn start(setup: &Setup, poll_us: &str) -> Self {
        let program = Program::serve(
            setup.listening().arg(format!("--poll-us={poll_us}")),
            &setup.socket(),
        )
        .unwrap();
        let front_end = FrontEnd::connect(&setup.socket(), &Options::default()).unwrap();
        let queue = front_end.queue(0, 16).unwrap();
        let chain = read_request(&front_end, 512);
        Self {
            program,
            _front_end: front_end,
            queue,
            chain,
        }
    }

    /// Makes a request available, without a kick.
    fn offer(&mut self) {
        self.queue.add(&self.chain).unwrap();
        self.queue.publish();
    }

    /// Returns whether all requests are answered in time.
    fn is_answered(&mut self, limit: Duration) -> bool {
        let answered = self
            .queue
            .wait_used_index(self.queue.split().avail_index(), limit);
        while self.queue.take_used().is_some() {}
        answered
    }

    /// Runs a request with a kick.
    fn request(&mut self) {
        self.offer();
        self.queue.kick_anyway();
        assert!(self.is_answered(PATIENCE));
    }

    /// Returns the CPU time for 100 requests with pauses between them.
    fn cost_of_seldom_requests(mut self) -> Duration {
        let before = self.program.processor_time().unwrap();
        for _ in 0..100 {
            self.request();
            std::thread::sleep(Duration::from_millis(5));
        }
        self.program.processor_time().unwrap() - before
    }
}

fn a_thread_that_polls_needs_no_kick(binary: &Binary) {
    let setup = Setup::new(binary);
    let mut running = Running::start(&setup, "1000000");
    // On a busy machine the second of polling may be over before the thread has polled once.
    let answered_without_kick = (0..10).any(|_| {
        running.request();
        running.offer();
        let answered = running.is_answered(Duration::from_secs(2));
        running.queue.kick_anyway();
        answered || !running.is_answered(PATIENCE)
    });
    assert!(answered_without_kick);
}

fn a_thread_that_does_not_poll_waits_for_the_kick(binary: &Binary) {
    let setup = Setup::new(binary);
    let mut running = Running::start(&setup, "off");
    for _ in 0..5 {
        running.request();
        let end = Instant::now() + PATIENCE;
        while running.queue.split().avail_event() != running.queue.split().avail_index() {
            assert!(Instant::now() < end, "it asks for no kick");
            std::thread::yield_now();
        }
        running.offer();
        assert!(!running.is_answered(QUIET));
        running.queue.kick_anyway();
        assert!(running.is_answered(PATIENCE));
    }
}

fn a_thread_sleeps_between_rare_requests_unless_told_to_poll(binary: &Binary) {
    let setup = Setup::new(binary);
    let [learned, never, always] = ["auto", "off", "10000"]
        .map(|poll_us| Running::start(&setup, poll_us).cost_of_seldom_requests());
    assert!(
        2 * learned < always && 2 * never < always,
        "auto {learned:?}, off {never:?}, 10 ms {always:?}"
    );
}

for_each_program_with_a_file!(
    a_thread_that_polls_needs_no_kick,
    a_thread_that_does_not_poll_waits_for_the_kick,
    a_thread_sleeps_between_rare_requests_unless_told_to_poll,
);
