// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What survives: saved states, crashes, resets.

use vhost::vhost_user::VhostUserFrontend;
use vhost_device_tests::front_end::console::event;
use vhost_device_tests::front_end::state::sealed;
use vhost_device_tests::process::Signal;

use super::*;

const PORTS: [&str; 2] = ["unix=DIR/port", "name=agent,unix=DIR/agent"];

/// Stops all queues, and returns where they continue.
fn stop(driver: &ConsoleDriver) -> Vec<u32> {
    (0..6)
        .map(|queue| driver.front_end.stop(queue).unwrap())
        .collect()
}

/// Continues with the queues of `driver` on another connection.
fn resume(driver: &mut ConsoleDriver, device: &Device, bases: &[u32], state: Option<&[u8]>) {
    let memory = driver.front_end.memory().clone();
    let options = Options::default();
    let front_end =
        FrontEnd::connect_with_memory(&device.path("socket"), &options, memory).unwrap();
    if let Some(state) = state {
        front_end.load_state(state).unwrap();
    }
    let (receive, transmit) = driver.control.as_ref().unwrap();
    let control = [&receive.queue, transmit];
    let ports = driver
        .ports
        .iter()
        .map(|port| [&port.receive.queue, &port.transmit]);
    let mut queues: Vec<_> = ports.flatten().collect();
    queues.splice(2..2, control);
    for (index, (queue, base)) in queues.into_iter().zip(bases).enumerate() {
        front_end.start(index, queue, *base).unwrap();
    }
    driver.front_end = front_end;
}

#[test]
fn a_saved_device_continues_elsewhere() {
    let source = Device::start(&PORTS, &[]);
    let mut driver = source.connect();
    driver.send(1, event::PORT_OPEN, 1);
    driver.write(0, b"boot messages", PATIENCE);
    // The client of the channel does not read all of this.
    let stuck = source.client("agent");
    assert_eq!(driver.expect(event::PORT_OPEN, PATIENCE).value, 1);
    let stream = text(1 << 20);
    driver.submit(1, &stream, 32768);
    assert!(!driver.is_taken(1, QUIET));
    let bases = stop(&driver);
    let state = driver.front_end.save_state().unwrap();
    let mut before = Vec::new();
    stuck
        .set_read_timeout(Some(Duration::from_secs(1)))
        .unwrap();
    let _ = { &stuck }.read_to_end(&mut before);

    let target = Device::start(&PORTS, &[]);
    resume(&mut driver, &target, &bases, Some(&state));
    assert_eq!(receive(&target.client("port"), 13), b"boot messages");
    assert_eq!(
        driver.expect(event::PORT_OPEN, PATIENCE).value,
        0,
        "no client yet"
    );
    let client = target.client("agent");
    assert_eq!(driver.expect(event::PORT_OPEN, PATIENCE).value, 1);
    let after = receive(&client, stream.len() - before.len());
    assert_same(&[before, after].concat(), &stream);
    assert!(driver.is_taken(1, PATIENCE));
    { &client }.write_all(b"still open").unwrap();
    assert_eq!(driver.read(1, 10, PATIENCE), b"still open");
}

#[test]
fn files_that_two_devices_share_have_each_byte_once() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().to_str().unwrap();
    let ports = [
        "unix=DIR/port".to_owned(),
        format!("file={path}/console,append"),
        format!("name=channel,file={path}/channel,append"),
    ];
    let ports = ports.each_ref().map(String::as_str);
    let log = format!("--log={path}/log");
    let source = Device::start(&ports, &[&log]);
    let mut driver = source.connect();
    driver.send(2, event::PORT_OPEN, 1);
    let names = ["log", "console", "channel"];
    for (port, name) in names.iter().enumerate() {
        driver.submit(port, b"before ", 7);
        assert!(driver.is_taken(port, PATIENCE));
        written(&directory.path().join(name), 7);
    }
    let bases: Vec<u32> = (0..8)
        .map(|queue| driver.front_end.stop(queue).unwrap())
        .collect();
    let state = driver.front_end.save_state().unwrap();
    let target = Device::start(&ports, &[&log]);
    resume(&mut driver, &target, &bases, Some(&state));
    for (port, name) in names.iter().enumerate() {
        driver.submit(port, b"after", 5);
        assert!(driver.is_taken(port, PATIENCE));
        let bytes = written(&directory.path().join(name), 12);
        assert_eq!(bytes.escape_ascii().to_string(), "before after", "{name}");
    }
    assert_eq!(receive(&target.client("port"), 12), b"before after");
}

#[test]
fn a_guest_continues_after_a_crash_without_a_saved_state() {
    let device = Device::start(&PORTS, &[]);
    let mut driver = device.connect();
    driver.send(1, event::PORT_OPEN, 1);
    driver.write(0, b"before", PATIENCE);
    // A front-end that keeps no requests in flight knows the bases, because all requests are completed at once.
    let bases = stop(&driver);
    let Device {
        mut program,
        directory,
        ..
    } = device;
    program.end(Signal::KILL, PATIENCE).unwrap();
    let device = Device::start_in(directory, &PORTS, &[], |_| {});
    resume(&mut driver, &device, &bases, None);
    let told = [
        driver.expect(event::PORT_OPEN, PATIENCE),
        driver.expect(event::PORT_OPEN, PATIENCE),
    ];
    assert_eq!(
        told.map(|message| (message.port, message.value)),
        [(0, 1), (1, 0)]
    );
    let client = device.client("port");
    { &client }.write_all(b"keys").unwrap();
    assert_eq!(driver.read(0, 4, PATIENCE), b"keys");
    let agent = device.client("agent");
    { &agent }.write_all(b"ping").unwrap();
    assert_eq!(driver.read(1, 4, PATIENCE), b"ping");
}

#[test]
fn invalid_states_are_refused() {
    let device = Device::start(&PORTS, &[]);
    let other = Device::start(&PORTS[..1], &[]);
    let mut driver = device.connect();
    stop(&driver);
    let state = driver.front_end.save_state().unwrap();
    assert!(driver.front_end.load_state(&state).is_ok());
    drop(driver);
    let front_end = FrontEnd::connect(&other.path("socket"), &Options::default()).unwrap();
    assert!(
        front_end.load_state(&state).is_err(),
        "another number of ports"
    );
    for part in [
        &b""[..],
        b"\x02",
        b"\x01\x00",
        b"\x00\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
    ] {
        assert!(
            front_end.load_state(&sealed("console", 1, part)).is_err(),
            "{part:?}"
        );
    }
    drop(front_end);
    driver = other.connect();
    driver.write(0, b"works", PATIENCE);
}

#[test]
fn a_reset_forgets_what_the_driver_had_opened() {
    let device = Device::start(&PORTS, &[]);
    let mut driver = device.connect();
    driver.send(1, event::PORT_OPEN, 1);
    device.wait_for(1, |port| port["open-in-guest"] == true);
    driver.front_end.call().reset_device().unwrap();
    device.wait_for(1, |port| port["open-in-guest"] == false);
    assert_alive(&driver);
}
