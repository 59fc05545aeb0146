// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Commands that read, write and compare blocks.

use super::*;

/// Opcodes that name blocks, by the length of their CDB.
const OPCODES_10: [u8; 8] = [0x28, 0x2a, 0x2e, 0x2f, 0x34, 0x35, 0x41, 0x42];
const OPCODES_12: [u8; 4] = [0xa8, 0xaa, 0xae, 0xaf];
const OPCODES_16: [u8; 9] = [0x88, 0x8a, 0x8b, 0x8e, 0x8f, 0x90, 0x91, 0x93, 0x89];

fn cdb_12(opcode: u8, block: u32, count: u32) -> [u8; 12] {
    let mut cdb = [0; 12];
    cdb[0] = opcode;
    cdb[2..6].copy_from_slice(&block.to_be_bytes());
    cdb[6..10].copy_from_slice(&count.to_be_bytes());
    cdb
}

#[test]
fn every_length_of_a_cdb_reads_and_writes_the_same_blocks() {
    let rig = Rig::new();
    let reads: [Vec<u8>; 4] = [
        vec![0x08, 0, 0, 7, 2, 0],
        cdb_10(0x28, 0, 7, 2).into(),
        cdb_12(0xa8, 7, 2).into(),
        cdb_16(0x88, 7, 2).into(),
    ];
    for (seed, read) in reads.iter().enumerate() {
        let data = pattern(2, seed as u8);
        let mut write = read.clone();
        write[0] += 2;
        rig.ok(FIRST, &write, &data);
        for read in &reads {
            assert_eq!(rig.ok(FIRST, read, &[]), data);
        }
    }
}

#[test]
fn blocks_beyond_the_end_are_refused_for_every_command() {
    let rig = Rig::new();
    let last = BLOCKS as u32 - 1;
    let block = pattern(2, 1);
    let mut cdbs: Vec<Vec<u8>> = Vec::new();
    for (first, count) in [(last, 2), (last + 2, 1), (u32::MAX, 1), (last + 2, 0)] {
        let opcodes = OPCODES_10.iter().filter(|opcode| **opcode != 0x42);
        cdbs.extend(opcodes.map(|opcode| cdb_10(*opcode, 0, first, count).to_vec()));
        cdbs.extend(OPCODES_12.map(|opcode| cdb_12(opcode, first, count.into()).to_vec()));
    }
    for (first, count) in [
        (u64::from(last), 2),
        (u64::MAX, 1),
        (u64::MAX, u32::MAX),
        (1 << 63, 1),
        (BLOCKS + 1, 0),
    ] {
        cdbs.extend(OPCODES_16.map(|opcode| {
            let mut cdb = cdb_16(opcode, first, count);
            if opcode == 0x89 {
                cdb[10..14].copy_from_slice(&count.min(255).to_be_bytes());
            }
            cdb.to_vec()
        }));
    }
    cdbs.push(vec![0x08, 0x1f, 0xff, 0xff, 1, 0]);
    cdbs.push(vec![0x0a, 0x1f, 0xff, 0xff, 1, 0]);
    for cdb in cdbs {
        assert_eq!(
            rig.sense(FIRST, &cdb, &block),
            (ILLEGAL, 0x2100),
            "{cdb:02x?}"
        );
    }
    assert!(rig.medium.take_log().is_empty());
}

#[test]
fn no_blocks_are_no_error_and_move_nothing() {
    let rig = Rig::new();
    let end = BLOCKS as u32;
    for opcode in [0x28, 0x2a, 0x2e, 0x2f, 0x34] {
        for first in [0, end] {
            assert!(rig.ok(FIRST, &cdb_10(opcode, 0, first, 0), &[]).is_empty());
        }
    }
    for opcode in [0x88, 0x8a, 0x8b, 0x8e, 0x8f, 0x89] {
        assert!(rig.ok(FIRST, &cdb_16(opcode, BLOCKS, 0), &[]).is_empty());
    }
    assert!(rig.medium.take_log().is_empty());
}

#[test]
fn six_byte_commands_count_0_as_256_blocks() {
    let rig = Rig::new();
    let data = pattern(256, 9);
    rig.ok(FIRST, &[0x0a, 0, 0, 3, 0, 0], &data);
    assert_eq!(rig.ok(FIRST, &[0x08, 0, 0, 3, 0, 0], &[]), data);
}

