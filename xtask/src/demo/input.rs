// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The part of the demo with an input device. It needs uinput, and runs in User-Mode Linux if the host does not have uinput.

use std::ffi::{OsStr, OsString};
use std::fs::OpenOptions;
use std::path::Path;
use std::time::Duration;

use vhost_device_tests::evdev::{Device, EV_KEY, EV_LED, LED_CAPSL, devices, report};
use vhost_device_tests::guest::{Guest, GuestError, Machine};
use vhost_device_tests::process;
use vhost_device_tests::uml;

use super::back_end::BackEnd;
use crate::packages::{self, Need, USER_MODE_LINUX};
use crate::progress::Progress;

pub const INPUT: &str = "vhost-device-input";

/// Time limits for the guest, and for User-Mode Linux with the guest in it.
const GUEST_DEADLINE: Duration = Duration::from_secs(120);
const DEADLINE: Duration = Duration::from_secs(150);

/// The codes of the keys to press: h e l l o.
const KEYS: [u16; 5] = [35, 18, 38, 38, 24];

/// The script that the guest runs. The machine has another keyboard, which is not a VIRTIO device.
const SCRIPT: &str = r#"
    for node in $(ls -d /sys/class/input/event* | xargs -n 1 readlink -f | grep virtio); do
        echo "@name $(cat $node/device/name)"
        node=/dev/input/$(basename $node)
    done
    evtest --grab $node > /tmp/events &
    until grep -q Testing /tmp/events; do sleep 0.1; done
    echo "@ready"
    until [ $(grep -c '(KEY_.*), value 0' /tmp/events) -eq 5 ]; do sleep 0.1; done
    echo "@keys $(sed -n 's/.*(KEY_\(.*\)), value 1/\1/p' /tmp/events | tr '\n' ' ')"
    printf '\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x11\0\x01\0\x01\0\0\0' > $node
"#;

/// Returns whether this host has uinput.
pub fn has_uinput() -> bool {
    OpenOptions::new().write(true).open("/dev/uinput").is_ok()
}

/// Returns the programs that this part needs on this host.
pub fn needs() -> &'static [Need] {
    match has_uinput() {
        true => &[("evtest", "evtest")],
        false => USER_MODE_LINUX,
    }
}

/// Prepares this part. Builds User-Mode Linux if the host needs it and the cache does not contain it, and boots it once.
pub fn prepare(progress: &Progress) -> Result<(), String> {
    packages::install(progress, needs())?;
    if has_uinput() {
        return Ok(());
    }
    packages::user_mode_linux(progress)?;
    progress.step("This host does not have uinput; trying User-Mode Linux");
    match uml::run(OsStr::new("/bin/true"), &[], DEADLINE) {
        Ok(0) => Ok(()),
        Ok(status) => Err(format!("User-Mode Linux ended with status {status}")),
        Err(error) => Err(error.to_string()),
    }
}

pub fn run(progress: &Progress) -> Result<(), String> {
    if has_uinput() {
        return here(progress);
    }
    progress.step("Starting User-Mode Linux");
    let this =
        std::env::current_exe().map_err(|error| format!("cannot find this program: {error}"))?;
    let arguments = [
        OsString::from("demo-input"),
        OsString::from(progress.elapsed().as_millis().to_string()),
    ];
    match uml::run(this.as_os_str(), &arguments, DEADLINE) {
        Ok(0) => Ok(()),
        Ok(status) => Err(format!(
            "the demo in User-Mode Linux ended with status {status}"
        )),
        Err(error) => Err(error.to_string()),
    }
}

/// Shows a keyboard in a guest. The host must have uinput.
pub fn here(progress: &Progress) -> Result<(), String> {
    let keyboard = Device::create(&devices::KEYBOARD)
        .map_err(|error| format!("cannot create a keyboard: {error}"))?;
    let options = [process::option("evdev-path", keyboard.node())];
    let back_end = BackEnd::start(progress, INPUT, &options)?;
    progress.step("Booting a guest with this keyboard");
    let guest = Machine::new("demo-input", SCRIPT)
        .module("virtio_input")
        .module("evdev")
        .program("evtest")
        .vhost_user("vhost-user-input-pci", &back_end.socket)
        .deadline(GUEST_DEADLINE)
        .start();
    guest
        .and_then(|mut guest| show(progress, &mut guest, &keyboard))
        .map_err(|error| format!("{error}\nlog of {INPUT}:\n{}", back_end.program.stderr()))
}

fn show(progress: &Progress, guest: &mut Guest, keyboard: &Device) -> Result<(), GuestError> {
    let name = guest.wait("name")?;
    progress.step(&format!("  guest: keyboard: {name}"));
    guest.wait("ready")?;
    for key in KEYS {
        for value in [1, 0] {
            let pressed = report(&[(EV_KEY, key, value)]);
            keyboard
                .report(&pressed)
                .map_err(|error| GuestError::System("press a key".into(), error))?;
        }
    }
    let keys = guest.wait("keys")?;
    progress.step(&format!("  guest: keys: {keys}"));
    guest.finish()?;
    let lit = |received: &[vhost_device_tests::evdev::Event]| {
        let mut events = received.iter();
        events.any(|event| (event.kind, event.code, event.value) == (EV_LED, LED_CAPSL, 1))
    };
    let received = keyboard
        .received()
        .map_err(|error| GuestError::System("read the state of the lights".into(), error))?;
    let state = if lit(&received) { "on" } else { "off" };
    let node = Path::new(keyboard.node()).display();
    progress.step(&format!(
        "On the host again, the caps lock light of {node} is {state}."
    ));
    Ok(())
}
