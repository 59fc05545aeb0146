// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guests and clients that mean harm can only harm themselves.

use vhost_device_tests::front_end::Buffer;
use vhost_device_tests::front_end::console::event;

use super::*;

const PORTS: [&str; 2] = ["unix=DIR/port", "name=agent,unix=DIR/agent"];

/// An address that is not guest memory.
const NOWHERE: u64 = 1 << 44;

/// Asserts that both directions of the console work.
fn assert_works(device: &Device, driver: &mut ConsoleDriver) {
    let client = device.client("port");
    device.wait_for_clients(0, 1);
    driver.write(0, b"\nworks", PATIENCE);
    let mut seen = Vec::new();
    while !seen.ends_with(b"\nworks") {
        seen.extend(receive(&client, 1));
    }
    { &client }.write_all(b"works").unwrap();
    assert_eq!(driver.read(0, 5, PATIENCE), b"works");
    drop(client);
    device.wait_for_clients(0, 0);
}

#[test]
fn chains_outside_guest_memory_fail_alone() {
    let device = Device::start(&PORTS, &[]);
    let mut driver = device.connect();
    let inside = driver.front_end.memory().allocate(4096, 16);
    for chain in [
        vec![Buffer::readable(NOWHERE, 64)],
        vec![Buffer::readable(inside, 64), Buffer::readable(NOWHERE, 64)],
        vec![Buffer::readable(NOWHERE, u32::MAX)],
    ] {
        driver.ports[0].transmit.submit(&chain);
        assert!(driver.is_taken(0, PATIENCE));
        let (_, transmit) = driver.control.as_mut().unwrap();
        transmit.submit(&chain);
        transmit.take_used_within(PATIENCE);
    }
    assert_works(&device, &mut driver);
}

#[test]
fn buffers_outside_guest_memory_lose_no_byte_of_a_client() {
    let device = Device::start(&PORTS, &[]);
    let mut driver = device.connect_with(&Options::default());
    driver.post_control();
    driver.send(0, event::DEVICE_READY, 1);
    driver.send(0, event::PORT_READY, 1);
    driver.send(0, event::PORT_OPEN, 1);
    let client = device.client("port");
    { &client }.write_all(b"whole").unwrap();
    device.wait_for_clients(0, 1);
    let receive = &mut driver.ports[0].receive;
    receive.post(Buffer::writable(NOWHERE, 64));
    assert_eq!(receive.take(PATIENCE).map(|(_, used)| used), Some(0));
    driver.post_data(0);
    assert_eq!(driver.read(0, 5, PATIENCE), b"whole");
}

#[test]
fn buffers_of_the_wrong_direction_and_of_no_bytes_do_no_harm() {
    let device = Device::start(&PORTS, &[]);
    let mut driver = device.connect();
    let address = driver.front_end.memory().allocate(4096, 16);
    let chains = [
        vec![Buffer::writable(address, 64)],
        vec![Buffer::readable(address, 0)],
        vec![Buffer::writable(address, 0)],
    ];
    for chain in &chains {
        driver.ports[0].transmit.submit(chain);
        assert!(driver.is_taken(0, PATIENCE));
        let (_, transmit) = driver.control.as_mut().unwrap();
        transmit.submit(chain);
        transmit.take_used_within(PATIENCE);
    }
    drop(driver);
    // Readable parts before the buffers for input are ignored.
    let client = device.client("port");
    device.wait_for_clients(0, 1);
    let mut driver = device.connect_with(&Options::default());
    driver.post_control();
    driver.send(0, event::DEVICE_READY, 1);
    driver.send(0, event::PORT_READY, 1);
    driver.send(0, event::PORT_OPEN, 1);
    let address = driver.front_end.memory().allocate(4096, 16);
    let queue = &mut driver.ports[0].receive.queue;
    queue.submit(&[Buffer::readable(address, 64)]);
    queue.submit(&[
        Buffer::readable(address, 64),
        Buffer::writable(address + 64, 64),
    ]);
    { &client }.write_all(b"text").unwrap();
    assert_eq!(queue.take_used_within(PATIENCE).length, 0);
    assert_eq!(queue.take_used_within(PATIENCE).length, 4);
    assert_eq!(driver.front_end.memory().read_vec(address + 64, 4), b"text");
    assert_alive(&driver);
}

#[test]
fn input_never_exceeds_a_buffer() {
    let device = Device::start(&PORTS, &[]);
    let mut driver = device.connect_with(&Options::default());
    driver.post_control();
    driver.send(0, event::DEVICE_READY, 1);
    driver.send(0, event::PORT_READY, 1);
    driver.send(0, event::PORT_OPEN, 1);
    let client = device.client("port");
    let typed = text(600);
    { &client }.write_all(&typed).unwrap();
    let address = driver.front_end.memory().allocate(8192, 16);
    driver.front_end.memory().fill(address, 8192, 0xdd);
    let mut seen = Vec::new();
    // One byte, and pieces.
    for (number, sizes) in [&[1][..], &[1, 1, 1], &[3, 5, 7], &[100], &[600]]
        .into_iter()
        .enumerate()
    {
        let start = address + 1000 * number as u64;
        let mut at = start;
        let chain: Vec<Buffer> = sizes
            .iter()
            .map(|size| {
                let buffer = Buffer::writable(at, *size);
                at += u64::from(*size);
                buffer
            })
            .collect();
        let room: u32 = sizes.iter().sum();
        let queue = &mut driver.ports[0].receive.queue;
        queue.submit(&chain);
        let used = queue.take_used_within(PATIENCE).length;
        assert!(used >= 1 && used <= room);
        let bytes = driver.front_end.memory().read_vec(start, 1000);
        let (written, rest) = bytes.split_at(used as usize);
        seen.extend_from_slice(written);
        assert!(rest.iter().all(|byte| *byte == 0xdd), "{sizes:?}");
    }
    assert_eq!(seen, typed);
}

