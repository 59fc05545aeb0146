// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Logical block provisioning: UNMAP, WRITE SAME and GET LBA STATUS (SBC-3, 4.7 and 5).

use std::sync::Arc;

use super::LogicalUnit;
use super::answer::{Answer, Failure};
use super::call::{Call, Outcome, action, good, procedure};
use super::cdb::Fields;
use super::compare::chunks;
use super::medium::{Action, Facts, Medium, Procedure};
use super::sense::{Sense, code};
use super::transfer::{Blocks, check_protect, length};

/// The most block descriptors of UNMAP (MAXIMUM UNMAP BLOCK DESCRIPTOR COUNT).
pub const MAX_DESCRIPTORS: usize = 256;
/// The most blocks that this program offers to unmap at once.
const MAX_UNMAP: u32 = 1 << 20;

/// Bytes of the header of the parameter list of UNMAP, and of its descriptors.
const HEADER: usize = 8;
const DESCRIPTOR: usize = 16;

/// The most extents that GET LBA STATUS returns.
const MAX_EXTENTS: usize = 256;

/// Returns MAXIMUM UNMAP LBA COUNT.
pub fn max_unmap_blocks(facts: &Facts) -> u32 {
    let blocks = facts
        .provisioning
        .map_or(0, |unmap| unmap.max_bytes / u64::from(facts.block_size));
    u32::try_from(blocks).map_or(MAX_UNMAP, |blocks| blocks.min(MAX_UNMAP))
}

/// Returns MAXIMUM WRITE SAME LENGTH.
pub fn max_same_blocks(facts: &Facts) -> u64 {
    facts.max_zero_bytes / u64::from(facts.block_size)
}

/// UNMAP (SBC-3, 5.30).
pub fn unmap(call: &mut Call<'_>) -> Outcome {
    if call.cdb.bit(1, 0) {
        // ANCHOR is not supported.
        return Err(Sense::cdb_bit(1, 0).into());
    }
    let list = match usize::from(call.cdb.u16(7)) {
        0 => return good(),
        length => call.parameters(length, usize::from(u16::MAX))?,
    };
    if list.len() < HEADER {
        return Err(Sense::illegal(code::PARAMETER_LIST_LENGTH).into());
    }
    // What is beyond either length does not count, and neither does a part of a descriptor.
    let given = usize::from(Fields(&list).u16(2));
    let descriptors = Fields(&list).part(HEADER..HEADER + given).0;
    let descriptors = descriptors.chunks_exact(DESCRIPTOR);
    if descriptors.len() > MAX_DESCRIPTORS {
        return Err(Sense::parameter(2).into());
    }
    let mut ranges = Vec::with_capacity(descriptors.len());
    let mut left = u64::from(max_unmap_blocks(call.facts()));
    for (index, descriptor) in descriptors.enumerate() {
        let fields = Fields(descriptor);
        let blocks = Blocks::of_descriptor(fields);
        let bytes = blocks.bytes(call.unit)?;
        let Some(rest) = left.checked_sub(blocks.count) else {
            let at = HEADER + index * DESCRIPTOR + 8;
            return Err(Sense::parameter(at as u16).into());
        };
        left = rest;
        if !bytes.is_empty() {
            ranges.push(bytes);
        }
    }
    match ranges.is_empty() {
        true => good(),
        false => action(Action::Unmap(ranges)),
    }
}

/// WRITE SAME (SBC-3, 5.46): one block of data, for all blocks.
fn write_same(call: &mut Call<'_>, blocks: Blocks, without_data: bool) -> Outcome {
    check_protect(call.cdb)?;
    if call.cdb.bit(1, 4) {
        // ANCHOR is not supported.
        return Err(Sense::cdb_bit(1, 4).into());
    }
    let unmap = call.cdb.bit(1, 3);
    if unmap && call.facts().provisioning.is_none() {
        return Err(Sense::cdb_bit(1, 3).into());
    }
    let bytes = blocks.bytes_up_to(call.unit, call.facts().max_zero_bytes)?;
    if bytes.is_empty() {
        // WSNZ. SBC-2 let 0 mean all blocks to the end; that would take too long.
        return Err(Sense::cdb(blocks.count_at()).into());
    }
    let size = call.facts().block_size as usize;
    let mut block = vec![0; size];
    if !without_data {
        if call.command.data_out != size as u64 {
            return Err(Sense::cdb(blocks.count_at()).into());
        }
        block = call.parameters(size, size)?;
    }
    // FUA is not a field of WRITE SAME.
    let stable = call.unit.state.is_write_through();
    if block.iter().all(|byte| *byte == 0) {
        return action(Action::Zero {
            range: bytes,
            unmap,
            stable,
        });
    }
    let unit = Arc::clone(call.unit);
    let moved = length(&bytes);
    let write = Procedure::new(call.unit, move |medium, _| {
        let mut pattern = Vec::new();
        for (offset, length) in chunks(bytes.clone()) {
            if pattern.len() != length {
                pattern = block.repeat(length / size);
            }
            let written = medium.write(offset, &pattern);
            unit.check_medium(written, offset, false)?;
        }
        if stable {
            unit.check_medium(medium.flush(), bytes.start, false)?;
        }
        Ok(Answer::good())
    });
    procedure(write.changing().moving(moved))
}

