// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The thread of a queue, with a device for tests only.

#![cfg(test)]

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use vhost::VhostBackend;
use vhost_device_common::device::{Device, QueueHandler, StartError, Watcher};
use vhost_device_common::session;
use vhost_device_common::statistics::Statistics;
use vhost_device_common::worker::{Polling, Queue, Queues, Readiness};
use vhost_device_tests::front_end::device::{EVENT_IDX, RING_PACKED};
use vhost_device_tests::front_end::{Buffer, FrontEnd, Options, Queue as Ring};
use vmm_sys_util::eventfd::EventFd;

const LIMIT: Duration = Duration::from_secs(10);
const REQUESTS: usize = 8;
/// More rounds than the device needs to learn that the driver is late.
const ROUNDS: usize = 32;
/// A request that is not done before the driver is called.
const WAITS: u8 = 1;
/// A request that takes [`SLOW_TIME`].
const SLOW: u8 = 2;
const SLOW_TIME: Duration = Duration::from_millis(50);
/// Queues of the device, all on one thread.
const QUEUES: u16 = 16;

/// Shared state of the test and the device's thread.
#[derive(Default)]
struct Shared {
    /// The call eventfd of the driver.
    call: OnceLock<EventFd>,
    /// Whether it was called while the request waited for that.
    called: OnceLock<bool>,
    /// A file that the device waits for beside requests.
    event: OnceLock<OwnedFd>,
    /// How many times that became ready.
    heard: AtomicUsize,
    /// Slow requests that are done.
    slow: AtomicUsize,
}

/// Carries out no requests.
#[derive(Clone)]
struct Idle(Arc<Shared>);

#[derive(clap::Args)]
struct NoOptions {}

impl Device for Idle {
    const TYPE: &'static str = "rng";
    const PROGRAM: &'static str = "idle";
    const VERSION: &'static str = "0";
    const DESCRIPTION: &'static str = "a test device";

    type Options = NoOptions;
    type Handler = Self;

    fn open(NoOptions {}: NoOptions) -> Result<Self, StartError> {
        Ok(Idle(Arc::default()))
    }

    fn num_queues(&self) -> u16 {
        QUEUES
    }

    fn handler(&self, _thread: u16, watcher: Watcher) -> io::Result<Self> {
        if let Some(event) = self.0.event.get() {
            watcher.add(event, Readiness::READABLE, 0)?;
        }
        Ok(self.clone())
    }
}

impl QueueHandler for Idle {
    fn process(&mut self, queue: &mut Queue) {
        while let Some(mut chain) = queue.take() {
            let kind = chain.read_object().unwrap_or(0);
            if kind == SLOW {
                std::thread::sleep(SLOW_TIME);
                self.0.slow.fetch_add(1, Ordering::Release);
            }
            if kind == WAITS
                && let Some(call) = self.0.call.get()
            {
                let deadline = Instant::now() + LIMIT;
                let mut called = false;
                while !called && Instant::now() < deadline {
                    std::thread::sleep(Duration::from_millis(1));
                    called = call.read().is_ok();
                }
                self.0.called.set(called).unwrap();
            }
            queue.complete(chain, 0);
        }
    }

    /// Takes requests here too.
    fn ready(&mut self, _token: u32, _readiness: Readiness, queues: &mut Queues) {
        if let Some(queue) = queues.get_mut(0) {
            self.process(queue);
        }
        self.0.heard.fetch_add(1, Ordering::Release);
    }
}

/// A driver that makes some requests available at once and continues when the last one is done.
struct LateDriver {
    front_end: FrontEnd,
    ring: Ring,
}

impl LateDriver {
    /// The last request has the type `last`.
    fn round(&mut self, last: u8) {
        let memory = self.front_end.memory();
        for number in 1..=REQUESTS {
            let address = memory.allocate(1, 1);
            memory.write_u8(address, if number == REQUESTS { last } else { 0 });
            self.ring.add(&[Buffer::readable(address, 1)]).unwrap();
        }
        assert!(!self.ring.arm_interrupt());
        let _ = self.ring.call_fd().read();
        self.ring.publish();
        self.ring.kick();
        for _ in 0..REQUESTS {
            assert!(self.ring.poll_used(2 * LIMIT), "a request is not done");
            self.ring.take_used().unwrap();
        }
    }
}

