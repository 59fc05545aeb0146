// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Control messages in any order, any number of times, for any port.

use vhost_device_tests::front_end::console::{Message, event};

use super::*;

fn message(port: u32, event: u16, value: u16) -> Message {
    Message {
        port,
        event,
        value,
        rest: Vec::new(),
    }
}

fn named(port: u32, name: &str) -> Message {
    Message {
        rest: name.as_bytes().to_vec(),
        ..message(port, event::PORT_NAME, 1)
    }
}

/// Returns all messages that come before a short silence.
fn messages(driver: &mut ConsoleDriver) -> Vec<Message> {
    std::iter::from_fn(|| driver.message(QUIET)).collect()
}

#[test]
fn a_driver_that_is_ready_hears_of_all_ports_and_then_of_each() {
    let device = Device::start(
        &[
            "name=first,unix=DIR/a",
            "unix=DIR/b",
            "name=channel,unix=DIR/c",
        ],
        &[],
    );
    let mut driver = device.connect_with(&Options::default());
    driver.post_control();
    assert_eq!(messages(&mut driver), [], "before it is ready");
    driver.send(0, event::DEVICE_READY, 1);
    let added: Vec<Message> = (0..3)
        .map(|port| message(port, event::PORT_ADD, 1))
        .collect();
    assert_eq!(messages(&mut driver), added);
    driver.send(2, event::PORT_READY, 1);
    let described = [named(2, "channel"), message(2, event::PORT_OPEN, 0)];
    assert_eq!(messages(&mut driver), described);
    driver.send(1, event::PORT_READY, 1);
    let described = [
        message(1, event::CONSOLE_PORT, 1),
        message(1, event::PORT_OPEN, 1),
    ];
    assert_eq!(messages(&mut driver), described);
    driver.send(0, event::PORT_READY, 1);
    let described = [
        message(0, event::CONSOLE_PORT, 1),
        named(0, "first"),
        message(0, event::PORT_OPEN, 1),
    ];
    assert_eq!(messages(&mut driver), described);
}

#[test]
fn messages_that_come_twice_are_answered_twice() {
    let device = Device::start(&["unix=DIR/a", "name=b,unix=DIR/b"], &[]);
    let mut driver = device.connect_with(&Options::default());
    driver.post_control();
    for _ in 0..3 {
        driver.send(0, event::DEVICE_READY, 1);
        assert_eq!(messages(&mut driver).len(), 2);
        for _ in 0..3 {
            driver.send(1, event::PORT_READY, 1);
            assert_eq!(
                messages(&mut driver),
                [named(1, "b"), message(1, event::PORT_OPEN, 0)]
            );
        }
        for _ in 0..3 {
            driver.send(1, event::PORT_OPEN, 1);
            driver.send(1, event::PORT_OPEN, 1);
            driver.send(1, event::PORT_OPEN, 0);
        }
    }
    assert_eq!(messages(&mut driver), []);
}

/// All events, known or not, for all sorts of ports, in all states of the driver.
#[test]
fn no_message_in_any_state_ends_anything() {
    let mut device = Device::start(&["unix=DIR/a", "name=b,unix=DIR/b"], &[]);
    device.program.expect_no_leak().unwrap();
    let states: [&[(u32, u16, u16)]; 5] = [
        &[],
        &[(0, event::DEVICE_READY, 1)],
        &[(0, event::DEVICE_READY, 1), (1, event::PORT_READY, 1)],
        &[(0, event::DEVICE_READY, 1), (1, event::PORT_READY, 0)],
        &[(0, event::DEVICE_READY, 0)],
    ];
    for state in states {
        let mut driver = device.connect_with(&Options::default());
        driver.post_control();
        for &(port, event, value) in state {
            driver.send(port, event, value);
        }
        for event in [0, 1, 2, 3, 4, 5, 6, 7, 8, 0xff, 0x100, 0xffff] {
            for port in [0, 1, 2, 31, 0xffff, 0x1_0000, u32::MAX] {
                for value in [0, 1, 2, 0xffff] {
                    driver.send(port, event, value);
                }
            }
        }
        for bytes in [&b"\0"[..], b"\0\0\0\0\0\0\0"] {
            driver.send_bytes(bytes);
        }
        messages(&mut driver);
        driver.send(0, event::DEVICE_READY, 1);
        assert_eq!(messages(&mut driver).len(), 2, "{state:?}");
        assert_alive(&driver);
    }
}

#[test]
fn a_port_that_the_guest_cannot_use_is_left_alone() {
    let device = Device::start(&["unix=DIR/a", "name=b,unix=DIR/b"], &[]);
    let mut driver = device.connect_with(&Options::default());
    driver.post_control();
    driver.send(0, event::DEVICE_READY, 1);
    messages(&mut driver);
    driver.post_data(1);
    driver.send(1, event::PORT_READY, 0);
    driver.send(1, event::PORT_OPEN, 1);
    let client = device.client("b");
    { &client }.write_all(b"unread").unwrap();
    device.wait_for_clients(1, 1);
    assert_eq!(messages(&mut driver), []);
    assert_eq!(driver.read(1, 6, QUIET), b"");
}

#[test]
fn messages_wait_for_buffers_and_are_not_piled_up() {
    let device = Device::start(&["unix=DIR/a", "name=b,unix=DIR/b"], &[]);
    let mut driver = device.connect_with(&Options::default());
    driver.send(0, event::DEVICE_READY, 1);
    for _ in 0..200 {
        driver.send(0, event::DEVICE_READY, 1);
        driver.send(1, event::PORT_READY, 1);
        driver.send(1, event::PORT_READY, 1);
    }
    for _ in 0..50 {
        drop(device.client("b"));
    }
    let _client = device.client("b");
    device.wait_for_clients(1, 1);
    driver.post_control();
    let seen = messages(&mut driver);
    assert!(seen.len() <= 6, "{seen:?}");
    assert_eq!(seen.last(), Some(&message(1, event::PORT_OPEN, 1)));
}

#[test]
fn a_buffer_that_is_too_small_for_a_message_is_returned_empty() {
    use vhost_device_tests::front_end::Buffer;
    let device = Device::start(&["unix=DIR/a"], &[]);
    let mut driver = device.connect_with(&Options::default());
    let address = driver.front_end.memory().allocate(64, 16);
    driver.send(0, event::DEVICE_READY, 1);
    let (receive, _) = driver.control.as_mut().unwrap();
    for length in [1, 7] {
        receive.post(Buffer::writable(address, length));
        assert_eq!(receive.take(PATIENCE).map(|(_, used)| used), Some(0));
    }
    receive.post(Buffer::writable(address, 8));
    assert_eq!(receive.take(PATIENCE).map(|(_, used)| used), Some(8));
}

#[test]
fn thirty_one_ports_work_at_once() {
    let names: Vec<String> = (0..31)
        .map(|port| format!("name=port{port},unix=DIR/{port}"))
        .collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let device = Device::start(&names, &[]);
    let mut driver = device.connect();
    assert_eq!(driver.front_end.queue_count(), 64);
    let clients: Vec<UnixStream> = (0..31)
        .map(|port| device.client(&port.to_string()))
        .collect();
    for (port, client) in clients.iter().enumerate() {
        driver.send(port as u32, event::PORT_OPEN, 1);
        let line = format!("to {port:2}");
        { client }.write_all(line.as_bytes()).unwrap();
        assert_eq!(driver.read(port, 5, PATIENCE), line.as_bytes());
        driver.write(port, line.as_bytes(), PATIENCE);
        assert_eq!(receive(client, 5), line.as_bytes());
    }
}
