// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Runs a device and its handler without threads: does what a worker does, step by step.

use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::{Args, Command, FromArgMatches};
use vhost_device_common::device::{Device, QueueHandler};
use vhost_device_common::ring::Ring;
use vhost_device_common::worker::{EpollPoller, Poller, Queue, Queues, Readiness, Token, Watcher};

use crate::driver::Driver;
use crate::guest::Guest;

/// Limit for the batches of one kick: four times a full ring of 256 descriptors.
const MOST_BATCHES: usize = 16;

/// Opens a device as its program does.
pub fn open<D: Device>(arguments: &[String]) -> Result<D, String> {
    let command = D::Options::augment_args(Command::new(D::PROGRAM).no_binary_name(true));
    let matches = command.try_get_matches_from(arguments);
    let options = matches.and_then(|matches| D::Options::from_arg_matches(&matches));
    let options = options.map_err(|error| error.to_string())?;
    D::open(options).map_err(|error| error.to_string())
}

/// Loads a state into a device. If it accepts the state, it must be able to save and load it again.
pub fn load<D: Device>(device: &D, state: Option<&[u8]>) {
    if let Some(state) = state
        && device.load(D::STATE_VERSION, state).is_ok()
    {
        save(device);
    }
}

/// Saves the state of a device, and loads it after a reset.
pub fn save<D: Device>(device: &D) {
    if let Ok(state) = device.save() {
        assert!(state.len() as u64 <= device.max_state_size());
        device.reset();
        let loaded = device.load(D::STATE_VERSION, &state);
        loaded.expect("a device loads what it has saved");
        let again = device.save().expect("a device saves what it has loaded");
        assert!(state == again, "what was loaded is not what was saved");
    }
}

/// Starts a queue on a ring of the driver.
pub fn queue(index: u16, driver: &Driver, guest: &Guest) -> Queue {
    let memory = Arc::clone(&guest.memory);
    let ring = Ring::new(driver.setup(index), memory, driver.base(), None, 0);
    Queue::new(index, ring.expect("the ring is in memory"), true)
}

/// A poller, and the handle by which a handler has it watch files.
pub fn poller() -> (EpollPoller, Watcher) {
    let poller = EpollPoller::new().expect("a poller");
    let watcher = poller.watcher();
    (poller, watcher)
}

/// A worker without its thread.
pub struct Bench<'a, H> {
    handler: &'a mut H,
    poller: EpollPoller,
    queues: Queues,
}

impl<'a, H: QueueHandler> Bench<'a, H> {
    /// `poller` has the files that the handler watches.
    pub fn new(handler: &'a mut H, poller: EpollPoller, queues: Vec<Queue>) -> Self {
        Self {
            handler,
            poller,
            queues: Queues::new(queues),
        }
    }

    /// Handles a kick by the driver.
    pub fn kick(&mut self, index: u16) {
        let Some(queue) = self.queues.get_mut(index) else {
            return;
        };
        for _ in 0..MOST_BATCHES {
            queue.begin_batch(Instant::now());
            if !queue.has_available() {
                break;
            }
            self.handler.process(queue);
            queue.publish();
        }
    }

    /// Waits with the poller of the handler until it holds no request.
    pub fn finish(&mut self, index: u16) {
        while self.held(index) > 0 {
            let mut ready = Vec::new();
            let poller = self.handler.poller();
            let waited = poller.map(|poller| poller.wait(&mut ready, None));
            waited.expect("a way to wait").expect("a poller that works");
            for token in ready {
                if let Token::Device(token) = token {
                    self.ready(token);
                }
            }
            if let Some(queue) = self.queues.get_mut(index) {
                queue.publish();
            }
        }
    }

    /// Calls the handler for all files that have become ready.
    pub fn wait(&mut self) {
        let waited = self.poller.wait(&mut Vec::new(), Some(Duration::ZERO));
        waited.expect("a poller that works");
        while let Some((token, readiness)) = self.poller.next_file() {
            self.handler.ready(token, readiness, &mut self.queues);
        }
    }

    /// Calls the handler for this token, whether its file is ready or not.
    pub fn ready(&mut self, token: u32) {
        self.handler
            .ready(token, Readiness::READABLE, &mut self.queues);
    }

    /// Returns the number of requests that the handler holds.
    pub fn held(&mut self, index: u16) -> u16 {
        self.queues.get_mut(index).map_or(0, |queue| queue.held())
    }

    /// Stops a queue. The handler must complete all requests that it holds.
    pub fn stop(&mut self, index: u16) {
        let Some(queue) = self.queues.get_mut(index) else {
            return;
        };
        self.handler.drain(queue);
        queue.publish();
        assert_eq!(queue.held(), 0, "queue {index} keeps requests");
    }

    pub fn handler(&mut self) -> &mut H {
        self.handler
    }
}
