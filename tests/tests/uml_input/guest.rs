// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A Linux guest in QEMU, which both run where the devices are.

use std::time::Duration;

use vhost_device_tests::evdev::{
    ABS_PRESSURE, ABS_TILT_X, ABS_X, ABS_Y, BTN_TOOL_PEN, BTN_TOUCH, Device, EV_ABS, EV_KEY,
    EV_LED, EV_SYN, Event, KEY_A, LED_CAPSL, devices, report,
};
use vhost_device_tests::guest::Machine;

use super::{Input, wait_until};

/// In the guest: finds devices by name, prints their properties, records events, and switches a light on.
const SCRIPT: &str = r#"
    find_node() {
        for node in $(ls -d /sys/class/input/event* | xargs -n 1 readlink -f | grep $2); do
            if [ "$(cat $node/device/name)" = "$1" ]; then basename $node; fi
        done
    }
    tell() {
        cd /sys/class/input/$2/device
        echo "@$1-ids $(cat id/bustype id/vendor id/product id/version | tr '\n' ' ')"
        echo "@$1-properties $(cat properties)"
        for kind in ev key rel abs msc led snd ff sw; do
            echo "@$1-$kind $(cat capabilities/$kind)"
        done
        cd /
    }
    # Machines have a keyboard of that name themselves.
    keyboard=$(find_node "AT Translated Set 2 keyboard" virtio)
    tablet=$(find_node "Wacom Intuos Pro M Pen" virtio)
    tell keyboard $keyboard
    tell tablet $tablet
    grep -q 'Name="Wacom Intuos Pro M Pen"' /proc/bus/input/devices

    evtest --grab /dev/input/$keyboard > /tmp/keyboard &
    evtest --grab /dev/input/$tablet > /tmp/tablet &
    for log in keyboard tablet; do
        until grep -q Testing /tmp/$log; do sleep 0.1; done
    done
    echo "@ready"
    until grep -q 'KEY_A), value 0' /tmp/keyboard && grep -q 'BTN_TOUCH), value 0' /tmp/tablet; do sleep 0.1; done
    kill %1 %2
    for log in keyboard tablet; do
        sed -n '/Testing/,$d; s/^ *//; p' /tmp/$log | tr '\n' ';' | tr -s ' ' | sed "s/^/@$log-is /"; echo
        sed -n '/Testing/,$ { s/.*, type/type/p }' /tmp/$log | sed "s/^/@$log-event /"
    done
    # An event of the kernel: a time, then type, code and value.
    printf '\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x11\0\x01\0\x01\0\0\0' > /dev/input/$keyboard
"#;

#[test]
#[ignore = "needs uinput"]
fn a_guest_has_the_devices_their_events_and_their_lights() {
    let keyboard = Device::create(&devices::KEYBOARD).unwrap();
    let tablet = Device::create(&devices::TABLET).unwrap();
    let back_ends = [Input::start(&keyboard), Input::start(&tablet)];
    let mut guest = Machine::new("uml_input", SCRIPT)
        .module("virtio_input")
        .module("evdev")
        .program("evtest")
        .vhost_user("vhost-user-input-pci", &back_ends[0].socket)
        .vhost_user("vhost-user-input-pci", &back_ends[1].socket)
        .deadline(Duration::from_secs(120))
        .start()
        .unwrap();
    guest.wait("ready").unwrap();
    for value in [1, 0] {
        keyboard.report(&report(&[(EV_KEY, KEY_A, value)])).unwrap();
    }
    let strokes: [&[(u16, u16, i32)]; 2] = [
        &[
            (EV_KEY, BTN_TOOL_PEN, 1),
            (EV_KEY, BTN_TOUCH, 1),
            (EV_ABS, ABS_X, 20000),
            (EV_ABS, ABS_Y, 10000),
            (EV_ABS, ABS_PRESSURE, 4096),
            (EV_ABS, ABS_TILT_X, -12),
        ],
        &[(EV_KEY, BTN_TOUCH, 0), (EV_ABS, ABS_PRESSURE, 0)],
    ];
    for stroke in strokes {
        tablet.report(&report(stroke)).unwrap();
    }
    let output = guest.finish().unwrap();
    assert_eq!(guest.qemu_stderr(), "");
    // QEMU offers packed rings to guests whenever a back-end supports them.
    for back_end in &back_ends {
        assert_eq!(back_end.logged(" started: packed ring"), 2);
    }

    for (name, device) in [("keyboard", &keyboard), ("tablet", &tablet)] {
        let directory = std::path::Path::new("/sys/class/input")
            .join(device.node().file_name().unwrap())
            .join("device");
        let read = |file: &str| std::fs::read_to_string(directory.join(file)).unwrap();
        let ids = ["bustype", "vendor", "product", "version"]
            .map(|id| read(&format!("id/{id}")))
            .concat();
        let value = |what: &str| output.value(&format!("{name}-{what}")).unwrap().trim();
        assert_eq!(value("ids"), ids.trim().replace('\n', " "));
        assert_eq!(value("properties"), read("properties").trim());
        for kind in ["ev", "key", "rel", "abs", "msc", "led", "snd", "ff", "sw"] {
            let capabilities = read(&format!("capabilities/{kind}"));
            assert_eq!(value(kind), capabilities.trim(), "{name}: {kind}");
        }
    }

    let axes = output.value("tablet-is").unwrap();
    for axis in [
        "(ABS_X);Value 0;Min 0;Max 44800;Fuzz 4;Resolution 200;",
        "(ABS_PRESSURE);Value 0;Min 0;Max 8191;",
        "(ABS_TILT_X);Value 0;Min -64;Max 63;Fuzz 1;Resolution 57;",
    ] {
        assert!(axes.contains(axis), "no {axis} in {axes}");
    }

    let events = |name: &str| -> Vec<String> {
        let events = output.values(name).map(str::to_owned);
        events.filter(|event| event.starts_with("type")).collect()
    };
    let keys = [
        "type 1 (EV_KEY), code 30 (KEY_A), value 1",
        "type 1 (EV_KEY), code 30 (KEY_A), value 0",
    ];
    assert_eq!(events("keyboard-event"), keys);
    let strokes = [
        "type 1 (EV_KEY), code 320 (BTN_TOOL_PEN), value 1",
        "type 1 (EV_KEY), code 330 (BTN_TOUCH), value 1",
        "type 3 (EV_ABS), code 0 (ABS_X), value 20000",
        "type 3 (EV_ABS), code 1 (ABS_Y), value 10000",
        "type 3 (EV_ABS), code 24 (ABS_PRESSURE), value 4096",
        "type 3 (EV_ABS), code 26 (ABS_TILT_X), value -12",
        "type 1 (EV_KEY), code 330 (BTN_TOUCH), value 0",
        "type 3 (EV_ABS), code 24 (ABS_PRESSURE), value 0",
    ];
    assert_eq!(events("tablet-event"), strokes);

    let mut received = Vec::new();
    wait_until("the light goes on", || {
        received.extend(keyboard.received().unwrap());
        received.retain(|event: &Event| event.kind != EV_SYN);
        received.contains(&Event::new(EV_LED, LED_CAPSL, 1))
    });
}
