// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! RESERVE and PERSISTENT RESERVE.

use super::*;

const THIRD: Nexus = Nexus(3);
const READY: [u8; 6] = [0; 6];

/// PERSISTENT RESERVE OUT with a type.
fn out(action: u8, kind: u8) -> [u8; 10] {
    [0x5f, action, kind, 0, 0, 0, 0, 0, 24, 0]
}

/// Its parameter list.
fn keys(key: u64, other: u64, flags: u8) -> Vec<u8> {
    let mut list = [key.to_be_bytes(), other.to_be_bytes()].concat();
    list.extend([0, 0, 0, 0, flags, 0, 0, 0]);
    list
}

/// PERSISTENT RESERVE IN. Returns what comes after PRGENERATION.
fn read(rig: &Rig, action: u8) -> Vec<u8> {
    let data = rig.ok(THIRD, &[0x5e, action, 0, 0, 0, 0, 0, 4, 0, 0], &[]);
    data[4..].to_vec()
}

fn rig() -> Rig {
    let rig = Rig::new();
    rig.attention(THIRD);
    rig
}

fn register(rig: &Rig, nexus: Nexus, key: u64) {
    rig.ok(nexus, &out(6, 0), &keys(0, key, 0));
}

#[test]
fn reserve_keeps_others_out_until_release_or_a_reset() {
    let rig = rig();
    for (reserve, release) in [(0x16, 0x17), (0x56, 0x57)] {
        rig.ok(FIRST, &[reserve], &[]);
        rig.ok(FIRST, &[reserve], &[]);
        rig.read(0, 1);
        for cdb in [&READY[..], &cdb_10(0x28, 0, 0, 1), &[reserve]] {
            rig.conflicts(SECOND, cdb, &[]);
        }
        rig.ok(SECOND, &[0x12, 0, 0, 0, 36, 0], &[]);
        // It does nothing.
        rig.ok(SECOND, &[release], &[]);
        rig.conflicts(SECOND, &READY, &[]);
        rig.ok(FIRST, &[release], &[]);
        rig.ok(SECOND, &READY, &[]);
    }
    rig.ok(FIRST, &[0x16], &[]);
    rig.unit.nexus_lost(FIRST);
    rig.ok(SECOND, &[0x16], &[]);
    rig.unit.reset();
    rig.attention(FIRST);
    rig.attention(FIRST);
    rig.ok(FIRST, &READY, &[]);
}

#[test]
fn keys_are_registered_changed_and_removed() {
    let rig = rig();
    assert_eq!(read(&rig, 0), [0; 4]);
    rig.conflicts(FIRST, &out(0, 0), &keys(1, 2, 0));
    rig.ok(FIRST, &out(0, 0), &keys(0, 0x11, 0));
    rig.conflicts(FIRST, &out(0, 0), &keys(0, 0x12, 0));
    rig.ok(FIRST, &out(0, 0), &keys(0x11, 0x12, 0));
    rig.ok(SECOND, &out(6, 0), &keys(0xffff, 0x22, 0));
    let expected = [0x12u64.to_be_bytes(), 0x22u64.to_be_bytes()].concat();
    assert_eq!(read(&rig, 0)[4..], expected);
    let data = rig.ok(FIRST, &[0x5e, 0, 0, 0, 0, 0, 0, 0, 8, 0], &[]);
    assert_eq!(data, [0, 0, 0, 3, 0, 0, 0, 16]);
    rig.ok(FIRST, &out(0, 0), &keys(0x12, 0, 0));
    assert_eq!(read(&rig, 0)[4..], expected[8..]);
    // RESERVE is not for those who do it this way.
    rig.conflicts(FIRST, &[0x16], &[]);
}

