// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The answer to a request of any form.

use vhost_device_tests::front_end::{Buffer, FrontEnd, Options, QueueOptions};

use crate::{Device, Driver, LARGEST, assert_same, words};

/// Guest memory has a hole here.
const HOLE: u64 = 0x8000_0000;

#[test]
fn there_is_one_queue_and_neither_features_nor_config_space() {
    let device = Device::start(&[]);
    let front_end = FrontEnd::connect(&device.socket, &Options::default()).unwrap();
    assert_eq!(front_end.queue_count(), 1);
    assert_eq!(front_end.offered() & ((1 << 24) - 1), 0);
    let config = vhost::vhost_user::message::VhostUserProtocolFeatures::CONFIG;
    assert!(!front_end.protocol_features().contains(config));
}

#[test]
fn bytes_come_in_order_whatever_their_requests_look_like() {
    const SIZE: u32 = 4096;
    for indirect in [0, 64] {
        let source = words(1 << 17);
        let device = Device::with_source(&source, &[]);
        let front_end = FrontEnd::connect(&device.socket, &Options::default()).unwrap();
        let options = QueueOptions {
            indirect,
            ..front_end.queue_options(256)
        };
        let mut driver = Driver::with_queue(front_end, options);
        let readable = Buffer::readable(driver.area + u64::from(Driver::AREA) / 2, 100);
        let mut seen = Vec::new();
        let shapes: [(u32, &[u32]); 9] = [
            (SIZE, &[]),
            (SIZE, &[1]),
            (SIZE, &[1000, 1, 2000]),
            (SIZE, &[64; 60]),
            (1, &[]),
            (3, &[1, 1]),
            (LARGEST, &[]),
            (LARGEST - 1, &[30000, 5]),
            (17, &[0, 8, 0]),
        ];
        for (length, pieces) in shapes {
            for before in [&[][..], &[readable], &readable.split(&[1, 50])] {
                let mut chain = before.to_vec();
                chain.extend(driver.buffer(length).split(pieces));
                let written = driver.carry_out(&chain);
                assert_eq!(written, length, "{chain:?}");
                seen.extend(driver.check(length, written));
            }
        }
        assert_same(&seen, &source[..seen.len()]);
    }
}

#[test]
fn requests_that_wait_together_are_filled_in_order() {
    let source = words(1 << 16);
    let device = Device::with_source(&source, &[]);
    let mut driver = device.connect();
    let buffers = driver.buffer(256 * 200).split(&[200; 256]);
    for _ in 0..3 {
        for buffer in &buffers {
            driver.queue.add(&[*buffer]).unwrap();
        }
        driver.queue.publish();
        driver.queue.kick();
        for _ in &buffers {
            assert!(driver.queue.wait_used(crate::PATIENCE));
            assert_eq!(driver.queue.take_used().unwrap().length, 200);
        }
    }
    let seen = driver.check(256 * 200, 256 * 200);
    assert_same(&seen, &source[2 * seen.len()..3 * seen.len()]);
}

#[test]
fn a_request_gets_64_kib_at_most() {
    let source = words(1 << 16);
    let device = Device::with_source(&source, &[]);
    let mut driver = device.connect();
    for (length, pieces) in [
        (1 << 20, &[][..]),
        (LARGEST + 1, &[]),
        (1 << 20, &[5000, 100_000]),
    ] {
        let chain = driver.buffer(length).split(pieces);
        assert_eq!(driver.carry_out(&chain), LARGEST);
        driver.check(length, LARGEST);
    }
    assert_same(&driver.read(16), &source[3 * LARGEST as usize..][..16]);
}

#[test]
fn a_request_with_no_byte_to_write_gets_none() {
    let source = words(100);
    let device = Device::with_source(&source, &[]);
    let mut driver = device.connect();
    let readable = Buffer {
        writable: false,
        ..driver.buffer(100)
    };
    assert_eq!(driver.carry_out(&[readable]), 0);
    assert_eq!(driver.carry_out(&readable.split(&[10, 20])), 0);
    assert_eq!(driver.carry_out(&[Buffer::writable(driver.area, 0)]), 0);
    driver.check(100, 0);
    assert_same(&driver.read(16), &source[..16]);
}

#[test]
fn a_request_that_points_outside_guest_memory_gets_nothing_and_takes_nothing() {
    let source = words(100);
    let device = Device::with_source(&source, &[]);
    let mut driver = device.connect();
    let good = driver.buffer(64);
    let end = driver.front_end.memory().regions()[0].size();
    for bad in [
        Buffer::writable(HOLE, 64),
        Buffer::writable(u64::MAX - 10, 64),
        Buffer::writable(u64::MAX, 1),
        Buffer::writable(end - 1, 2),
        Buffer::writable(HOLE, u32::MAX),
    ] {
        assert_eq!(driver.carry_out(&[bad]), 0, "{bad:?}");
        assert_eq!(driver.carry_out(&[good, bad]), 0, "{bad:?} second");
        assert_eq!(driver.carry_out(&[bad, good]), 0, "{bad:?} first");
    }
    driver.check(64, 0);
    assert_same(&driver.read(16), &source[..16]);
}

#[test]
fn the_next_connection_continues_where_the_last_one_ended() {
    let source = words(1 << 12);
    let device = Device::with_source(&source, &[]);
    let mut seen = Vec::new();
    for length in [100, 1, 5000] {
        seen.extend(device.connect().read(length));
    }
    assert_same(&seen, &source[..5101]);
}

#[test]
fn a_stopped_ring_goes_on_where_it_was() {
    let source = words(1 << 12);
    let device = Device::with_source(&source, &[]);
    let mut driver = device.connect();
    let mut seen = driver.read(100);
    let base = driver.front_end.stop(0).unwrap();
    assert_eq!(base, driver.queue.used_base());
    driver.submit(200);
    driver.assert_waits();
    driver.front_end.start(0, &driver.queue, base).unwrap();
    seen.extend(driver.answer(200));
    assert_same(&seen, &source[..300]);
}

#[test]
fn no_two_reads_from_the_kernel_are_alike() {
    let mut seen = Vec::new();
    for _ in 0..2 {
        let device = Device::start(&[]);
        for _ in 0..2 {
            let mut driver = device.connect();
            seen.extend([driver.read(32), driver.read(32)]);
        }
    }
    assert!(seen.iter().all(|bytes| bytes.len() == 32));
    for (index, bytes) in seen.iter().enumerate() {
        assert!(!seen[..index].contains(bytes), "read {index}");
    }
}

#[test]
fn a_character_device_can_be_the_source() {
    let device = Device::start(&["--rng-source=/dev/zero"]);
    assert_eq!(device.connect().read(100_000), [0; LARGEST as usize]);
    let device = Device::start(&["--rng-source=/dev/urandom"]);
    let mut driver = device.connect();
    assert_ne!(driver.read(64), driver.read(64));
}
