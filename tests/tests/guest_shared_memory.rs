// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Shared memory in QEMU: a file that a device maps appears in a BAR of the guest's, and disappears when it is unmapped.

#![cfg(test)]

use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::json;
use vhost_device_tests::guest::qemu::NewQemu;
use vhost_device_tests::guest::{Guest, Machine};
use vhost_device_tests::process::{self, PATIENCE, Program};
use vhost_device_tests::shared_memory::{PROGRAM, pattern};

/// The driver for random numbers makes a request, which the device answers when the first page is mapped. QEMU has region 0 at the
/// beginning of BAR 4.
const SCRIPT: &str = r#"
    rng=/sys/class/misc/hw_random/rng_current
    until grep -q virtio_rng $rng; do sleep 0.1; done
    dd if=/dev/hwrng of=/dev/null bs=1 count=1
    set -- $(sed -n 5p /sys/bus/virtio/devices/virtio0/../resource)
    word() { printf %d $(devmem $(($1)) 32); }
    echo "@first $(word $1)"
    echo "@last $(word $1+4092)"
    echo virtio0 > /sys/bus/virtio/drivers/virtio_rng/unbind
    echo "@reset $(word $1)"
    echo virtio0 > /sys/bus/virtio/drivers/virtio_rng/bind
    until grep -q virtio_rng $rng; do sleep 0.1; done
    dd if=/dev/hwrng of=/dev/null bs=1 count=1
    echo "@again $(word $1)"
    while [ $(word $1) = PATTERN ]; do sleep 0.1; done
    echo "@unmapped $(word $1)"
    while :; do sleep 1; done
"#;

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn a_mapped_file_appears_in_the_guest_until_it_is_unmapped() {
    let Some(qemu) = NewQemu::prepare_or_skip() else {
        return;
    };
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("socket");
    let mut command = process::command(PROGRAM).unwrap();
    command.arg(process::option("socket-path", &socket));
    let mut program = Program::spawn(&mut command).unwrap();
    program.wait_for_listener(&socket).unwrap();

    let script = SCRIPT.replace("PATTERN", &pattern(0).to_string());
    let device = "vhost-user-test-device-pci,virtio-id=4,num_vqs=1,config_size=4";
    let machine = Machine::new("shared_memory", script).qemu(qemu).reboots();
    let mut guest = machine
        .module("virtio-rng")
        .vhost_user(device, &socket)
        .start()
        .unwrap();
    let assert_mapped = |guest: &mut Guest| {
        for (name, offset) in [("first", 0), ("last", 4092)] {
            assert_eq!(guest.wait(name).unwrap(), pattern(offset).to_string());
        }
    };
    assert_mapped(&mut guest);
    // A reset unmaps all, and the device maps the page again for the next driver.
    assert_ne!(guest.wait("reset").unwrap(), pattern(0).to_string());
    assert_eq!(guest.wait("again").unwrap(), pattern(0).to_string());

    program.signal(Signal::HUP).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while !program.stderr().contains("reply 0: Ok(())") {
        assert!(Instant::now() < deadline, "{}", program.stderr());
        thread::sleep(Duration::from_millis(10));
    }
    guest.wait("unmapped").unwrap();

    // QEMU 11.1.3 crashes if something is mapped when the whole machine is reset.
    let mut qmp = guest.qmp().unwrap();
    qmp.execute("system_reset", json!({})).unwrap();
    assert_mapped(&mut guest);
    assert_eq!(guest.qemu_stderr(), "");
}
