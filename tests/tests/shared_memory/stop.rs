// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Requests that the front-end has not replied to when a queue stops, the device is reset, or the front-end goes away.

use std::time::Instant;

use vhost::vhost_user::message::{BackendReq, FrontendReq};

use crate::{CLOSED, Device, OK, PAGE, QUIET, STOPPED, map, unmap};

#[test]
fn a_queue_stops_without_a_reply_and_what_is_mapped_nevertheless_is_unmapped() {
    let device = Device::start();
    let mut driver = device.connect();
    let place = driver.submit(&map(0));
    driver.receive(BackendReq::SHMEM_MAP);
    let begin = Instant::now();
    driver.front_end.stop(0).unwrap();
    println!("stopped in {:?}", begin.elapsed());
    assert_eq!(driver.status(place), STOPPED);

    // The front-end has had no time for it before now.
    driver.reply(BackendReq::SHMEM_MAP, 0);
    let request = driver.receive(BackendReq::SHMEM_UNMAP);
    assert_eq!(
        request.payload[16..32],
        [0, PAGE].map(u64::to_ne_bytes).concat()
    );
    driver.reply(BackendReq::SHMEM_UNMAP, 0);
    driver.assert_quiet();

    driver.queue = driver.front_end.queue(0, 256).unwrap();
    assert_eq!(driver.map_first_page(), OK);
}

#[test]
fn what_is_refused_after_a_stop_is_not_unmapped() {
    let device = Device::start();
    let mut driver = device.connect();
    let place = driver.submit(&map(0));
    driver.receive(BackendReq::SHMEM_MAP);
    driver.front_end.stop(0).unwrap();
    assert_eq!(driver.status(place), STOPPED);
    driver.reply(BackendReq::SHMEM_MAP, 1);
    driver.assert_quiet();
}

#[test]
fn an_unmap_without_a_reply_when_the_queue_stops_is_still_carried_out() {
    let device = Device::start();
    let mut driver = device.connect();
    assert_eq!(driver.map_first_page(), OK);
    let place = driver.submit(&unmap(0));
    driver.receive(BackendReq::SHMEM_UNMAP);
    driver.front_end.stop(0).unwrap();
    assert_eq!(driver.status(place), STOPPED);
    driver.queue = driver.front_end.queue(0, 256).unwrap();
    let place = driver.submit(&map(0));
    driver.receive(BackendReq::SHMEM_MAP);
    driver.reply(BackendReq::SHMEM_UNMAP, 0);
    driver.reply(BackendReq::SHMEM_MAP, 0);
    assert_eq!(driver.status(place), OK);
}

#[test]
fn a_reset_waits_for_no_reply() {
    let device = Device::start();
    let mut driver = device.connect();
    let place = driver.submit(&map(0));
    driver.receive(BackendReq::SHMEM_MAP);
    let raw = driver.front_end.raw().unwrap();
    assert_eq!(
        raw.acknowledged(FrontendReq::RESET_DEVICE, &[], &[])
            .unwrap(),
        0
    );
    assert_eq!(driver.status(place), STOPPED);
}

#[test]
fn a_front_end_that_goes_away_leaves_nothing_for_the_next_one() {
    let device = Device::start();
    for _ in 0..3 {
        let mut driver = device.connect();
        let places: Vec<u64> = (0..20).map(|at| driver.submit(&map(at * PAGE))).collect();
        driver.receive(BackendReq::SHMEM_MAP);
        driver.front_end.disconnect();
        for place in places {
            // What the device takes as its queue stops is not asked for any more.
            assert!([CLOSED, STOPPED].contains(&driver.status(place)));
        }
    }
    assert_eq!(device.connect().map_first_page(), OK);
}

#[test]
fn another_channel_takes_the_place_of_one_with_requests() {
    let device = Device::start();
    let mut driver = device.connect();
    let place = driver.submit(&map(0));
    driver.receive(BackendReq::SHMEM_MAP);
    let old = std::mem::replace(
        &mut driver.channel,
        driver.front_end.back_end_channel().unwrap(),
    );
    assert_eq!(driver.status(place), CLOSED);
    assert!(old.closed(QUIET));
    assert_eq!(driver.map_first_page(), OK);
}
