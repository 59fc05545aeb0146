// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use super::*;
use crate::event::{ABS_MT_SLOT, EV_LED, EV_REL, EV_REP, EV_SND};

const KEY_A: u16 = 30;
const KEY_B: u16 = 48;
const ABS_X: u16 = 0;
const REL_X: u16 = 0;
const MT_X: u16 = 0x35;
const MT_TOOL: u16 = 0x37;

fn key(code: u16, value: i32) -> Event {
    Event::new(EV_KEY, code, value)
}

fn abs(code: u16, value: i32) -> Event {
    Event::new(EV_ABS, code, value)
}

fn motion() -> Event {
    Event::new(EV_REL, REL_X, 1)
}

fn state(events: &[Event]) -> State {
    let mut state = State::default();
    events.iter().for_each(|event| state.apply(*event));
    state
}

/// Returns a queue for a guest that knows the state of an idle device.
fn reports() -> Reports {
    let mut reports = Reports::new(false, Suspended::default());
    reports.resync(State::default());
    assert_eq!(reports.next(), None);
    reports
}

/// Pushes a whole report.
fn push(reports: &mut Reports, events: &[Event]) {
    events.iter().for_each(|event| reports.push(*event));
    reports.push(Event::REPORT);
}

/// Returns the events that a guest with this number of buffers receives.
fn take(reports: &mut Reports, buffers: usize) -> Vec<Event> {
    let mut events = Vec::new();
    while events.len() < buffers
        && let Some(event) = reports.next()
    {
        events.push(event);
        reports.pop();
    }
    events
}

fn take_all(reports: &mut Reports) -> Vec<Event> {
    take(reports, usize::MAX)
}

/// Pushes motion until reports are dropped. Returns the number of queued reports, of two events each.
fn fill(reports: &mut Reports) -> usize {
    for _ in 0..CAPACITY {
        push(reports, &[motion()]);
    }
    CAPACITY / 2
}

#[test]
fn only_whole_reports_are_forwarded() {
    let mut reports = reports();
    reports.push(key(KEY_A, 1));
    reports.push(motion());
    assert_eq!(reports.next(), None);
    reports.push(Event::REPORT);
    let expected = [key(KEY_A, 1), motion(), Event::REPORT];
    assert_eq!(take_all(&mut reports), expected);
    assert_eq!(reports.next(), None);
}

#[test]
fn an_event_stays_until_the_guest_has_received_it() {
    let mut reports = reports();
    push(&mut reports, &[key(KEY_A, 1)]);
    assert_eq!(reports.next(), Some(key(KEY_A, 1)));
    assert_eq!(reports.next(), Some(key(KEY_A, 1)));
    reports.pop();
    assert_eq!(reports.next(), Some(Event::REPORT));
}

#[test]
fn settings_of_the_guest_are_not_reported_back() {
    let mut reports = reports();
    for kind in [EV_LED, EV_SND, EV_REP, 0x15, 0x16, 0x17] {
        push(&mut reports, &[Event::new(kind, 0, 1)]);
    }
    assert_eq!(reports.next(), None, "no empty reports either");
    push(&mut reports, &[Event::new(EV_LED, 0, 1), motion()]);
    assert_eq!(take_all(&mut reports), [motion(), Event::REPORT]);
}

#[test]
fn repeat_events_are_not_forwarded_to_a_guest_that_repeats_keys() {
    let repeated = [key(KEY_A, KEY_REPEATED)];
    let mut reports = reports();
    push(&mut reports, &repeated);
    assert_eq!(take_all(&mut reports), [repeated[0], Event::REPORT]);
    reports.repeats_keys = true;
    push(&mut reports, &repeated);
    assert_eq!(take_all(&mut reports), []);
}

#[test]
fn a_new_guest_gets_the_state() {
    let mut reports = Reports::new(false, Suspended::default());
    push(&mut reports, &[key(KEY_B, 1)]);
    assert_eq!(reports.next(), None, "an event before the state was read");
    reports.resync(state(&[key(KEY_A, 1), abs(ABS_X, 5)]));
    let expected = [key(KEY_A, 1), abs(ABS_X, 5), Event::REPORT];
    assert_eq!(take_all(&mut reports), expected);
}

#[test]
fn whole_reports_are_dropped_beyond_the_capacity() {
    let mut reports = reports();
    let kept = fill(&mut reports);
    push(&mut reports, &[key(KEY_A, 1)]);
    push(&mut reports, &[key(KEY_B, 1)]);
    push(&mut reports, &[key(KEY_B, 0)]);
    let events = take(&mut reports, 2 * kept);
    assert_eq!(events, [motion(), Event::REPORT].repeat(kept));
    assert_eq!(
        take_all(&mut reports),
        [key(KEY_A, 1), Event::REPORT],
        "the key that is still held, in a report of its own"
    );
    push(&mut reports, &[key(KEY_A, 0)]);
    assert_eq!(take_all(&mut reports), [key(KEY_A, 0), Event::REPORT]);
}

