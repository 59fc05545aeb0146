// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! EXTENDED COPY(LID1) between logical units of this program, and RECEIVE COPY RESULTS (SPC-4, 6.4 and 6.18 to 6.24).

use std::ops::Range;
use std::sync::Arc;

use super::answer::{Answer, Failure};
use super::call::{Call, Outcome, good, procedure, reply};
use super::cdb::Fields;
use super::compare::chunks;
use super::medium::{Medium, Peer, Procedure};
use super::registry::Class;
use super::sense::{Key, Sense, code};
use super::state::Copied;
use super::transfer::length;
use super::{LogicalUnit, Nexus};

/// The most CSCD descriptors, and segment descriptors, of one command.
const MAX_DESCRIPTORS: usize = 16;
/// Bytes of the header of the parameter list.
const HEADER: usize = 16;
/// A CSCD descriptor that names a logical unit by a designator, and its bytes.
const IDENTIFICATION: u8 = 0xe4;
const CSCD: usize = 32;
/// A segment descriptor for blocks to blocks, and its bytes.
const BLOCKS_TO_BLOCKS: u8 = 0x02;
const SEGMENT: usize = 28;
/// The most bytes of all descriptors.
const MAX_LIST: usize = MAX_DESCRIPTORS * (CSCD + SEGMENT);
/// The most bytes of one segment.
const MAX_SEGMENT: u32 = 32 << 20;
/// The most copies at once. The pool of the transport limits them further.
const MAX_COPIES: u8 = 16;

/// Where a copy reads or writes.
enum Place {
    Unit(Peer),
    /// It cannot be reached.
    Nowhere,
}

/// A segment as the initiator has described it.
struct Segment {
    source: u16,
    destination: u16,
    blocks: u16,
    from: u64,
    to: u64,
    /// DC: the blocks are those of the destination.
    counts_destination: bool,
}

/// A segment that can be copied.
struct Plan {
    source: Peer,
    destination: Peer,
    from: Range<u64>,
    to: u64,
}

pub fn extended_copy(call: &mut Call<'_>) -> Outcome {
    let list = match call.cdb.u32(10) as usize {
        0 => return good(),
        length => call.parameters(length, HEADER + MAX_LIST)?,
    };
    let fields = Fields(&list);
    let targets = usize::from(fields.u16(2));
    let segments = fields.u32(8) as usize;
    let inline = fields.u32(12) as usize;
    let descriptors = targets.saturating_add(segments);
    let end = descriptors.saturating_add(HEADER);
    if list.len() < HEADER || end.saturating_add(inline) > list.len() || descriptors > MAX_LIST {
        return Err(Sense::illegal(code::PARAMETER_LIST_LENGTH).into());
    }
    let targets = fields.part(HEADER..HEADER.saturating_add(targets));
    let places = parse_targets(call, targets)?;
    let start = HEADER.saturating_add(targets.0.len());
    let segments = parse_segments(fields.part(start..end), start)?;
    if inline > 0 {
        return Err(Sense::illegal(code::INLINE_DATA_LENGTH).into());
    }
    let nexus = call.command.nexus;
    let plans = segments
        .iter()
        .map(|segment| plan(&places, segment, nexus))
        .collect::<Result<Vec<_>, _>>()?;
    // LIST ID USAGE: 0 keeps the result for RECEIVE COPY STATUS.
    let list = (fields.byte(1) >> 3 & 3 == 0).then_some(fields.byte(0));
    let unit = Arc::clone(call.unit);
    let lengths = plans.iter().map(|plan| length(&plan.from));
    let moved = lengths.sum::<u64>().saturating_mul(2);
    let copy = Procedure::new(call.unit, move |medium, _| {
        let mut copied = Copied {
            nexus,
            list: list.unwrap_or(0),
            segments: 0,
            bytes: 0,
            failed: false,
        };
        let outcome = plans
            .iter()
            .try_for_each(|plan| carry_out(plan, medium, &mut copied));
        copied.failed = outcome.is_err();
        if list.is_some() {
            unit.state.with(|saved| saved.copied = Some(copied));
        }
        outcome.map(|()| Answer::good())
    });
    procedure(copy.changing().moving(moved))
}

/// Parses the CSCD descriptors.
fn parse_targets(call: &Call<'_>, list: Fields<'_>) -> Result<Vec<Place>, Failure> {
    let descriptors = list.0.chunks(CSCD);
    if descriptors.len() > MAX_DESCRIPTORS {
        return Err(Sense::illegal(code::TOO_MANY_TARGET_DESCRIPTORS).into());
    }
    let mut places = Vec::with_capacity(descriptors.len());
    for (index, descriptor) in descriptors.enumerate() {
        let at = |byte: usize| (HEADER + index * CSCD + byte) as u16;
        let fields = Fields(descriptor);
        if fields.byte(0) != IDENTIFICATION {
            let sense = Sense::illegal(code::UNSUPPORTED_TARGET_DESCRIPTOR);
            return Err(sense.at(false, at(0), None).into());
        }
        // The device must be one with blocks. LU ID TYPE and NUL are obsolete.
        if descriptor.len() < CSCD || fields.byte(1) & 0x1f != 0 {
            return Err(Sense::parameter(at(1)).into());
        }
        let size = fields.u32(28) & 0x00ff_ffff;
        places.push(match find(call, fields) {
            Some(peer) if peer.unit.facts.block_size == size => Place::Unit(peer),
            Some(_) => return Err(Sense::parameter(at(29)).into()),
            None => Place::Nowhere,
        });
    }
    Ok(places)
}

