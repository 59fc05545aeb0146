// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Headers and data in any framing.

use std::io::Write;

use vhost_device_tests::front_end::Buffer;
use vhost_device_tests::front_end::vsock::{HEADER_SIZE, STREAM, op};

use super::*;

#[test]
fn a_packet_of_the_guest_may_be_spread_over_any_descriptors() {
    let device = Device::start();
    let listener = device.listen(5000);
    let mut guest = device.connect();
    let link = guest.open(1024, 5000);
    let mut host = accept_stream(&listener);
    let data = pattern(64 << 10);
    // As Linux sends 64 KiB: a header, then pages.
    let pages: Vec<u32> = std::iter::once(44).chain([4096; 15]).collect();
    for lengths in [
        &[][..],
        &[44],
        &[1, 43],
        &[43, 1],
        &[43, 2],
        &[20, 60, 1],
        &[44, 0, 1, 0],
        &[1; 100],
        &pages,
    ] {
        guest
            .0
            .send_bytes(&link.data(&data).to_bytes(None), lengths);
        assert!(read(&mut host, data.len()) == data, "{lengths:?}");
    }
}

#[test]
fn random_framing_keeps_all_bytes_in_order() {
    let device = Device::start();
    let listener = device.listen(5000);
    let mut guest = device.connect();
    let link = guest.open(1024, 5000);
    let mut host = accept_stream(&listener);
    let mut random = fastrand::Rng::with_seed(7);
    for round in 0..200 {
        let data = pattern(random.usize(1..100_000));
        let bytes = link.data(&data).to_bytes(None);
        let mut left = bytes.len() as u32;
        let mut lengths = Vec::new();
        while left > 1 && lengths.len() < 100 {
            let bits = random.u32(1..15);
            let length = random.u32(0..left.min(1 << bits));
            lengths.push(length);
            left -= length;
        }
        guest.0.send_bytes(&bytes, &lengths);
        assert!(read(&mut host, data.len()) == data, "{round}: {lengths:?}");
    }
}

#[test]
fn only_the_length_in_the_header_counts() {
    let device = Device::start();
    let listener = device.listen(5000);
    let mut guest = device.connect();
    let link = guest.open(1024, 5000);
    let mut host = accept_stream(&listener);
    let bytes = link.data(b"data and more").to_bytes(Some(4));
    let empty = [&[44][..], &[0; 60], &[1]].concat();
    for lengths in [&[][..], &[46], &empty] {
        guest.0.send_bytes(&bytes, lengths);
        guest.send(&link.data(b"next"));
        assert_eq!(read(&mut host, 8), b"datanext", "{lengths:?}");
    }
}

#[test]
fn buffers_of_the_guest_may_have_any_framing() {
    let device = Device::start();
    let mut driver = VsockDriver::without_buffers(device.front_end(), 0, 0).unwrap();
    let memory = driver.front_end.memory().clone();
    let area = memory.allocate(64 << 10, 64);
    let mut host = device.call(7000);
    let receive = |driver: &mut VsockDriver, lengths: &[u32], size: u32| {
        memory.fill(area, size as usize, 0xdd);
        driver
            .rx
            .submit(&Buffer::writable(area, size).split(lengths));
        let used = driver.rx.take_used_within(PATIENCE);
        Packet::from_bytes(&memory.read_vec(area, used.length as usize))
    };
    let request = receive(&mut driver, &[1, 2, 41], 44);
    assert_eq!(request.op, op::REQUEST);
    let link = Link {
        peer_port: request.src_port,
        ..Link::to_host(7000, 0)
    };
    driver.send(&link.packet(op::RESPONSE));
    let data = pattern(6000);
    host.write_all(&data).unwrap();
    let mut got = Vec::new();
    let framings: [(&[u32], u32); 8] = [
        (&[44], 45),
        (&[43, 1], 50),
        (&[43, 2], 50),
        (&[], 1000),
        (&[1; 60], 100),
        (&[10, 0, 34, 0, 7], 60),
        (&[44, 1000], 2000),
        (&[], 8000),
    ];
    for (lengths, size) in framings {
        let packet = receive(&mut driver, lengths, size);
        assert_eq!(packet.op, op::RW, "{lengths:?}");
        assert!(!packet.data.is_empty());
        got.extend(packet.data);
    }
    assert!(got == data);
}

