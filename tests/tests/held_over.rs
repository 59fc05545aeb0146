// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Requests that a device puts back into the ring, or holds over a stop of its queue: with a device that exists only here.

#![cfg(test)]

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserInflight, VhostUserProtocolFeatures as Protocol};
use vhost_device_common::chain::Chain;
use vhost_device_common::device::{Device, QueueHandler, StartError, Watcher};
use vhost_device_common::session;
use vhost_device_common::statistics::Statistics;
use vhost_device_common::worker::{Polling, Queue};
use vhost_device_tests::front_end::device::{EVENT_IDX, RING_PACKED};
use vhost_device_tests::front_end::{Buffer, FrontEnd, Options, Queue as Ring};

const LIMIT: Duration = Duration::from_secs(10);
const QUEUE_SIZE: u16 = 32;
/// Requests that a driver makes available at once.
const REQUESTS: usize = 8;

/// What the device does with requests whose byte is above 0.
const COMPLETE: u8 = 0;
const HOLD_OVER: u8 = 1;
const PUT_BACK: u8 = 2;
/// It carries requests out by threes, and puts fewer back.
const GATHER: u8 = 3;
const GATHERED: usize = 3;

#[derive(Clone)]
struct Holder(Arc<AtomicU8>);

struct Handler {
    what: Arc<AtomicU8>,
    held: Vec<Chain>,
}

#[derive(clap::Args)]
struct NoOptions {}

impl Device for Holder {
    const TYPE: &'static str = "rng";
    const PROGRAM: &'static str = "holder";
    const VERSION: &'static str = "0";
    const DESCRIPTION: &'static str = "a test device";

    type Options = NoOptions;
    type Handler = Handler;

    fn open(NoOptions {}: NoOptions) -> Result<Self, StartError> {
        Ok(Holder(Arc::default()))
    }

    fn handler(&self, _thread: u16, _watcher: Watcher) -> io::Result<Handler> {
        Ok(Handler {
            what: Arc::clone(&self.0),
            held: Vec::new(),
        })
    }
}

impl QueueHandler for Handler {
    fn process(&mut self, queue: &mut Queue) {
        let what = self.what.load(Ordering::Acquire);
        while let Some(mut chain) = queue.take() {
            // All of it is read before the device can tell.
            let number: u8 = chain.read_object().unwrap();
            if number > 0 && what != COMPLETE {
                self.held.push(chain);
                continue;
            }
            chain.write(&[number]).unwrap();
            queue.complete(chain, 1);
        }
        if what == GATHER {
            let is_enough = self.held.len() >= GATHERED;
            while !is_enough && let Some(chain) = self.held.pop() {
                queue.put_back(chain);
            }
            for mut chain in self.held.drain(..) {
                chain.write(&[GATHER]).unwrap();
                queue.complete(chain, 1);
            }
        }
    }

    fn drain(&mut self, queue: &mut Queue) {
        match self.what.load(Ordering::Acquire) {
            PUT_BACK => {
                while let Some(chain) = self.held.pop() {
                    queue.put_back(chain);
                }
            }
            _ => {
                for chain in self.held.drain(..) {
                    queue.suspend(chain);
                }
            }
        }
    }
}

/// The device behind one connection.
struct Back {
    front_end: FrontEnd,
    server: JoinHandle<()>,
    what: Arc<AtomicU8>,
    /// Where the answers are, by the heads of their requests.
    places: HashMap<u16, u64>,
}

impl Back {
    fn start(packed: bool, what: u8) -> Self {
        let format = if packed { RING_PACKED } else { 0 };
        Self::with_features(format | EVENT_IDX, what)
    }