/// Finds the logical unit that a CSCD descriptor names by its NAA designator.
fn find(call: &Call<'_>, descriptor: Fields<'_>) -> Option<Peer> {
    let is_naa = descriptor.byte(4) & 0x0f == 1 && descriptor.byte(5) & 0x3f == 3;
    let is_whole = descriptor.byte(7) == 8;
    (is_naa && is_whole)
        .then(|| call.target.find(descriptor.u64(8)))
        .flatten()
}

/// Parses the segment descriptors, which begin at `start` of the parameter list.
fn parse_segments(list: Fields<'_>, start: usize) -> Result<Vec<Segment>, Failure> {
    let mut segments = Vec::new();
    let mut at = 0;
    while at < list.0.len() {
        let fields = Fields(list.0.get(at..).unwrap_or_default());
        let pointer = |byte: usize| (start + at + byte) as u16;
        if fields.byte(0) != BLOCKS_TO_BLOCKS {
            let sense = Sense::illegal(code::UNSUPPORTED_SEGMENT_DESCRIPTOR);
            return Err(sense.at(false, pointer(0), None).into());
        }
        if usize::from(fields.u16(2)) != SEGMENT - 4 || fields.0.len() < SEGMENT {
            return Err(Sense::parameter(pointer(2)).into());
        }
        if segments.len() >= MAX_DESCRIPTORS {
            return Err(Sense::illegal(code::TOO_MANY_SEGMENT_DESCRIPTORS).into());
        }
        segments.push(Segment {
            source: fields.u16(4),
            destination: fields.u16(6),
            blocks: fields.u16(10),
            from: fields.u64(12),
            to: fields.u64(20),
            counts_destination: fields.bit(1, 1),
        });
        at += SEGMENT;
    }
    Ok(segments)
}

/// COPY ABORTED.
fn aborted(code: u16) -> Failure {
    Sense::new(Key::CopyAborted, code).into()
}

/// Returns the unit with this index.
fn place(places: &[Place], index: u16) -> Result<&Peer, Failure> {
    match places.get(usize::from(index)) {
        Some(Place::Unit(peer)) => Ok(peer),
        Some(Place::Nowhere) => Err(aborted(code::COPY_TARGET_NOT_REACHABLE)),
        None => Err(aborted(code::UNREACHABLE_COPY_TARGET)),
    }
}

/// Checks a segment before any of them is copied.
fn plan(places: &[Place], segment: &Segment, nexus: Nexus) -> Result<Plan, Failure> {
    let source = place(places, segment.source)?;
    let destination = place(places, segment.destination)?;
    let [from_size, to_size] =
        [source, destination].map(|peer| u64::from(peer.unit.facts.block_size));
    let unit = if segment.counts_destination {
        to_size
    } else {
        from_size
    };
    let length = u64::from(segment.blocks).saturating_mul(unit);
    let from = segment.from.checked_mul(from_size);
    let to = segment.to.checked_mul(to_size);
    let is_whole = length.is_multiple_of(from_size) && length.is_multiple_of(to_size);
    let is_short = length <= u64::from(MAX_SEGMENT);
    let (Some(from), Some(to), true) = (from, to, is_whole && is_short) else {
        return Err(aborted(code::NONE));
    };
    let has = |peer: &Peer, start: u64, size: u64| {
        let end = start.checked_add(length);
        end.is_some_and(|end| end <= peer.unit.blocks().saturating_mul(size))
    };
    if !has(source, from, from_size) || !has(destination, to, to_size) {
        return Err(aborted(code::NONE));
    }
    check(&source.unit, nexus, Class::Read)?;
    check(&destination.unit, nexus, Class::Write)?;
    destination.unit.check_writable()?;
    Ok(Plan {
        source: source.clone(),
        destination: destination.clone(),
        from: from..from.saturating_add(length),
        to,
    })
}

/// Checks that a unit is ready, and that reservations let the initiator use it.
fn check(unit: &LogicalUnit, nexus: Nexus, class: Class) -> Result<(), Failure> {
    let is_usable = unit
        .state
        .with(|saved| !saved.ejected && super::allows(saved, nexus, class).is_ok());
    match is_usable {
        true => Ok(()),
        false => Err(aborted(code::COPY_TARGET_NOT_REACHABLE)),
    }
}

