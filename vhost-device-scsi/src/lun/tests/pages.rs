// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! INQUIRY, mode pages, log pages and reports.

use super::*;
use crate::lun::commands::TABLE;

fn vital(page: u8) -> [u8; 6] {
    [0x12, 1, page, 1, 0, 0]
}

#[test]
fn inquiry_data_is_cut_to_the_allocation_length() {
    let rig = Rig::new();
    let whole = rig.ok(FIRST, &[0x12, 0, 0, 1, 0, 0], &[]);
    assert_eq!(whole.len(), usize::from(whole[4]) + 5);
    assert_eq!(whole[8..36], *b"VENDOR  PRODUCT         1.0 ");
    for length in 0..=255 {
        let data = rig.ok(FIRST, &[0x12, 0, 0, 0, length, 0], &[]);
        assert_eq!(data, whole[..whole.len().min(length.into())]);
    }
}

#[test]
fn every_page_that_is_listed_is_there_and_no_other() {
    let rig = Rig::new();
    let listed = rig.ok(FIRST, &vital(0), &[])[4..].to_vec();
    assert_eq!(listed, [0, 0x80, 0x83, 0x86, 0x8f, 0xb0, 0xb1, 0xb2, 0xb7]);
    for page in 0..=255 {
        if listed.contains(&page) {
            let data = rig.ok(FIRST, &vital(page), &[]);
            assert_eq!(data[..2], [0, page]);
            let length = usize::from(u16::from_be_bytes([data[2], data[3]]));
            assert_eq!(data.len(), length + 4, "{page:02x}");
            assert_eq!(rig.ok(FIRST, &[0x12, 1, page, 0, 4, 0], &[]), data[..4]);
        } else {
            assert_eq!(rig.sense(FIRST, &vital(page), &[]), (ILLEGAL, 0x2400));
        }
    }
    // A page without EVPD, and CMDDT.
    assert_eq!(
        rig.sense(FIRST, &[0x12, 0, 1, 0, 9, 0], &[]),
        (ILLEGAL, 0x2400)
    );
    assert_eq!(
        rig.sense(FIRST, &[0x12, 2, 0, 0, 9, 0], &[]),
        (ILLEGAL, 0x2400)
    );
}

#[test]
fn the_last_designator_of_the_unit_is_its_naa_one() {
    let rig = Rig::new();
    let data = rig.ok(FIRST, &vital(0x83), &[]);
    let mut designators = Vec::new();
    let mut rest = &data[4..];
    while let [code_set, kind, _, length, after @ ..] = rest {
        let (value, next) = after.split_at(usize::from(*length));
        designators.push((code_set & 15, kind & 0x3f, value));
        rest = next;
    }
    assert_eq!(designators.first(), Some(&(2, 1, &b"VENDOR  serial"[..])));
    assert_eq!(designators.last(), Some(&(1, 3, &NAA.to_be_bytes()[..])));
    let naa = designators.iter().filter(|(_, kind, _)| kind & 15 == 3);
    assert_eq!(naa.count(), 1);
}

#[test]
fn capacity_is_that_of_the_medium() {
    let rig = Rig::new();
    let data = rig.ok(FIRST, &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[]);
    assert_eq!(data, [0, 0, 0x1f, 0xff, 0, 0, 2, 0]);
    let read = |length: u32| {
        let mut cdb = cdb_16(0x9e, 0, length);
        cdb[1] = 0x10;
        rig.ok(FIRST, &cdb, &[])
    };
    let long = read(32);
    assert_eq!(
        long[..16],
        [0, 0, 0, 0, 0, 0, 0x1f, 0xff, 0, 0, 2, 0, 0, 3, 0xc0, 0]
    );
    for length in 0..32 {
        assert_eq!(read(length), long[..length as usize]);
    }
    rig.unit.set_blocks(1 << 33);
    assert_eq!(rig.attention(FIRST), 0x2a09);
    let data = rig.ok(FIRST, &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[]);
    assert_eq!(data[..4], [0xff; 4]);
    let cdb = [0x25, 0, 0, 0, 0, 1, 0, 0, 0, 0];
    assert_eq!(rig.sense(FIRST, &cdb, &[]), (ILLEGAL, 0x2400));
}