#[test]
fn a_key_released_while_reports_were_dropped_is_released() {
    let mut reports = reports();
    push(&mut reports, &[key(KEY_A, 1), abs(ABS_X, 1)]);
    fill(&mut reports);
    push(&mut reports, &[key(KEY_A, 0), abs(ABS_X, 7)]);
    let events = take_all(&mut reports);
    assert!(events.starts_with(&[key(KEY_A, 1), abs(ABS_X, 1), Event::REPORT]));
    assert!(events.ends_with(&[
        motion(),
        Event::REPORT,
        key(KEY_A, 0),
        abs(ABS_X, 7),
        Event::REPORT
    ]));
    assert!(events.len() <= CAPACITY + 3);
}

#[test]
fn reports_are_dropped_until_the_queue_is_empty() {
    let mut reports = reports();
    let kept = fill(&mut reports);
    take(&mut reports, kept);
    push(&mut reports, &[key(KEY_A, 1)]);
    push(&mut reports, &[motion()]);
    take(&mut reports, kept);
    assert_eq!(take_all(&mut reports), [key(KEY_A, 1), Event::REPORT]);
    push(&mut reports, &[motion()]);
    assert_eq!(take_all(&mut reports), [motion(), Event::REPORT]);
}

#[test]
fn changes_are_not_sent_in_the_middle_of_a_report() {
    let mut reports = reports();
    fill(&mut reports);
    reports.push(key(KEY_A, 1));
    let events = take_all(&mut reports);
    assert_eq!(events.last(), Some(&Event::REPORT));
    assert!(!events.contains(&key(KEY_A, 1)));
    reports.push(abs(ABS_X, 3));
    reports.push(Event::REPORT);
    let expected = [key(KEY_A, 1), abs(ABS_X, 3), Event::REPORT];
    assert_eq!(take_all(&mut reports), expected);
}

#[test]
fn an_endless_report_is_dropped_and_uses_no_memory() {
    let mut reports = reports();
    for value in 0..10 * CAPACITY as i32 {
        reports.push(abs(ABS_X, value));
    }
    assert_eq!(reports.next(), None);
    assert!(reports.report.len() <= CAPACITY);
    reports.push(Event::REPORT);
    let last = abs(ABS_X, 10 * CAPACITY as i32 - 1);
    assert_eq!(take_all(&mut reports), [last, Event::REPORT]);
}

#[test]
fn a_report_of_the_whole_capacity_is_forwarded() {
    let mut reports = reports();
    push(&mut reports, &vec![motion(); CAPACITY - 1]);
    assert_eq!(take_all(&mut reports).len(), CAPACITY);
    push(&mut reports, &vec![motion(); CAPACITY]);
    assert_eq!(take_all(&mut reports), [], "one event too many");
}

#[test]
fn events_are_ignored_after_syn_dropped_until_the_state_is_read() {
    let mut reports = reports();
    push(&mut reports, &[key(KEY_A, 1)]);
    reports.push(key(KEY_B, 1));
    reports.push(Event::new(EV_SYN, SYN_DROPPED, 0));
    assert!(reports.is_dropping());
    push(&mut reports, &[key(31, 1)]);
    push(&mut reports, &[key(KEY_A, 0)]);
    assert_eq!(take_all(&mut reports), [key(KEY_A, 1), Event::REPORT]);
    assert!(reports.is_dropping());
    reports.resync(state(&[key(31, 1)]));
    let expected = [key(KEY_A, 0), key(31, 1), Event::REPORT];
    assert_eq!(take_all(&mut reports), expected);
    push(&mut reports, &[key(31, 0)]);
    assert_eq!(take_all(&mut reports), [key(31, 0), Event::REPORT]);
}

#[test]
fn an_unplugged_device_releases_keys_and_touches() {
    let mut reports = reports();
    let touch = [
        abs(ABS_MT_SLOT, 1),
        abs(ABS_MT_TRACKING_ID, 7),
        abs(MT_X, 5),
    ];
    push(&mut reports, &[key(KEY_A, 1), key(KEY_B, 1)]);
    push(&mut reports, &touch);
    push(&mut reports, &[key(KEY_B, 0)]);
    reports.push(motion());
    take(&mut reports, 1);
    reports.unplug();
    let events = take_all(&mut reports);
    assert_eq!(
        events[..2],
        [key(KEY_B, 1), Event::REPORT],
        "the rest of a partly received report"
    );
    let expected = [key(KEY_A, 0), abs(ABS_MT_TRACKING_ID, -1), Event::REPORT];
    assert!(events.ends_with(&expected), "{events:?}");
    assert!(!events.contains(&motion()), "an incomplete report");
    reports.unplug();
    assert_eq!(reports.next(), None);
}

#[test]
fn a_device_that_returns_reports_its_changes() {
    let mut reports = reports();
    push(&mut reports, &[key(KEY_A, 1), abs(ABS_X, 5)]);
    take_all(&mut reports);
    reports.unplug();
    take_all(&mut reports);
    reports.drop_events();
    push(&mut reports, &[key(31, 1)]);
    reports.resync(state(&[key(KEY_B, 1), abs(ABS_X, 5)]));
    assert_eq!(take_all(&mut reports), [key(KEY_B, 1), Event::REPORT]);
}