#[test]
fn buffers_that_cannot_hold_a_packet_are_given_back() {
    let device = Device::start();
    let mut driver = VsockDriver::without_buffers(device.front_end(), 1, 4096).unwrap();
    let memory = driver.front_end.memory().clone();
    let area = memory.allocate(4096, 64);
    let _host = device.call(7000);
    let outside = 1 << 60;
    for chain in [
        vec![Buffer::writable(area, 43)],
        vec![Buffer::readable(area, 100)],
        vec![Buffer::writable(outside, 100)],
        vec![Buffer::writable(area, 20), Buffer::writable(outside, 24)],
    ] {
        driver.rx.submit(&chain);
        let used = driver.rx.take_used_within(PATIENCE);
        assert_eq!(used.length, 0, "{chain:?}");
    }
    driver.supply(1);
    let mut guest = Guest(driver);
    let mut link = guest.accept(7000, STREAM);
    // Data needs room for a byte.
    let mut host = _host;
    host.write_all(b"data").unwrap();
    guest.0.refills = false;
    assert_eq!(guest.read(&mut link, 4), b"data");
    host.write_all(b"more").unwrap();
    for chain in [
        vec![Buffer::writable(area, HEADER_SIZE as u32)],
        vec![Buffer::writable(area, 44), Buffer::writable(outside, 24)],
    ] {
        guest.0.rx.submit(&chain);
        let used = guest.0.rx.take_used_within(PATIENCE);
        assert_eq!(used.length, 0, "{chain:?}");
    }
    guest.0.supply(1);
    assert_eq!(guest.read(&mut link, 4), b"more");
}

/// The device fills several buffers by one system call; some cannot be used, and credit may end in any of them.
#[test]
fn a_stream_fills_buffers_of_any_size_in_order() {
    const BYTES: usize = 4 << 20;
    let device = Device::start();
    let mut guest = device.connect();
    let mut host = device.call(7000);
    let mut link = guest.accept(7000, STREAM);
    guest.0.refills = false;
    let data = pattern(BYTES);
    let sent = data.clone();
    let writer = std::thread::spawn(move || {
        read_ok(&mut host);
        host.write_all(&sent).unwrap();
        host
    });
    // Uses up the buffers of the driver, which are all alike.
    let mut got = Vec::new();
    for _ in 0..64 {
        let packet = guest.0.receive();
        got.extend(packet.data);
    }
    let driver = &mut guest.0;
    let memory = driver.front_end.memory().clone();
    let area = memory.allocate(16 << 20, 64);
    let mut random = fastrand::Rng::with_seed(19);
    let (mut outstanding, mut next) = (std::collections::VecDeque::new(), 0_u64);
    let mut told = 0;
    while got.len() < BYTES {
        while outstanding.len() < 40 {
            let size = match random.u8(0..12) {
                0 => random.u32(1..45),
                1 => random.u32(45..60),
                2 => random.u32(60..40_000),
                _ => 4096,
            };
            let cut = random.u32(0..=size);
            let address = area + next % (15 << 20);
            next += u64::from(size);
            driver
                .rx
                .add(&Buffer::writable(address, size).split(&[cut]))
                .unwrap();
            outstanding.push_back((address, size));
        }
        driver.rx.publish();
        driver.rx.kick();
        if got.len() - told > random.usize(1000..100_000) {
            told = got.len();
            link.taken = told as u32;
            // The credit ends anywhere.
            let buf_alloc = random.u32(1000..200_000);
            driver.send(&Packet {
                buf_alloc,
                ..link.packet(op::CREDIT_UPDATE)
            });
        }
        if !driver.rx.wait_used(Duration::from_millis(2)) {
            told = 0;
            continue;
        }
        while let Some(used) = driver.rx.take_used() {
            let (address, size) = outstanding.pop_front().unwrap();
            if used.length == 0 {
                assert!(size <= 44, "{size}");
                continue;
            }
            let packet = Packet::from_bytes(&memory.read_vec(address, used.length as usize));
            match packet.op {
                op::RW => assert!(!packet.data.is_empty()),
                op::CREDIT_REQUEST => {}
                _ => panic!("{packet:?}"),
            }
            got.extend(packet.data);
        }
    }
    assert!(got == data);
    drop(writer.join().unwrap());
}
