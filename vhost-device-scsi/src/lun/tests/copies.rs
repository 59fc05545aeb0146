// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! EXTENDED COPY and its results.

use super::*;

const ABORTED: u8 = 10;

/// A CSCD descriptor for a unit.
fn place(naa: u64) -> Vec<u8> {
    let mut descriptor = vec![0xe4, 0, 0, 0, 1, 3, 0, 8];
    descriptor.extend(naa.to_be_bytes());
    descriptor.resize(29, 0);
    descriptor.extend([0, 2, 0]);
    descriptor
}

/// A segment descriptor: source, destination, blocks, from, to.
fn segment(source: u16, destination: u16, blocks: u16, from: u64, to: u64) -> Vec<u8> {
    let mut descriptor = vec![2, 0, 0, 24];
    descriptor.extend(source.to_be_bytes());
    descriptor.extend(destination.to_be_bytes());
    descriptor.extend([0, 0]);
    descriptor.extend(blocks.to_be_bytes());
    descriptor.extend(from.to_be_bytes());
    descriptor.extend(to.to_be_bytes());
    descriptor
}

/// A parameter list. `usage` 0 keeps the result.
fn list(id: u8, usage: u8, places: &[Vec<u8>], segments: &[Vec<u8>]) -> Vec<u8> {
    let (places, segments) = (places.concat(), segments.concat());
    let mut list = vec![id, usage << 3];
    list.extend((places.len() as u16).to_be_bytes());
    list.extend([0; 4]);
    list.extend((segments.len() as u32).to_be_bytes());
    list.extend([0; 4]);
    [list, places, segments].concat()
}

fn cdb(length: usize) -> [u8; 16] {
    cdb_16(0x83, 0, length as u32)
}

#[track_caller]
fn refused(rig: &Rig, list: &[u8], expected: (u8, u16)) {
    assert_eq!(rig.sense(FIRST, &cdb(list.len()), list), expected);
}

/// RECEIVE COPY STATUS.
fn status(id: u8) -> [u8; 16] {
    let mut cdb = cdb_16(0x84, 0, 100);
    cdb[2] = id;
    cdb
}

#[test]
fn blocks_are_copied_within_a_unit_even_if_they_overlap() {
    for (from, to) in [(0, 5000), (1000, 10), (10, 1000), (0, 1)] {
        let rig = Rig::new();
        let data = pattern(2048, 3);
        rig.write(from, &data);
        let list = list(1, 2, &[place(NAA)], &[segment(0, 0, 2048, from, to)]);
        rig.ok(FIRST, &cdb(list.len()), &list);
        assert!(rig.read(to, 2048) == data, "{from} {to}");
    }
}

#[test]
fn blocks_are_copied_to_another_unit() {
    let rig = Rig::new();
    let mut other = facts();
    other.identity.naa = NAA + 1;
    let peer = Peer {
        unit: Arc::new(LogicalUnit::new(other, BLOCKS)),
        medium: Arc::new(Memory::new(BLOCKS as usize * BLOCK)),
    };
    rig.units.peers.lock().unwrap().push(peer.clone());
    let data = pattern(10, 3);
    rig.write(0, &data);
    let places = [place(NAA), place(NAA + 1)];
    let list = list(
        7,
        0,
        &places,
        &[segment(0, 1, 4, 0, 9), segment(0, 1, 6, 4, 20)],
    );
    rig.ok(FIRST, &cdb(list.len()), &list);
    let mut copied = vec![0; 10 * BLOCK];
    peer.medium.read(9 * 512, &mut copied[..4 * BLOCK]).unwrap();
    peer.medium
        .read(20 * 512, &mut copied[4 * BLOCK..])
        .unwrap();
    assert_eq!(copied, data);
    assert_eq!(
        rig.ok(FIRST, &status(7), &[]),
        [0, 0, 0, 8, 1, 0, 2, 1, 0, 0, 0, 5]
    );
    // It is told once, and not after another command.
    assert_eq!(rig.sense(FIRST, &status(7), &[]), (ILLEGAL, 0x2400));
    rig.ok(FIRST, &cdb(list.len()), &list);
    rig.ok(SECOND, &[0; 6], &[]);
    rig.ok(FIRST, &[0; 6], &[]);
    assert_eq!(rig.sense(FIRST, &status(7), &[]), (ILLEGAL, 0x2400));
    // A unit that is reserved cannot be reached.
    peer.unit.state.with(|saved| saved.reserved = Some(SECOND));
    refused(&rig, &list, (ABORTED, 0x0d02));
}

#[test]
fn parameter_lists_that_end_too_early_are_refused() {
    let rig = Rig::new();
    let whole = list(1, 0, &[place(NAA)], &[segment(0, 0, 1, 0, 9)]);
    for length in 1..whole.len() {
        assert_eq!(rig.sense(FIRST, &cdb(length), &whole), (ILLEGAL, 0x1a00));
    }
    rig.ok(FIRST, &cdb(0), &[]);
    assert_eq!(rig.sense(FIRST, &status(1), &[]), (ILLEGAL, 0x2400));
}

