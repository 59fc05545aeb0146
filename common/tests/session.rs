// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Sessions with a device that exists only here, for what no real device does yet.

#![cfg(test)]

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::time::Duration;

use vhost::VhostBackend;
use vhost::vhost_user::message::{
    BackendReq, VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost_device_common::device::{
    ConfigError, Device, FrontEnd, QueueHandler, StartError, Watcher,
};
use vhost_device_common::session;
use vhost_device_common::statistics::Statistics;
use vhost_device_common::worker::{Polling, Queue};
use virtio_bindings::virtio_config::VIRTIO_F_RING_PACKED;

/// Has a config space of two bytes. Each write to the first is a change, which the front-end is told of as many times as the byte
/// says. The second has the lowest protocol features that the front-end accepted.
#[derive(Default)]
struct Counter {
    value: Mutex<u8>,
    front_end: Mutex<FrontEnd>,
}

#[derive(clap::Args)]
struct NoOptions {}

struct Nothing;

impl QueueHandler for Nothing {
    fn process(&mut self, queue: &mut Queue) {
        while let Some(chain) = queue.take() {
            queue.complete(chain, 0);
        }
    }
}

impl Device for Counter {
    const TYPE: &'static str = "rng";
    const PROGRAM: &'static str = "counter";
    const VERSION: &'static str = "0";
    const DESCRIPTION: &'static str = "a test device";

    type Options = NoOptions;
    type Handler = Nothing;

    fn capabilities() -> Vec<&'static str> {
        Vec::new()
    }

    fn open(_options: NoOptions) -> Result<Self, StartError> {
        Ok(Self::default())
    }

    fn features(&self) -> u64 {
        0
    }

    fn num_queues(&self) -> u16 {
        2
    }

    fn max_queue_size(&self) -> u16 {
        256
    }

    fn config(&self) -> Vec<u8> {
        let accepted = self.front_end.lock().unwrap().protocol_features();
        vec![*self.value.lock().unwrap(), accepted as u8]
    }

    fn write_config(&self, _offset: usize, data: &[u8]) -> Result<(), ConfigError> {
        *self.value.lock().unwrap() = data[0];
        for _ in 0..data[0] {
            self.front_end.lock().unwrap().config_changed();
        }
        Ok(())
    }

    fn protocol_features(&self) -> u64 {
        VhostUserProtocolFeatures::RARP.bits()
    }

    fn connected(&self, front_end: &FrontEnd) {
        self.front_end.lock().unwrap().clone_from(front_end);
    }

    fn new_driver(&self) {
        *self.value.lock().unwrap() = 0;
    }

    fn handler(&self, _thread: u16, _watcher: Watcher) -> io::Result<Nothing> {
        Ok(Nothing)
    }
}

/// Runs `test` with a front-end that is connected to a `Counter`, and its channel for requests of the
/// back-end.
fn with_front_end(test: impl FnOnce(&mut Frontend, &mut UnixStream)) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (_end, stop) = UnixStream::pair().unwrap();
    let server = std::thread::spawn(move || {
        let (counter, statistics) = (
            Counter::default(),
            Statistics::new(Counter::TYPE, Counter::REQUESTS),
        );
        let stop = OwnedFd::from(stop);
        session::serve(&counter, &statistics, theirs, &stop, Polling::Auto).unwrap();
    });
    let mut front_end = Frontend::from_stream(ours, 2);
    let features = front_end.get_features().unwrap();
    front_end.set_features(features).unwrap();
    let wanted = VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::BACKEND_REQ
        | VhostUserProtocolFeatures::RARP;
    assert!(front_end.get_protocol_features().unwrap().contains(wanted));
    front_end.set_protocol_features(wanted).unwrap();
    front_end.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    let (mut channel, theirs) = UnixStream::pair().unwrap();
    channel
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    front_end.set_backend_request_fd(&theirs).unwrap();
    drop(theirs);
    test(&mut front_end, &mut channel);
    drop(front_end);
    server.join().unwrap();
}

fn config(front_end: &mut Frontend) -> u8 {
    let flags = VhostUserConfigFlags::WRITABLE;
    front_end.get_config(0, 1, flags, &[0]).unwrap().1[0]
}

#[test]
fn a_config_change_reaches_the_front_end_and_wants_no_reply() {
    with_front_end(|front_end, channel| {
        let flags = VhostUserConfigFlags::WRITABLE;
        front_end.set_config(0, flags, &[1]).unwrap();
        let mut header = [0; 12];
        channel.read_exact(&mut header).unwrap();
        let words: Vec<u32> = header
            .chunks(4)
            .map(|word| u32::from_ne_bytes(word.try_into().unwrap()))
            .collect();
        // Version 1, neither a reply nor one wanted, without payload.
        assert_eq!(words, [BackendReq::CONFIG_CHANGE_MSG.into(), 1, 0]);
        assert_eq!(config(front_end), 1);
    });
}

#[test]
fn a_front_end_that_reads_no_changes_still_gets_its_config() {
    with_front_end(|front_end, _channel| {
        // Far more than a socket buffer holds.
        for value in (1..=255).chain(1..=255) {
            let flags = VhostUserConfigFlags::WRITABLE;
            front_end.set_config(0, flags, &[value]).unwrap();
            assert_eq!(config(front_end), value);
        }
    });
}

#[test]
fn a_device_adds_protocol_features_and_learns_which_were_accepted() {
    with_front_end(|front_end, _channel| {
        let mut accepted = || {
            let flags = VhostUserConfigFlags::WRITABLE;
            front_end.get_config(1, 1, flags, &[0]).unwrap().1[0]
        };
        // RARP is bit 2, REPLY_ACK bit 3, BACKEND_REQ bit 5; CONFIG is bit 9.
        assert_eq!(accepted(), 0b10_1100);
    });
}

/// Some front-ends acknowledge what asks for no acknowledgement.
#[test]
fn what_a_front_end_sends_on_the_channel_unasked_changes_nothing() {
    with_front_end(|front_end, channel| {
        channel.write_all(&[0xff; 4096]).unwrap();
        let flags = VhostUserConfigFlags::WRITABLE;
        for _ in 0..2 {
            front_end.set_config(0, flags, &[1]).unwrap();
            let mut header = [0; 12];
            channel.read_exact(&mut header).unwrap();
            assert_eq!(config(front_end), 1);
        }
    });
}

/// A packed ring can stop at a base that is 0, which is where a split one begins.
#[test]
fn a_driver_that_chooses_another_ring_format_is_a_new_one() {
    with_front_end(|front_end, _channel| {
        let flags = VhostUserConfigFlags::WRITABLE;
        front_end.set_config(0, flags, &[1]).unwrap();
        let features = front_end.get_features().unwrap();
        front_end.set_vring_base(0, 0).unwrap();
        front_end.set_features(features).unwrap();
        assert_eq!(config(front_end), 1, "the same driver");
        front_end
            .set_features(features & !(1 << VIRTIO_F_RING_PACKED))
            .unwrap();
        assert_eq!(config(front_end), 0);
    });
}
