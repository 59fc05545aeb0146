// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Everything at once: commands on two queues, functions that end them, disks that come and go, and queues that stop. Each request is
//! answered once, and nothing hangs.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;
use serde_json::json;
use vhost_device_tests::front_end::scsi::{
    ABORT_TASK, ABORT_TASK_SET, ABORTED, BAD_TARGET, BUSY, INCORRECT_LUN, NEXUS_RESET, OK,
    Prepared, QUERY_TASK, READ_16, RESET, Request, RequestArea, SUCCEEDED, UNIT_RESET, WRITE_16,
    address, transfer,
};
use vhost_device_tests::front_end::{GuestMemory, Queue};

use crate::{BLOCKS, Device, Host, PATIENCE, SIZE, for_each_engine};

/// Requests in flight on each queue.
const DEPTH: usize = 16;
const TIME: Duration = Duration::from_secs(2);

/// A driver of one request queue.
struct Load<'a> {
    memory: &'a GuestMemory,
    areas: Vec<RequestArea>,
    in_flight: HashMap<u16, (usize, Prepared)>,
    random: Rng,
}

impl<'a> Load<'a> {
    fn new(memory: &'a GuestMemory, seed: u64) -> Self {
        Self {
            memory,
            areas: (0..DEPTH).map(|_| RequestArea::new(memory, 8192)).collect(),
            in_flight: HashMap::new(),
            random: Rng::with_seed(seed),
        }
    }

    /// Sends a random command to a random disk.
    fn send(&mut self, queue: &mut Queue, number: usize) {
        let random = &mut self.random;
        let block = random.u64(..BLOCKS - 8);
        let blocks = random.u32(1..=8);
        let mut compare = [0; 16];
        (compare[0], compare[9], compare[13]) = (0x89, random.u8(..), 1);
        let data = vec![random.u8(..); 512 * blocks as usize];
        let (read, write) = (
            transfer(READ_16, block, blocks),
            transfer(WRITE_16, block, blocks),
        );
        let unmap = [
            &[0, 22, 0, 16, 0, 0, 0, 0][..],
            &block.to_be_bytes(),
            &[0, 0, 0, 8, 0, 0, 0, 0],
        ];
        let unmap = unmap.concat();
        let (cdb, data, reply_length): (&[u8], &[u8], u32) = match random.u8(..10) {
            0..4 => (&read, &[], 512 * blocks),
            4..7 => (&write, &data, 0),
            7 => (&compare, &[0; 1024], 0),
            8 => (&[0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0], &unmap, 0),
            _ => (&[0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[], 0),
        };
        let request = Request {
            lun: address(random.u8(..3), 0),
            id: random.u64(..8),
            cdb,
            data,
            reply_length,
        };
        let prepared = self.areas[number].prepare(self.memory, &request);
        let head = queue.submit(&prepared.chain);
        let before = self.in_flight.insert(head, (number, prepared));
        assert!(before.is_none());
    }

    /// Takes one answer, and returns the number of the request.
    fn take(&mut self, queue: &mut Queue) -> usize {
        let used = queue.take_used_within(PATIENCE);
        let (number, prepared) = self
            .in_flight
            .remove(&used.head)
            .expect("a request in flight");
        let completion = prepared.completion(self.memory, used.length);
        // BUSY: it had not begun when its queue stopped.
        let known = [OK, ABORTED, RESET, BAD_TARGET, BUSY];
        assert!(known.contains(&completion.response), "{completion:?}");
        number
    }

    fn run(mut self, queue: &mut Queue, is_over: impl Fn() -> bool) -> u64 {
        let mut count = 0;
        (0..DEPTH).for_each(|number| self.send(queue, number));
        while !is_over() {
            let number = self.take(queue);
            self.send(queue, number);
            count += 1;
        }
        while !self.in_flight.is_empty() {
            self.take(queue);
        }
        count
    }
}

#[test]
fn all_requests_are_answered_whatever_happens_at_the_same_time() {
    for_each_engine(|engine| {
        let disks: [(&[u8], &str); 2] = [(&[0; SIZE], ""), (&[0; SIZE], "")];
        let Host {
            driver,
            mut control,
            events: _events,
            front_end,
            device,
        } = Host::new(Device::start(&disks, &[engine]));
        let memory = front_end.memory().clone();
        let mut queues = [driver.queue, front_end.queue(3, 256).unwrap()];
        let end = Instant::now() + TIME;
        let is_over = || Instant::now() >= end;
        let [one, two] = &mut queues;
        let (commands, functions) = (AtomicU64::new(0), AtomicU64::new(0));
        thread::scope(|scope| {
            for (seed, queue) in [(1, one), (2, two)] {
                let load = Load::new(&memory, seed);
                let commands = &commands;
                scope
                    .spawn(move || commands.fetch_add(load.run(queue, is_over), Ordering::Relaxed));
            }
            scope.spawn(|| {
                let mut random = Rng::with_seed(3);
                let kinds = [
                    ABORT_TASK,
                    ABORT_TASK_SET,
                    UNIT_RESET,
                    NEXUS_RESET,
                    QUERY_TASK,
                ];
                while !is_over() {
                    let kind = kinds[random.usize(..kinds.len())];
                    let response =
                        control.function(kind, address(random.u8(..3), 0), random.u64(..8));
                    let known = [OK, SUCCEEDED, BAD_TARGET, INCORRECT_LUN];
                    assert!(known.contains(&response), "{response}");
                    functions.fetch_add(1, Ordering::Relaxed);
                }
            });
            scope.spawn(|| {
                let file = device.path("more");
                std::fs::write(&file, [0; SIZE]).unwrap();
                let file = format!("--file={}", file.display());
                while !is_over() {
                    // Its last requests may still have the image.
                    if device.ctl(&[&file, "add-disk", "target=2"]).is_ok() {
                        thread::sleep(Duration::from_millis(5));
                        device.execute("remove-disk", json!({"target": 2})).unwrap();
                    }
                }
            });
        });
        let (commands, functions) = (commands.into_inner(), functions.into_inner());
        println!("{engine}: {commands} commands, {functions} functions");
        assert!(
            commands > 100 && functions > 10,
            "{engine}: {commands} {functions}"
        );
    });
}

#[test]
fn a_queue_stops_and_starts_while_everything_goes_on() {
    for_each_engine(|engine| {
        let disks: [(&[u8], &str); 3] = [
            (&[0; SIZE], ""),
            (&[0; SIZE], ",iops=2000"),
            (&[0; SIZE], ""),
        ];
        let Host {
            driver,
            mut control,
            events: _events,
            front_end,
            device: _device,
        } = Host::new(Device::start(&disks, &[engine]));
        let memory = front_end.memory().clone();
        let mut queue = driver.queue;
        let is_over = AtomicBool::new(false);
        let kinds = [ABORT_TASK_SET, UNIT_RESET, NEXUS_RESET];
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut random = Rng::with_seed(3);
                while !is_over.load(Ordering::Relaxed) {
                    let kind = kinds[random.usize(..kinds.len())];
                    control.function(kind, address(random.u8(..3), 0), 0);
                }
            });
            let mut load = Load::new(&memory, 5);
            for _ in 0..30 {
                (0..DEPTH).for_each(|number| load.send(&mut queue, number));
                let begin = Instant::now();
                let base = front_end.stop(2).unwrap();
                assert!(begin.elapsed() < Duration::from_secs(5), "{engine}");
                front_end.start(2, &queue, base).unwrap();
                while !load.in_flight.is_empty() {
                    load.take(&mut queue);
                }
            }
            is_over.store(true, Ordering::Relaxed);
        });
    });
}
