// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A device is killed under load, and another one takes over: acknowledged writes persist, and each request is answered once.

use std::collections::HashMap;
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserInflight;
use vhost_device_tests::front_end::scsi::{
    CHECK_CONDITION, OK, Prepared, Request, RequestArea, WRITE_16, transfer,
};
use vhost_device_tests::front_end::{FrontEnd, GuestMemory, Options, Queue};
use vhost_device_tests::process::{Signal, kills};

use crate::{Device, FIRST, PATIENCE, for_each_engine, serve};

/// Requests in flight.
const DEPTH: usize = 32;
/// Bytes of each write.
const WRITE: usize = 4096;
/// The queue of the requests.
const QUEUE: usize = 2;

/// One write at a time to each part of the disk.
struct Writer {
    memory: GuestMemory,
    areas: Vec<RequestArea>,
    queue: Queue,
    in_flight: HashMap<u16, (usize, Prepared)>,
    /// The number of writes to each part that were sent, and that were acknowledged.
    sent: Vec<u8>,
    acknowledged: Vec<u8>,
}

impl Writer {
    /// Sends the next write to a part, or the last one once more.
    fn send(&mut self, part: usize, again: bool) {
        if !again {
            self.sent[part] = self.sent[part].wrapping_add(1);
        }
        let data = [self.sent[part]; WRITE];
        let cdb = transfer(WRITE_16, (part * WRITE / 512) as u64, (WRITE / 512) as u32);
        let prepared = self.areas[part].prepare(
            &self.memory,
            &Request {
                lun: FIRST,
                id: part as u64,
                cdb: &cdb,
                data: &data,
                ..Request::default()
            },
        );
        let head = self.queue.submit(&prepared.chain);
        assert!(self.in_flight.insert(head, (part, prepared)).is_none());
    }

    /// Handles answers until `end`. Each acknowledged write is followed by the next one.
    fn work(&mut self, end: Instant, goes_on: bool) {
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if self.in_flight.is_empty() || !self.queue.wait_used(left) {
                return;
            }
            while let Some(used) = self.queue.take_used() {
                let (part, prepared) = self
                    .in_flight
                    .remove(&used.head)
                    .expect("a request in flight");
                let completion = prepared.completion(&self.memory, used.length);
                assert_eq!(completion.response, OK);
                let again = completion.status == CHECK_CONDITION;
                if again {
                    // The new device has started: drivers repeat the command.
                    assert_eq!(completion.sense_codes().0, 6);
                } else {
                    self.acknowledged[part] = self.sent[part];
                }
                if again || goes_on {
                    self.send(part, again);
                }
            }
        }
    }

    /// Panics unless the disk has all acknowledged writes.
    fn check(&self, contents: &[u8]) {
        for (part, bytes) in contents.chunks(WRITE).take(DEPTH).enumerate() {
            let (sent, acknowledged) = (self.sent[part], self.acknowledged[part]);
            assert!(
                bytes.iter().all(|byte| [sent, acknowledged].contains(byte)),
                "part {part} has neither write {acknowledged} nor {sent}"
            );
        }
    }
}

#[test]
fn acknowledged_writes_survive_kills_and_all_requests_are_answered_once() {
    for_each_engine(|engine| {
        let mut random = fastrand::Rng::with_seed(4);
        let mut device = Device::with_one(&[engine]);
        let arguments = [
            engine.to_owned(),
            format!("--disk=file={}", device.path("image0").display()),
        ];
        let mut front_end = device.connect();
        let memory = front_end.memory().clone();
        let wanted = VhostUserInflight::new(0, 0, 3, 64);
        let (inflight, file) = front_end.call().get_inflight_fd(&wanted).unwrap();
        let share = |front_end: &FrontEnd| {
            let call = front_end
                .call()
                .set_inflight_fd(&inflight, file.as_raw_fd());
            call.unwrap();
        };
        share(&front_end);
        let mut writer = Writer {
            areas: (0..DEPTH)
                .map(|_| RequestArea::new(&memory, WRITE as u32))
                .collect(),
            queue: front_end.queue(QUEUE, 64).unwrap(),
            memory: memory.clone(),
            in_flight: HashMap::new(),
            sent: vec![0; DEPTH],
            acknowledged: vec![0; DEPTH],
        };
        (0..DEPTH).for_each(|part| writer.send(part, false));
        for _ in 0..kills(10) {
            let time = Duration::from_micros(random.u64(0..20_000));
            writer.work(Instant::now() + time, true);
            device.program.signal(Signal::KILL).unwrap();
            let status = device.program.wait(PATIENCE).unwrap();
            assert_eq!(status.signal(), Some(Signal::KILL.as_raw()));
            writer.check(&device.contents(0));
            device.program = serve(device.directory.path(), &arguments);
            let socket = device.path("socket");
            front_end = FrontEnd::connect_with_memory(&socket, &Options::default(), memory.clone())
                .unwrap();
            share(&front_end);
            front_end
                .start(QUEUE, &writer.queue, random.u16(..).into())
                .unwrap();
        }
        writer.work(Instant::now() + PATIENCE, false);
        assert!(writer.in_flight.is_empty(), "{engine}: requests were lost");
        writer.check(&device.contents(0));
        assert_eq!(writer.sent, writer.acknowledged);
        assert_eq!(front_end.stop(QUEUE).unwrap(), writer.queue.used_base());
    });
}