/// A chain of almost 64 GiB, in which each descriptor names the same memory.
#[test]
fn an_enormous_chain_does_not_delay_the_front_end() {
    let device = Device::start(&PORTS, &[]);
    let mut driver = device.connect();
    let address = driver.front_end.memory().allocate(16 << 20, 16);
    let chain = vec![Buffer::readable(address, 16 << 20); 60];
    for _ in 0..8 {
        driver.ports[0].transmit.submit(&chain);
    }
    let start = Instant::now();
    for _ in 0..20 {
        assert_alive(&driver);
        driver.front_end.config(0, 12).unwrap();
    }
    let base = driver.front_end.stop(1).unwrap();
    let took = start.elapsed();
    assert!(took < Duration::from_secs(2), "{took:?}");
    driver
        .front_end
        .start(1, &driver.ports[0].transmit, base)
        .unwrap();
    assert_alive(&driver);
}

#[test]
fn a_flood_of_openings_keeps_nothing() {
    let mut device = Device::start(&PORTS, &[]);
    device.program.expect_no_leak().unwrap();
    let mut driver = device.connect();
    for value in (0..20_000).map(|number| number % 2) {
        driver.send(1, event::PORT_OPEN, value);
    }
    let before = device.program.resident_bytes().unwrap();
    for value in (0..20_000).map(|number| number % 2) {
        driver.send(1, event::PORT_OPEN, value);
        driver.send(1, event::PORT_READY, value);
    }
    let after = device.program.resident_bytes().unwrap();
    assert!(after < before + (1 << 20), "{before} {after}");
    assert_eq!(device.program.status().unwrap(), None);
    assert!(device.program.stderr().lines().count() < 1000);
}

#[test]
fn clients_that_come_and_go_in_masses_keep_nothing() {
    let mut device = Device::start(&PORTS, &[]);
    device.program.expect_no_leak().unwrap();
    let mut driver = device.connect();
    for round in 0..2000 {
        let client = device.client(if round % 2 == 0 { "port" } else { "agent" });
        if round % 3 == 0 {
            // Gone before it is accepted, or not.
            continue;
        }
        let _ = { &client }.write_all(b"x");
    }
    driver.send(1, event::PORT_OPEN, 1);
    // They are gone when the guest has read what they sent.
    let deadline = Instant::now() + PATIENCE;
    let are_left = |port| !device.port(port)["clients"].as_array().unwrap().is_empty();
    while are_left(0) || are_left(1) {
        assert!(Instant::now() < deadline);
        driver.read(0, 4096, Duration::from_millis(5));
        driver.read(1, 4096, Duration::from_millis(5));
    }
    assert_works(&device, &mut driver);
}

#[test]
fn a_guest_that_ignores_a_closed_channel_only_stops_itself() {
    let device = Device::start(&PORTS, &[]);
    let mut driver = device.connect();
    for _ in 0..30 {
        driver.submit(1, &text(4096), 4096);
    }
    assert!(!driver.is_taken(1, QUIET));
    assert_works(&device, &mut driver);
}

/// Buffers of a guest for which there is nothing, and requests of one that cannot be carried out, are no reason to look again and again.
#[test]
fn waiting_takes_no_processor_time() {
    let device = Device::start(&PORTS, &[]);
    let mut driver = device.connect();
    driver.send(1, event::PORT_OPEN, 1);
    driver.submit(1, b"without a client", 16);
    let before = device.program.processor_time().unwrap();
    std::thread::sleep(Duration::from_secs(1));
    let time = device.program.processor_time().unwrap() - before;
    assert!(time < Duration::from_millis(100), "{time:?}");
}

#[test]
fn clients_are_accepted_again_after_the_limit_of_open_files_was_reached() {
    use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
    let device = Device::start(&PORTS, &[]);
    let mut driver = device.connect();
    driver.write(0, b"line", PATIENCE);
    let pid = Pid::from_raw(device.program.id() as i32);
    // No file can be opened, and those that are open stay open.
    let limit = Rlimit {
        current: Some(3),
        maximum: getrlimit(Resource::Nofile).maximum,
    };
    let before = prlimit(pid, Resource::Nofile, limit).unwrap();
    let client = device.client("port");
    assert_quiet(&client);
    prlimit(pid, Resource::Nofile, before).unwrap();
    assert_eq!(receive(&client, 4), b"line");
}
