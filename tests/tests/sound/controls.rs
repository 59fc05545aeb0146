// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Control elements, jacks, and the events about them.

use serde_json::json;
use vhost_device_tests::front_end::Options;

use crate::{
    BAD_MSG, CTL_ENUM_ITEMS, CTL_INFO, CTL_NOTIFY, CTL_READ, CTL_TLV_COMMAND, CTL_TLV_READ,
    CTL_TLV_WRITE, CTL_WRITE, Device, Driver, EVENT, JACK_CONNECTED, JACK_DISCONNECTED, JACK_INFO,
    NOT_SUPP, OK, Params, QUIET, RELEASE, RX, START, STOP, TX, word, words,
};

/// Data of CTL_NOTIFY for a changed value.
fn changed(element: u32) -> u32 {
    1 << 16 | element
}

fn read(driver: &mut Driver, element: u32) -> u32 {
    let (status, bytes) = driver.request(&words(&[CTL_READ, element]), 516);
    assert_eq!((status, bytes.len()), (OK, 512));
    assert!(bytes[4..].iter().all(|byte| *byte == 0));
    word(&bytes, 0)
}

/// Writes an element as Linux does: all of the value structure is sent.
fn write(driver: &mut Driver, element: u32, value: u32) -> u32 {
    let mut request = words(&[CTL_WRITE, element, value]);
    request.resize(8 + 512, 0);
    driver.status(&request)
}

#[test]
fn elements_are_described_for_alsa() {
    let device = Device::start(&["--controls"]);
    let mut driver = device.connect();
    assert_eq!(driver.front_end.offered() & 1, 1);
    let config = driver.front_end.config(0, 16).unwrap();
    assert_eq!(config, words(&[2, 2, 4, 3]));
    // As the specification has the structure, and as Linux has it.
    for (size, range) in [(92, 68), (96, 72)] {
        let (status, bytes) = driver.request(&words(&[CTL_INFO, 0, 3, size]), 4 + 3 * size);
        assert_eq!(status, OK);
        let infos: Vec<_> = bytes.chunks(size as usize).collect();
        for (info, (name, role, kind, access, max)) in infos.into_iter().zip([
            ("Master Playback Volume", 1 << 1, 1, 0b1_0011, 120),
            ("Master Playback Switch", 2 << 1, 0, 0b0_0011, 1),
            ("Capture Volume", 3 << 1 | 1, 1, 0b1_0011, 120),
        ]) {
            let fields: Vec<_> = (0..6).map(|index| word(info, index)).collect();
            assert_eq!(fields, [0, role, kind, access, 1, 0], "{name}");
            let text = info[24..68].split(|byte| *byte == 0).next().unwrap();
            assert_eq!(text, name.as_bytes());
            let numbers: Vec<_> = (0..3).map(|index| word(&info[range..], index)).collect();
            assert_eq!(numbers, [0, max, 1], "{name}");
        }
    }
}

#[test]
fn values_can_be_read_and_written() {
    let device = Device::start(&["--controls"]);
    let mut driver = device.connect();
    driver.listen(8);
    for (element, max) in [(0, 120), (1, 1), (2, 120)] {
        assert_eq!(read(&mut driver, element), max);
        assert_eq!(write(&mut driver, element, max / 2), OK);
        assert_eq!(read(&mut driver, element), max / 2);
        // Linux tells its programs only of what the device tells it.
        assert_eq!(driver.event(), (CTL_NOTIFY, changed(element)));
        assert_eq!(write(&mut driver, element, max / 2), OK);
        for value in [max + 1, u32::MAX, 1 << 31] {
            assert_eq!(write(&mut driver, element, value), BAD_MSG);
        }
        assert_eq!(read(&mut driver, element), max / 2);
    }
    std::thread::sleep(QUIET);
    assert_eq!(driver.take_event(), None, "nothing else has changed");
    for element in [3, 0xffff, u32::MAX] {
        for code in [CTL_READ, CTL_WRITE, CTL_TLV_READ, CTL_ENUM_ITEMS] {
            let (status, _) = driver.request(&words(&[code, element, 0]), 516);
            assert_eq!(status, BAD_MSG, "{code:#x} {element}");
        }
    }
}

#[test]
fn a_value_needs_room_only_for_itself() {
    let device = Device::start(&["--controls"]);
    let mut driver = device.connect();
    for room in [8, 9, 100, 600] {
        let (status, bytes) = driver.request(&words(&[CTL_READ, 0]), room);
        assert_eq!((status, word(&bytes, 0)), (OK, 120));
        assert_eq!(bytes.len() as u32, (room - 4).min(512));
    }
    for room in 4..8 {
        let (status, _) = driver.request(&words(&[CTL_READ, 0]), room);
        assert_eq!(status, BAD_MSG);
    }
    for length in 8..12 {
        assert_eq!(driver.status(&words(&[CTL_WRITE, 0, 1])[..length]), BAD_MSG);
    }
}

#[test]
fn volumes_have_a_scale_in_decibels() {
    let device = Device::start(&["--controls"]);
    let mut driver = device.connect();
    let scale = words(&[1, 8, (-6000i32) as u32, 50 | 1 << 16]);
    for element in [0, 2] {
        let (status, bytes) = driver.request(&words(&[CTL_TLV_READ, element]), 4 + 4096);
        assert_eq!((status, bytes), (OK, scale.clone()));
        // As much as there is room for.
        let (status, bytes) = driver.request(&words(&[CTL_TLV_READ, element]), 4 + 10);
        assert_eq!((status, &bytes[..]), (OK, &scale[..10]));
    }
    let (status, _) = driver.request(&words(&[CTL_TLV_READ, 1]), 4 + 4096);
    assert_eq!(status, NOT_SUPP, "a switch");
    for code in [CTL_TLV_WRITE, CTL_TLV_COMMAND] {
        let mut request = words(&[code, 0, 1, 8, 0, 0]);
        assert_eq!(driver.status(&request), NOT_SUPP);
        request.resize(70_000, 0);
        assert_eq!(driver.status(&request), NOT_SUPP);
    }
    assert_eq!(driver.status(&words(&[CTL_ENUM_ITEMS, 0])), NOT_SUPP);
}