#[test]
fn reservations_of_every_type_allow_what_the_standard_says() {
    // Type, whether others may read, whether registrants may do all.
    for (kind, reads, registrants) in [
        (1, true, false),
        (3, false, false),
        (5, true, true),
        (6, false, true),
        (7, true, true),
        (8, false, true),
    ] {
        let rig = rig();
        let data = pattern(1, 1);
        register(&rig, FIRST, 1);
        register(&rig, SECOND, 2);
        rig.ok(FIRST, &out(1, kind), &keys(1, 0, 0));
        let (read, write) = (cdb_10(0x28, 0, 0, 1), cdb_10(0x2a, 0, 0, 1));
        for (nexus, may_read, may_write) in [
            (FIRST, true, true),
            (SECOND, reads || registrants, registrants),
            (THIRD, reads, false),
        ] {
            for (cdb, may) in [(read, may_read), (write, may_write)] {
                match may {
                    true => drop(rig.ok(nexus, &cdb, &data)),
                    false => rig.conflicts(nexus, &cdb, &data),
                }
            }
            rig.ok(nexus, &READY, &[]);
            rig.ok(nexus, &[0x12, 0, 0, 0, 36, 0], &[]);
        }
        let held = super::reservations::read(&rig, 1);
        let key = if kind > 6 { 0 } else { 1u64 };
        assert_eq!(held[4..12], key.to_be_bytes());
        assert_eq!(held[17], kind);
        // Nobody else can reserve, or release.
        rig.conflicts(THIRD, &out(1, kind), &keys(0, 0, 0));
        rig.conflicts(
            SECOND,
            &out(1, if kind == 1 { 3 } else { 1 }),
            &keys(2, 0, 0),
        );
        rig.ok(FIRST, &out(2, kind), &keys(1, 0, 0));
        rig.ok(THIRD, &write, &data);
        // Registrants are told that they may, if they could before.
        let told = if registrants { 0x2a04 } else { 0 };
        assert_eq!(rig.attention(SECOND), told, "{kind}");
    }
}

#[test]
fn release_names_the_type_that_was_reserved() {
    let rig = rig();
    register(&rig, FIRST, 1);
    rig.ok(FIRST, &out(2, 1), &keys(1, 0, 0));
    rig.ok(FIRST, &out(1, 1), &keys(1, 0, 0));
    rig.ok(FIRST, &out(1, 1), &keys(1, 0, 0));
    assert_eq!(
        rig.sense(FIRST, &out(2, 3), &keys(1, 0, 0)),
        (ILLEGAL, 0x2604)
    );
    rig.conflicts(FIRST, &out(2, 1), &keys(2, 0, 0));
    rig.conflicts(FIRST, &out(1, 3), &keys(1, 0, 0));
    // Removing the holder's registration releases it too.
    rig.ok(FIRST, &out(0, 0), &keys(1, 0, 0));
    assert_eq!(read(&rig, 1), [0; 4]);
}

#[test]
fn clear_removes_everything_and_tells_the_others() {
    let rig = rig();
    register(&rig, FIRST, 1);
    register(&rig, SECOND, 2);
    rig.ok(FIRST, &out(1, 3), &keys(1, 0, 0));
    rig.conflicts(SECOND, &out(3, 0), &keys(1, 0, 0));
    rig.ok(SECOND, &out(3, 0), &keys(2, 0, 0));
    assert_eq!(rig.attention(FIRST), 0x2a03);
    assert_eq!(rig.attention(SECOND), 0);
    assert_eq!((read(&rig, 0), read(&rig, 1)), (vec![0; 4], vec![0; 4]));
}