/// Serves a front-end that negotiates these ring features.
fn serve(shared: &Arc<Shared>, features: u64) -> (FrontEnd, JoinHandle<()>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let idle = Idle(Arc::clone(shared));
    let server = std::thread::spawn(move || {
        let (_end, stop) = UnixStream::pair().unwrap();
        let statistics = Statistics::new(Idle::TYPE, Idle::REQUESTS);
        session::serve(&idle, &statistics, theirs, &stop.into(), Polling::Auto).unwrap();
    });
    let mut options = Options::default();
    options.features &= !(EVENT_IDX | RING_PACKED);
    options.features |= features;
    (FrontEnd::from_stream(ours, &options).unwrap(), server)
}

#[test]
fn a_handler_takes_nothing_from_a_disabled_queue() {
    for features in [0, RING_PACKED] {
        let shared = Arc::new(Shared::default());
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        shared.event.set(event).unwrap();
        let hear = || {
            let before = shared.heard.load(Ordering::Acquire);
            rustix::io::write(shared.event.get().unwrap(), &1u64.to_ne_bytes()).unwrap();
            let deadline = Instant::now() + LIMIT;
            while shared.heard.load(Ordering::Acquire) == before {
                assert!(Instant::now() < deadline, "the handler hears nothing");
                std::thread::yield_now();
            }
        };
        let (front_end, server) = serve(&shared, features);
        let memory = front_end.memory();
        let mut ring = front_end.queue(0, 16).unwrap();
        let request = [Buffer::readable(memory.allocate(1, 1), 1)];
        ring.submit(&request);
        assert!(ring.wait_used(LIMIT), "a request is not done");
        ring.take_used().unwrap();
        // The handler may have requests left of the last batch.
        front_end.enable(0, false).unwrap();
        ring.add(&request).unwrap();
        ring.publish();
        hear();
        // Its completions are published after the session message.
        front_end.enable(0, false).unwrap();
        assert!(!ring.has_used(), "taken from a disabled queue");
        front_end.enable(0, true).unwrap();
        assert!(ring.wait_used(LIMIT), "not done after it was enabled again");
        drop((ring, front_end));
        server.join().unwrap();
    }
}

#[test]
fn session_messages_come_before_the_remaining_queues_of_a_thread() {
    let shared = Arc::new(Shared::default());
    let (front_end, server) = serve(&shared, 0);
    let memory = front_end.memory();
    let kind = memory.allocate(1, 1);
    memory.write(kind, &[SLOW]);
    let mut rings: Vec<_> = (0..usize::from(QUEUES))
        .map(|index| front_end.queue(index, 16).unwrap())
        .collect();
    for ring in &mut rings {
        ring.submit(&[Buffer::readable(kind, 1)]);
    }
    // The thread has seen the kicks of all queues once it serves others than the first.
    let deadline = Instant::now() + LIMIT;
    while shared.slow.load(Ordering::Acquire) < 2 {
        assert!(Instant::now() < deadline, "no request is done");
        std::thread::sleep(Duration::from_millis(1));
    }
    front_end
        .call()
        .set_vring_call(0, rings[0].call_fd())
        .unwrap();
    let done = shared.slow.load(Ordering::Acquire);
    assert!(done < rings.len(), "heard after all queues were served");
    for ring in &mut rings {
        assert!(ring.wait_used(LIMIT), "a request is not done");
    }
    drop((rings, front_end));
    server.join().unwrap();
}

#[test]
fn a_driver_gets_an_early_call() {
    for features in [0, EVENT_IDX, RING_PACKED, RING_PACKED | EVENT_IDX] {
        let shared = Arc::new(Shared::default());
        let (front_end, server) = serve(&shared, features);
        let ring = front_end.queue(0, 16).unwrap();
        let call = ring.call_fd().try_clone().unwrap();
        shared.call.set(call).unwrap();
        let mut driver = LateDriver { front_end, ring };
        for _ in 0..ROUNDS {
            driver.round(0);
        }
        assert_eq!(shared.called.get(), None);
        driver.round(WAITS);
        assert_eq!(shared.called.get(), Some(&true), "features {features:#x}");
        drop(driver);
        server.join().unwrap();
    }
}
