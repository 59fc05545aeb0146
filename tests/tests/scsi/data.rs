// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Data between the driver and the disks.

use vhost_device_tests::front_end::scsi::{
    CHECK_CONDITION, GOOD, OK, OVERRUN, READ_16, Request, WRITE_16, transfer,
};

use crate::{BLOCKS, Device, FIRST, Host, SIZE, for_each_engine, noise};

#[test]
fn what_is_written_is_read_and_on_the_disk() {
    for_each_engine(|engine| {
        let mut host = Host::with_one(&[engine]);
        let mut expected = vec![0; SIZE];
        for (seed, block) in [(1, 0), (2, 100), (3, BLOCKS - 256)] {
            let data = noise(seed, 256 * 512);
            let completion = host.driver.write(FIRST, block, &data);
            assert_eq!((completion.response, completion.status), (OK, GOOD));
            assert_eq!((completion.residual, completion.used), (0, 108));
            let start = block as usize * 512;
            expected[start..start + data.len()].copy_from_slice(&data);
        }
        // SYNCHRONIZE CACHE, and a write with FUA.
        let completion = host
            .driver
            .command(FIRST, &[0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0], 0);
        assert_eq!(completion.status, GOOD);
        let mut cdb = transfer(WRITE_16, 7, 1);
        cdb[1] = 8;
        expected[7 * 512..8 * 512].fill(0x77);
        assert_eq!(host.driver.send(FIRST, &cdb, &[0x77; 512]).status, GOOD);
        let completion = host.driver.read(FIRST, 0, BLOCKS as u32);
        assert!(completion.data == expected, "{engine}");
        assert_eq!(completion.used as usize, 108 + SIZE);
        assert!(host.device.contents(0) == expected, "{engine}");
    });
}

#[test]
fn blocks_are_unmapped_and_zeroed() {
    for_each_engine(|engine| {
        let mut host = Host::new(Device::start(&[(&[7; SIZE], "")], &[engine]));
        host.driver.clear_attentions(FIRST);
        // UNMAP of 8 blocks from block 16, and of 8 from 64.
        let mut list = vec![0, 38, 0, 32, 0, 0, 0, 0];
        for block in [16u64, 64] {
            list.extend(block.to_be_bytes());
            list.extend([0, 0, 0, 8, 0, 0, 0, 0]);
        }
        let unmap = [0x42, 0, 0, 0, 0, 0, 0, 0, list.len() as u8, 0];
        let completion = host.driver.send(FIRST, &unmap, &list);
        assert_eq!(
            (completion.response, completion.status),
            (OK, GOOD),
            "{completion:?}"
        );
        // WRITE SAME(16) of a block of zeroes to 8 blocks from 128.
        let same = transfer(0x93, 128, 8);
        assert_eq!(host.driver.send(FIRST, &same, &[0; 512]).status, GOOD);
        let contents = host.device.contents(0);
        for (block, bytes) in contents.chunks(512).enumerate() {
            let is_zero = [16, 64, 128]
                .iter()
                .any(|first| (*first..first + 8).contains(&block));
            let expected = if is_zero { 0 } else { 7 };
            assert!(
                bytes.iter().all(|byte| *byte == expected),
                "{engine}: block {block}"
            );
        }
    });
}

#[test]
fn commands_in_several_steps_are_carried_out() {
    for_each_engine(|engine| {
        let mut host = Host::new(Device::start(&[(&[7; SIZE], "")], &[engine]));
        host.driver.clear_attentions(FIRST);
        // COMPARE AND WRITE of a block.
        let mut cdb = [0; 16];
        cdb[0] = 0x89;
        cdb[9] = 5;
        cdb[13] = 1;
        let right = [[7; 512], [9; 512]].concat();
        let completion = host.driver.send(FIRST, &cdb, &right);
        assert_eq!(completion.status, GOOD, "{engine}: {completion:?}");
        assert_eq!(host.device.contents(0)[5 * 512..6 * 512], [9; 512]);
        let completion = host.driver.send(FIRST, &cdb, &right);
        assert_eq!(completion.status, CHECK_CONDITION);
        assert_eq!(completion.sense_codes().0, 0xe, "MISCOMPARE");
    });
}

#[test]
fn data_that_does_not_fit_the_buffer_is_not_moved() {
    let contents = noise(1, SIZE);
    let mut host = Host::new(Device::start(&[(&contents, "")], &[]));
    host.driver.clear_attentions(FIRST);
    let read = transfer(READ_16, 0, 2);
    let completion = host.driver.command(FIRST, &read, 512);
    assert_eq!((completion.response, completion.residual), (OVERRUN, 0));
    let write = transfer(WRITE_16, 0, 2);
    let completion = host.driver.send(FIRST, &write, &[0; 512]);
    assert_eq!((completion.response, completion.residual), (OVERRUN, 0));
    let completion = host.driver.command(FIRST, &read, 4096);
    assert_eq!(
        (completion.response, completion.residual),
        (OK, 4096 - 1024)
    );
    assert_eq!(completion.used, 108 + 1024);
    let completion = host.driver.request(&Request {
        cdb: &transfer(WRITE_16, 8, 1),
        data: &[1; 4096],
        ..Request::default()
    });
    assert_eq!((completion.response, completion.residual), (OK, 4096 - 512));
    let mut expected = contents;
    expected[8 * 512..9 * 512].fill(1);
    assert!(host.device.contents(0) == expected);
}

#[test]
fn a_range_outside_the_disk_and_writes_to_a_read_only_disk_fail() {
    let disks: [(&[u8], &str); 2] = [(&[0; SIZE], ",read-only"), (&[0; SIZE], "")];
    let mut host = Host::new(Device::start(&disks, &[]));
    let writable = [1, 1, 0, 0, 0, 0, 0, 0];
    for lun in [FIRST, writable] {
        host.driver.clear_attentions(lun);
        for (block, blocks) in [
            (BLOCKS, 1),
            (BLOCKS - 1, 2),
            (u64::MAX, 1),
            (u64::MAX - 1, 2),
        ] {
            let completion = host.driver.read(lun, block, blocks);
            assert_eq!(completion.sense_codes(), (5, 0x21, 0), "{block}");
        }
    }
    let completion = host.driver.write(FIRST, 0, &[1; 512]);
    assert_eq!(completion.sense_codes().0, 7, "DATA PROTECT");
    assert_eq!(host.driver.write(writable, 0, &[1; 512]).status, GOOD);
    assert_eq!(host.device.contents(0), [0; SIZE]);
}