#[test]
fn preempt_takes_the_reservation_from_its_holder() {
    for action in [4, 5] {
        let rig = rig();
        for (nexus, key) in [(FIRST, 1), (SECOND, 2), (THIRD, 3)] {
            register(&rig, nexus, key);
        }
        rig.ok(FIRST, &out(1, 5), &keys(1, 0, 0));
        // A key that nobody has, and none.
        rig.conflicts(SECOND, &out(action, 5), &keys(2, 9, 0));
        assert_eq!(
            rig.sense(SECOND, &out(action, 5), &keys(2, 0, 0)),
            (ILLEGAL, 0x2600)
        );
        // Another registration goes, the reservation stays.
        rig.ok(SECOND, &out(action, 5), &keys(2, 3, 0));
        assert_eq!(rig.attention(THIRD), 0x2a05);
        assert_eq!(read(&rig, 1)[11], 1);
        register(&rig, THIRD, 3);
        rig.ok(SECOND, &out(action, 6), &keys(2, 1, 0));
        assert_eq!(rig.attention(FIRST), 0x2a05);
        assert_eq!(rig.attention(THIRD), 0x2a04);
        let held = read(&rig, 1);
        assert_eq!((held[11], held[17]), (2, 6));
        rig.conflicts(FIRST, &cdb_10(0x28, 0, 0, 1), &[]);
    }
}

#[test]
fn preempt_without_a_key_takes_it_from_all_registrants() {
    let rig = rig();
    for (nexus, key) in [(FIRST, 1), (SECOND, 2), (THIRD, 3)] {
        register(&rig, nexus, key);
    }
    rig.ok(FIRST, &out(1, 7), &keys(1, 0, 0));
    rig.ok(SECOND, &out(4, 1), &keys(2, 0, 0));
    assert_eq!(rig.attention(FIRST), 0x2a05);
    assert_eq!(rig.attention(THIRD), 0x2a05);
    assert_eq!(read(&rig, 0)[4..], 2u64.to_be_bytes());
    assert_eq!(read(&rig, 1)[17], 1);
}

#[test]
fn the_last_registrant_takes_a_reservation_of_all_with_it() {
    let rig = rig();
    register(&rig, FIRST, 1);
    register(&rig, SECOND, 2);
    rig.ok(FIRST, &out(1, 8), &keys(1, 0, 0));
    rig.ok(FIRST, &out(0, 0), &keys(1, 0, 0));
    assert_eq!(read(&rig, 1)[17], 8);
    rig.ok(SECOND, &out(0, 0), &keys(2, 0, 0));
    assert_eq!(read(&rig, 1), [0; 4]);
}

