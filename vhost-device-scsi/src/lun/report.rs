// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Reports: capacity, logical units, task management functions, target port groups, defects.

use super::answer::Answer;
use super::attention::Attention;
use super::call::{Call, Outcome, reply};
use super::cdb::Fields;
use super::inquiry::{self, TARGET_PORT};
use super::medium::Target;
use super::sense::{Key, Sense, code};
use super::{Command, Step};

/// READ CAPACITY(10) (SBC-3, 5.15).
pub fn read_capacity_10(call: &mut Call<'_>) -> Outcome {
    let is_partial = call.cdb.bit(8, 0);
    if !is_partial && call.cdb.u32(2) != 0 {
        return Err(Sense::cdb(2).into());
    }
    let last = call.unit.blocks().saturating_sub(1);
    // All ones send the initiator to READ CAPACITY(16).
    let last = u32::try_from(last).unwrap_or(u32::MAX);
    let parts = [last.to_be_bytes(), call.facts().block_size.to_be_bytes()];
    reply(parts.concat(), usize::MAX)
}

/// READ CAPACITY(16) (SBC-3, 5.16).
pub fn read_capacity_16(call: &mut Call<'_>) -> Outcome {
    let facts = call.facts();
    let last = call.unit.blocks().saturating_sub(1);
    let ratio = facts.physical_block_size / facts.block_size.max(1);
    let mut data = last.to_be_bytes().to_vec();
    data.extend(facts.block_size.to_be_bytes());
    let provisioning = facts.provisioning.map_or(0, |unmap| {
        // LBPME, LBPRZ
        0x80 | u8::from(unmap.reads_zeroes) << 6
    });
    data.extend([0, ratio.max(1).ilog2() as u8 & 0x0f, provisioning]);
    data.resize(32, 0);
    reply(data, call.cdb.u32(10) as usize)
}

/// REPORT LUNS (SPC-4, 6.33).
pub fn luns(call: &mut Call<'_>) -> Outcome {
    let nexus = call.command.nexus;
    let state = &call.unit.state;
    state.with(|saved| saved.forget(nexus, Attention::LunsChanged));
    let data = list_luns(call.cdb, &**call.target)?;
    reply(data, call.cdb.u32(6) as usize)
}

/// The well-known logical unit of REPORT LUNS.
const REPORT_LUNS: [u8; 8] = [0xc1, 0x01, 0, 0, 0, 0, 0, 0];

fn list_luns(cdb: Fields<'_>, target: &dyn Target) -> Result<Vec<u8>, Sense> {
    // SELECT REPORT: addressable, well-known, all.
    let (units, well_known) = match cdb.byte(2) {
        0 => (target.luns(), false),
        1 => (Vec::new(), true),
        2 => (target.luns(), true),
        _ => return Err(Sense::cdb(2)),
    };
    let mut list = Vec::with_capacity(units.len().saturating_add(2).saturating_mul(8));
    list.resize(8, 0);
    if well_known {
        list.extend(REPORT_LUNS);
    }
    for lun in units {
        // Flat space addressing from 256 on (SAM-5, 4.7.7).
        let [high, low] = lun.to_be_bytes();
        let method = if lun < 256 { 0 } else { 0x40 };
        list.extend([method | high & 0x3f, low, 0, 0, 0, 0, 0, 0]);
    }
    let length = (list.len() as u32).saturating_sub(8);
    list.splice(..4, length.to_be_bytes());
    Ok(list)
}

/// The first byte of INQUIRY data where there is no logical unit: qualifier 3, type 1F.
pub const ABSENT: u8 = 0x7f;
/// The first byte of INQUIRY data of a well-known logical unit.
pub const WELL_KNOWN: u8 = 0x1e;

/// Answers a command for something that is no block device.
pub fn without_unit(command: &Command<'_>, target: &dyn Target, first: u8) -> Answer {
    let cdb = Fields(command.cdb);
    let missing = Sense::illegal(code::LOGICAL_UNIT_NOT_SUPPORTED);
    let data = |data: Vec<u8>, allocation: usize| reply(data, allocation);
    let outcome = match (cdb.byte(0), first) {
        (0x12, _) if cdb.byte(1) & 3 == 0 && cdb.byte(2) == 0 => {
            data(inquiry::standard(first, None), cdb.u16(3).into())
        }
        (0x12, _) => Err(Sense::cdb_bit(1, 0).into()),
        (0xa0, _) => match list_luns(cdb, target) {
            Ok(list) => data(list, cdb.u32(6) as usize),
            Err(sense) => Err(sense.into()),
        },
        (0x03, ABSENT) => data(missing.to_bytes(cdb.bit(1, 0)), cdb.byte(4).into()),
        (0x03, _) => {
            let sense = Sense::new(Key::NoSense, code::NONE);
            data(sense.to_bytes(cdb.bit(1, 0)), cdb.byte(4).into())
        }
        (_, ABSENT) => Err(missing.into()),
        (0x00, _) => Ok(Step::Done(Answer::good())),
        _ => Err(Sense::illegal(code::INVALID_OPCODE).into()),
    };
    match outcome {
        Ok(Step::Done(answer)) => answer,
        Ok(_) => Answer::good(),
        Err(failure) => failure.answer(false),
    }
}

/// REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS (SPC-4, 6.36).
pub fn task_management_functions(call: &mut Call<'_>) -> Outcome {
    // ABORT TASK, ABORT TASK SET, CLEAR TASK SET, LOGICAL UNIT RESET, QUERY TASK; QUERY TASK SET, I_T NEXUS RESET.
    let mut data = vec![0xdc, 0x03, 0, 0];
    if call.cdb.bit(2, 7) {
        data.splice(3.., [12]);
        data.resize(16, 0);
    }
    reply(data, call.cdb.u32(6) as usize)
}

/// REPORT TARGET PORT GROUPS (SPC-4, 6.37): one group of one port, active.
pub fn target_port_groups(call: &mut Call<'_>) -> Outcome {
    let port = TARGET_PORT.to_be_bytes();
    let mut groups = vec![0x80, 0x01]; // PREF, active/optimized; AO_SUP
    groups.extend(port);
    groups.extend([0, 0, 0, 1, 0, 0]);
    groups.extend(port);
    let length = (groups.len() as u32).to_be_bytes();
    let mut data = length.to_vec();
    match call.cdb.byte(1) >> 5 {
        0 => {}
        // The extended header.
        1 => {
            let length = (groups.len() as u32).saturating_add(4).to_be_bytes();
            data = length.to_vec();
            data.extend([0x10, 0, 0, 0]);
        }
        _ => return Err(Sense::cdb_bit(1, 7).into()),
    }
    data.extend(groups);
    reply(data, call.cdb.u32(6) as usize)
}

/// READ DEFECT DATA(10) (SBC-3, 5.13): the host takes care of defects.
pub fn defects_10(call: &mut Call<'_>) -> Outcome {
    let asked = call.cdb.byte(2) & 0x1f;
    reply(vec![0, asked, 0, 0], call.cdb.u16(7).into())
}

/// READ DEFECT DATA(12) (SBC-3, 5.14).
pub fn defects_12(call: &mut Call<'_>) -> Outcome {
    let asked = call.cdb.byte(1) & 0x1f;
    let data = vec![0, asked, 0, 0, 0, 0, 0, 0];
    reply(data, call.cdb.u32(6) as usize)
}