/// MODE SENSE(10) without block descriptors: header and pages.
fn mode(rig: &Rig, control: u8, page: u8, subpage: u8) -> Vec<u8> {
    let cdb = [0x5a, 8, control << 6 | page, subpage, 0, 0, 0, 4, 0, 0];
    rig.ok(FIRST, &cdb, &[])
}

#[test]
fn mode_pages_have_current_changeable_and_default_values() {
    let rig = Rig::new();
    assert_eq!(mode(&rig, 0, 0x08, 0)[8..11], [0x08, 0x12, 4]);
    assert_eq!(mode(&rig, 1, 0x08, 0)[8..12], [0x08, 0x12, 4, 0]);
    assert_eq!(mode(&rig, 0, 0x0a, 0)[8..14], [0x0a, 0x0a, 0, 0x10, 0, 0]);
    assert_eq!(mode(&rig, 1, 0x0a, 0)[8..14], [0x0a, 0x0a, 4, 0, 8, 0]);
    assert_eq!(mode(&rig, 0, 0x0a, 1)[8..12], [0x4a, 1, 0, 28]);
    let all = mode(&rig, 0, 0x3f, 0);
    assert_eq!(all.len(), 8 + 12 + 20 + 12 + 12);
    assert_eq!(mode(&rig, 0, 0x3f, 0xff).len(), all.len() + 32);
    assert_eq!(mode(&rig, 2, 0x3f, 0), all);
    let length = u16::from_be_bytes([all[0], all[1]]);
    assert_eq!(usize::from(length) + 2, all.len());
    // Saved values, and pages that are not there.
    assert_eq!(
        rig.sense(FIRST, &[0x1a, 0, 0xc8, 0, 255, 0], &[]),
        (ILLEGAL, 0x3900)
    );
    assert_eq!(
        rig.sense(FIRST, &[0x1a, 0, 0x02, 0, 255, 0], &[]),
        (ILLEGAL, 0x2400)
    );
    assert_eq!(
        rig.sense(FIRST, &[0x1a, 0, 0x0a, 5, 255, 0], &[]),
        (ILLEGAL, 0x2400)
    );
}

#[test]
fn block_descriptors_say_how_many_blocks_there_are() {
    let rig = Rig::new();
    let data = rig.ok(FIRST, &[0x1a, 0, 0x08, 0, 255, 0], &[]);
    assert_eq!(data[..12], [31, 0, 0x10, 8, 0, 0, 0x20, 0, 0, 0, 2, 0]);
    let data = rig.ok(FIRST, &[0x5a, 0x10, 0x08, 0, 0, 0, 0, 0, 255, 0], &[]);
    assert_eq!(data[4..8], [1, 0, 0, 16]);
    assert_eq!(
        data[8..24],
        [0, 0, 0, 0, 0, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 2, 0]
    );
    assert_eq!(rig.ok(FIRST, &[0x1a, 0, 0x3f, 0, 4, 0], &[]).len(), 4);
}

#[test]
fn what_mode_sense_returns_can_be_selected_again() {
    let rig = Rig::new();
    for cdb in [
        [0x5a, 0, 0x3f, 0, 0, 0, 0, 4, 0, 0],
        [0x5a, 0x10, 0x3f, 0xff, 0, 0, 0, 4, 0, 0],
    ] {
        let data = rig.ok(FIRST, &cdb, &[]);
        let length = data.len() as u8;
        rig.ok(FIRST, &[0x55, 0x10, 0, 0, 0, 0, 0, 0, length, 0], &data);
    }
    assert!(rig.medium.take_log().is_empty());
    assert_eq!(rig.attention(SECOND), 0);
}

/// MODE SELECT(6) of one page.
fn select(page: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let list = [&[0; 4], page].concat();
    (vec![0x15, 0x10, 0, 0, list.len() as u8, 0], list)
}