#[test]
fn full_status_describes_every_registration() {
    let rig = rig();
    register(&rig, FIRST, 0x11);
    register(&rig, SECOND, 0x22);
    rig.ok(FIRST, &out(1, 5), &keys(0x11, 0, 0));
    let status = read(&rig, 3);
    assert_eq!(status[..4], [0, 0, 0, 96]);
    let (one, other) = status[4..].split_at(48);
    assert_eq!((one[7], one[12], one[13], one[19]), (0x11, 1, 5, 1));
    assert_eq!((other[7], other[12], other[13], other[19]), (0x22, 0, 0, 1));
    assert_eq!(one[20..24], [0, 0, 0, 24]);
    assert_eq!(one[24..36], [6, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
}

#[test]
fn capabilities_name_all_types() {
    let rig = rig();
    assert_eq!(
        rig.ok(FIRST, &[0x5e, 2, 0, 0, 0, 0, 0, 0, 8, 0], &[]),
        [0, 8, 1, 0x90, 0xea, 1, 0, 0]
    );
    rig.ok(FIRST, &out(6, 0), &keys(0, 1, 1));
    assert_eq!(
        rig.ok(FIRST, &[0x5e, 2, 0, 0, 0, 0, 0, 0, 4, 0], &[]),
        [0, 8, 1, 0x91]
    );
}

#[test]
fn a_unit_without_a_place_for_reservations_does_not_claim_that_they_persist() {
    let mut without = facts();
    without.persists = false;
    let rig = Rig::with(without);
    assert_eq!(
        rig.ok(FIRST, &[0x5e, 2, 0, 0, 0, 0, 0, 0, 4, 0], &[]),
        [0, 8, 0, 0x90]
    );
    for action in [0, 6] {
        let list = keys(0, 1, 1);
        assert_eq!(rig.sense(FIRST, &out(action, 0), &list), (ILLEGAL, 0x2600));
    }
    rig.ok(FIRST, &out(0, 0), &keys(0, 1, 0));
}

#[test]
fn parameter_lists_are_checked() {
    let rig = rig();
    let list = keys(0, 1, 0);
    let mut short = out(0, 0);
    short[8] = 23;
    assert_eq!(rig.sense(FIRST, &short, &list), (ILLEGAL, 0x1a00));
    // SPEC_I_PT, ALL_TG_PT.
    for flags in [8, 4] {
        assert_eq!(
            rig.sense(FIRST, &out(0, 0), &keys(0, 1, flags)),
            (ILLEGAL, 0x2600)
        );
    }
    register(&rig, FIRST, 1);
    for kind in [0, 2, 4, 9, 15, 0x11] {
        assert_eq!(
            rig.sense(FIRST, &out(1, kind), &keys(1, 0, 0)),
            (ILLEGAL, 0x2400)
        );
    }
    for action in 7..32 {
        assert_eq!(rig.sense(FIRST, &out(action, 0), &list), (ILLEGAL, 0x2400));
    }
}

#[test]
fn registrations_are_bounded() {
    let rig = rig();
    for number in 0..64 {
        rig.attention(Nexus(100 + number));
        register(&rig, Nexus(100 + number), 1);
    }
    let one_more = rig.sense(FIRST, &out(6, 0), &keys(0, 1, 0));
    assert_eq!(one_more, (ILLEGAL, 0x5504));
    register(&rig, Nexus(100), 2);
}

#[test]
fn reservations_survive_a_restart_if_the_initiator_wants_it() {
    let rig = rig();
    rig.ok(FIRST, &out(6, 0), &keys(0, 1, 0));
    assert!(rig.units.stored.lock().unwrap().is_empty());
    rig.ok(FIRST, &out(6, 0), &keys(0, 0x77, 1));
    rig.ok(FIRST, &out(1, 3), &keys(0x77, 0, 0));
    let stored = rig.units.stored.lock().unwrap().clone();
    let again = Rig::fresh(facts());
    again.unit.load_reservations(&stored).unwrap();
    again.attention(FIRST);
    again.attention(THIRD);
    again.conflicts(THIRD, &cdb_10(0x28, 0, 0, 1), &[]);
    assert_eq!(read(&again, 0)[11], 0x77);
    again.ok(FIRST, &out(2, 3), &keys(0x77, 0, 0));
    // Without registrations there is nothing to store.
    rig.ok(FIRST, &out(3, 0), &keys(0x77, 0, 0));
    assert!(rig.units.stored.lock().unwrap().is_empty());
}

#[test]
fn what_cannot_be_stored_does_not_happen() {
    let rig = rig();
    *rig.units.cannot_store.lock().unwrap() = true;
    assert_eq!(rig.sense(FIRST, &out(6, 0), &keys(0, 1, 1)), (4, 0x4400));
    assert_eq!(read(&rig, 0), [0; 4]);
    register(&rig, FIRST, 1);
}

#[test]
fn stored_reservations_that_make_no_sense_are_refused() {
    let rig = rig();
    rig.ok(FIRST, &out(6, 0), &keys(0, 0x77, 1));
    let stored = rig.units.stored.lock().unwrap().clone();
    let fresh = Rig::fresh(facts());
    assert!(fresh.unit.load_reservations(&[]).is_ok());
    for length in 1..stored.len() {
        assert!(fresh.unit.load_reservations(&stored[..length]).is_err());
    }
    let mut newer = stored.clone();
    newer[0] += 1;
    assert!(fresh.unit.load_reservations(&newer).is_err());
    assert!(fresh.unit.load_reservations(&stored).is_ok());
}