/// Copies a segment. `medium` is that of the command, which says whether the command was aborted.
fn carry_out(plan: &Plan, medium: &dyn Medium, copied: &mut Copied) -> Result<(), Failure> {
    let failed = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::Interrupted => Sense::new(Key::AbortedCommand, code::NONE).into(),
        _ => aborted(code::NONE),
    };
    // If the destination overlaps the source from behind, the end goes first, as it would be overwritten.
    let mut parts: Vec<(u64, usize)> = chunks(plan.from.clone()).collect();
    if plan.to > plan.from.start {
        parts.reverse();
    }
    let mut buffer = Vec::new();
    for (offset, length) in parts {
        medium.check().map_err(failed)?;
        buffer.resize(length, 0);
        plan.source
            .medium
            .read(offset, &mut buffer)
            .map_err(failed)?;
        let to = plan
            .to
            .saturating_add(offset.saturating_sub(plan.from.start));
        plan.destination.medium.write(to, &buffer).map_err(failed)?;
        copied.bytes = copied.bytes.saturating_add(length as u64);
    }
    if plan.destination.unit.state.is_write_through() && length(&plan.from) > 0 {
        plan.destination.medium.flush().map_err(failed)?;
    }
    copied.segments = copied.segments.saturating_add(1);
    Ok(())
}

/// RECEIVE COPY STATUS(LID1) (SPC-4, 6.24).
pub fn status(call: &mut Call<'_>) -> Outcome {
    let (nexus, list) = (call.command.nexus, call.cdb.byte(2));
    let state = &call.unit.state;
    let copied = state.with(|saved| saved.take_copy(nexus, list));
    let copied = copied.ok_or(Sense::cdb(2))?;
    // COPY MANAGER STATUS: completed with or without errors.
    let mut data = vec![0, 0, 0, 8, if copied.failed { 2 } else { 1 }];
    data.extend(copied.segments.to_be_bytes());
    data.push(1); // TRANSFER COUNT UNITS: KiB
    data.extend(
        u32::try_from(copied.bytes >> 10)
            .unwrap_or(u32::MAX)
            .to_be_bytes(),
    );
    reply(data, call.cdb.u32(10) as usize)
}

/// RECEIVE COPY FAILURE DETAILS(LID1) (SPC-4, 6.22): the sense data of the command had all of them.
pub fn failed_segment_details(call: &mut Call<'_>) -> Outcome {
    reply(vec![0; 4], call.cdb.u32(10) as usize)
}

/// RECEIVE COPY OPERATING PARAMETERS (SPC-4, 6.23).
pub fn operating_parameters(call: &mut Call<'_>) -> Outcome {
    let mut data = vec![0; 8];
    data.extend((MAX_DESCRIPTORS as u16).to_be_bytes());
    data.extend((MAX_DESCRIPTORS as u16).to_be_bytes());
    data.extend((MAX_LIST as u32).to_be_bytes());
    data.extend(MAX_SEGMENT.to_be_bytes());
    // MAXIMUM INLINE DATA LENGTH, HELD DATA LIMIT, MAXIMUM STREAM DEVICE TRANSFER SIZE.
    data.extend([0; 12]);
    data.extend([0, 0, 0, MAX_COPIES, MAX_COPIES]);
    // Granularity of segments, inline data and held data, as powers of two.
    data.extend([9, 0, 0, 0, 0, 0]);
    data.extend([2, BLOCKS_TO_BLOCKS, IDENTIFICATION]);
    let length = (data.len() as u32).saturating_sub(4);
    data.splice(..4, length.to_be_bytes());
    reply(data, call.cdb.u32(10) as usize)
}

/// Returns the third-party copy page of vital product data (SPC-4, 7.8.17).
pub fn vital_product_data() -> Vec<u8> {
    let mut data = Vec::new();
    let mut descriptor = |kind: u16, body: &[u8]| {
        let padding = body.len().next_multiple_of(4);
        data.extend(kind.to_be_bytes());
        data.extend((padding as u16).to_be_bytes());
        data.extend(body);
        data.extend(std::iter::repeat_n(0, padding - body.len()));
    };
    // Supported commands: opcodes, each with its service actions.
    descriptor(0x0001, &[8, 0x83, 1, 0x00, 0x84, 3, 0x00, 0x03, 0x04]);
    let count = (MAX_DESCRIPTORS as u16).to_be_bytes();
    let list = (MAX_LIST as u32).to_be_bytes();
    let parameters = [&[0; 8], &count[..], &count, &list, &[0; 12]].concat();
    descriptor(0x0004, &parameters);
    descriptor(0x0008, &[2, BLOCKS_TO_BLOCKS, IDENTIFICATION]);
    // Supported CSCD identifiers: none besides indexes.
    descriptor(0x000c, &[0, 0]);
    let copies = u32::from(MAX_COPIES).to_be_bytes();
    let segment = MAX_SEGMENT.to_be_bytes();
    let general = [&copies[..], &copies, &segment, &[9], &[0; 19]].concat();
    descriptor(0x8001, &general);
    data
}