#[test]
fn a_driver_that_does_not_know_elements_has_none() {
    let device = Device::start(&["--controls"]);
    let options = Options::default();
    let options = Options {
        features: options.features & !1,
        ..options
    };
    let mut driver = device.connect_with(&options);
    for code in CTL_INFO..=CTL_TLV_COMMAND {
        assert_eq!(driver.status(&words(&[code, 0, 1, 96])), NOT_SUPP);
    }
    // The host can still change them.
    driver.listen(1);
    let arguments = json!({"name": "Master Playback Volume", "value": 60});
    device.control("set-control", arguments).unwrap();
    driver.assert_quiet(EVENT);
}

/// Plays or records a constant with these volumes. Returns what arrives.
fn through(device: &Device, values: [(u32, u32); 2], stream: u32) -> i16 {
    let mut driver = device.connect();
    for (element, value) in values {
        assert_eq!(write(&mut driver, element, value), OK);
    }
    driver.prepare(stream, &Params::USUAL);
    let sample = 10_000i16.to_le_bytes();
    let sample = match stream {
        0 => {
            driver.play(0, &sample.repeat(960), 0);
            driver.commands(&[START], 0);
            driver.wait(TX);
            driver.commands(&[STOP, RELEASE], 0);
            let file = device.read("played");
            file[file.len() - 2..].to_vec()
        }
        _ => {
            driver.record(1, 1920, 0);
            driver.commands(&[START], 1);
            driver.wait(RX).data[..2].to_vec()
        }
    };
    i16::from_le_bytes(sample.try_into().unwrap())
}

#[test]
fn volumes_change_the_sound() {
    let directory = tempfile::tempdir().unwrap();
    let constant = 10_000i16.to_le_bytes().repeat(1 << 16);
    std::fs::write(directory.path().join("sound"), constant).unwrap();
    let device = Device::start_in(
        directory,
        &[
            "--backend=file",
            "--playback-file=DIR/played",
            "--capture-file=DIR/sound",
            "--controls",
        ],
    );
    for (volume, switch, heard) in [
        (120, 1, 10_000),
        (80, 1, 1000),
        (119, 1, 9441),
        (0, 1, 0),
        (1, 1, 11),
        (120, 0, 0),
    ] {
        let values = [(0, volume), (1, switch)];
        assert_eq!(through(&device, values, 0), heard, "{volume} {switch}");
    }
    for (volume, heard) in [(120, 10_000), (80, 1000), (0, 0)] {
        assert_eq!(
            through(&device, [(2, volume), (0, 3)], 1),
            heard,
            "{volume}"
        );
    }
}

#[test]
fn the_host_can_change_volumes_and_jacks() {
    let device = Device::start(&["--controls"]);
    let mut driver = device.connect();
    driver.listen(8);
    let set = |name: &str, value: u32| {
        device.control("set-control", json!({"name": name, "value": value}))
    };
    set("Master Playback Volume", 60).unwrap();
    assert_eq!(driver.event(), (CTL_NOTIFY, changed(0)));
    assert_eq!(read(&mut driver, 0), 60);
    set("Master Playback Volume", 60).unwrap();
    let jack = |id: u32, connected: bool| {
        device.control("set-jack", json!({"id": id, "connected": connected}))
    };
    jack(1, false).unwrap();
    assert_eq!(driver.event(), (JACK_DISCONNECTED, 1));
    let (_, info) = driver.request(&words(&[JACK_INFO, 1, 1, 24]), 28);
    assert_eq!(info[16], 0);
    jack(1, true).unwrap();
    assert_eq!(driver.event(), (JACK_CONNECTED, 1));
    std::thread::sleep(QUIET);
    assert_eq!(driver.take_event(), None);
    for (answer, word) in [
        (set("Bass", 1), "Master Playback Switch"),
        (set("Capture Volume", 121), "cannot have the value 121"),
        (jack(2, true), "no jack 2"),
    ] {
        let error = answer.unwrap_err();
        assert!(error.contains(word), "{error}");
    }
    let plain = Device::start(&[]);
    let arguments = json!({"name": "Master Playback Volume", "value": 1});
    let error = plain.control("set-control", arguments).unwrap_err();
    assert!(error.contains("--controls"), "{error}");
}

#[test]
fn events_wait_for_buffers_and_replace_each_other() {
    let device = Device::start(&[]);
    let mut driver = device.connect();
    let jack = |connected: bool| {
        let arguments = json!({"id": 0, "connected": connected});
        device.control("set-jack", arguments).unwrap();
    };
    for round in 0..100 {
        jack(round % 2 == 1);
    }
    jack(false);
    driver.listen(4);
    assert_eq!(driver.event(), (JACK_DISCONNECTED, 0));
    std::thread::sleep(QUIET);
    assert_eq!(driver.take_event(), None);
    // A jack is the host's, and is not reset with the driver.
    drop(driver);
    let mut driver = device.connect();
    let (_, info) = driver.request(&words(&[JACK_INFO, 0, 1, 24]), 28);
    assert_eq!(info[16], 0);
}