#[test]
fn descriptors_are_bounded_as_the_operating_parameters_say() {
    let rig = Rig::new();
    let mut cdb = cdb_16(0x84, 0, 100);
    cdb[1] = 3;
    let parameters = rig.ok(FIRST, &cdb, &[]);
    assert_eq!(parameters.len(), 4 + usize::from(parameters[3]));
    let most = usize::from(parameters[9]);
    assert_eq!(parameters[11], most as u8);
    let (places, segments) = (
        vec![place(NAA); most + 1],
        vec![segment(0, 0, 1, 0, 9); most + 1],
    );
    refused(
        &rig,
        &list(1, 0, &places, &segments[..1]),
        (ILLEGAL, 0x2606),
    );
    refused(
        &rig,
        &list(1, 0, &places[..1], &segments),
        (ILLEGAL, 0x2608),
    );
    refused(&rig, &list(1, 0, &places, &segments), (ILLEGAL, 0x1a00));
    let list = list(1, 0, &places[..most], &segments[..most]);
    rig.ok(FIRST, &super::copies::cdb(list.len()), &list);
}

#[test]
fn descriptors_of_other_kinds_are_refused() {
    let rig = Rig::new();
    let with = |at: usize, value: u8| {
        let mut list = list(1, 0, &[place(NAA)], &[segment(0, 0, 1, 0, 9)]);
        list[at] = value;
        list
    };
    refused(&rig, &with(16, 0xe0), (ILLEGAL, 0x2607));
    refused(&rig, &with(16 + 1, 0x01), (ILLEGAL, 0x2600));
    refused(&rig, &with(16 + 30, 4), (ILLEGAL, 0x2600));
    refused(&rig, &with(48, 0x03), (ILLEGAL, 0x2609));
    refused(&rig, &with(48 + 3, 23), (ILLEGAL, 0x2600));
    // A designator that no unit has.
    refused(&rig, &with(16 + 15, 0xee), (ABORTED, 0x0d02));
    // Indexes beyond the descriptors.
    refused(&rig, &with(48 + 5, 1), (ABORTED, 0x0804));
    refused(&rig, &with(48 + 7, 1), (ABORTED, 0x0804));
    assert!(rig.medium.take_log().is_empty());
}

#[test]
fn nothing_is_copied_if_any_segment_reaches_beyond_the_end() {
    let rig = Rig::new();
    for (from, to) in [
        (BLOCKS - 1, 0),
        (0, BLOCKS - 1),
        (u64::MAX, 0),
        (0, u64::MAX),
    ] {
        let segments = [segment(0, 0, 2, 0, 9), segment(0, 0, 2, from, to)];
        refused(&rig, &list(1, 0, &[place(NAA)], &segments), (ABORTED, 0));
    }
    assert!(rig.medium.take_log().is_empty());
}

#[test]
fn a_copy_that_fails_says_how_far_it_came() {
    let rig = Rig::new();
    *rig.medium.error.lock().unwrap() = Some(io::ErrorKind::Other);
    refused(
        &rig,
        &list(3, 0, &[place(NAA)], &[segment(0, 0, 2, 0, 9)]),
        (ABORTED, 0),
    );
    assert_eq!(rig.ok(FIRST, &status(3), &[])[4..7], [2, 0, 0]);
}

#[test]
fn a_segment_is_no_longer_than_the_operating_parameters_say() {
    let mut large = facts();
    large.block_size = 4096;
    let rig = Rig::with(large);
    let mut operating_parameters = cdb_16(0x84, 0, 100);
    operating_parameters[1] = 3;
    let parameters = rig.ok(FIRST, &operating_parameters, &[]);
    let most = u32::from_be_bytes(parameters[16..20].try_into().unwrap()) / 4096;
    rig.unit.set_blocks(1 << 30);
    rig.attention(FIRST);
    let mut place = place(NAA);
    place[30] = 0x10;
    for (blocks, is_allowed) in [(most, true), (most + 1, false)] {
        let segment = segment(0, 0, blocks as u16, 0, 1 << 20);
        let list = list(1, 2, std::slice::from_ref(&place), &[segment]);
        let step = rig.start(FIRST, &cdb(list.len()), &mut Buffer(&list), 0);
        assert_eq!(matches!(step, Step::Procedure(_)), is_allowed, "{blocks}");
    }
}

#[test]
fn an_aborted_copy_between_other_units_ends() {
    let rig = Rig::new();
    let mut other = facts();
    other.identity.naa = NAA + 1;
    let memory = Arc::new(Memory::new(BLOCKS as usize * BLOCK));
    let peer = Peer {
        unit: Arc::new(LogicalUnit::new(other, BLOCKS)),
        medium: memory.clone(),
    };
    rig.units.peers.lock().unwrap().push(peer);
    let list = list(1, 2, &[place(NAA + 1)], &[segment(0, 0, 2048, 0, 4096)]);
    *rig.medium.error.lock().unwrap() = Some(io::ErrorKind::Interrupted);
    refused(&rig, &list, (0x0b, 0));
    assert!(memory.take_log().is_empty());
}

#[test]
fn a_copy_changes_and_moves_all_segments_twice() {
    let rig = Rig::new();
    let segments = [segment(0, 0, 3, 0, 9), segment(0, 0, 2, 0, 20)];
    let list = list(1, 2, &[place(NAA)], &segments);
    let step = rig.start(FIRST, &cdb(list.len()), &mut Buffer(&list), 0);
    let Step::Procedure(procedure) = step else {
        panic!("no procedure");
    };
    assert!(procedure.changes());
    assert_eq!(procedure.bytes(), 10 * BLOCK as u64);
}
