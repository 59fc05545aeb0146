// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Front-ends that reply wrongly, too much, or not at all.

use std::os::fd::AsFd;
use std::time::Duration;

use rustix::net::SendFlags;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{BackendReq, FrontendReq};
use vhost_device_tests::front_end::RawConnection;
use vhost_device_tests::front_end::connection::{NEED_REPLY, REPLY, VERSION, message};

use crate::{
    BUSY, CLOSED, Device, Driver, NOTIFICATION, OK, PAGE, QUIET, map, reply, tight_pair, unmap,
};

/// Requests that may wait for replies.
const MAX_PENDING: u64 = 64;

/// Checks that the session and the queue continue, and that another channel works like the first one.
fn assert_lives(driver: &mut Driver) {
    assert_eq!(driver.carry_out(&map(0)), CLOSED);
    assert_eq!(driver.carry_out(&NOTIFICATION), OK);
    driver.front_end.call().get_queue_num().unwrap();
    driver.channel = driver.front_end.back_end_channel().unwrap();
    assert_eq!(driver.map_first_page(), OK);
}

#[test]
fn a_reply_that_makes_no_sense_ends_the_channel_only() {
    let device = Device::start();
    let map_reply = |flags, payload: &[u8]| message(BackendReq::SHMEM_MAP, flags, payload);
    let value = 0u64.to_ne_bytes();
    for bytes in [
        message(BackendReq::SHMEM_UNMAP, VERSION | REPLY, &value),
        message(0u32, VERSION | REPLY, &value),
        map_reply(VERSION, &value),
        map_reply(REPLY, &value),
        map_reply(VERSION | REPLY | NEED_REPLY, &value),
        map_reply(VERSION | REPLY, &[]),
        map_reply(VERSION | REPLY, &value[..4]),
        map_reply(VERSION | REPLY, &[0; 16]),
        vec![0xff; 12],
        vec![0xff; 5000],
        // One reply too many.
        map_reply(VERSION | REPLY, &value).repeat(2),
    ] {
        let mut driver = device.connect();
        let places = [driver.submit(&map(0)), driver.submit(&unmap(0))];
        driver.receive(BackendReq::SHMEM_MAP);
        driver.receive(BackendReq::SHMEM_UNMAP);
        driver.channel.send_bytes(&bytes, &[]).unwrap();
        for place in places {
            let status = driver.status(place);
            assert!(
                status == CLOSED || bytes.len() == 40 && status == OK,
                "{bytes:?}"
            );
        }
        assert_lives(&mut driver);
    }
}

#[test]
fn a_reply_to_nothing_ends_the_channel_only() {
    let device = Device::start();
    let mut driver = device.connect();
    driver.reply(BackendReq::SHMEM_MAP, 0);
    driver.front_end.call().get_queue_num().unwrap();
    std::thread::sleep(QUIET);
    assert_lives(&mut driver);
}

#[test]
fn the_end_of_the_channel_is_not_the_end_of_the_connection() {
    let device = Device::start();
    let mut driver = device.connect();
    let place = driver.submit(&map(0));
    driver.receive(BackendReq::SHMEM_MAP);
    let (other, _end) = std::os::unix::net::UnixStream::pair().unwrap();
    driver.channel = RawConnection::from_stream(other).unwrap();
    assert_eq!(driver.status(place), CLOSED);
    assert_lives(&mut driver);
}