    fn with_features(features: u64, what: u8) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let holder = Holder(Arc::new(what.into()));
        let what = Arc::clone(&holder.0);
        let server = std::thread::spawn(move || {
            let (_end, stop) = UnixStream::pair().unwrap();
            let statistics = Statistics::new(Holder::TYPE, Holder::REQUESTS);
            session::serve(&holder, &statistics, theirs, &stop.into(), Polling::Auto).unwrap();
        });
        let mut options = Options::default();
        options.features &= !(RING_PACKED | EVENT_IDX);
        options.features |= features;
        options.protocol_features |= Protocol::INFLIGHT_SHMFD;
        let front_end = FrontEnd::from_stream(ours, &options).unwrap();
        Self {
            front_end,
            server,
            what,
            places: HashMap::new(),
        }
    }

    /// Makes a request with each of these bytes available.
    fn submit(&mut self, ring: &mut Ring, numbers: &[u8]) {
        let memory = self.front_end.memory();
        for number in numbers {
            let address = memory.allocate(2, 1);
            memory.write_u8(address, *number);
            let request = [
                Buffer::readable(address, 1),
                Buffer::writable(address + 1, 1),
            ];
            let head = ring.add(&request).unwrap();
            self.places.insert(head, address + 1);
        }
        ring.publish();
        ring.kick();
    }

    /// Waits for as many answers, and gives what they say.
    fn answers(&self, ring: &mut Ring, count: usize) -> Vec<u8> {
        let memory = self.front_end.memory();
        let mut answers = Vec::new();
        while answers.len() < count {
            assert!(ring.wait_used(LIMIT), "after {answers:?}");
            let used = ring.take_used().unwrap();
            assert_eq!(used.length, 1);
            answers.push(memory.read_u8(self.places[&used.head]));
        }
        assert!(!ring.has_used());
        answers
    }

    /// Has another process, which completes all requests, continue with the same guest.
    fn replace(self) -> Self {
        let (memory, places) = (self.front_end.memory().clone(), self.places.clone());
        let packed = self.front_end.features() & RING_PACKED != 0;
        self.end();
        let mut next = Self::start(packed, COMPLETE);
        next.front_end.replace_memory(memory).unwrap();
        next.places = places;
        next
    }

    /// Keeps a file of requests in flight.
    fn note_requests(&self) -> (VhostUserInflight, File) {
        let wanted = VhostUserInflight {
            num_queues: 1,
            queue_size: QUEUE_SIZE,
            ..VhostUserInflight::default()
        };
        let (inflight, file) = self.front_end.call().get_inflight_fd(&wanted).unwrap();
        let mut call = self.front_end.call();
        call.set_inflight_fd(&inflight, file.as_raw_fd()).unwrap();
        drop(call);
        (inflight, file)
    }

    fn end(self) {
        drop(self.front_end);
        self.server.join().unwrap();
    }
}

/// Numbers of which the device leaves the odd ones unanswered; all requests after each of those are taken before it stops.
const NUMBERS: [u8; REQUESTS] = [0, 1, 0, 3, 0, 0, 7, 0];
const LEFT: [u8; 3] = [1, 3, 7];

#[test]
fn a_queue_that_goes_on_gives_requests_again_that_were_held_over() {
    for packed in [false, true] {
        let mut back = Back::start(packed, HOLD_OVER);
        let mut ring = back.front_end.queue(0, QUEUE_SIZE).unwrap();
        back.submit(&mut ring, &NUMBERS);
        assert_eq!(back.answers(&mut ring, REQUESTS - LEFT.len()), [0; 5]);
        // More than once, without a word lost.
        let mut base = back.front_end.stop(0).unwrap();
        for _ in 0..3 {
            back.front_end.start(0, &ring, base).unwrap();
            base = back.front_end.stop(0).unwrap();
        }
        assert!(!ring.has_used());
        back.what.store(COMPLETE, Ordering::Release);
        back.front_end.start(0, &ring, base).unwrap();
        back.submit(&mut ring, &[9]);
        assert_eq!(back.answers(&mut ring, 4), [1, 3, 7, 9], "{packed}");
        drop(ring);
        back.end();
    }
}

