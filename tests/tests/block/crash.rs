// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A device is killed, and another one takes over: acknowledged writes persist, each request is answered once, and a flush
//! covers all writes that were acknowledged before it, by either process.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

use fastrand::Rng;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserInflight;
use vhost_device_tests::front_end::block::{FLUSH, OK, OUT, Request, SECTOR_SIZE};
use vhost_device_tests::front_end::{FrontEnd, GuestMemory, Options, Result};
use vhost_device_tests::process::{Program, Signal, kills};

use crate::durability::unwritten_pages_in;
use crate::load::Load;
use crate::{Device, PATIENCE, Place, Variant, assert_same};

/// Requests in flight.
pub const DEPTH: usize = 128;
/// Number of flushes among them, if there are any.
pub const FLUSHES: usize = 4;
/// Bytes of each write.
const SIZE: usize = 8 << 10;
/// Unit that a kill leaves either written or not written.
const PAGE: usize = 4096;
/// Default number of kills.
const FEW_KILLS: u64 = 20;
/// Interval at which to check whether a device has ended while no answer arrives.
const INTERVAL: Duration = Duration::from_millis(1);

impl Variant {
    /// Returns whether requests are carried out one after the other.
    fn is_in_order(self) -> bool {
        self.engine == "auto" && self.place == Place::Memory
    }
}

/// A part of the image, with one write at a time.
struct Part {
    /// Number of writes to it, including the one in flight.
    version: u64,
    /// The last acknowledged version.
    acknowledged: Vec<u8>,
}

/// A driver that keeps requests in flight, on devices that are killed one after the other.
pub struct Crashes {
    pub device: Device,
    variant: Variant,
    /// Environment of each device after the first.
    pub environment: Vec<(&'static str, String)>,
    /// Arguments of each device after the first.
    pub arguments: Vec<&'static str>,
    /// `None` if the device ended while the connection was made.
    pub front_end: Option<FrontEnd>,
    inflight: VhostUserInflight,
    inflight_file: File,
    memory: GuestMemory,
    pub load: Load,
    parts: Vec<Part>,
    /// Parts without a write in flight, the longest idle one first.
    idle: VecDeque<usize>,
    /// The part of each request that is a write. The other requests are flushes.
    writes: Vec<usize>,
    /// What each flush covers: the parts that were written and idle when it was sent, and their version.
    covered: Vec<Vec<(usize, u64)>>,
    /// Parts for which a completed flush was observed.
    seen_flushed: u64,
    /// The image, if this host shows which pages are on its disk.
    disk: Option<File>,
    /// Requests in the order in which they were made.
    order: VecDeque<usize>,
    /// The driver does not read the ring before it is called.
    asleep: bool,
    /// Requests answered since the last kill.
    pub answered: u64,
}

impl Crashes {
    /// Keeps [`DEPTH`] requests in flight, some of which are flushes. For each flush some parts of the image stay idle for a while.
    pub fn start(variant: Variant, flushes: usize) -> Self {
        let writes = DEPTH - flushes;
        let parts = writes + 64 * flushes;
        let directory = variant.directory();
        let mut image = File::create(directory.path().join("image")).unwrap();
        // Written one by one, they are one by one in the page cache too.
        (0..parts).for_each(|_| image.write_all(&[0; SIZE]).unwrap());
        let device = variant.start_in(directory, &[], |_| {});
        let front_end = device.connect();
        let wanted = VhostUserInflight::new(0, 0, 1, DEPTH as u16);
        let (inflight, file) = front_end.call().get_inflight_fd(&wanted).unwrap();
        let call = front_end
            .call()
            .set_inflight_fd(&inflight, file.as_raw_fd());
        call.unwrap();
        let load = Load::new(&front_end, 0, DEPTH, SIZE as u32);
        let image = device.file();
        image.sync_all().unwrap();
        let is_on_disk = matches!(unwritten_pages_in(&image, 0..0), Ok(0));
        let mut crashes = Self {
            device,
            variant,
            environment: Vec::new(),
            arguments: Vec::new(),
            inflight,
            inflight_file: file,
            memory: front_end.memory().clone(),
            front_end: Some(front_end),
            load,
            parts: (0..parts)
                .map(|_| Part {
                    version: 0,
                    acknowledged: vec![0; SIZE],
                })
                .collect(),
            idle: (0..parts).collect(),
            writes: vec![0; writes],
            covered: vec![Vec::new(); flushes],
            seen_flushed: 0,
            disk: is_on_disk.then_some(image),
            order: VecDeque::new(),
            asleep: false,
            answered: 0,
        };
        (0..DEPTH).for_each(|number| crashes.make(number));
        crashes
    }

