// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The device of the session.

use std::io;
use std::sync::{Mutex, PoisonError};

use clap::Args;
use vhost_device_common::chain::Chain;
use vhost_device_common::device::{
    ConfigError, Device, QueueHandler, StartError, StateError, Watcher,
};
use vhost_device_common::worker::Queue;

use super::QUEUES;

const CONFIG_SIZE: usize = 32;

/// A device that copies the readable part of a request to the writable part. It holds the last request of each batch until the next one.
#[derive(Debug, Default)]
pub struct Echo<const ONE_PER_QUEUE: bool> {
    config: Mutex<[u8; CONFIG_SIZE]>,
}

#[derive(Args)]
pub struct NoOptions;

impl<const ONE_PER_QUEUE: bool> Device for Echo<ONE_PER_QUEUE> {
    const TYPE: &'static str = "rng";
    const PROGRAM: &'static str = "echo";
    const VERSION: &'static str = "0";
    const DESCRIPTION: &'static str = "a device for tests";
    const STATE_VERSION: u32 = 1;
    const KEEPS_THREADS: bool = !ONE_PER_QUEUE;

    type Options = NoOptions;
    type Handler = Kept;

    fn open(_: NoOptions) -> Result<Self, StartError> {
        Ok(Self {
            config: Mutex::new([0; CONFIG_SIZE]),
        })
    }

    fn num_queues(&self) -> u16 {
        QUEUES
    }

    fn config(&self) -> Vec<u8> {
        let config = self.config.lock().unwrap_or_else(PoisonError::into_inner);
        config.to_vec()
    }

    fn write_config(&self, offset: usize, data: &[u8]) -> Result<(), ConfigError> {
        let mut config = self.config.lock().unwrap_or_else(PoisonError::into_inner);
        let size = data.len();
        let place = offset.checked_add(size).map(|end| offset..end);
        match place.and_then(|place| config.get_mut(place)) {
            Some(place) => place.copy_from_slice(data),
            None => return Err(ConfigError { offset, size }),
        }
        Ok(())
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        Ok(self.config())
    }

    fn load(&self, _version: u32, state: &[u8]) -> Result<(), StateError> {
        let mut config = self.config.lock().unwrap_or_else(PoisonError::into_inner);
        *config = state.try_into().map_err(|_| StateError::TooLong)?;
        Ok(())
    }

    fn thread_of(&self, queue: u16) -> u16 {
        if ONE_PER_QUEUE { queue } else { 0 }
    }

    fn handler(&self, _thread: u16, _watcher: Watcher) -> io::Result<Kept> {
        Ok(Kept::default())
    }
}

/// The handler of all queues.
#[derive(Default)]
pub struct Kept {
    chains: Vec<(u16, Chain)>,
}

impl Kept {
    fn finish(queue: &mut Queue, mut chain: Chain) {
        let length = chain.readable_len().min(chain.writable_len()).min(4096);
        let mut bytes = vec![0; length as usize];
        let outcome = chain.read(&mut bytes).and_then(|()| chain.write(&bytes));
        queue.complete(chain, outcome.map_or(0, |()| length as u32));
    }

    /// Completes the held request of a queue.
    fn release(&mut self, queue: &mut Queue) {
        let index = queue.index();
        for (_, chain) in self.chains.extract_if(.., |(kept, _)| *kept == index) {
            Self::finish(queue, chain);
        }
    }
}

impl QueueHandler for Kept {
    fn process(&mut self, queue: &mut Queue) {
        while let Some(chain) = queue.take() {
            self.release(queue);
            self.chains.push((queue.index(), chain));
        }
    }

    fn drain(&mut self, queue: &mut Queue) {
        self.release(queue);
    }
}
