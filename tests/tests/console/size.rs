// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The size of a console, the config space, and the emergency write.

use vhost_device_tests::front_end::console::event;

use super::*;

const CONFIG_CHANGE: u32 = 2;

#[test]
fn the_config_space_has_the_size_and_the_number_of_ports() {
    let device = Device::start(&["unix=DIR/a", "unix=DIR/b"], &[]);
    let driver = device.connect();
    assert_eq!(
        driver.front_end.config(0, 12).unwrap(),
        [0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]
    );
    device
        .command("resize", json!({"columns": 300, "rows": 25}))
        .unwrap();
    assert_eq!(
        driver.front_end.config(0, 12).unwrap(),
        [44, 1, 25, 0, 2, 0, 0, 0, 0, 0, 0, 0]
    );
    // User-Mode Linux reads pieces.
    assert_eq!(driver.front_end.config(2, 4).unwrap(), [25, 0, 2, 0]);
    assert_eq!(driver.front_end.config(8, 64).unwrap(), [0; 64]);
}

#[test]
fn a_resize_is_announced_in_both_ways() {
    let device = Device::start(&["unix=DIR/a", "unix=DIR/b", "name=c,unix=DIR/c"], &[]);
    let mut driver = device.connect();
    let channel = driver.front_end.back_end_channel().unwrap();
    device
        .command("resize", json!({"columns": 100, "rows": 40}))
        .unwrap();
    assert_eq!(channel.receive().unwrap().request, CONFIG_CHANGE);
    let resize = driver.expect(event::RESIZE, PATIENCE);
    assert_eq!((resize.port, resize.rest), (0, vec![100, 0, 40, 0]));
    device
        .command("resize", json!({"columns": 80, "rows": 24, "port": 1}))
        .unwrap();
    let resize = driver.expect(event::RESIZE, PATIENCE);
    assert_eq!((resize.port, resize.rest), (1, vec![80, 0, 24, 0]));
    // The same size again is no change.
    device
        .command("resize", json!({"columns": 80, "rows": 24, "port": 1}))
        .unwrap();
    assert_eq!(driver.message(QUIET), None);
    for (arguments, word) in [
        (
            json!({"columns": 0, "rows": 24}),
            "columns must be 1 to 65535",
        ),
        (
            json!({"columns": 80, "rows": 65536}),
            "rows must be 1 to 65535",
        ),
        (json!({"columns": 80, "rows": 24, "port": 2}), "no console"),
        (
            json!({"columns": 80, "rows": 24, "port": 3}),
            "does not exist",
        ),
    ] {
        let error = device.command("resize", arguments).unwrap_err();
        assert!(error.contains(word), "{error}");
    }
}

#[test]
fn a_size_that_is_known_is_announced_at_the_start() {
    let device = Device::start(&["unix=DIR/a"], &["--swap-resize"]);
    device
        .command("resize", json!({"columns": 100, "rows": 40}))
        .unwrap();
    let mut driver = device.connect_with(&Options::default());
    let messages = driver.start(PATIENCE);
    let resize = messages
        .iter()
        .find(|message| message.event == event::RESIZE);
    assert_eq!(resize.unwrap().rest, [40, 0, 100, 0], "swapped");
}

#[test]
fn a_driver_without_the_feature_hears_of_no_size() {
    let device = Device::start(&["unix=DIR/a"], &[]);
    let mut options = Options::default();
    options.features &= !1;
    let mut driver = device.connect_with(&options);
    driver.start(PATIENCE);
    device
        .command("resize", json!({"columns": 100, "rows": 40}))
        .unwrap();
    assert_eq!(driver.message(QUIET), None);
}

#[test]
fn an_emergency_write_appears_before_the_driver_starts() {
    let device = Device::start(&["unix=DIR/a"], &[]);
    let client = device.client("a");
    let front_end = FrontEnd::connect(&device.path("socket"), &Options::default()).unwrap();
    for byte in *b"panic" {
        front_end.set_config(8, &[byte, 0, 0, 0]).unwrap();
    }
    drop(front_end);
    // Clients are accepted while queues run.
    let _driver = device.connect();
    assert_eq!(receive(&client, 5), b"panic");
}

#[test]
fn only_emerg_wr_can_be_written_however_the_front_end_writes_it() {
    let device = Device::start(&["unix=DIR/a"], &[]);
    let client = device.client("a");
    let driver = device.connect();
    device.wait_for_clients(0, 1);
    // QEMU's generic device writes all of the config space.
    let mut whole = driver.front_end.config(0, 12).unwrap();
    driver.front_end.set_config(0, &whole).unwrap();
    whole[8] = b'q';
    driver.front_end.set_config(0, &whole).unwrap();
    driver.front_end.set_config(8, b"w").unwrap();
    driver.front_end.set_config(4, b"....e").unwrap();
    driver.front_end.set_config(8, b"r\xff\xff\xff").unwrap();
    for (offset, size) in [
        (0, 1),
        (0, 8),
        (1, 3),
        (4, 4),
        (7, 1),
        (9, 1),
        (9, 3),
        (11, 1),
        (12, 1),
        (8, 5),
        (0, 13),
        (200, 1),
    ] {
        let written = driver.front_end.set_config(offset, &vec![b'x'; size]);
        assert!(written.is_err(), "{size} bytes at {offset}");
        assert_alive(&driver);
    }
    assert_eq!(receive(&client, 4), b"qwer");
    assert_quiet(&client);
    assert_eq!(
        driver.front_end.config(0, 12).unwrap()[..8],
        [0, 0, 0, 0, 1, 0, 0, 0]
    );
}
