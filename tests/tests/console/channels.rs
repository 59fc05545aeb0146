// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Channels of programs: ports with a name, which lose nothing.

use vhost_device_tests::front_end::console::event;

use super::*;

const AGENT: &str = "name=org.qemu.guest_agent.0,unix=DIR/agent";

/// Bytes of a channel that the device takes from the guest before its client receives them.
const HELD: usize = 64 << 10;

fn start() -> (Device, ConsoleDriver) {
    let device = Device::start(&["pty", AGENT], &[]);
    let driver = device.connect();
    (device, driver)
}

/// Opens the channel in the guest.
fn open(driver: &mut ConsoleDriver) {
    driver.send(1, event::PORT_OPEN, 1);
}

#[test]
fn the_guest_is_told_when_clients_come_and_go() {
    let (device, mut driver) = start();
    for _ in 0..3 {
        let client = device.client("agent");
        let opened = driver.expect(event::PORT_OPEN, PATIENCE);
        assert_eq!((opened.port, opened.value), (1, 1));
        drop(client);
        let closed = driver.expect(event::PORT_OPEN, PATIENCE);
        assert_eq!((closed.port, closed.value), (1, 0));
    }
    let first = device.client("agent");
    driver.expect(event::PORT_OPEN, PATIENCE);
    let second = device.client("agent");
    device.wait_for_clients(1, 2);
    drop(first);
    device.wait_for_clients(1, 1);
    assert_eq!(driver.message(QUIET), None, "a client is left");
    drop(second);
    assert_eq!(driver.expect(event::PORT_OPEN, PATIENCE).value, 0);
}

/// A program in the guest must not take two clients for one.
#[test]
fn the_guest_is_told_when_a_client_takes_the_place_of_another_at_once() {
    use vhost_device_tests::process::Signal;
    let (mut device, mut driver) = start();
    let mut client = device.client("agent");
    let opened = driver.expect(event::PORT_OPEN, PATIENCE);
    assert_eq!(opened.value, 1);
    for _ in 0..20 {
        // Both are seen at once by a thread that is stopped meanwhile.
        device.program.signal(Signal::STOP).unwrap();
        let next = device.client("agent");
        drop(client);
        device.program.signal(Signal::CONT).unwrap();
        let told = [(); 2].map(|()| driver.expect(event::PORT_OPEN, PATIENCE).value);
        assert_eq!(told, [0, 1]);
        client = next;
    }
}

#[test]
fn the_guest_waits_without_a_client_and_nothing_is_lost() {
    let (device, mut driver) = start();
    open(&mut driver);
    driver.submit(1, b"answer", 6);
    assert!(!driver.is_taken(1, QUIET), "taken without a client");
    let client = device.client("agent");
    assert!(driver.is_taken(1, PATIENCE));
    assert_eq!(receive(&client, 6), b"answer");
}

#[test]
fn the_guest_waits_for_a_client_that_does_not_read_and_the_console_does_not() {
    let (device, mut driver) = start();
    open(&mut driver);
    let client = device.client("agent");
    device.wait_for_clients(1, 1);
    let stream = text(1 << 20);
    driver.submit(1, &stream, 32768);
    assert!(
        !driver.is_taken(1, QUIET),
        "more is taken than the client reads"
    );
    driver.write(0, &text(1 << 20), PATIENCE);
    assert_same(&receive(&client, stream.len()), &stream);
    assert!(driver.is_taken(1, PATIENCE));
    assert_eq!(device.port(1)["bytes-missed"], 0);
}

#[test]
fn a_channel_is_as_fast_as_its_client_and_loses_nothing() {
    let (device, mut driver) = start();
    open(&mut driver);
    let client = device.client("agent");
    let stream = text(16 << 20);
    let count = stream.len();
    let reader = std::thread::spawn(move || receive(&client, count));
    for chunk in stream.chunks(1 << 20) {
        driver.submit(1, chunk, 65536);
        assert!(driver.is_taken(1, PATIENCE));
    }
    assert_same(&reader.join().unwrap(), &stream);
}