#[test]
fn software_write_protection_refuses_writes_until_it_is_lifted() {
    let rig = Rig::new();
    let data = pattern(1, 1);
    let mut page = mode(&rig, 0, 0x0a, 0)[8..].to_vec();
    page[4] |= 8;
    let (cdb, list) = select(&page);
    rig.ok(FIRST, &cdb, &list);
    assert_eq!(mode(&rig, 0, 0x0a, 0)[3], 0x90);
    assert_eq!(mode(&rig, 0, 0x0a, 0)[8..], page);
    assert_eq!(
        rig.sense(FIRST, &cdb_10(0x2a, 0, 0, 1), &data),
        (PROTECTED, 0x2702)
    );
    rig.read(0, 1);
    // Others are told.
    assert_eq!(rig.attention(SECOND), 0x2a01);
    page[4] &= !8;
    let (cdb, list) = select(&page);
    rig.ok(FIRST, &cdb, &list);
    rig.write(0, &data);
}

#[test]
fn sense_data_is_in_descriptors_if_the_control_page_says_so() {
    let rig = Rig::new();
    let mut page = mode(&rig, 0, 0x0a, 0)[8..].to_vec();
    page[2] |= 4;
    let (cdb, list) = select(&page);
    rig.ok(FIRST, &cdb, &list);
    let answer = rig.run(FIRST, &cdb_16(0x88, 1 << 40, 1), &[], 512);
    assert_eq!(answer.sense[..4], [0x72, 5, 0x21, 0]);
    assert_eq!(answer.sense[8..10], [0, 10]);
    assert_eq!(answer.sense[12..20], (1u64 << 40).to_be_bytes());
    // REQUEST SENSE says itself in which format it wants it.
    assert_eq!(rig.ok(FIRST, &[3, 0, 0, 0, 255, 0], &[])[0], 0x70);
    assert_eq!(rig.ok(FIRST, &[3, 1, 0, 0, 255, 0], &[])[0], 0x72);
}

#[test]
fn mode_select_changes_nothing_if_any_part_of_it_is_wrong() {
    let rig = Rig::new();
    let caching = mode(&rig, 0, 0x08, 0)[8..].to_vec();
    let mut off = caching.clone();
    off[2] = 0;
    let mut fixed = caching.clone();
    fixed[3] = 1;
    let mut short = caching.clone();
    short[1] = 0x11;
    for wrong in [fixed, short, vec![0x02, 0x0e], vec![0x0a]] {
        let (cdb, list) = select(&[off.clone(), wrong].concat());
        let (key, code) = rig.sense(FIRST, &cdb, &list);
        assert!(key == ILLEGAL && [0x2600, 0x1a00].contains(&code));
        assert_eq!(mode(&rig, 0, 0x08, 0)[8..], caching);
    }
    // Lists that end too early.
    let (mut cdb, list) = select(&caching);
    for length in 1..list.len() as u8 {
        cdb[4] = length;
        if length != 4 {
            assert_eq!(rig.sense(FIRST, &cdb, &list), (ILLEGAL, 0x1a00), "{length}");
        }
    }
    // A block descriptor that changes the size of blocks, or their number.
    for descriptor in [[0, 0, 0, 0, 0, 0, 4, 0], [0, 0, 0, 9, 0, 0, 2, 0]] {
        let list = [&[0, 0, 0, 8], &descriptor[..]].concat();
        assert_eq!(
            rig.sense(FIRST, &[0x15, 0x10, 0, 0, 12, 0], &list),
            (ILLEGAL, 0x2600)
        );
    }
    // SP.
    assert_eq!(
        rig.sense(FIRST, &[0x15, 0x11, 0, 0, 24, 0], &list),
        (ILLEGAL, 0x2400)
    );
}

