// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Connections when the device, the driver or the front-end starts again.

use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_device_tests::front_end::Buffer;
use vhost_device_tests::front_end::vsock::op;
use vhost_device_tests::process::Signal;

use super::*;

#[test]
fn connections_of_an_earlier_process_are_reset_at_their_next_packet() {
    let device = Device::start();
    let listener = device.listen(5000);
    let mut guest = device.connect();
    let link = guest.open(1024, 5000);
    let mut host = accept_stream(&listener);
    let directory = {
        let Device {
            mut program,
            directory,
        } = device;
        program.expect_anything();
        program.end(Signal::KILL, PATIENCE).unwrap();
        directory
    };
    assert_eq!(read_to_end(&mut host), b"");
    let device = Device::start_in(directory, |_| {});
    let mut guest = device.connect();
    guest.send(&link.data(b"data"));
    guest.expect(&link, op::RST);
    let again = guest.open(1024, 5000);
    let mut host = accept_stream(&listener);
    guest.send(&again.data(b"data"));
    assert_eq!(read(&mut host, 4), b"data");
}

#[test]
fn a_driver_that_continues_is_told_that_its_connections_are_gone() {
    let device = Device::start();
    let mut guest = device.connect();
    let driver = &mut guest.0;
    let memory = driver.front_end.memory();
    let area = memory.allocate(64, 64);
    memory.write(area, &[0xdd; 8]);
    driver.event.submit(&[Buffer::writable(area, 8)]);
    assert!(
        !driver.event.wait_used(QUIET),
        "a new driver has no connections"
    );
    // The same driver, seen by a device that knows nothing of it.
    let memory = driver.front_end.memory().clone();
    driver.front_end.disconnect();
    let front_end =
        FrontEnd::connect_with_memory(&device.path("socket"), &Options::default(), memory).unwrap();
    driver.rx = continued(&front_end, 0);
    let mut event = continued(&front_end, 2);
    event.submit(&[Buffer::writable(area, 8)]);
    let used = event.take_used_within(PATIENCE);
    assert_eq!(used.length, 4);
    let bytes = front_end.memory().read_vec(area, 8);
    assert_eq!(bytes, [0, 0, 0, 0, 0xdd, 0xdd, 0xdd, 0xdd]);
    event.submit(&[Buffer::writable(area, 8)]);
    assert!(!event.wait_used(QUIET), "told twice");
}

/// Starts a queue in the middle.
fn continued(front_end: &FrontEnd, index: usize) -> vhost_device_tests::front_end::Queue {
    let mut options = front_end.queue_options(256);
    options.base += 5;
    front_end.queue_with(index, options).unwrap()
}

#[test]
fn a_driver_whose_device_state_was_loaded_is_told_that_its_connections_are_gone() {
    let device = Device::start();
    let front_end = device.front_end();
    assert!(
        front_end
            .protocol_features()
            .contains(VhostUserProtocolFeatures::DEVICE_STATE)
    );
    let state = front_end.save_state().unwrap();
    front_end.load_state(&state).unwrap();
    let mut event = front_end.queue(2, 64).unwrap();
    let area = front_end.memory().allocate(64, 64);
    event.submit(&[Buffer::writable(area, 2)]);
    assert_eq!(event.take_used_within(PATIENCE).length, 0, "too small");
    event.submit(&[Buffer::writable(area, 4)]);
    assert_eq!(event.take_used_within(PATIENCE).length, 4);
}

#[test]
fn connections_outlive_a_stop_of_the_queues() {
    let device = Device::start();
    let listener = device.listen(5000);
    let mut guest = device.connect();
    let mut link = guest.open(1024, 5000);
    let mut host = accept_stream(&listener);
    let driver = &mut guest.0;
    let bases: Vec<u32> = (0..2)
        .map(|index| driver.front_end.stop(index).unwrap())
        .collect();
    std::io::Write::write_all(&mut host, b"meanwhile").unwrap();
    std::thread::sleep(QUIET);
    driver.front_end.start(0, &driver.rx, bases[0]).unwrap();
    driver.front_end.start(1, &driver.tx, bases[1]).unwrap();
    assert_eq!(guest.read(&mut link, 9), b"meanwhile");
    guest.send(&link.data(b"data"));
    assert_eq!(read(&mut host, 4), b"data");
}

#[test]
fn a_reset_closes_all_connections() {
    let device = device_with_control(&[]);
    let listener = device.listen(5000);
    let mut guest = device.connect();
    guest.open(1024, 5000);
    let mut host = accept_stream(&listener);
    let raw = guest.0.front_end.raw().unwrap();
    let outcome = raw.acknowledged(FrontendReq::RESET_DEVICE, &[], &[]);
    assert_eq!(outcome.unwrap(), 0);
    assert_eq!(read_to_end(&mut host), b"");
    assert_eq!(device.connections("open"), 0);
    guest.assert_alive();
}

/// QEMU does not announce a reboot of the guest, but stops the queues and starts them at the beginning.
#[test]
fn a_new_driver_has_no_connections() {
    let device = device_with_control(&[]);
    let listener = device.listen(5000);
    let mut guest = device.connect();
    let link = guest.open(1024, 5000);
    let mut host = accept_stream(&listener);
    let driver = &mut guest.0;
    for index in 0..3 {
        driver.front_end.stop(index).unwrap();
    }
    for queue in [&mut driver.rx, &mut driver.tx, &mut driver.event] {
        queue.reset();
    }
    let base = driver.rx.options().start();
    driver.front_end.start(0, &driver.rx, base).unwrap();
    driver.front_end.start(1, &driver.tx, base).unwrap();
    driver.front_end.start(2, &driver.event, base).unwrap();
    assert_eq!(read_to_end(&mut host), b"");
    assert_eq!(device.connections("open"), 0);
    let area = driver.front_end.memory().allocate(4096, 64);
    driver.send(&link.data(b"data"));
    driver.rx.submit(&[Buffer::writable(area, 4096)]);
    let used = driver.rx.take_used_within(PATIENCE);
    let bytes = driver
        .front_end
        .memory()
        .read_vec(area, used.length as usize);
    assert_eq!(Packet::from_bytes(&bytes).op, op::RST);
}

#[test]
fn a_connection_that_ends_takes_all_sockets_with_it() {
    let device = Device::start();
    let listener = device.listen(5000);
    let mut guest = device.connect();
    guest.open(1024, 5000);
    let mut host = accept_stream(&listener);
    let mut waiting = device.call(7000);
    guest.0.receive();
    guest.0.front_end.disconnect();
    assert_eq!(read_to_end(&mut host), b"");
    assert_eq!(read_to_end(&mut waiting), b"");
    device.connect().assert_works(&device);
}