#[test]
fn protection_information_is_refused() {
    let rig = Rig::new();
    let data = pattern(2, 1);
    for protect in 1..8 {
        let flags = protect << 5;
        for opcode in [0x28, 0x2a, 0x2e, 0x2f, 0x41] {
            let cdb = cdb_10(opcode, flags, 0, 1);
            assert_eq!(rig.sense(FIRST, &cdb, &data[..BLOCK]), (ILLEGAL, 0x2400));
        }
        for opcode in [0x88, 0x89, 0x8a, 0x8b, 0x8e, 0x8f, 0x93] {
            let mut cdb = cdb_16(opcode, 0, 1);
            cdb[1] = flags;
            assert_eq!(rig.sense(FIRST, &cdb, &data), (ILLEGAL, 0x2400));
        }
    }
}

#[test]
fn a_transfer_is_no_longer_than_block_limits_says() {
    let rig = Rig::new();
    let limits = rig.ok(FIRST, &[0x12, 1, 0xb0, 0, 255, 0], &[]);
    let most = u32::from_be_bytes(limits[8..12].try_into().unwrap());
    rig.unit.set_blocks(1 << 30);
    rig.attention(FIRST);
    for opcode in [0x88, 0x8a, 0x8b, 0x8e] {
        let cdb = cdb_16(opcode, 0, most + 1);
        assert_eq!(rig.sense(FIRST, &cdb, &[]), (ILLEGAL, 0x2400));
    }
    // VERIFY with each BYTCHK.
    for check in [0, 2, 6] {
        let mut cdb = cdb_16(0x8f, 0, most + 1);
        cdb[1] = check;
        let step = rig.start(FIRST, &cdb, &mut Buffer(&[0; BLOCK]), 0);
        assert!(matches!(step, Step::Done(answer) if answer.status == Status::CheckCondition));
    }
}

#[test]
fn a_buffer_that_is_too_small_is_an_overrun_and_moves_nothing() {
    let rig = Rig::new();
    let data = pattern(1, 1);
    for opcode in [0x2a, 0x2e] {
        let answer = rig.run(FIRST, &cdb_10(opcode, 0, 0, 2), &data, 0);
        assert_eq!(answer.response, Response::Overrun);
    }
    let answer = rig.run(FIRST, &cdb_10(0x2f, 2, 0, 2), &data, 0);
    assert_eq!(answer.response, Response::Overrun);
    let answer = rig.run(FIRST, &cdb_10(0x28, 0, 0, 2), &[], 1023);
    assert_eq!(answer.response, Response::Overrun);
    assert!(rig.medium.take_log().is_empty());
}

#[test]
fn a_write_is_stable_with_fua_or_without_a_cache() {
    let rig = Rig::new();
    let data = pattern(1, 1);
    let is_stable = |cdb: &[u8]| match rig.start(FIRST, cdb, &mut Buffer(&data), 0) {
        Step::Action(Action::Write { stable, .. }) => stable,
        _ => panic!("no write"),
    };
    assert!(!is_stable(&cdb_10(0x2a, 0x10, 0, 1)));
    assert!(is_stable(&cdb_10(0x2a, 0x08, 0, 1)));
    // MODE SELECT(6) of the caching page without WCE.
    let mut list = vec![0; 24];
    list[4..6].copy_from_slice(&[0x08, 0x12]);
    rig.ok(FIRST, &[0x15, 0x10, 0, 0, 24, 0], &list);
    assert_eq!(rig.medium.take_log(), ["flush"]);
    assert!(is_stable(&cdb_10(0x2a, 0, 0, 1)));
    assert!(is_stable(&[0x0a, 0, 0, 0, 1, 0]));
    rig.unit.reset();
    rig.attention(FIRST);
    assert!(!is_stable(&cdb_10(0x2a, 0, 0, 1)));
}

#[test]
fn a_verification_finds_the_first_byte_that_differs() {
    let rig = Rig::new();
    let data = pattern(600, 3);
    rig.write(5, &data);
    let verify = |check: u8, data: &[u8]| {
        let mut cdb = cdb_16(0x8f, 5, 600);
        cdb[1] = check << 1;
        rig.run(FIRST, &cdb, data, 0)
    };
    assert_eq!(verify(0, &[]), Answer::good());
    assert_eq!(verify(1, &data), Answer::good());
    let mut other = data.clone();
    other[300_001] ^= 1;
    let answer = verify(1, &other);
    assert_eq!(answer.status, Status::CheckCondition);
    assert_eq!(answer.sense[..7], [0xf0, 0, 0x0e, 0, 4, 0x93, 0xe1]);
    assert_eq!(answer.sense[12..14], [0x1d, 0]);
    assert_eq!(verify(0, &other), Answer::good());
    // One block, for all blocks.
    assert_eq!(verify(3, &data[..BLOCK]).status, Status::CheckCondition);
    rig.write(5, &data[..BLOCK].repeat(600));
    assert_eq!(verify(3, &data[..BLOCK]), Answer::good());
    assert_eq!(verify(2, &data).status, Status::CheckCondition);
}

