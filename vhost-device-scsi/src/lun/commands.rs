// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The table of all commands. Decoding, REPORT SUPPORTED OPERATION CODES and statistics use it.

use super::call::{Call, Outcome, reply};
use super::cdb::Fields;
use super::medium::Facts;
use super::registry::Class;
use super::sense::{Sense, code};
use super::{compare, copy, inquiry, log, mode, provision, report, reserve, status, transfer};

/// What a command needs besides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    Nothing,
    /// A medium that is ready.
    Medium,
    /// A medium that is ready and can be written.
    Writable,
    /// As `Writable`. The command is only there if blocks can be unmapped.
    Unmap,
}

/// Kinds of commands, as the statistics count them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Read,
    Write,
    Verify,
    Flush,
    Unmap,
    WriteSame,
    CompareAndWrite,
    OrWrite,
    ExtendedCopy,
    Inquiry,
    ReportLuns,
    TestUnitReady,
    RequestSense,
    ReadCapacity,
    ModeSense,
    ModeSelect,
    LogSense,
    PersistentReserve,
    Report,
    Other,
}

/// Their names, in the same order.
pub const KINDS: &[&str] = &[
    "read",
    "write",
    "verify",
    "flush",
    "unmap",
    "write_same",
    "compare_and_write",
    "or_write",
    "extended_copy",
    "inquiry",
    "report_luns",
    "test_unit_ready",
    "request_sense",
    "read_capacity",
    "mode_sense",
    "mode_select",
    "log_sense",
    "persistent_reserve",
    "report",
    "other",
];

/// A command.
pub struct Row {
    pub opcode: u8,
    /// The service action, if there are several.
    pub action: Option<u16>,
    /// CDB USAGE DATA: the bits that are looked at, after the opcode (SPC-4, 6.35.3). With a service action, its byte is left 0 here.
    pub usage: &'static [u8],
    pub class: Class,
    pub needs: Needs,
    pub kind: Kind,
    pub run: fn(&mut Call<'_>) -> Outcome,
}

impl Row {
    /// Returns whether a logical unit with these properties has the command.
    pub fn is_available(&self, facts: &Facts) -> bool {
        match self.needs {
            Needs::Unmap => facts.provisioning.is_some(),
            _ => true,
        }
    }

    /// Returns whether the command needs a medium.
    pub fn needs_medium(&self) -> bool {
        self.needs != Needs::Nothing
    }

    /// Returns whether the command changes the medium.
    pub fn writes(&self) -> bool {
        !matches!(self.needs, Needs::Nothing | Needs::Medium)
    }

    /// Returns whether the command is RECEIVE COPY RESULTS.
    pub fn asks_for_copies(&self) -> bool {
        self.opcode == 0x84
    }

    /// Returns whether the command is carried out although there is a unit attention (SAM-5, 5.14.2).
    pub fn ignores_attentions(&self) -> bool {
        matches!(
            self.kind,
            Kind::Inquiry | Kind::ReportLuns | Kind::RequestSense
        )
    }
}

/// Where the rows of each opcode begin in the table, or would begin.
#[allow(clippy::indexing_slicing, reason = "computed by the compiler")]
static FIRST: [u8; 256] = {
    let mut first = [0; 256];
    let mut opcode = 0;
    let mut row = 0;
    while opcode < 256 {
        while row < TABLE.len() && (TABLE[row].opcode as usize) < opcode {
            row += 1;
        }
        first[opcode] = row as u8;
        opcode += 1;
    }
    first
};

/// Returns the rows of an opcode.
pub fn rows(opcode: u8) -> impl Iterator<Item = &'static Row> {
    let first = FIRST.get(usize::from(opcode)).copied().unwrap_or(0);
    let rows = TABLE.get(usize::from(first)..).unwrap_or_default();
    rows.iter().take_while(move |row| row.opcode == opcode)
}

