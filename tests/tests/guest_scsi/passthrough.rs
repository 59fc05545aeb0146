// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! SCSI devices of the host. The host is User-Mode Linux here, whose own SCSI host is another process of the program.

use std::env;
use std::fs;

use vhost_device_tests::front_end::scsi::{
    ABORT_TASK_SET, BAD_TARGET, CHECK_CONDITION, CLEAR_ACA, CONTROL_QUEUE, ControlDriver, GOOD,
    INCORRECT_LUN, OK, QUERY_TASK, REJECTED, REQUEST_QUEUE, ScsiDriver, UNIT_RESET, WRITE_16,
    address, transfer,
};
use vhost_device_tests::front_end::{FrontEnd, Options};
use vhost_device_tests::process::{BIN_DIR, Program, binary, command, option};
use vhost_device_tests::uml;
use vhost_device_tests::uml::front_end::{self, Device};

use crate::{PATIENCE, SCSI, noise};

/// Bytes of the disk, and its blocks.
const SIZE: usize = 1 << 20;
const BLOCKS: u64 = SIZE as u64 / 512;
/// Says where the test works in the guest.
const INSIDE: &str = "VHOST_DEVICE_TESTS_INSIDE";

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn a_guest_uses_a_device_of_the_host() {
    uml::kernel::prepare().unwrap();
    let work = uml::work().unwrap();
    let socket = work.path().join("socket");
    let contents = noise(1, SIZE);
    fs::write(work.path().join("outer"), &contents).unwrap();
    let mut command = command("vhost-device-scsi").unwrap();
    let image = work.path().join("outer");
    command
        .arg(option("socket-path", &socket))
        .arg(format!("--disk=file={},serial=OUTER", image.display()));
    let _program = Program::serve(&mut command, &socket).unwrap();
    let device = Device {
        socket: &socket,
        id: SCSI,
    };
    // The guest sees few directories of the host.
    fs::copy(env::current_exe().unwrap(), work.path().join("suite")).unwrap();
    let program = "vhost-device-scsi";
    fs::copy(binary(program).unwrap(), work.path().join(program)).unwrap();
    let script = format!(
        "export {INSIDE}=1 {BIN_DIR}=$work; until [ -e /dev/sg0 ] && [ -e /dev/sda ]; do usleep 10000; done
        $work/suite --ignored --exact passthrough::inside --nocapture"
    );
    let status = front_end::run(&[device], script, work.path(), PATIENCE);
    assert_eq!(status.unwrap(), 0);
    let mut expected = contents;
    expected[512 * 7..512 * 8].fill(0x77);
    assert!(fs::read(image).unwrap() == expected);
}

/// The part of the test that runs in the guest.
#[test]
#[ignore = "does nothing where no other test runs it"]
fn inside() {
    if env::var_os(INSIDE).is_none() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (socket, image) = (
        directory.path().join("socket"),
        directory.path().join("image"),
    );
    fs::write(&image, [3; SIZE]).unwrap();
    let mut command = command("vhost-device-scsi").unwrap();
    command
        .arg(option("socket-path", &socket))
        .arg(format!("--disk=file={}", image.display()))
        .arg("--passthrough=/dev/sg0,target=4")
        .arg("--passthrough=/dev/sda,target=4,lun=2,read-only");
    let _program = Program::serve(&mut command, &socket).unwrap();
    let front_end = FrontEnd::connect(&socket, &Options::default()).unwrap();
    let memory = front_end.memory();
    let queue = |index| front_end.queue(index, 256).unwrap();
    let mut control = ControlDriver::new(memory, queue(CONTROL_QUEUE));
    let mut driver = ScsiDriver::new(memory, queue(REQUEST_QUEUE), 1 << 20);
    let (whole, read_only) = (address(4, 0), address(4, 2));
    for lun in [whole, read_only] {
        driver.clear_attentions(lun);
        // The serial number of the device.
        let page = driver.command(lun, &[0x12, 1, 0x80, 0, 64, 0], 64);
        assert_eq!((page.response, page.status), (OK, GOOD));
        assert_eq!(page.data[4..9], *b"OUTER");
        assert!(page.residual > 0, "{page:?}");
        let read = driver.read(lun, 3, 16);
        assert!(read.data == noise(1, SIZE)[3 * 512..19 * 512]);
        assert_eq!((read.used, read.residual), (108 + 16 * 512, 0));
        // Its own errors come with its own sense data.
        let completion = driver.read(lun, BLOCKS, 1);
        assert_eq!(
            (completion.response, completion.status),
            (OK, CHECK_CONDITION)
        );
        assert_eq!(completion.sense_codes(), (5, 0x21, 0));
        // WRITE BUFFER could change the firmware.
        let completion = driver.command(lun, &[0x3b, 5, 0, 0, 0, 0, 0, 0, 0, 0], 0);
        assert_eq!(completion.sense_codes(), (5, 0x20, 0));
    }
    let completion = driver.write(whole, 7, &[0x77; 512]);
    assert_eq!((completion.response, completion.status), (OK, GOOD));
    assert_eq!(driver.write(read_only, 7, &[1; 512]).sense_codes().1, 0x20);
    let sync = [0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(driver.command(whole, &sync, 0).status, GOOD);
    // More than the command takes.
    let completion = driver.send(whole, &transfer(WRITE_16, 7, 1), &[0x77; 4096]);
    assert_eq!((completion.response, completion.residual), (OK, 4096 - 512));

    // It is one of the logical units of its target, beside the disk of another one.
    let list = driver.command(address(4, 1), &[0xa0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0], 256);
    assert_eq!(list.data[..4], [0, 0, 0, 16]);
    assert_eq!(
        driver.command(address(5, 0), &[0; 6], 0).response,
        BAD_TARGET
    );
    for (function, lun, expected) in [
        (QUERY_TASK, whole, OK),
        (ABORT_TASK_SET, whole, OK),
        (UNIT_RESET, whole, OK),
        (QUERY_TASK, address(4, 1), INCORRECT_LUN),
        (CLEAR_ACA, whole, REJECTED),
    ] {
        assert_eq!(control.function(function, lun, 0), expected);
    }
    // Such a device cannot be transferred.
    for queue in [CONTROL_QUEUE, REQUEST_QUEUE] {
        front_end.stop(queue).unwrap();
    }
    assert!(front_end.save_state().is_err());
}
