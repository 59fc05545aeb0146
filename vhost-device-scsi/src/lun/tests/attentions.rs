// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Unit attentions, and what START STOP UNIT and PREVENT ALLOW MEDIUM REMOVAL do.

use super::*;

const READY: [u8; 6] = [0; 6];
const ATTENTION: u8 = 6;
const NOT_READY: u8 = 2;

#[test]
fn each_initiator_is_told_of_the_start_once() {
    let rig = Rig::fresh(facts());
    for nexus in [FIRST, SECOND] {
        // These do not clear it.
        rig.ok(nexus, &[0x12, 0, 0, 0, 36, 0], &[]);
        rig.ok(nexus, &[0xa0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0], &[]);
        assert_eq!(rig.sense(nexus, &READY, &[]), (ATTENTION, 0x2901));
        rig.ok(nexus, &READY, &[]);
    }
    // Alternating initiators.
    for nexus in [FIRST, SECOND, FIRST] {
        rig.ok(nexus, &cdb_10(0x28, 0, 0, 1), &[]);
    }
}

#[test]
fn a_unit_attention_comes_before_other_errors_and_is_delivered_by_request_sense() {
    let rig = Rig::new();
    rig.unit.set_blocks(BLOCKS * 2);
    assert_eq!(rig.sense(FIRST, &[0xff], &[]), (ATTENTION, 0x2a09));
    assert_eq!(rig.sense(FIRST, &[0xff], &[]), (ILLEGAL, 0x2000));
    assert_eq!(rig.attention(SECOND), 0x2a09);
    assert_eq!(rig.attention(SECOND), 0);
    // The same size again.
    rig.unit.set_blocks(BLOCKS * 2);
    rig.ok(FIRST, &READY, &[]);
}

#[test]
fn attentions_come_in_order_and_a_reset_replaces_them() {
    let rig = Rig::new();
    rig.unit.attend(Attention::LunsChanged);
    rig.unit.attend(Attention::CapacityChanged);
    rig.unit.attend(Attention::LunsChanged);
    assert_eq!(rig.sense(FIRST, &READY, &[]), (ATTENTION, 0x3f0e));
    assert_eq!(rig.sense(FIRST, &READY, &[]), (ATTENTION, 0x2a09));
    rig.ok(FIRST, &READY, &[]);
    rig.unit.reset();
    assert_eq!(rig.sense(SECOND, &READY, &[]), (ATTENTION, 0x2903));
    rig.ok(SECOND, &READY, &[]);
    rig.unit.nexus_lost(SECOND);
    assert_eq!(rig.sense(SECOND, &READY, &[]), (ATTENTION, 0x2907));
}

#[test]
fn report_luns_clears_the_attention_that_asks_for_it() {
    let rig = Rig::new();
    rig.unit.attend(Attention::LunsChanged);
    rig.ok(FIRST, &[0xa0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0], &[]);
    rig.ok(FIRST, &READY, &[]);
    assert_eq!(rig.attention(SECOND), 0x3f0e);
}

/// START STOP UNIT.
fn start_stop(flags: u8) -> [u8; 6] {
    [0x1b, 0, 0, 0, flags, 0]
}

#[test]
fn a_unit_that_was_stopped_is_ready_and_its_cache_is_flushed() {
    let rig = Rig::new();
    rig.ok(FIRST, &start_stop(0), &[]);
    assert_eq!(rig.medium.take_log(), ["flush"]);
    rig.ok(FIRST, &READY, &[]);
    // NO_FLUSH, and START.
    rig.ok(FIRST, &start_stop(4), &[]);
    rig.ok(FIRST, &start_stop(1), &[]);
    // Power conditions change nothing.
    for condition in 1..16 {
        rig.ok(FIRST, &start_stop(condition << 4 | 2), &[]);
        rig.ok(FIRST, &READY, &[]);
    }
    assert!(rig.medium.take_log().is_empty());
}

#[test]
fn a_medium_is_ejected_unless_someone_prevents_it() {
    let rig = Rig::new();
    let prevent = |nexus, value| rig.ok(nexus, &[0x1e, 0, 0, 0, value, 0], &[]);
    prevent(SECOND, 1);
    assert_eq!(rig.sense(FIRST, &start_stop(2), &[]), (ILLEGAL, 0x5302));
    rig.ok(FIRST, &READY, &[]);
    prevent(SECOND, 0);
    rig.ok(FIRST, &start_stop(2), &[]);
    for cdb in [
        &READY[..],
        &cdb_10(0x28, 0, 0, 1),
        &cdb_10(0x2a, 0, 0, 1),
        &cdb_10(0x35, 0, 0, 1),
        &cdb_10(0x34, 0, 0, 1),
        &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        &cdb_10(0x42, 0, 0, 24),
    ] {
        assert_eq!(rig.sense(FIRST, cdb, &[0; BLOCK]), (NOT_READY, 0x3a00));
    }
    assert_eq!(rig.attention(FIRST), 0x3a00);
    prevent(SECOND, 1);
    assert_eq!(rig.sense(FIRST, &start_stop(3), &[]), (ILLEGAL, 0x5302));
    prevent(SECOND, 0);
    rig.ok(FIRST, &start_stop(3), &[]);
    rig.read(0, 1);
    assert_eq!(rig.attention(SECOND), 0x2800);
    // A lost nexus prevents nothing.
    prevent(SECOND, 1);
    rig.unit.nexus_lost(SECOND);
    rig.ok(FIRST, &start_stop(2), &[]);
    assert_eq!(
        rig.sense(FIRST, &[0x1e, 0, 0, 0, 2, 0], &[]),
        (ILLEGAL, 0x2400)
    );
}

#[test]
fn a_medium_that_stays_is_not_ejected() {
    let mut fixed = facts();
    fixed.removable = false;
    let rig = Rig::with(fixed);
    assert_eq!(rig.sense(FIRST, &start_stop(2), &[]), (ILLEGAL, 0x2400));
    rig.ok(FIRST, &READY, &[]);
}

#[test]
fn a_migration_takes_all_along() {
    let rig = Rig::new();
    rig.unit.attend(Attention::CapacityChanged);
    rig.ok(SECOND, &[3, 0, 0, 0, 18, 0], &[]);
    rig.unit
        .state
        .with(|saved| saved.modes.write_protect = true);
    rig.unit.state.with(|saved| saved.reserved = Some(SECOND));
    let saved = rig.unit.save();
    let other = Rig::new();
    other.unit.load(saved.clone()).unwrap();
    assert_eq!(other.unit.save(), saved);
    assert_eq!(other.sense(FIRST, &READY, &[]), (ATTENTION, 0x2a09));
    other.conflicts(FIRST, &READY, &[]);
    let data = pattern(1, 1);
    assert_eq!(
        other.sense(SECOND, &cdb_10(0x2a, 0, 0, 1), &data),
        (PROTECTED, 0x2702)
    );
}

#[test]
fn initiators_that_cannot_be_remembered_may_use_the_unit() {
    let rig = Rig::new();
    for number in 10..200 {
        rig.attention(Nexus(number));
        rig.ok(Nexus(number), &cdb_10(0x28, 0, 0, 1), &[]);
    }
    assert!(rig.unit.load(rig.unit.save()).is_ok());
}