#[test]
fn a_reply_may_come_in_pieces_and_with_files() {
    let device = Device::start();
    let mut driver = device.connect();
    let place = driver.submit(&map(0));
    let request = driver.receive(BackendReq::SHMEM_MAP);
    let value = 0u64.to_ne_bytes();
    let bytes = message(BackendReq::SHMEM_MAP, VERSION | REPLY, &value);
    for byte in bytes {
        let files = [request.fds[0].as_fd()];
        driver.channel.send_bytes(&[byte], &files).unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(driver.status(place), OK);
}

#[test]
fn half_a_reply_is_none() {
    let device = Device::start();
    let mut driver = device.connect();
    driver.submit(&map(0));
    driver.receive(BackendReq::SHMEM_MAP);
    let value = 0u64.to_ne_bytes();
    let bytes = message(BackendReq::SHMEM_MAP, VERSION | REPLY, &value);
    driver.channel.send_bytes(&bytes[..15], &[]).unwrap();
    driver.assert_quiet();
    // Nor does anybody wait for the rest.
    driver.front_end.stop(0).unwrap();
}

#[test]
fn without_replies_all_else_goes_on_and_no_more_than_a_few_requests_wait() {
    let device = Device::start();
    let mut driver = device.connect();
    let places: Vec<u64> = (0..MAX_PENDING)
        .map(|at| driver.submit(&map(at * PAGE)))
        .collect();
    for _ in &places {
        driver.receive(BackendReq::SHMEM_MAP);
    }
    assert_eq!(driver.carry_out(&map(MAX_PENDING * PAGE)), BUSY);
    driver.front_end.call().get_queue_num().unwrap();
    assert_eq!(driver.carry_out(&NOTIFICATION), OK);
    let told = driver.channel.receive().unwrap();
    assert_eq!(told.request, u32::from(BackendReq::CONFIG_CHANGE_MSG));
    // A reply makes room for one more.
    driver.reply(BackendReq::SHMEM_MAP, 0);
    assert_eq!(driver.status(places[0]), OK);
    driver.submit(&map(MAX_PENDING * PAGE));
    driver.receive(BackendReq::SHMEM_MAP);
    driver.front_end.stop(0).unwrap();
}

#[test]
fn a_full_channel_is_not_waited_for_and_a_change_is_told_later() {
    let device = Device::start();
    let mut driver = device.connect();
    let (ours, theirs) = tight_pair();
    let raw = driver.front_end.raw().unwrap();
    let request = FrontendReq::SET_BACKEND_REQ_FD;
    assert_eq!(
        raw.acknowledged(request, &[], &[theirs.as_fd()]).unwrap(),
        0
    );
    drop(theirs);
    driver.channel = RawConnection::from_stream(ours).unwrap();
    let mut sent = 0;
    let places: Vec<u64> = (0..MAX_PENDING)
        .map(|at| driver.submit(&map(at * PAGE)))
        .collect();
    assert_eq!(driver.carry_out(&NOTIFICATION), OK);
    let mut channel = RawConnection::from_stream(driver.channel.socket().try_clone().unwrap());
    let channel = channel.as_mut().unwrap();
    channel.set_timeout(QUIET).unwrap();
    while let Ok(request) = channel.receive() {
        assert_eq!(request.request, u32::from(BackendReq::SHMEM_MAP));
        sent += 1;
    }
    println!("room for {sent} requests");
    assert!(0 < sent && sent < MAX_PENDING, "room for {sent}");
    channel.set_timeout(crate::PATIENCE).unwrap();
    for _ in 0..sent {
        reply(channel, BackendReq::SHMEM_MAP, 0);
    }
    let told = channel.receive().unwrap();
    assert_eq!(told.request, u32::from(BackendReq::CONFIG_CHANGE_MSG));
    for (index, place) in (0..).zip(places) {
        let expected = if index < sent { OK } else { BUSY };
        assert_eq!(driver.status(place), expected);
    }
}

#[test]
fn a_flood_on_the_channel_delays_nothing() {
    let device = Device::start();
    let mut driver = device.connect();
    let socket = driver.channel.socket().try_clone().unwrap();
    let flood = |bytes| rustix::net::send(&socket, bytes, SendFlags::DONTWAIT);
    driver.submit(&map(0));
    driver.receive(BackendReq::SHMEM_MAP);
    for _ in 0..100 {
        let _ = flood(&[0xff; 1 << 16]);
        driver.front_end.call().get_queue_num().unwrap();
    }
    assert_lives(&mut driver);
}

#[test]
fn a_channel_that_is_no_socket_takes_no_requests() {
    let device = Device::start();
    let mut driver = device.connect();
    let file = tempfile::tempfile().unwrap();
    let raw = driver.front_end.raw().unwrap();
    let request = FrontendReq::SET_BACKEND_REQ_FD;
    assert_eq!(raw.acknowledged(request, &[], &[file.as_fd()]).unwrap(), 0);
    assert_lives(&mut driver);
}