#[test]
fn every_log_page_that_is_listed_is_there() {
    let rig = Rig::new();
    let sense = |page, subpage| [0x4d, 0, 0x40 | page, subpage, 0, 0, 0, 1, 0, 0];
    let listed = rig.ok(FIRST, &sense(0, 0), &[])[4..].to_vec();
    for page in &listed {
        let data = rig.ok(FIRST, &sense(*page, 0), &[]);
        assert_eq!(data[0], *page);
        assert_eq!(data.len(), 4 + usize::from(data[3]));
    }
    let with_subpages = rig.ok(FIRST, &sense(0, 0xff), &[]);
    assert_eq!(with_subpages[..4], [0x40, 0xff, 0, 8]);
    assert_eq!(rig.sense(FIRST, &sense(0x11, 0), &[]), (ILLEGAL, 0x2400));
    rig.ok(FIRST, &[0x4c, 2, 0xc0, 0, 0, 0, 0, 0, 0, 0], &[]);
}

/// REPORT SUPPORTED OPERATION CODES.
fn codes(options: u8, opcode: u8, action: u16) -> [u8; 12] {
    let [high, low] = action.to_be_bytes();
    [
        0xa3, 0x0c, options, opcode, high, low, 0, 0, 0xff, 0xff, 0, 0,
    ]
}

#[test]
fn the_table_describes_itself() {
    let rig = Rig::new();
    for (options, size) in [(0, 8), (0x80, 20)] {
        let data = rig.ok(FIRST, &codes(options, 0, 0), &[]);
        let length = u32::from_be_bytes(data[..4].try_into().unwrap()) as usize;
        assert_eq!(
            (data.len(), length),
            (TABLE.len() * size + 4, TABLE.len() * size)
        );
        for (descriptor, row) in data[4..].chunks(size).zip(TABLE) {
            assert_eq!(descriptor[0], row.opcode);
            assert_eq!(descriptor[5] & 1 == 1, row.action.is_some());
            assert_eq!(usize::from(descriptor[7]), row.usage.len() + 1);
        }
    }
    for row in TABLE {
        let (right, wrong) = match row.action {
            Some(_) => (2, 1),
            None => (1, 2),
        };
        let action = row.action.unwrap_or(0);
        for options in [right, 3, right | 0x80] {
            let data = rig.ok(FIRST, &codes(options, row.opcode, action), &[]);
            assert_eq!(data[1] & 7, 3);
            assert_eq!(data[4], row.opcode);
            let with_action = data[5] & 0x1f == action as u8 || row.action.is_none();
            assert!(with_action);
        }
        let refused = rig.run(FIRST, &codes(wrong, row.opcode, action), &[], 512);
        // The pointer is not to the service action: the command itself is there.
        assert_eq!(refused.sense[12..18], [0x24, 0, 0, 0xca, 0, 2]);
    }
    for options in [1, 2, 3] {
        assert_eq!(rig.ok(FIRST, &codes(options, 0x85, 0), &[]), [0, 1, 0, 0]);
    }
}

#[test]
fn what_the_table_does_not_have_is_refused() {
    let rig = Rig::new();
    for opcode in 0..=255 {
        let known = TABLE.iter().any(|row| row.opcode == opcode);
        if !known {
            let mut cdb = [0xff; 16];
            cdb[0] = opcode;
            assert_eq!(
                rig.sense(FIRST, &cdb, &[]),
                (ILLEGAL, 0x2000),
                "{opcode:02x}"
            );
        }
    }
    for opcode in [0x5e, 0x5f, 0x83, 0x84, 0x9e, 0xa3] {
        assert_eq!(rig.sense(FIRST, &[opcode, 0x1e], &[]), (ILLEGAL, 0x2400));
    }
    // NACA.
    assert_eq!(
        rig.sense(FIRST, &[0, 0, 0, 0, 0, 4], &[]),
        (ILLEGAL, 0x2400)
    );
}

