// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Queues that are enabled and disabled (SET_VRING_ENABLE), with a device that exists only here: a network device in this alone.

#![cfg(test)]

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost_device_common::device::{Device, QueueHandler, StartError, Watcher};
use vhost_device_common::session;
use vhost_device_common::statistics::Statistics;
use vhost_device_common::worker::{Polling, Queue};
use vhost_device_tests::front_end::device::RING_PACKED;
use vhost_device_tests::front_end::{Buffer, FrontEnd, Options, Queue as Ring};

const LIMIT: Duration = Duration::from_secs(10);
/// How long to look for what must not happen.
const QUIET: Duration = Duration::from_millis(50);

/// Requests stay in this queue while it is disabled.
const RECEIVE: usize = 0;
/// Those in this queue are discarded.
const TRANSMIT: usize = 1;
/// More than are taken at a time.
const MANY: u16 = 250;

/// What the handler was told: queues, and whether they were enabled.
type Told = Arc<Mutex<Vec<(usize, bool)>>>;

#[derive(Clone, Default)]
struct Port(Told);

#[derive(clap::Args)]
struct NoOptions {}

impl Device for Port {
    const TYPE: &'static str = "net";
    const PROGRAM: &'static str = "port";
    const VERSION: &'static str = "0";
    const DESCRIPTION: &'static str = "a test device";

    type Options = NoOptions;
    type Handler = Self;

    fn open(NoOptions {}: NoOptions) -> Result<Self, StartError> {
        Ok(Self::default())
    }

    fn num_queues(&self) -> u16 {
        2
    }

    fn handler(&self, _thread: u16, _watcher: Watcher) -> io::Result<Self> {
        Ok(self.clone())
    }
}

impl QueueHandler for Port {
    /// Writes a byte for each request.
    fn process(&mut self, queue: &mut Queue) {
        while let Some(mut chain) = queue.take() {
            chain.write(&[1]).unwrap();
            queue.complete(chain, 1);
        }
    }

    fn set_enabled(&mut self, queue: &mut Queue, enabled: bool) {
        let queue = usize::from(queue.index());
        self.0.lock().unwrap().push((queue, enabled));
    }

    fn discards(&self, queue: u16) -> bool {
        usize::from(queue) == TRANSMIT
    }
}

/// The device on a connection, with both queues set up, and not enabled.
struct Setup {
    front_end: FrontEnd,
    rings: [Ring; 2],
    told: Told,
    server: JoinHandle<()>,
}

impl Setup {
    fn new(features: u64) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let port = Port::default();
        let told = Arc::clone(&port.0);
        let server = std::thread::spawn(move || {
            let (_end, stop) = UnixStream::pair().unwrap();
            let statistics = Statistics::new(Port::TYPE, Port::REQUESTS);
            session::serve(&port, &statistics, theirs, &stop.into(), Polling::Auto).unwrap();
        });
        let mut options = Options::default();
        options.features &= !RING_PACKED;
        options.features |= features;
        let front_end = FrontEnd::from_stream(ours, &options).unwrap();
        let rings = [RECEIVE, TRANSMIT].map(|index| {
            let options = front_end.queue_options(256);
            let ring = Ring::new(front_end.memory(), options);
            front_end.configure(index, &ring, options.start()).unwrap();
            let kick = ring.kick_fd();
            front_end.call().set_vring_kick(index, kick).unwrap();
            ring
        });
        Self {
            front_end,
            rings,
            told,
            server,
        }
    }

    fn enable(&self, queue: usize, enabled: bool) {
        let mut call = self.front_end.call();
        call.set_vring_enable(queue, enabled).unwrap();
    }

    fn submit(&mut self, queue: usize) {
        let byte = self.front_end.memory().allocate(1, 1);
        self.rings[queue].submit(&[Buffer::writable(byte, 1)]);
    }

    /// Waits for an answer. Returns how many bytes were written.
    fn answer(&mut self, queue: usize) -> u32 {
        let ring = &mut self.rings[queue];
        assert!(ring.poll_used(LIMIT), "a request is not answered");
        ring.take_used().unwrap().length
    }

    fn end(self) {
        self.front_end.disconnect();
        self.server.join().unwrap();
    }
}

#[test]
fn requests_stay_in_a_disabled_queue_unless_the_handler_has_them_discarded() {
    for features in [0, RING_PACKED] {
        let mut setup = Setup::new(features);
        for _ in 0..2 {
            setup.submit(TRANSMIT);
            assert_eq!(setup.answer(TRANSMIT), 0);
            setup.submit(RECEIVE);
            assert!(!setup.rings[RECEIVE].poll_used(QUIET));

            setup.enable(RECEIVE, true);
            assert_eq!(setup.answer(RECEIVE), 1);
            setup.enable(TRANSMIT, true);
            setup.submit(TRANSMIT);
            assert_eq!(setup.answer(TRANSMIT), 1);

            setup.enable(RECEIVE, false);
            setup.enable(TRANSMIT, false);
        }
        setup.end();
    }
}

#[test]
fn many_requests_are_discarded() {
    for features in [0, RING_PACKED] {
        let mut setup = Setup::new(features);
        for _ in 0..3 {
            let byte = setup.front_end.memory().allocate(1, 1);
            let ring = &mut setup.rings[TRANSMIT];
            for _ in 0..MANY {
                ring.add(&[Buffer::writable(byte, 1)]).unwrap();
            }
            ring.publish();
            ring.kick();
            for _ in 0..MANY {
                assert_eq!(setup.answer(TRANSMIT), 0);
            }
        }
        assert_eq!(
            setup.front_end.stop(TRANSMIT).unwrap() & 0x7fff,
            match features {
                0 => u32::from(3 * MANY),
                // A packed ring has 256 places, and as many requests as that turn its wrap counter.
                _ => u32::from(3 * MANY) % 256,
            }
        );
        setup.end();
    }
}

#[test]
fn a_handler_is_told_of_each_change_and_of_the_state_at_the_start() {
    let mut setup = Setup::new(0);
    setup.enable(TRANSMIT, true);
    setup.enable(TRANSMIT, true);
    setup.enable(RECEIVE, false);
    setup.enable(TRANSMIT, false);
    let mut expected = vec![
        (RECEIVE, false),
        (TRANSMIT, false),
        (TRANSMIT, true),
        (TRANSMIT, false),
    ];
    assert_eq!(*setup.told.lock().unwrap(), expected);

    setup.enable(RECEIVE, true);
    setup.front_end.stop(RECEIVE).unwrap();
    setup.enable(RECEIVE, false);
    setup.enable(RECEIVE, true);
    setup.rings[RECEIVE] = setup.front_end.queue(RECEIVE, 256).unwrap();
    expected.extend([(RECEIVE, true), (RECEIVE, true)]);
    assert_eq!(*setup.told.lock().unwrap(), expected);
    setup.end();
}