#[test]
fn what_a_client_did_not_receive_is_for_the_next_one() {
    let (device, mut driver) = start();
    open(&mut driver);
    let stuck = device.client("agent");
    device.wait_for_clients(1, 1);
    let stream = text(1 << 20);
    driver.submit(1, &stream, 32768);
    let deadline = Instant::now() + PATIENCE;
    let mut before = 0;
    loop {
        std::thread::sleep(QUIET);
        let taken = device.port(1)["bytes-from-guest"].as_u64().unwrap() as usize;
        if taken == before {
            break;
        }
        assert!(Instant::now() < deadline);
        before = taken;
    }
    drop(stuck);
    device.wait_for_clients(1, 0);
    let next = device.client("agent");
    next.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    let mut seen = Vec::new();
    let _ = { &next }.read_to_end(&mut seen);
    assert!(seen.len() >= stream.len() - before, "the rest arrives");
    assert!(
        before - HELD <= stream.len() - seen.len(),
        "also what the device held"
    );
    assert_same(&seen, &stream[stream.len() - seen.len()..]);
    assert!(driver.is_taken(1, PATIENCE));
}

#[test]
fn a_late_client_of_a_channel_receives_nothing_old() {
    let (device, mut driver) = start();
    open(&mut driver);
    let client = device.client("agent");
    driver.submit(1, b"old", 3);
    assert!(driver.is_taken(1, PATIENCE));
    assert_eq!(receive(&client, 3), b"old");
    drop(client);
    device.wait_for_clients(1, 0);
    let client = device.client("agent");
    device.wait_for_clients(1, 1);
    assert_quiet(&client);
}

#[test]
fn what_a_client_sends_waits_until_the_guest_opens_the_port() {
    let (device, mut driver) = start();
    let client = device.client("agent");
    { &client }
        .write_all(b"{\"execute\":\"guest-sync\"}")
        .unwrap();
    device.wait_for_clients(1, 1);
    assert_eq!(driver.read(1, 24, QUIET), b"");
    drop(client);
    open(&mut driver);
    assert_eq!(
        driver.read(1, 24, PATIENCE),
        b"{\"execute\":\"guest-sync\"}"
    );
    device.wait_for_clients(1, 0);
    driver.send(1, event::PORT_OPEN, 0);
    let client = device.client("agent");
    { &client }.write_all(b"again").unwrap();
    assert_eq!(driver.read(1, 5, QUIET), b"");
    open(&mut driver);
    assert_eq!(driver.read(1, 5, PATIENCE), b"again");
}

#[test]
fn a_stop_of_a_queue_does_not_wait_for_a_client_and_repeats_nothing() {
    let (device, mut driver) = start();
    open(&mut driver);
    let client = device.client("agent");
    device.wait_for_clients(1, 1);
    let stream = text(1 << 20);
    driver.submit(1, &stream, 32768);
    assert!(!driver.is_taken(1, QUIET));
    let base = driver.front_end.stop(5).unwrap();
    let port = &driver.ports[1];
    driver.front_end.start(5, &port.transmit, base).unwrap();
    assert_same(&receive(&client, stream.len()), &stream);
    assert!(driver.is_taken(1, PATIENCE));
}

#[test]
fn a_new_driver_does_not_inherit_the_rest_of_a_chain() {
    let (device, mut driver) = start();
    open(&mut driver);
    let client = device.client("agent");
    device.wait_for_clients(1, 1);
    driver.submit(1, &text(1 << 20), 32768);
    assert!(!driver.is_taken(1, QUIET));
    drop(driver);
    let stopped = device.wait_for(1, |port| port["open-in-guest"] == false);
    let taken = stopped["bytes-from-guest"].as_u64().unwrap() as usize;
    let mut driver = device.connect();
    open(&mut driver);
    assert_same(&receive(&client, taken), &text(taken));
    driver.submit(1, b"from the beginning", 18);
    assert!(driver.is_taken(1, PATIENCE));
    assert_eq!(receive(&client, 18), b"from the beginning");
}