#[test]
fn another_process_takes_requests_that_were_held_over_from_the_file_of_requests_in_flight() {
    for packed in [false, true] {
        let mut back = Back::start(packed, HOLD_OVER);
        let (inflight, file) = back.note_requests();
        let mut ring = back.front_end.queue(0, QUEUE_SIZE).unwrap();
        back.submit(&mut ring, &NUMBERS);
        assert_eq!(back.answers(&mut ring, REQUESTS - LEFT.len()), [0; 5]);
        let base = back.front_end.stop(0).unwrap();
        back = back.replace();
        back.front_end
            .call()
            .set_inflight_fd(&inflight, file.as_raw_fd())
            .unwrap();
        back.front_end.start(0, &ring, base).unwrap();
        assert_eq!(back.answers(&mut ring, LEFT.len()), LEFT, "{packed}");
        drop(ring);
        back.end();
    }
}

#[test]
fn requests_that_were_put_back_are_in_the_ring() {
    for packed in [false, true] {
        let mut back = Back::start(packed, PUT_BACK);
        let mut ring = back.front_end.queue(0, QUEUE_SIZE).unwrap();
        back.submit(&mut ring, &[0, 0, 3, 4, 5]);
        assert_eq!(back.answers(&mut ring, 2), [0; 2]);
        let base = back.front_end.stop(0).unwrap();
        assert_eq!(base, ring.used_base(), "nothing is in flight");
        // Another process needs to know no more than this.
        back = back.replace();
        back.front_end.start(0, &ring, base).unwrap();
        back.submit(&mut ring, &[6]);
        assert_eq!(back.answers(&mut ring, 4), [3, 4, 5, 6], "{packed}");
        drop(ring);
        back.end();
    }
}

#[test]
fn a_driver_that_begins_anew_has_no_requests_held_over() {
    for case in 0..8 {
        let [packed, resets, notes] = [1, 2, 4].map(|bit| case & bit != 0);
        let mut back = Back::start(packed, HOLD_OVER);
        let _file = notes.then(|| back.note_requests());
        let mut ring = back.front_end.queue(0, QUEUE_SIZE).unwrap();
        back.submit(&mut ring, &NUMBERS);
        back.answers(&mut ring, REQUESTS - LEFT.len());
        back.front_end.stop(0).unwrap();
        if resets {
            back.front_end.call().reset_device().unwrap();
        }
        ring.reset();
        back.what.store(COMPLETE, Ordering::Release);
        let start = ring.options().start();
        back.front_end.start(0, &ring, start).unwrap();
        back.submit(&mut ring, &[9]);
        let case = format!("packed {packed}, resets {resets}, notes {notes}");
        assert_eq!(back.answers(&mut ring, 1), [9], "{case}");
        drop(ring);
        back.end();
    }
}

#[test]
fn requests_that_were_put_back_are_given_again_when_the_driver_adds_one() {
    for features in [0, EVENT_IDX, RING_PACKED, RING_PACKED | EVENT_IDX] {
        let mut back = Back::with_features(features, GATHER);
        let mut ring = back.front_end.queue(0, QUEUE_SIZE).unwrap();
        for round in 0..20 {
            for number in 1..=GATHERED {
                assert!(!ring.has_used(), "too few in round {round}");
                // Whether or not the device sleeps by then.
                if round % 2 == 0 {
                    std::thread::sleep(Duration::from_millis(2));
                }
                back.submit(&mut ring, &[number as u8]);
            }
            let answers = back.answers(&mut ring, GATHERED);
            assert_eq!(answers, [GATHER; GATHERED], "{features:#x}");
        }
        drop(ring);
        back.end();
    }
}

/// As another process would start it, but on the same connection.
#[test]
fn a_file_of_requests_in_flight_that_comes_late_loses_no_requests_held_over() {
    for packed in [false, true] {
        let mut back = Back::start(packed, HOLD_OVER);
        let mut ring = back.front_end.queue(0, QUEUE_SIZE).unwrap();
        back.submit(&mut ring, &NUMBERS);
        back.answers(&mut ring, REQUESTS - LEFT.len());
        let base = back.front_end.stop(0).unwrap();
        let _file = back.note_requests();
        back.what.store(COMPLETE, Ordering::Release);
        back.front_end.start(0, &ring, base).unwrap();
        assert_eq!(back.answers(&mut ring, LEFT.len()), LEFT, "{packed}");
        drop(ring);
        back.end();
    }
}
