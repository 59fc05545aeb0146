// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What is asked of a front-end, and what the driver learns of its reply.

use std::os::fd::AsFd;

use vhost::vhost_user::message::{BackendReq, FrontendReq, VhostUserProtocolFeatures as Protocol};
use vhost_device_tests::front_end::connection::payload;
use vhost_device_tests::shared_memory::{Command, FILE_SIZE, REGIONS, pattern};

use crate::{
    CLOSED, Device, NOTIFICATION, OK, PAGE, RANGE, REFUSED, UNSUPPORTED, map, unmap, usual,
};

/// The payload of SHMEM_MAP and SHMEM_UNMAP (vhost-user, "VIRTIO Shared Memory Region mmap").
fn mmap(command: &Command) -> Vec<u8> {
    let fields = [
        command.region,
        command.file_offset,
        command.offset,
        command.length,
        command.writable,
    ];
    fields.into_iter().flat_map(u64::to_ne_bytes).collect()
}

#[test]
fn regions_are_declared_by_their_ids() {
    let device = Device::start();
    let driver = device.connect();
    assert!(
        driver
            .front_end
            .protocol_features()
            .contains(Protocol::SHMEM)
    );
    let raw = driver.front_end.raw().unwrap();
    let reply = raw.ask(FrontendReq::GET_SHMEM_CONFIG, &[], &[]).unwrap();
    let mut sizes = [0; 256];
    for region in REGIONS {
        sizes[usize::from(region.id)] = region.size;
    }
    let mut expected = payload::vring_state(REGIONS.len() as u32, 0);
    expected.extend(sizes.iter().flat_map(|size: &u64| size.to_ne_bytes()));
    assert_eq!(reply.payload, expected);
}

#[test]
fn a_request_is_answered_when_the_front_end_has_mapped_the_file() {
    let device = Device::start();
    let mut driver = device.connect();
    for (region, offset, length, file_offset, writable) in [
        (0, 0, PAGE, 0, 0),
        (0, FILE_SIZE - 2 * PAGE, 2 * PAGE, PAGE, 1),
        (7, 0, PAGE, 3 * PAGE, 0),
    ] {
        let command = Command {
            region,
            offset,
            length,
            file_offset,
            writable,
            ..map(0)
        };
        let place = driver.submit(&command);
        let request = driver.receive(BackendReq::SHMEM_MAP);
        assert_eq!(request.payload, mmap(&command));
        let [file] = request.fds.as_slice() else {
            panic!("{} files", request.fds.len());
        };
        let mut word = [0; 4];
        rustix::io::pread(file.as_fd(), &mut word, file_offset).unwrap();
        assert_eq!(u32::from_le_bytes(word), pattern(file_offset));
        driver.assert_quiet();
        driver.reply(BackendReq::SHMEM_MAP, 0);
        assert_eq!(driver.status(place), OK);

        let command = Command {
            file_offset: 0,
            writable: 0,
            kind: unmap(0).kind,
            ..command
        };
        let place = driver.submit(&command);
        let request = driver.receive(BackendReq::SHMEM_UNMAP);
        assert_eq!(request.payload, mmap(&command));
        assert!(request.fds.is_empty());
        driver.assert_quiet();
        driver.reply(BackendReq::SHMEM_UNMAP, 0);
        assert_eq!(driver.status(place), OK);
    }
}

#[test]
fn replies_belong_to_requests_in_their_order() {
    let device = Device::start();
    let mut driver = device.connect();
    let places: Vec<u64> = (0..10).map(|at| driver.submit(&map(at * PAGE))).collect();
    for _ in &places {
        driver.receive(BackendReq::SHMEM_MAP);
    }
    for index in 0..places.len() as u64 {
        driver.reply(BackendReq::SHMEM_MAP, index % 3);
    }
    for (index, place) in places.into_iter().enumerate() {
        let expected = if index % 3 == 0 { OK } else { REFUSED };
        assert_eq!(driver.status(place), expected);
    }
}

#[test]
fn what_is_not_in_a_region_is_not_asked_for() {
    let device = Device::start();
    let mut driver = device.connect();
    let page = map(0);
    for (region, offset, length, file_offset) in [
        (1, 0, PAGE, 0),
        (255, 0, PAGE, 0),
        (0, 0, 0, 0),
        (0, 1, PAGE, 0),
        (0, 0, PAGE - 1, 0),
        (0, FILE_SIZE, PAGE, 0),
        (0, FILE_SIZE - PAGE, 2 * PAGE, 0),
        (0, PAGE, u64::MAX - PAGE + 1, 0),
        (0, u64::MAX - PAGE + 1, PAGE, 0),
        (7, FILE_SIZE, PAGE, 0),
        (7, 0, FILE_SIZE + PAGE, 0),
    ] {
        for kind in [page.kind, unmap(0).kind] {
            let command = Command {
                kind,
                region,
                offset,
                length,
                file_offset,
                writable: 0,
            };
            assert_eq!(driver.carry_out(&command), RANGE, "{command:?}");
        }
    }
    let command = Command {
        file_offset: 1,
        ..page
    };
    assert_eq!(driver.carry_out(&command), RANGE);
    driver.assert_quiet();
    assert_eq!(driver.map_first_page(), OK);
}

#[test]
fn a_front_end_that_does_not_acknowledge_maps_nothing() {
    let device = Device::start();
    let all = usual() | Protocol::SHMEM;
    for without in [Protocol::SHMEM, Protocol::REPLY_ACK] {
        let mut driver = device.connect_with(all - without);
        assert_eq!(driver.carry_out(&map(0)), UNSUPPORTED, "{without:?}");
        driver.assert_quiet();
    }
    // crosvm does not accept BACKEND_SEND_FD, and takes files nevertheless.
    let mut driver = device.connect_with(all);
    assert_eq!(driver.map_first_page(), OK);
}

#[test]
fn nothing_is_mapped_before_there_is_a_channel() {
    let device = Device::start();
    let mut driver = device.connect();
    drop(driver.front_end);
    let options = vhost_device_tests::front_end::Options {
        protocol_features: usual() | Protocol::SHMEM,
        ..Default::default()
    };
    let socket = device.directory.path().join("socket");
    driver.front_end = vhost_device_tests::front_end::FrontEnd::connect(&socket, &options).unwrap();
    driver.queue = driver.front_end.queue(0, 256).unwrap();
    assert_eq!(driver.carry_out(&map(0)), CLOSED);
    driver.channel = driver.front_end.back_end_channel().unwrap();
    assert_eq!(driver.map_first_page(), OK);
}

#[test]
fn a_config_change_is_told_between_maps() {
    let device = Device::start();
    let mut driver = device.connect();
    let place = driver.submit(&map(0));
    driver.receive(BackendReq::SHMEM_MAP);
    assert_eq!(driver.carry_out(&NOTIFICATION), OK);
    let told = driver.channel.receive().unwrap();
    assert_eq!(told.request, u32::from(BackendReq::CONFIG_CHANGE_MSG));
    driver.reply(BackendReq::SHMEM_MAP, 0);
    assert_eq!(driver.status(place), OK);
}