#[test]
fn units_are_listed_by_their_numbers() {
    let rig = Rig::new();
    let report = |select| {
        let cdb = [0xa0, 0, select, 0, 0, 0, 0, 0, 1, 0, 0, 0];
        rig.ok(FIRST, &cdb, &[])
    };
    let data = report(0);
    assert_eq!(data[..8], [0, 0, 0, 24, 0, 0, 0, 0]);
    let luns: Vec<[u8; 2]> = data[8..].chunks(8).map(|lun| [lun[0], lun[1]]).collect();
    assert_eq!(luns, [[0, 0], [0, 5], [0x41, 0x2c]]);
    assert_eq!(report(1)[8..10], [0xc1, 1]);
    assert_eq!(report(2).len(), 8 + 4 * 8);
    let cdb = [0xa0, 0, 3, 0, 0, 0, 0, 0, 1, 0, 0, 0];
    assert_eq!(rig.sense(FIRST, &cdb, &[]), (ILLEGAL, 0x2400));
}

#[test]
fn a_unit_that_is_not_there_says_so() {
    let rig = Rig::new();
    let run = |cdb: &[u8], well_known: bool| {
        let command = Command {
            cdb,
            nexus: FIRST,
            data_out: 0,
            data_in: 512,
        };
        match well_known {
            true => LogicalUnit::report_luns(&command, &*rig.units),
            false => LogicalUnit::absent(&command, &*rig.units),
        }
    };
    assert_eq!(run(&[0x12, 0, 0, 0, 36, 0], false).data[0], 0x7f);
    assert_eq!(run(&[0x12, 0, 0, 0, 36, 0], true).data[0], 0x1e);
    assert_eq!(run(&[3, 0, 0, 0, 18, 0], false).data[12], 0x25);
    assert_eq!(run(&[0, 0, 0, 0, 0, 0], false).sense[12], 0x25);
    assert_eq!(run(&[0, 0, 0, 0, 0, 0], true), Answer::good());
    assert_eq!(run(&cdb_10(0x28, 0, 0, 1), true).sense[12], 0x20);
    for well_known in [false, true] {
        let luns = run(&[0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0], well_known);
        assert_eq!(luns.data.len(), 16);
        assert_eq!(run(&vital(0), well_known).sense[12], 0x24);
    }
}

#[test]
fn the_echo_buffer_returns_what_its_initiator_has_stored() {
    let rig = Rig::new();
    let echo = [0x3c, 0x0a, 0, 0, 0, 0, 0, 1, 0, 0];
    assert_eq!(rig.sense(FIRST, &echo, &[]), (ILLEGAL, 0x2c00));
    rig.ok(FIRST, &[0x3b, 0x0a, 0, 0, 0, 0, 0, 0, 5, 0], b"hello");
    assert_eq!(rig.ok(FIRST, &echo, &[]), b"hello");
    assert_eq!(rig.sense(SECOND, &echo, &[]), (ILLEGAL, 0x2c00));
    assert_eq!(
        rig.ok(FIRST, &[0x3c, 0x0b, 0, 0, 0, 0, 0, 0, 4, 0], &[]),
        [0, 0, 0x10, 0]
    );
    let long = [0x3b, 0x0a, 0, 0, 0, 0, 0, 0x10, 1, 0];
    assert_eq!(rig.sense(FIRST, &long, &[0; 4097]), (ILLEGAL, 0x1a00));
    assert_eq!(
        rig.sense(FIRST, &[0x3b, 0x05, 0, 0, 0, 0, 0, 0, 4, 0], &[0; 4]),
        (ILLEGAL, 0x2400)
    );
}

#[test]
fn small_reports_have_the_length_that_they_name() {
    let rig = Rig::new();
    let groups = [0xa3, 0x0a, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0];
    let data = rig.ok(FIRST, &groups, &[]);
    assert_eq!((data.len(), data[3]), (16, 12));
    let functions = [0xa3, 0x0d, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0];
    assert_eq!(rig.ok(FIRST, &functions, &[]), [0xdc, 3, 0, 0]);
    assert_eq!(
        rig.ok(FIRST, &[0x37, 0, 0x0d, 0, 0, 0, 0, 0, 9, 0], &[]),
        [0, 0x0d, 0, 0]
    );
    assert_eq!(
        rig.ok(FIRST, &[0xb7, 0x0d, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0], &[])
            .len(),
        8
    );
    rig.ok(FIRST, &[0x1d, 4, 0, 0, 0, 0], &[]);
}
