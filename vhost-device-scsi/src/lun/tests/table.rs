// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Every command with buffers of every kind.

use super::*;
use crate::lun::commands::TABLE;

/// Bytes of buffers: none, parts of lists, lists, blocks.
const LENGTHS: [usize; 12] = [0, 1, 4, 7, 8, 18, 24, 36, 511, 512, 1024, 4096];
/// What all fields of a CDB and of a parameter list contain.
const VALUES: [u8; 5] = [0, 1, 0x10, 0x80, 0xff];

/// Checks an answer.
fn check(answer: &Answer, cdb: &[u8]) {
    let has_sense = answer.status == Status::CheckCondition;
    assert_eq!(!answer.sense.is_empty(), has_sense, "{cdb:02x?}");
    assert!(!has_sense || answer.data.is_empty(), "{cdb:02x?}");
    if answer.response != Response::Ok {
        assert_eq!((answer.status, answer.data.len()), (Status::Good, 0));
    }
}

#[test]
fn every_command_is_answered_whatever_its_fields_and_buffers_are() {
    let rig = Rig::new();
    for row in TABLE {
        for value in VALUES {
            let mut cdb = vec![value; row.usage.len() + 1];
            cdb[0] = row.opcode;
            if let Some(action) = row.action {
                cdb[1] = value & 0xe0 | action as u8;
            }
            for length in LENGTHS {
                for answer in [
                    rig.run(FIRST, &cdb, &vec![value; length], 0),
                    rig.run(FIRST, &cdb, &[], length as u64),
                ] {
                    check(&answer, &cdb);
                }
            }
        }
    }
}

#[test]
fn a_command_that_reads_no_data_moves_nothing_of_the_data_out_buffer() {
    let rig = Rig::new();
    let data = [0x5a; BLOCK];
    for cdb in [
        &[0; 6][..],
        &[0x12, 0, 0, 0, 36, 0],
        &cdb_10(0x28, 0, 0, 0),
        &cdb_10(0x35, 0, 0, 0),
        &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ] {
        let mut buffer = Buffer(&data);
        rig.start(FIRST, cdb, &mut buffer, 0);
        assert_eq!(buffer.0.len(), BLOCK, "{cdb:02x?}");
    }
}