#[test]
fn what_is_written_and_verified_is_on_stable_storage() {
    let rig = Rig::new();
    let data = pattern(3, 5);
    for check in [0, 1] {
        rig.ok(FIRST, &cdb_10(0x2e, check << 1, 2, 3), &data);
        assert_eq!(rig.read(2, 3), data);
        assert_eq!(rig.medium.take_log(), ["write 1536 at 1024", "flush"]);
    }
    let cdb = cdb_10(0x2e, 6, 2, 3);
    assert_eq!(rig.sense(FIRST, &cdb, &data), (ILLEGAL, 0x2400));
}

/// COMPARE AND WRITE.
fn compare(count: u8, flags: u8) -> [u8; 16] {
    let mut cdb = cdb_16(0x89, 10, count.into());
    cdb[1] = flags;
    cdb
}

#[test]
fn compare_and_write_writes_all_or_nothing() {
    let rig = Rig::new();
    for count in [1, 2, 255] {
        let (old, new) = (pattern(count, 1), pattern(count, 77));
        rig.write(10, &old);
        let list = [old.clone(), new.clone()].concat();
        rig.ok(FIRST, &compare(count as u8, 0), &list);
        assert_eq!(rig.read(10, count as u16), new);
        rig.medium.take_log();
        // Now the old data is not there any more.
        let answer = rig.run(FIRST, &compare(count as u8, 0), &list, 0);
        assert_eq!(answer.sense[2] & 15, 0x0e);
        assert_eq!(answer.sense[3..7], [0; 4]);
        assert!(rig.medium.take_log().is_empty());
    }
    let (old, new) = (pattern(1, 77), pattern(1, 1));
    rig.ok(FIRST, &compare(1, 0x08), &[old, new].concat());
    assert_eq!(rig.medium.take_log(), ["write 512 at 5120", "flush"]);
}

#[test]
fn compare_and_write_needs_exactly_two_halves() {
    let rig = Rig::new();
    let data = pattern(4, 1);
    for count in [1, 3] {
        assert_eq!(
            rig.sense(FIRST, &compare(count, 0), &data),
            (ILLEGAL, 0x2400)
        );
    }
    assert!(rig.medium.take_log().is_empty());
}

#[test]
fn procedures_that_must_be_alone_say_where() {
    let rig = Rig::new();
    let data = pattern(4, 1);
    let exclusive = |cdb: &[u8]| match rig.start(FIRST, cdb, &mut Buffer(&data), 0) {
        Step::Procedure(procedure) => procedure.exclusive(),
        _ => panic!("no procedure"),
    };
    assert_eq!(exclusive(&compare(2, 0)), Some(5120..6144));
    assert_eq!(exclusive(&cdb_16(0x8b, 1, 4)), Some(512..2560));
    assert_eq!(exclusive(&cdb_10(0x2f, 2, 1, 4)), None);
}

#[test]
fn orwrite_sets_bits() {
    let rig = Rig::new();
    rig.write(0, &[0x0f; 700 * BLOCK]);
    rig.ok(FIRST, &cdb_16(0x8b, 1, 600), &[0xa0; 600 * BLOCK]);
    assert_eq!(rig.read(0, 1), [0x0f; BLOCK]);
    assert_eq!(rig.read(1, 600), [0xaf; 600 * BLOCK]);
    assert_eq!(rig.read(601, 1), [0x0f; BLOCK]);
}

#[test]
fn atomic_writes_are_not_offered() {
    let rig = Rig::new();
    let refused = rig.sense(FIRST, &cdb_16(0x9c, 3, 1), &pattern(1, 1));
    assert_eq!(refused, (ILLEGAL, 0x2000));
    let limits = rig.ok(FIRST, &[0x12, 1, 0xb0, 0, 255, 0], &[]);
    assert_eq!(limits[44..], [0; 20]);
}

