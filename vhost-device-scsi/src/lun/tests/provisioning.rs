// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! UNMAP, WRITE SAME and GET LBA STATUS.

use super::*;

/// A parameter list of UNMAP.
fn list(descriptors: &[(u64, u32)]) -> Vec<u8> {
    let length = descriptors.len() as u16 * 16;
    let mut list = (length + 6).to_be_bytes().to_vec();
    list.extend(length.to_be_bytes());
    list.extend([0; 4]);
    for (first, count) in descriptors {
        list.extend(first.to_be_bytes());
        list.extend(count.to_be_bytes());
        list.extend([0; 4]);
    }
    list
}

fn unmap(length: usize) -> [u8; 10] {
    cdb_10(0x42, 0, 0, length as u16)
}

/// The descriptors of GET LBA STATUS from a block on: first, count, status.
fn status(rig: &Rig, first: u64, allocation: u32) -> Vec<(u64, u32, u8)> {
    let mut cdb = cdb_16(0x9e, first, allocation);
    cdb[1] = 0x12;
    let data = rig.ok(FIRST, &cdb, &[]);
    let length = u32::from_be_bytes(data[..4].try_into().unwrap()) as usize + 4;
    assert_eq!(data.len(), length.min(allocation as usize));
    data[8..]
        .chunks_exact(16)
        .map(|one| {
            let first = u64::from_be_bytes(one[..8].try_into().unwrap());
            let count = u32::from_be_bytes(one[8..12].try_into().unwrap());
            (first, count, one[12])
        })
        .collect()
}

#[test]
fn unmapped_blocks_are_read_as_zeroes_and_reported() {
    let rig = Rig::new();
    rig.write(0, &pattern(64, 1));
    assert_eq!(status(&rig, 0, 24), [(0, 64, 0)]);
    let ranges = list(&[(8, 16), (40, 0), (48, 8)]);
    rig.ok(FIRST, &unmap(ranges.len()), &ranges);
    assert_eq!(rig.read(8, 16), [0; 16 * BLOCK]);
    assert_eq!(rig.read(0, 8), pattern(64, 1)[..8 * BLOCK]);
    assert_eq!(
        status(&rig, 4, 1000),
        [
            (4, 4, 0),
            (8, 16, 1),
            (24, 24, 0),
            (48, 8, 1),
            (56, 8, 0),
            (64, 8128, 1)
        ]
    );
    assert_eq!(status(&rig, 20, 56), [(20, 4, 1), (24, 24, 0), (48, 8, 1)]);
}

#[test]
fn lba_status_begins_inside_the_medium() {
    let rig = Rig::new();
    for first in [BLOCKS, u64::MAX] {
        let mut cdb = cdb_16(0x9e, first, 24);
        cdb[1] = 0x12;
        assert_eq!(rig.sense(FIRST, &cdb, &[]), (ILLEGAL, 0x2100));
    }
    assert_eq!(status(&rig, BLOCKS - 1, 1000), [(BLOCKS - 1, 1, 1)]);
    assert_eq!(status(&rig, 0, 8), []);
}

#[test]
fn lba_status_is_mapped_where_the_host_does_not_say() {
    let rig = Rig::new();
    *rig.medium.error.lock().unwrap() = Some(io::ErrorKind::Unsupported);
    assert_eq!(status(&rig, 7, 1000), [(7, BLOCKS as u32 - 7, 0)]);
    let mut thick = facts();
    thick.provisioning = None;
    let rig = Rig::with(thick);
    assert_eq!(status(&rig, 0, 1000), [(0, BLOCKS as u32, 0)]);
}

#[test]
fn unmap_lists_are_checked_before_anything_is_unmapped() {
    let rig = Rig::new();
    rig.write(0, &pattern(64, 1));
    let beyond = list(&[(0, 8), (BLOCKS, 1)]);
    assert_eq!(
        rig.sense(FIRST, &unmap(beyond.len()), &beyond),
        (ILLEGAL, 0x2100)
    );
    let wraps = list(&[(0, 8), (u64::MAX, u32::MAX)]);
    assert_eq!(
        rig.sense(FIRST, &unmap(wraps.len()), &wraps),
        (ILLEGAL, 0x2100)
    );
    let many = list(&[(0, 8); 257]);
    assert_eq!(
        rig.sense(FIRST, &unmap(many.len()), &many),
        (ILLEGAL, 0x2600)
    );
    assert_eq!(rig.sense(FIRST, &unmap(7), &[0; 7]), (ILLEGAL, 0x1a00));
    let mut anchor = unmap(24);
    anchor[1] = 1;
    assert_eq!(
        rig.sense(FIRST, &anchor, &list(&[(0, 8)])),
        (ILLEGAL, 0x2400)
    );
    let answer = rig.run(FIRST, &unmap(24), &[0; 23], 0);
    assert_eq!(answer.response, Response::Overrun);
    assert_eq!(rig.read(0, 64), pattern(64, 1));
    // No list, no descriptors, and a part of one are no errors.
    rig.ok(FIRST, &unmap(0), &[]);
    rig.ok(FIRST, &unmap(8), &list(&[]));
    rig.ok(FIRST, &unmap(20), &list(&[(0, 8)])[..20]);
    assert_eq!(rig.read(0, 64), pattern(64, 1));
}

