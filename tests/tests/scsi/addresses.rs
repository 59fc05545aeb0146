// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which disk a request is for.

use vhost_device_tests::front_end::scsi::{BAD_TARGET, CHECK_CONDITION, GOOD, OK, address};

use crate::{Device, Host, SIZE, noise};

/// REPORT LUNS with room for 4096 bytes.
const REPORT_LUNS: [u8; 12] = [0xa0, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0];
/// INQUIRY with room for 36 bytes.
const INQUIRY: [u8; 6] = [0x12, 0, 0, 0, 36, 0];

fn luns(data: &[u8]) -> Vec<u16> {
    let length = u32::from_be_bytes(data[..4].try_into().unwrap()) as usize;
    let entries = data[8..8 + length].chunks(8);
    let number = |entry: &[u8]| u16::from_be_bytes([entry[0] & 0x3f, entry[1]]);
    entries.map(number).collect()
}

#[test]
fn each_disk_is_at_the_address_that_its_options_give() {
    let contents: Vec<_> = (0..4).map(|seed| noise(seed, SIZE)).collect();
    let disks = [
        (contents[0].as_slice(), ",target=7,lun=300"),
        (&contents[1], ",target=255,lun=16383"),
        (&contents[2], ""),
        (&contents[3], ",target=7"),
    ];
    let mut host = Host::new(Device::start(&disks, &[]));
    // One without a target comes after the others, to the first free one.
    let places = [(7, 300), (255, 16383), (0, 0), (7, 0)];
    for ((target, lun), contents) in places.into_iter().zip(&contents) {
        let lun = address(target, lun);
        host.driver.clear_attentions(lun);
        let completion = host.driver.read(lun, 3, 16);
        assert_eq!((completion.response, completion.status), (OK, GOOD));
        assert_eq!(completion.residual, 0);
        assert!(completion.data == contents[3 * 512..19 * 512], "{target}");
    }
    // The peripheral device format names the same unit.
    let completion = host.driver.read([1, 7, 0, 0, 0, 0, 0, 0], 0, 8);
    assert!(completion.data == contents[3][..4096]);
}

#[test]
fn a_target_without_disks_does_not_exist() {
    let mut host = Host::with_one(&[]);
    for target in 1..=255 {
        let completion = host.driver.command(address(target, 0), &INQUIRY, 36);
        assert_eq!(completion.response, BAD_TARGET, "{target}");
        assert_eq!(completion.residual, 36);
    }
    for first in [0, 2, 0xc1] {
        let lun = [first, 0, 0x40, 0, 0, 0, 0, 0];
        let completion = host.driver.command(lun, &[0; 6], 0);
        assert_eq!(completion.response, BAD_TARGET, "{first}");
    }
}

#[test]
fn a_unit_that_its_target_does_not_have_lists_the_others_and_fails_other_commands() {
    let disks: [(&[u8], &str); 2] = [
        (&[0; SIZE], ",target=3,lun=1"),
        (&[0; SIZE], ",target=3,lun=4"),
    ];
    let mut host = Host::new(Device::start(&disks, &[]));
    let absent = [
        address(3, 0),
        address(3, 5),
        // Formats that no unit has, and the unit REPORT LUNS.
        [1, 3, 0x80, 1, 0, 0, 0, 0],
        [1, 3, 0x40, 1, 0, 0, 0, 1],
        [1, 3, 0xc1, 1, 0, 0, 0, 0],
    ];
    for lun in absent {
        let completion = host.driver.command(lun, &REPORT_LUNS, 4096);
        assert_eq!((completion.response, completion.status), (OK, GOOD));
        let found = luns(&completion.data);
        assert!(found.ends_with(&[1, 4]), "{found:?}");
        let completion = host.driver.command(lun, &INQUIRY, 36);
        assert_eq!((completion.response, completion.status), (OK, GOOD));
        let is_well_known = lun[2] == 0xc1;
        let expected = if is_well_known { 0x1e } else { 0x7f };
        assert_eq!(completion.data[0], expected, "{lun:?}");
        if is_well_known {
            continue;
        }
        let completion = host.driver.command(lun, &[0; 6], 0);
        assert_eq!(completion.status, CHECK_CONDITION);
        assert_eq!(completion.sense_codes(), (5, 0x25, 0));
    }
    assert_eq!(host.device.contents(0), [0; SIZE]);
}

#[test]
fn two_disks_at_one_address_or_of_one_identity_are_refused() {
    use vhost_device_tests::process::{PATIENCE, Program, command, option};

    let directory = tempfile::tempdir().unwrap();
    let images = ["a", "b"].map(|name| directory.path().join(name));
    for image in &images {
        std::fs::write(image, [0; 4096]).unwrap();
    }
    for (keys, word) in [
        (["target=1", "target=1"], "target 1 lun 0"),
        (["serial=S", "serial=S"], "serial"),
    ] {
        let mut command = command("vhost-device-scsi").unwrap();
        command.arg(option("socket-path", directory.path().join("socket")));
        for (image, keys) in images.iter().zip(keys) {
            command.arg(format!("--disk=file={},{keys}", image.display()));
        }
        let mut program = Program::spawn(&mut command).unwrap();
        assert_eq!(program.wait(PATIENCE).unwrap().code(), Some(1));
        let log = program.stderr();
        assert!(log.contains(word), "{log}");
        assert_eq!(log.lines().count(), 1, "{log}");
    }
}