pub fn write_same_10(call: &mut Call<'_>) -> Outcome {
    // PBDATA and LBDATA, which are obsolete.
    if call.cdb.byte(1) & 0x06 != 0 {
        return Err(Sense::cdb_bit(1, 2).into());
    }
    write_same(call, Blocks::of_10(call.cdb), false)
}

pub fn write_same_16(call: &mut Call<'_>) -> Outcome {
    if call.cdb.byte(1) & 0x06 != 0 {
        return Err(Sense::cdb_bit(1, 2).into());
    }
    let without_data = call.cdb.bit(1, 0);
    write_same(call, Blocks::of_16(call.cdb), without_data)
}

/// PROVISIONING STATUS of GET LBA STATUS.
const MAPPED: u8 = 0;
const DEALLOCATED: u8 = 1;

/// GET LBA STATUS (SBC-3, 5.3).
pub fn lba_status(call: &mut Call<'_>) -> Outcome {
    let first = call.cdb.u64(2);
    let allocation = call.cdb.u32(10);
    let blocks = call.unit.blocks();
    if first >= blocks {
        return Err(Sense::illegal(code::LBA_OUT_OF_RANGE)
            .with_information(first)
            .into());
    }
    let room = (allocation as usize).saturating_sub(HEADER) / DESCRIPTOR;
    let most = room.clamp(1, MAX_EXTENTS);
    let unit = Arc::clone(call.unit);
    procedure(Procedure::new(call.unit, move |medium, _| {
        let mut data = vec![0; HEADER];
        for extent in extents(&unit, medium, first, blocks, most)? {
            data.extend(extent.first.to_be_bytes());
            data.extend(extent.count.to_be_bytes());
            data.extend([extent.status, 0, 0, 0]);
        }
        let length = (data.len() as u32).saturating_sub(4);
        data.splice(..4, length.to_be_bytes());
        data.truncate(allocation as usize);
        Ok(Answer::data(data))
    }))
}

/// Blocks with the same status.
struct Status {
    first: u64,
    count: u32,
    status: u8,
}

/// Finds out the status of blocks from `first` on.
fn extents(
    unit: &LogicalUnit,
    medium: &dyn Medium,
    first: u64,
    end: u64,
    most: usize,
) -> Result<Vec<Status>, Failure> {
    let size = u64::from(unit.facts.block_size);
    let mut list: Vec<Status> = Vec::new();
    let mut next = first;
    // A file may be in as many pieces as it has blocks, so the number of steps has a bound of its own.
    for _ in 0..most.saturating_mul(2) {
        if next >= end {
            break;
        }
        let left = u32::try_from(end - next).unwrap_or(u32::MAX);
        let (count, status) = match unit.facts.provisioning {
            None => (left, MAPPED),
            Some(_) => status(unit, medium, next.saturating_mul(size), left)?,
        };
        let is_full = list.len() >= most;
        match list.last_mut() {
            Some(last) if last.status == status && last.count.checked_add(count).is_some() => {
                last.count += count;
            }
            _ if is_full => break,
            _ => list.push(Status {
                first: next,
                count,
                status,
            }),
        }
        next = next.saturating_add(count.into());
    }
    Ok(list)
}

/// Finds out the status of at most `left` blocks at `offset`. Blocks that are a hole in part are mapped.
fn status(
    unit: &LogicalUnit,
    medium: &dyn Medium,
    offset: u64,
    left: u32,
) -> Result<(u32, u8), Failure> {
    let size = u64::from(unit.facts.block_size);
    let blocks = |count: u64| u32::try_from(count).map_or(left, |count| count.min(left));
    match medium.extent(offset) {
        Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {
            Err(unit.medium_failure(&error, None, true).into())
        }
        Ok(extent) if !extent.is_mapped && extent.length >= size => {
            Ok((blocks(extent.length / size), DEALLOCATED))
        }
        Ok(extent) => Ok((blocks(extent.length.div_ceil(size).max(1)), MAPPED)),
        Err(_) => Ok((left, MAPPED)),
    }
}