    /// Returns the contents of a part in its `version`th write.
    fn contents(part: usize, version: u64) -> Vec<u8> {
        let word = version << 16 | part as u64;
        word.to_ne_bytes().repeat(SIZE / size_of::<u64>())
    }

    /// Makes request `number` available to the device.
    fn make(&mut self, number: usize) {
        let data;
        let request = if let Some(index) = self.writes.get_mut(number) {
            *index = self.idle.pop_front().unwrap();
            let part = &mut self.parts[*index];
            part.version += 1;
            data = Self::contents(*index, part.version);
            Request {
                kind: OUT,
                sector: (*index * SIZE / SECTOR_SIZE) as u64,
                data: &data,
                ..Request::default()
            }
        } else {
            let idle = self.idle.iter();
            let covered = idle.map(|index| (*index, self.parts[*index].version));
            self.covered[number - self.writes.len()] = covered.collect();
            Request {
                kind: FLUSH,
                ..Request::default()
            }
        };
        self.load.add(number, &request);
        self.order.push_back(number);
        self.load.publish();
    }

    /// Takes an answered request. Like a driver, it sleeps when there is none, until it is called. Returns `None` if the device has
    /// ended, or at `end`.
    pub fn next(&mut self, end: Option<Instant>) -> Option<usize> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if !self.asleep {
                if let Some((number, completion)) = self.load.take() {
                    assert_eq!(u32::from(completion.status), OK);
                    self.was_answered(number);
                    return Some(number);
                }
                self.asleep = !self.load.queue_mut().arm_interrupt();
            }
            while self.asleep {
                self.asleep = !self.load.queue_mut().wait_call(INTERVAL);
                if self.asleep && self.device.program.status().unwrap().is_some() {
                    return None;
                }
                if end.is_some_and(|end| Instant::now() >= end) {
                    return None;
                }
                assert!(Instant::now() < deadline, "the driver is not called");
            }
        }
    }

    fn was_answered(&mut self, number: usize) {
        self.answered += 1;
        let place = self.order.iter().position(|other| *other == number);
        self.order.remove(place.unwrap());
        if self.variant.is_in_order() {
            assert_eq!(
                place,
                Some(0),
                "a request is answered before an earlier one"
            );
        }
        if let Some(&index) = self.writes.get(number) {
            let part = &mut self.parts[index];
            part.acknowledged = Self::contents(index, part.version);
            self.idle.push_back(index);
            return;
        }
        let Some(disk) = &self.disk else { return };
        for (index, version) in std::mem::take(&mut self.covered[number - self.writes.len()]) {
            let part = &self.parts[index];
            // Data that was written again may be in memory only.
            if part.version == version {
                let start = (index * SIZE) as u64;
                let unwritten = unwritten_pages_in(disk, start..start + SIZE as u64);
                assert_eq!(
                    unwritten.unwrap(),
                    0,
                    "a flush is answered, and a write before it is not on the disk"
                );
                self.seen_flushed += u64::from(version > 0);
            }
        }
    }

    /// Waits until all is answered.
    fn settle(&mut self) {
        while !self.order.is_empty() {
            let answered = self.next(None);
            assert!(answered.is_some(), "the device has ended");
        }
    }

    /// Replaces a killed device with one whose inflight region is empty, and which must take all requests.
    pub fn begin_anew(&mut self) {
        self.settle();
        self.kill();
        self.assert_killed();
        let zeroes = vec![0; self.inflight.mmap_size as usize];
        self.inflight_file.write_all_at(&zeroes, 0).unwrap();
        (0..DEPTH).for_each(|number| self.make(number));
    }

    /// Kills the device.
    pub fn kill(&mut self) {
        self.device.program.signal(Signal::KILL).unwrap();
    }

    /// Waits until the device has been killed, and checks that all acknowledged writes are there.
    pub fn assert_killed(&mut self) {
        let status = self.device.program.wait(PATIENCE).unwrap();
        assert_eq!(status.signal(), Some(Signal::KILL.as_raw()), "{status}");
        let seen = self.device.contents();
        for (index, (seen, part)) in seen.chunks(SIZE).zip(&self.parts).enumerate() {
            let new = Self::contents(index, part.version);
            let pages = part.acknowledged.chunks(PAGE).zip(new.chunks(PAGE));
            for (seen, (acknowledged, new)) in seen.chunks(PAGE).zip(pages) {
                // The device may have been writing the new version.
                assert!(
                    seen == acknowledged || seen == new,
                    "the acknowledged data of part {index} is not there"
                );
            }
        }
    }

    /// Starts another device in place of the ended one, and its ring. It may be killed at any time.
    pub fn restart(&mut self, base: u32) {
        let front_end = self.replace().and_then(|front_end| {
            front_end.start(0, self.load.queue(), base)?;
            Ok(front_end)
        });
        self.front_end = front_end.ok();
    }

    /// Starts another device in place of the ended one, and connects to it.
    pub fn replace(&mut self) -> Result<FrontEnd> {
        self.answered = 0;
        self.front_end = None;
        let device = &mut self.device;
        let (image, socket) = (&device.image, &device.socket);
        let mut command = self.variant.command(image, socket, &self.arguments);
        command.envs(self.environment.iter().cloned());
        device.program = Program::spawn(&mut command).unwrap();
        device.program.wait_for_listener(&device.socket).unwrap();
        let (options, memory) = (Options::default(), self.memory.clone());
        let front_end = FrontEnd::connect_with_memory(&device.socket, &options, memory)?;
        let file = self.inflight_file.as_raw_fd();
        front_end.call().set_inflight_fd(&self.inflight, file)?;
        Ok(front_end)
    }

    /// Continues until there are no more answers, until `end`, or until this device has answered this many requests.
    pub fn work(&mut self, end: Option<Instant>, most: u64) {
        while self.answered < most
            && end.is_none_or(|end| Instant::now() < end)
            && let Some(number) = self.next(end)
        {
            self.make(number);
        }
    }

    /// Waits until all is answered, stops the ring, and compares the image.
    pub fn finish(mut self) {
        self.settle();
        let front_end = self.front_end.as_ref().unwrap();
        assert_eq!(front_end.stop(0).unwrap(), self.load.queue().used_base());
        assert!(self.load.take().is_none(), "a request is answered twice");
        let acknowledged = self.parts.iter().map(|part| &part.acknowledged[..]);
        let expected = acknowledged.collect::<Vec<_>>().concat();
        assert_same(&self.device.contents(), &expected, "the image");
        assert!(
            self.covered.is_empty() || self.disk.is_none() || self.seen_flushed > 0,
            "no flush was seen to bring anything to the disk"
        );
    }
}

/// Kills at random moments; the base that the front-end sends is wrong.
fn kill_at_random(variant: Variant, flushes: usize) {
    let mut random = Rng::with_seed(11);
    let mut crashes = Crashes::start(variant, flushes);
    for _ in 0..kills(FEW_KILLS) {
        let end = Instant::now() + Duration::from_micros(random.u64(0..30_000));
        crashes.work(Some(end), u64::MAX);
        crashes.kill();
        crashes.assert_killed();
        crashes.restart(random.u16(..).into());
    }
    crashes.finish();
}

fn acknowledged_writes_survive_kills_and_all_are_answered_once(variant: Variant) {
    kill_at_random(variant, 0);
}

fn a_flush_covers_what_was_acknowledged_before_it_by_a_device_that_was_killed(variant: Variant) {
    kill_at_random(variant, FLUSHES);
}

crate::for_each_variant![
    acknowledged_writes_survive_kills_and_all_are_answered_once,
    a_flush_covers_what_was_acknowledged_before_it_by_a_device_that_was_killed,
];
