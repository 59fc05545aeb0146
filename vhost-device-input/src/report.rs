// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Puts events together to whole reports, keeps these for a guest that is slow, and drops whole ones
//! when there are too many. After that it makes a report of its own, from what the guest was told and
//! what is so, before all else goes on.

use std::collections::VecDeque;

use vhost_device_common::warn_limited;

use crate::event::{
    ABS_MT_TRACKING_ID, EV_ABS, EV_KEY, EV_SYN, Event, FORWARDED_TYPES, KEY_REPEATED, SYN_DROPPED,
};
use crate::state::State;

/// Most events that wait for the guest, and most of one report. A keyboard fills this in minutes, a
/// mouse that reports a thousand times a second in a third of one.
pub const CAPACITY: usize = 1024;

/// What is left of a guest whose queue has stopped.
#[derive(Clone, Debug, Default)]
pub struct Suspended {
    /// The controls that it was told of.
    pub guest: State,
    /// The end of a report whose beginning it has.
    pub pending: Vec<Event>,
}

/// The reports on their way to the guest.
#[derive(Debug, Default)]
pub struct Reports {
    /// What the device's controls are, as far as events were read.
    current: State,
    /// What the guest believes when it has got all that waits.
    guest: State,
    /// The beginning of the report that is being read.
    report: Vec<Event>,
    /// Whole reports; the beginning of the first may be gone to the guest.
    pending: VecDeque<Event>,
    /// The first event that waits is not the first of its report.
    mid_report: bool,
    /// `guest` has to become `current` before any more reports are let through.
    must_sync: bool,
    /// Events were lost: none count until the state was asked for.
    is_dropping: bool,
    /// The device repeats held keys. The guest, who knows of that, does so itself.
    repeats_keys: bool,
}

impl Reports {
    /// For a guest that knows no more than what is `suspended`, of a device whose state has yet to be asked for.
    pub fn new(repeats_keys: bool, suspended: Suspended) -> Self {
        Self {
            guest: suspended.guest,
            mid_report: !suspended.pending.is_empty(),
            pending: suspended.pending.into(),
            must_sync: true,
            is_dropping: true,
            repeats_keys,
            ..Self::default()
        }
    }

    /// Takes in the next event of the device.
    pub fn push(&mut self, event: Event) {
        if (event.kind, event.code) == (EV_SYN, SYN_DROPPED) {
            self.drop_events();
        }
        if self.is_dropping {
            return;
        }
        match event.kind {
            EV_KEY if self.repeats_keys && event.value == KEY_REPEATED => return,
            kind if FORWARDED_TYPES.contains(&kind) => {}
            _ => return,
        }
        self.current.apply(event);
        if self.report.len() < CAPACITY {
            self.report.push(event);
        } else {
            self.start_dropping();
        }
        if event.is_report() {
            self.finish_report();
        }
    }

    fn finish_report(&mut self) {
        let mut report = std::mem::take(&mut self.report);
        if !self.must_sync && self.pending.len() + report.len() > CAPACITY {
            self.start_dropping();
        }
        // What was left out can leave nothing but the end.
        if !self.must_sync && report.len() > 1 {
            self.forward(&report);
        }
        report.clear();
        self.report = report;
    }

    /// Has a whole report wait for the guest.
    fn forward(&mut self, report: &[Event]) {
        report.iter().for_each(|event| self.guest.apply(*event));
        self.pending.extend(report);
        let begins_touch = |event: &Event| {
            (event.kind, event.code) == (EV_ABS, ABS_MT_TRACKING_ID) && event.value >= 0
        };
        if report.iter().any(begins_touch) {
            // What was left out while there was no touch.
            let more = self.current.differences(&self.guest);
            if !more.is_empty() {
                let end = self.pending.pop_back();
                more.iter().for_each(|event| self.guest.apply(*event));
                self.pending.extend(more);
                self.pending.extend(end);
            }
        }
    }

    fn start_dropping(&mut self) {
        if !self.must_sync {
            self.must_sync = true;
            warn_limited(format_args!(
                "the guest does not fetch its input events; new ones are dropped until it has"
            ));
        }
    }

    /// Events were lost, or are old.
    pub fn drop_events(&mut self) {
        self.is_dropping = true;
    }

    /// Whether events were lost, so that the state must be asked for with [`Reports::resync`] after
    /// all events there are have been read.
    pub fn is_dropping(&self) -> bool {
        self.is_dropping
    }

    /// The device's state is `current`: it was asked for, all events before it have been read.
    pub fn resync(&mut self, current: State) {
        self.current = current;
        self.report.clear();
        self.is_dropping = false;
        self.must_sync = true;
    }

    /// The device is gone, and with it the hands on its keys.
    pub fn unplug(&mut self) {
        let mut current = std::mem::take(&mut self.current);
        current.release_all();
        self.resync(current);
    }

    /// The queue stops. The guest, if it is the same one, waits for the end of a report whose beginning
    /// it has; it, or another, is told all else anew when the queue starts. Gives what another device must know to do so.
    pub fn stop(&mut self) -> Suspended {
        let end = self.pending.iter().position(Event::is_report);
        let keep = end.filter(|_| self.mid_report).map_or(0, |end| end + 1);
        self.pending.truncate(keep);
        self.guest.forget();
        self.must_sync = true;
        Suspended {
            guest: self.guest.clone(),
            pending: self.pending.iter().copied().collect(),
        }
    }

    /// If what the guest was told differs from what is so, has it told before all else, as soon as
    /// nothing waits any more. From then on reports are let through again.
    pub fn sync_guest(&mut self) {
        if self.must_sync && self.pending.is_empty() && self.report.is_empty() && !self.is_dropping
        {
            self.must_sync = false;
            let changes = self.current.differences(&self.guest);
            if !changes.is_empty() {
                changes.iter().for_each(|event| self.guest.apply(*event));
                self.pending.extend(changes);
                self.pending.push_back(Event::REPORT);
            }
        }
    }

    /// The next event for the guest.
    pub fn next(&mut self) -> Option<Event> {
        self.sync_guest();
        self.pending.front().copied()
    }

    /// The guest has got the next event.
    pub fn pop(&mut self) {
        if let Some(event) = self.pending.pop_front() {
            self.mid_report = !event.is_report();
        }
    }
}

#[cfg(test)]
mod tests;