#[test]
fn a_restarted_queue_sends_the_whole_state() {
    let mut reports = reports();
    push(&mut reports, &[key(KEY_A, 1), key(KEY_B, 1), abs(ABS_X, 5)]);
    take_all(&mut reports);
    push(&mut reports, &[motion()]);
    reports.stop();
    push(&mut reports, &[motion()]);
    push(&mut reports, &[key(KEY_B, 0)]);
    let expected = [key(KEY_A, 1), key(KEY_B, 0), abs(ABS_X, 5), Event::REPORT];
    assert_eq!(take_all(&mut reports), expected);
}

#[test]
fn a_partly_received_report_continues_when_the_queue_restarts() {
    let mut reports = reports();
    push(&mut reports, &[motion(), key(KEY_A, 1)]);
    push(&mut reports, &[key(KEY_B, 1)]);
    assert_eq!(take(&mut reports, 1), [motion()]);
    reports.stop();
    let expected = [
        key(KEY_A, 1),
        Event::REPORT,
        key(KEY_A, 1),
        key(KEY_B, 1),
        Event::REPORT,
    ];
    assert_eq!(take_all(&mut reports), expected);
}

#[test]
fn reports_of_touches_are_forwarded_unchanged() {
    let mut reports = reports();
    let touches = [
        abs(ABS_MT_SLOT, 0),
        abs(ABS_MT_TRACKING_ID, 1),
        abs(MT_X, 5),
        abs(ABS_MT_SLOT, 1),
        abs(ABS_MT_TRACKING_ID, 2),
        abs(MT_X, 6),
    ];
    push(&mut reports, &touches);
    push(&mut reports, &[abs(MT_X, 7)]);
    push(&mut reports, &[abs(ABS_MT_TRACKING_ID, -1)]);
    push(&mut reports, &[abs(ABS_MT_TRACKING_ID, 3), abs(MT_X, 9)]);
    let expected = [
        &touches[..],
        &[Event::REPORT, abs(MT_X, 7), Event::REPORT],
        &[abs(ABS_MT_TRACKING_ID, -1), Event::REPORT],
        &[abs(ABS_MT_TRACKING_ID, 3), abs(MT_X, 9), Event::REPORT],
    ];
    assert_eq!(take_all(&mut reports), expected.concat());
}

#[test]
fn a_new_touch_includes_unchanged_axes_of_its_slot() {
    let before = [
        abs(ABS_MT_SLOT, 1),
        abs(MT_TOOL, 2),
        abs(MT_X, 5),
        abs(ABS_MT_SLOT, 0),
    ];
    let mut reports = Reports::new(false, Suspended::default());
    reports.resync(state(&before));
    assert_eq!(take_all(&mut reports), [abs(ABS_MT_SLOT, 0), Event::REPORT]);
    // The kernel reports only axes that have changed, which does not include the tool.
    let touch = [
        abs(ABS_MT_SLOT, 1),
        abs(ABS_MT_TRACKING_ID, 7),
        abs(MT_X, 8),
    ];
    push(&mut reports, &touch);
    let expected = [&touch[..], &[abs(MT_TOOL, 2), Event::REPORT]].concat();
    assert_eq!(take_all(&mut reports), expected);
    push(&mut reports, &[abs(ABS_MT_TRACKING_ID, -1)]);
    push(&mut reports, &[abs(ABS_MT_TRACKING_ID, 8)]);
    let expected = [-1, 8].map(|id| [abs(ABS_MT_TRACKING_ID, id), Event::REPORT]);
    assert_eq!(take_all(&mut reports), expected.concat(), "only once");
}

#[test]
fn the_guest_gets_the_touches_after_reports_were_dropped() {
    let mut reports = reports();
    push(
        &mut reports,
        &[
            abs(ABS_MT_SLOT, 0),
            abs(ABS_MT_TRACKING_ID, 1),
            abs(MT_X, 5),
            abs(ABS_MT_SLOT, 1),
            abs(ABS_MT_TRACKING_ID, 2),
            abs(MT_X, 6),
        ],
    );
    fill(&mut reports);
    push(&mut reports, &[abs(ABS_MT_TRACKING_ID, -1)]);
    push(
        &mut reports,
        &[
            abs(ABS_MT_SLOT, 0),
            abs(MT_X, 50),
            abs(ABS_MT_SLOT, 2),
            abs(ABS_MT_TRACKING_ID, 3),
            abs(MT_X, 7),
        ],
    );
    let expected = [
        abs(ABS_MT_SLOT, 0),
        abs(MT_X, 50),
        abs(ABS_MT_SLOT, 1),
        abs(ABS_MT_TRACKING_ID, -1),
        abs(ABS_MT_SLOT, 2),
        abs(ABS_MT_TRACKING_ID, 3),
        abs(MT_X, 7),
        Event::REPORT,
    ];
    let events = take_all(&mut reports);
    assert!(events.ends_with(&expected), "{:?}", &events[CAPACITY - 4..]);
}