/// Finds the command of a CDB.
///
/// # Errors
/// There is none with this opcode, or with this service action.
pub fn find(cdb: Fields<'_>, facts: &Facts) -> Result<&'static Row, Sense> {
    let action = u16::from(cdb.byte(1) & 0x1f);
    let available = || rows(cdb.byte(0)).filter(|row| row.is_available(facts));
    let fits = |row: &&Row| row.action.is_none_or(|own| own == action);
    match available().find(fits) {
        Some(row) => Ok(row),
        None if available().next().is_some() => Err(Sense::cdb_bit(1, 4)),
        None => Err(Sense::illegal(code::INVALID_OPCODE)),
    }
}

/// Returns the kind of a command, whether it is available or not.
pub fn kind(cdb: Fields<'_>) -> Kind {
    let action = u16::from(cdb.byte(1) & 0x1f);
    let row = rows(cdb.byte(0)).find(|row| row.action.is_none_or(|own| own == action));
    row.map_or(Kind::Other, |row| row.kind)
}

const fn row(
    opcode: u8,
    action: Option<u16>,
    usage: &'static [u8],
    class: Class,
    needs: Needs,
    kind: Kind,
    run: fn(&mut Call<'_>) -> Outcome,
) -> Row {
    Row {
        opcode,
        action,
        usage,
        class,
        needs,
        kind,
        run,
    }
}

use Class::{Free, Read, Report, Write};
use Needs::{Medium, Nothing, Unmap, Writable};

// Usage of CDBs that several commands share. The last byte is CONTROL, of which NACA is looked at.
const CDB_6: &[u8] = &[0, 0, 0, 0, 4];
const TRANSFER_6: &[u8] = &[0x1f, 0xff, 0xff, 0xff, 4];
const TRANSFER_10: &[u8] = &[0xf8, 0xff, 0xff, 0xff, 0xff, 0, 0xff, 0xff, 4];
const TRANSFER_12: &[u8] = &[0xf8, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 4];
const TRANSFER_16: &[u8] = &[
    0xf8, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 4,
];
const VERIFY_10: &[u8] = &[0xf6, 0xff, 0xff, 0xff, 0xff, 0, 0xff, 0xff, 4];
const VERIFY_12: &[u8] = &[0xf6, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 4];
const VERIFY_16: &[u8] = &[
    0xf6, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 4,
];
const CACHE_10: &[u8] = &[0x02, 0xff, 0xff, 0xff, 0xff, 0, 0xff, 0xff, 4];
const CACHE_16: &[u8] = &[
    0x02, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 4,
];
const SAME_10: &[u8] = &[0xf8, 0xff, 0xff, 0xff, 0xff, 0, 0xff, 0xff, 4];
const SAME_16: &[u8] = &[
    0xf9, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 4,
];
const COMPARE_16: &[u8] = &[
    0xf8, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0xff, 0, 4,
];
const CDB_10: &[u8] = &[0, 0, 0, 0, 0, 0, 0, 0, 4];
const OUT_10: &[u8] = &[0, 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, 4];
const LIST_10: &[u8] = &[0, 0, 0, 0, 0, 0, 0xff, 0xff, 4];
const ALLOCATION_12: &[u8] = &[0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 4];
const SERVICE_16: &[u8] = &[
    0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 4,
];
const COPY_16: &[u8] = &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 4];
const RESULTS_16: &[u8] = &[0, 0xff, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 4];

/// All commands, in the order of their opcodes.
#[rustfmt::skip]
pub const TABLE: &[Row] = &[
    row(0x00, None, CDB_6, Report, Medium, Kind::TestUnitReady, status::test_unit_ready),
    row(0x03, None, &[1, 0, 0, 0xff, 4], Free, Nothing, Kind::RequestSense, status::request_sense),
    row(0x08, None, TRANSFER_6, Read, Medium, Kind::Read, transfer::read_6),
    row(0x0a, None, TRANSFER_6, Write, Writable, Kind::Write, transfer::write_6),
    row(0x12, None, &[1, 0xff, 0xff, 0xff, 4], Free, Nothing, Kind::Inquiry, inquiry::inquiry),
    row(0x15, None, &[0x11, 0, 0, 0xff, 4], Write, Nothing, Kind::ModeSelect, mode::select_6),
    row(0x16, None, CDB_6, Report, Nothing, Kind::Other, reserve::reserve),
    row(0x17, None, CDB_6, Free, Nothing, Kind::Other, reserve::release),
    row(0x1a, None, &[0x08, 0xff, 0xff, 0xff, 4], Write, Nothing, Kind::ModeSense, mode::sense_6),
    row(0x1b, None, &[1, 0, 0, 0xf7, 4], Report, Nothing, Kind::Other, status::start_stop_unit),
    row(0x1d, None, &[0xf7, 0, 0xff, 0xff, 4], Write, Nothing, Kind::Other, status::send_diagnostic),
    row(0x1e, None, &[0, 0, 0, 0x03, 4], Report, Nothing, Kind::Other, status::prevent_removal),
    row(0x25, None, &[0, 0xff, 0xff, 0xff, 0xff, 0, 0, 1, 4], Report, Medium, Kind::ReadCapacity, report::read_capacity_10),
    row(0x28, None, TRANSFER_10, Read, Medium, Kind::Read, transfer::read_10),
    row(0x2a, None, TRANSFER_10, Write, Writable, Kind::Write, transfer::write_10),
    row(0x2e, None, VERIFY_10, Write, Writable, Kind::Write, compare::write_and_verify_10),
    row(0x2f, None, VERIFY_10, Read, Medium, Kind::Verify, compare::verify_10),
    row(0x34, None, CACHE_10, Read, Medium, Kind::Other, transfer::pre_fetch_10),
    row(0x35, None, CACHE_10, Write, Medium, Kind::Flush, transfer::synchronize_cache_10),
    row(0x37, None, &[0, 0x1f, 0, 0, 0, 0, 0xff, 0xff, 4], Read, Medium, Kind::Other, report::defects_10),
    row(0x3b, None, &[0x1f, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 4], Write, Nothing, Kind::Other, status::write_buffer),
    row(0x3c, None, &[0x1f, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 4], Write, Nothing, Kind::Other, status::read_buffer),
    row(0x41, None, SAME_10, Write, Writable, Kind::WriteSame, provision::write_same_10),
    row(0x42, None, &[1, 0, 0, 0, 0, 0, 0xff, 0xff, 4], Write, Unmap, Kind::Unmap, provision::unmap),
    row(0x4c, None, &[0x03, 0xc0, 0, 0, 0, 0, 0xff, 0xff, 4], Write, Nothing, Kind::Other, log::select),
    row(0x4d, None, &[0x01, 0xff, 0xff, 0, 0xff, 0xff, 0xff, 0xff, 4], Report, Nothing, Kind::LogSense, log::sense),
    row(0x55, None, &[0x11, 0, 0, 0, 0, 0, 0xff, 0xff, 4], Write, Nothing, Kind::ModeSelect, mode::select_10),
    row(0x56, None, CDB_10, Report, Nothing, Kind::Other, reserve::reserve),
    row(0x57, None, CDB_10, Free, Nothing, Kind::Other, reserve::release),
    row(0x5a, None, &[0x18, 0xff, 0xff, 0, 0, 0, 0xff, 0xff, 4], Write, Nothing, Kind::ModeSense, mode::sense_10),
    row(0x5e, Some(0x00), LIST_10, Report, Nothing, Kind::PersistentReserve, reserve::read_keys),
    row(0x5e, Some(0x01), LIST_10, Report, Nothing, Kind::PersistentReserve, reserve::read_reservation),
    row(0x5e, Some(0x02), LIST_10, Report, Nothing, Kind::PersistentReserve, reserve::report_capabilities),
    row(0x5e, Some(0x03), LIST_10, Report, Nothing, Kind::PersistentReserve, reserve::read_full_status),
    row(0x5f, Some(0x00), OUT_10, Report, Nothing, Kind::PersistentReserve, reserve::persistent_reserve_out),
    row(0x5f, Some(0x01), OUT_10, Report, Nothing, Kind::PersistentReserve, reserve::persistent_reserve_out),
    row(0x5f, Some(0x02), OUT_10, Report, Nothing, Kind::PersistentReserve, reserve::persistent_reserve_out),
    row(0x5f, Some(0x03), OUT_10, Report, Nothing, Kind::PersistentReserve, reserve::persistent_reserve_out),
    row(0x5f, Some(0x04), OUT_10, Report, Nothing, Kind::PersistentReserve, reserve::persistent_reserve_out),
    row(0x5f, Some(0x05), OUT_10, Report, Nothing, Kind::PersistentReserve, reserve::persistent_reserve_out),
    row(0x5f, Some(0x06), OUT_10, Report, Nothing, Kind::PersistentReserve, reserve::persistent_reserve_out),
    row(0x83, Some(0x00), COPY_16, Write, Medium, Kind::ExtendedCopy, copy::extended_copy),
    row(0x84, Some(0x00), RESULTS_16, Write, Nothing, Kind::Other, copy::status),
    row(0x84, Some(0x03), RESULTS_16, Write, Nothing, Kind::Other, copy::operating_parameters),
    row(0x84, Some(0x04), RESULTS_16, Write, Nothing, Kind::Other, copy::failed_segment_details),
    row(0x88, None, TRANSFER_16, Read, Medium, Kind::Read, transfer::read_16),
    row(0x89, None, COMPARE_16, Write, Writable, Kind::CompareAndWrite, compare::compare_and_write),
    row(0x8a, None, TRANSFER_16, Write, Writable, Kind::Write, transfer::write_16),
    row(0x8b, None, TRANSFER_16, Write, Writable, Kind::OrWrite, compare::or_write),
    row(0x8e, None, VERIFY_16, Write, Writable, Kind::Write, compare::write_and_verify_16),
    row(0x8f, None, VERIFY_16, Read, Medium, Kind::Verify, compare::verify_16),
    row(0x90, None, CACHE_16, Read, Medium, Kind::Other, transfer::pre_fetch_16),
    row(0x91, None, CACHE_16, Write, Medium, Kind::Flush, transfer::synchronize_cache_16),
    row(0x93, None, SAME_16, Write, Writable, Kind::WriteSame, provision::write_same_16),
    row(0x9e, Some(0x10), SERVICE_16, Report, Medium, Kind::ReadCapacity, report::read_capacity_16),
    row(0x9e, Some(0x12), SERVICE_16, Read, Medium, Kind::Other, provision::lba_status),
    row(0xa0, None, &[0, 0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 4], Free, Nothing, Kind::ReportLuns, report::luns),
    row(0xa3, Some(0x0a), ALLOCATION_12, Report, Nothing, Kind::Report, report::target_port_groups),
    row(0xa3, Some(0x0c), &[0, 0x87, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 4], Report, Nothing, Kind::Report, operation_codes),
    row(0xa3, Some(0x0d), &[0, 0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 4], Report, Nothing, Kind::Report, report::task_management_functions),
    row(0xa8, None, TRANSFER_12, Read, Medium, Kind::Read, transfer::read_12),
    row(0xaa, None, TRANSFER_12, Write, Writable, Kind::Write, transfer::write_12),
    row(0xae, None, VERIFY_12, Write, Writable, Kind::Write, compare::write_and_verify_12),
    row(0xaf, None, VERIFY_12, Read, Medium, Kind::Verify, compare::verify_12),
    row(0xb7, None, &[0x1f, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 4], Read, Medium, Kind::Other, report::defects_12),
];

/// Seconds that a command takes at most, and after which an initiator may give up: not specified.
const TIMEOUTS: [u8; 12] = [0, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// Returns the CDB USAGE DATA of a command.
fn usage(row: &Row) -> Vec<u8> {
    let mut usage = vec![row.opcode];
    usage.extend(row.usage);
    if let (Some(action), Some(byte)) = (row.action, usage.get_mut(1)) {
        *byte |= action as u8;
    }
    usage
}

/// REPORT SUPPORTED OPERATION CODES (SPC-4, 6.35).
pub fn operation_codes(call: &mut Call<'_>) -> Outcome {
    let cdb = call.cdb;
    let with_timeouts = cdb.bit(2, 7);
    let (opcode, action) = (cdb.byte(3), cdb.u16(4));
    let available = |row: &&Row| row.is_available(call.facts());
    let rows: Vec<&Row> = rows(opcode).filter(available).collect();
    let has_actions = rows.iter().any(|row| row.action.is_some());
    let find = |wanted: Option<u16>| rows.iter().copied().find(|row| row.action == wanted);
    let data = match cdb.byte(2) & 7 {
        0 => all(call.facts(), with_timeouts),
        1 if has_actions => return Err(Sense::cdb_bit(2, 2).into()),
        1 => one(find(None), with_timeouts),
        2 if !has_actions && !rows.is_empty() => return Err(Sense::cdb_bit(2, 2).into()),
        2 => one(find(Some(action)), with_timeouts),
        3 if has_actions => one(find(Some(action)), with_timeouts),
        3 if action != 0 => one(None, with_timeouts),
        3 => one(find(None), with_timeouts),
        _ => return Err(Sense::cdb_bit(2, 2).into()),
    };
    reply(data, cdb.u32(6) as usize)
}

/// Describes all commands.
fn all(facts: &Facts, with_timeouts: bool) -> Vec<u8> {
    let mut data = vec![0; 4];
    for row in TABLE.iter().filter(|row| row.is_available(facts)) {
        let action = row.action.unwrap_or(0).to_be_bytes();
        let flags = u8::from(with_timeouts) << 1 | u8::from(row.action.is_some());
        let length = (row.usage.len() as u16).saturating_add(1);
        data.extend([row.opcode, 0]);
        data.extend(action);
        data.extend([0, flags]);
        data.extend(length.to_be_bytes());
        if with_timeouts {
            data.extend(TIMEOUTS);
        }
    }
    let length = (data.len() as u32).saturating_sub(4);
    data.splice(..4, length.to_be_bytes());
    data
}

/// Describes one command; `None` is one that is not supported.
fn one(row: Option<&Row>, with_timeouts: bool) -> Vec<u8> {
    let Some(row) = row else {
        return vec![0, 1, 0, 0];
    };
    let usage = usage(row);
    let mut data = vec![0, u8::from(with_timeouts) << 7 | 3];
    data.extend((usage.len() as u16).to_be_bytes());
    data.extend(usage);
    if with_timeouts {
        data.extend(TIMEOUTS);
    }
    data
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cdb_is_as_long_as_its_opcode_says() {
        for row in TABLE {
            let length = match row.opcode >> 5 {
                0 => 6,
                1 | 2 => 10,
                4 => 16,
                5 => 12,
                group => panic!("{:02x} is in group {group}", row.opcode),
            };
            assert_eq!(row.usage.len() + 1, length, "{:02x}", row.opcode);
            assert_eq!(row.usage.last(), Some(&4), "{:02x}", row.opcode);
        }
    }

    #[test]
    fn an_opcode_has_either_service_actions_or_one_row() {
        for (index, row) in TABLE.iter().enumerate() {
            for other in &TABLE[index + 1..] {
                assert!(row.opcode <= other.opcode);
                assert!(
                    row.opcode != other.opcode || row.action.is_some() && row.action < other.action
                );
            }
        }
    }

    #[test]
    fn every_row_is_found_by_its_opcode() {
        for row in TABLE {
            assert!(rows(row.opcode).any(|found| found.action == row.action));
        }
        let count: usize = (0..=255).map(|opcode| rows(opcode).count()).sum();
        assert_eq!(count, TABLE.len());
    }

    #[test]
    fn every_kind_has_a_name() {
        assert_eq!(KINDS.len(), Kind::Other as usize + 1);
    }
}
