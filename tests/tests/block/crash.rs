// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A device that is killed, and another that takes its place: what was acknowledged is there, and each request is answered once.

use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserInflight;
use vhost_device_tests::front_end::block::{OK, OUT, Request, SECTOR_SIZE};
use vhost_device_tests::front_end::{FrontEnd, Options};
use vhost_device_tests::process::{Program, Signal};

use crate::load::Load;
use crate::{Device, PATIENCE, Variant, assert_same, noise};

/// Requests under way.
const DEPTH: usize = 128;
/// Bytes that each of them writes, to a place of its own.
const SIZE: usize = 8 << 10;
/// Environment variable with another number of kills.
const KILLS: &str = "VHOST_DEVICE_KILLS";
const FEW_KILLS: u64 = 20;

impl Device {
    /// Ends the device at once, and starts another on the same image and socket.
    fn kill_and_restart(&mut self, variant: Variant) {
        self.program.end(Signal::KILL, PATIENCE).unwrap();
        let mut command = variant.command(&self.image, &self.socket, &[]);
        self.program = Program::spawn(&mut command).unwrap();
        self.program.wait_for_listener(&self.socket).unwrap();
    }
}

/// What write number `version` to place `number` writes.
fn contents(number: usize, version: u64) -> Vec<u8> {
    noise(version << 16 | number as u64, SIZE)
}

fn acknowledged_writes_survive_kills_and_all_are_answered_once(variant: Variant) {
    let kills = std::env::var(KILLS).ok().and_then(|text| text.parse().ok());
    let mut random = fastrand::Rng::with_seed(11);
    let mut device = variant.start(&vec![0; DEPTH * SIZE], &[]);
    let mut front_end = device.connect();
    let size = DEPTH as u16;
    let wanted = VhostUserInflight::new(0, 0, 1, size);
    let (inflight, file) = front_end.call().get_inflight_fd(&wanted).unwrap();
    let remember = |front_end: &FrontEnd| {
        let set = front_end
            .call()
            .set_inflight_fd(&inflight, file.as_raw_fd());
        set.unwrap();
    };
    remember(&front_end);
    let mut load = Load::new(&front_end, 0, DEPTH, SIZE as u32);
    let mut versions = vec![0; DEPTH];
    let write = |load: &mut Load, versions: &mut [u64], number: usize| {
        versions[number] += 1;
        let data = contents(number, versions[number]);
        let sector = (number * SIZE / SECTOR_SIZE) as u64;
        let request = Request {
            kind: OUT,
            sector,
            data: &data,
            ..Request::default()
        };
        load.add(number, &request);
        load.publish();
    };
    (0..DEPTH).for_each(|number| write(&mut load, &mut versions, number));
    for _ in 0..kills.unwrap_or(FEW_KILLS) {
        let end = Instant::now() + Duration::from_micros(random.u64(0..30_000));
        while Instant::now() < end {
            match load.take() {
                Some((number, completion)) => {
                    assert_eq!(u32::from(completion.status), OK);
                    write(&mut load, &mut versions, number);
                }
                None => std::thread::yield_now(),
            }
        }
        device.kill_and_restart(variant);
        let memory = front_end.memory().clone();
        let options = Options::default();
        front_end = FrontEnd::connect_with_memory(&device.socket, &options, memory).unwrap();
        remember(&front_end);
        // What QEMU sends is not where the device stopped.
        front_end.start(0, load.queue(), 0).unwrap();
    }
    for _ in 0..DEPTH {
        let (_, completion) = load.wait();
        assert_eq!(u32::from(completion.status), OK);
    }
    assert_eq!(front_end.stop(0).unwrap(), load.queue().avail_index());
    assert!(load.take().is_none(), "a request is answered twice");
    let expected: Vec<u8> = (0..DEPTH)
        .flat_map(|number| contents(number, versions[number]))
        .collect();
    assert_same(&device.contents(), &expected, "the image");
}

crate::for_each_variant![acknowledged_writes_survive_kills_and_all_are_answered_once];