#[test]
fn a_cache_is_flushed_for_all_blocks() {
    let rig = Rig::new();
    rig.ok(FIRST, &cdb_10(0x35, 0, 3, 1), &[]);
    rig.ok(FIRST, &cdb_16(0x91, 0, 0), &[]);
    assert_eq!(rig.medium.take_log(), ["flush"; 2]);
}

#[test]
fn nothing_changes_a_read_only_medium() {
    let mut read_only = facts();
    read_only.read_only = true;
    let rig = Rig::with(read_only);
    let data = pattern(2, 1);
    for opcode in [0x2a, 0x2e, 0x41, 0x42] {
        let cdb = cdb_10(opcode, 0, 0, 2);
        assert_eq!(rig.sense(FIRST, &cdb, &data), (PROTECTED, 0x2700));
    }
    for opcode in [0x89, 0x8a, 0x8b, 0x8e, 0x93] {
        assert_eq!(
            rig.sense(FIRST, &cdb_16(opcode, 0, 1), &data),
            (PROTECTED, 0x2700)
        );
    }
    rig.ok(FIRST, &cdb_10(0x35, 0, 0, 0), &[]);
    assert!(rig.medium.take_log().is_empty());
    assert_eq!(rig.read(0, 2), [0; 2 * BLOCK]);
}

#[test]
fn errors_of_the_medium_say_what_failed_and_where() {
    let rig = Rig::new();
    let data = pattern(2, 1);
    for (kind, reads, writes) in [
        (io::ErrorKind::Other, (3, 0x1100), (3, 0x0c00)),
        (io::ErrorKind::StorageFull, (7, 0x2707), (7, 0x2707)),
        (io::ErrorKind::Interrupted, (11, 0), (11, 0)),
        (io::ErrorKind::OutOfMemory, (11, 0x4400), (11, 0x4400)),
    ] {
        *rig.medium.error.lock().unwrap() = Some(kind);
        assert_eq!(rig.sense(FIRST, &cdb_10(0x28, 0, 9, 2), &[]), reads);
        assert_eq!(rig.sense(FIRST, &cdb_10(0x2a, 0, 9, 2), &data), writes);
        assert_eq!(rig.sense(FIRST, &cdb_10(0x2f, 2, 9, 2), &data), reads);
        assert_eq!(
            rig.sense(FIRST, &cdb_10(0x41, 0, 9, 2), &data[..BLOCK]),
            writes
        );
    }
    *rig.medium.error.lock().unwrap() = Some(io::ErrorKind::Other);
    let answer = rig.run(FIRST, &cdb_10(0x28, 0, 9, 2), &[], 1024);
    assert_eq!(answer.sense[..7], [0xf0, 0, 3, 0, 0, 0, 9]);
    let read = Action::Read {
        offset: 1 << 41,
        length: 1 << 20,
    };
    let answer = rig
        .unit
        .finish(&read, Err(io::ErrorKind::Other.into()), 4096);
    // Block 2^32 + 8 does not fit fixed sense data.
    assert_eq!(answer.sense[..7], [0x70, 0, 3, 0, 0, 0, 0]);
}

#[test]
fn procedures_say_what_they_change_and_how_much_they_move() {
    let rig = Rig::new();
    let data = pattern(4, 1);
    let same = pattern(1, 2);
    let size = BLOCK as u64;
    let mut compare = cdb_16(0x89, 0, 0);
    compare[13] = 2;
    // The CDB, its data, and what the procedure says.
    let cases: [(&[u8], &[u8], bool, u64); 6] = [
        (&cdb_16(0x8f, 0, 4), &[], false, 4 * size),
        (&cdb_16(0x8e, 0, 4), &data, true, 8 * size),
        (&cdb_16(0x8b, 0, 4), &data, true, 8 * size),
        (&compare, &data, true, 4 * size),
        (&cdb_16(0x93, 0, 9), &same, true, 9 * size),
        (
            &[0x9e, 0x12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 99, 0, 0],
            &[],
            false,
            0,
        ),
    ];
    for (cdb, data, changes, bytes) in cases {
        let Step::Procedure(procedure) = rig.start(FIRST, cdb, &mut Buffer(data), 1 << 20) else {
            panic!("{cdb:02x?}");
        };
        let found = (procedure.changes(), procedure.bytes());
        assert_eq!(found, (changes, bytes), "{cdb:02x?}");
    }
}
