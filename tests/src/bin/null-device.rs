// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A disk on our core that answers each request at once, without data. It measures the cost of the core, to be compared with QEMU's null-co.

use std::io;
use std::process::ExitCode;

use vhost_device_common::device::{Device, QueueHandler, StartError, Watcher};
use vhost_device_common::program;
use vhost_device_common::worker::Queue;
use vhost_device_tests::bench::block::image::Place;
use vhost_device_tests::front_end::block::{OK, SECTOR_SIZE};

#[derive(clap::Args)]
struct Options {}

struct NullDevice;

impl Device for NullDevice {
    const TYPE: &'static str = "block";
    const PROGRAM: &'static str = "null-device";
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const DESCRIPTION: &'static str = "A disk that answers at once, without data, for benchmarks";

    type Options = Options;
    type Handler = Null;

    fn open(Options {}: Options) -> Result<Self, StartError> {
        Ok(NullDevice)
    }

    /// The capacity is all that a driver needs (VIRTIO 1.3, 5.2.4).
    fn config(&self) -> Vec<u8> {
        let sectors = (Place::Null.size() / SECTOR_SIZE) as u64;
        sectors.to_le_bytes().to_vec()
    }

    fn handler(&self, _thread: u16, _watcher: Watcher) -> io::Result<Null> {
        Ok(Null)
    }
}

struct Null;

impl QueueHandler for Null {
    fn process(&mut self, queue: &mut Queue) {
        while let Some(mut chain) = queue.take() {
            // The status is the last byte; the bytes before it count as written, as with null-co.
            let written = u32::try_from(chain.writable_len()).unwrap_or(u32::MAX);
            let answered = chain
                .split_tail(1)
                .and_then(|()| chain.write_tail(&[OK as u8]));
            queue.complete(chain, if answered.is_ok() { written } else { 0 });
        }
    }
}

fn main() -> ExitCode {
    program::run::<NullDevice>()
}