#[test]
fn unmap_is_bounded_as_block_limits_says() {
    let rig = Rig::new();
    rig.unit.set_blocks(1 << 30);
    rig.attention(FIRST);
    let limits = rig.ok(FIRST, &[0x12, 1, 0xb0, 0, 255, 0], &[]);
    let most = u32::from_be_bytes(limits[20..24].try_into().unwrap());
    assert_eq!(most, 1 << 20);
    let ranges = list(&[(0, most / 2), (1 << 21, most / 2 + 1)]);
    assert_eq!(
        rig.sense(FIRST, &unmap(ranges.len()), &ranges),
        (ILLEGAL, 0x2600)
    );
    let ranges = list(&[(0, most / 2), (1 << 21, most / 2)]);
    let step = rig.start(FIRST, &unmap(ranges.len()), &mut Buffer(&ranges), 0);
    assert!(matches!(step, Step::Action(Action::Unmap(ranges)) if ranges.len() == 2));
}

#[test]
fn a_medium_without_provisioning_has_no_unmap() {
    let mut thick = facts();
    thick.provisioning = None;
    let rig = Rig::with(thick);
    let ranges = list(&[(0, 8)]);
    assert_eq!(rig.sense(FIRST, &unmap(24), &ranges), (ILLEGAL, 0x2000));
    let cdb = cdb_10(0x41, 0x08, 0, 1);
    assert_eq!(rig.sense(FIRST, &cdb, &[0; BLOCK]), (ILLEGAL, 0x2400));
    let limits = rig.ok(FIRST, &[0x12, 1, 0xb0, 0, 255, 0], &[]);
    assert_eq!(limits[20..36], [0; 16]);
    assert_eq!(rig.ok(FIRST, &[0x12, 1, 0xb2, 0, 255, 0], &[])[4..], [0; 4]);
}

#[test]
fn one_block_is_written_many_times() {
    let rig = Rig::new();
    let block = pattern(1, 3);
    for count in [1, 2, 511, 1500] {
        rig.ok(FIRST, &cdb_10(0x41, 0, 5, count), &block);
        assert_eq!(rig.read(5, count), block.repeat(count.into()));
        assert_eq!(rig.read(5 + u64::from(count), 1), [0; BLOCK]);
    }
}

#[test]
fn zeroes_are_written_without_data_and_unmapped_if_asked() {
    let rig = Rig::new();
    let action = |cdb: &[u8], out: &[u8]| match rig.start(FIRST, cdb, &mut Buffer(out), 0) {
        Step::Action(Action::Zero { range, unmap, .. }) => (range, unmap),
        _ => panic!("no zeroes"),
    };
    let zeroes = [0; BLOCK];
    assert_eq!(action(&cdb_10(0x41, 0, 2, 3), &zeroes), (1024..2560, false));
    assert_eq!(action(&cdb_10(0x41, 8, 2, 3), &zeroes), (1024..2560, true));
    let mut without_data = cdb_16(0x93, 2, 3);
    without_data[1] = 0x09;
    assert_eq!(action(&without_data, &[]), (1024..2560, true));
    // Unmapped blocks would not be read as what is to be written.
    rig.ok(FIRST, &cdb_10(0x41, 8, 2, 3), &[7; BLOCK]);
    assert_eq!(rig.read(2, 3), [7; 3 * BLOCK]);
}

#[test]
fn write_same_takes_exactly_one_block_of_data() {
    let rig = Rig::new();
    for length in [0, BLOCK / 2, BLOCK * 2] {
        let cdb = cdb_10(0x41, 0x08, 0, 1);
        assert_eq!(
            rig.sense(FIRST, &cdb, &vec![0xa6; length]),
            (ILLEGAL, 0x2400)
        );
    }
    let anchor = cdb_10(0x41, 0x18, 0, 1);
    assert_eq!(rig.sense(FIRST, &anchor, &[0; BLOCK]), (ILLEGAL, 0x2400));
    for obsolete in [0x02, 0x04] {
        let cdb = cdb_10(0x41, obsolete, 0, 1);
        assert_eq!(rig.sense(FIRST, &cdb, &[0; BLOCK]), (ILLEGAL, 0x2400));
    }
}

#[test]
fn write_same_is_bounded_as_block_limits_says() {
    let rig = Rig::new();
    rig.unit.set_blocks(1 << 30);
    rig.attention(FIRST);
    let limits = rig.ok(FIRST, &[0x12, 1, 0xb0, 0, 255, 0], &[]);
    let most = u64::from_be_bytes(limits[36..44].try_into().unwrap());
    assert_eq!((limits[4], most), (1, (64 << 20) / BLOCK as u64));
    for count in [0, most as u32 + 1] {
        let cdb = cdb_16(0x93, 0, count);
        assert_eq!(rig.sense(FIRST, &cdb, &[0; BLOCK]), (ILLEGAL, 0x2400));
    }
}
