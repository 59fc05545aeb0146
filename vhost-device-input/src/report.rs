// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Collects events into whole reports and queues them for the guest. If the guest is too slow, drops whole reports; later
//! sends one report with all changes since.

use std::collections::VecDeque;

use vhost_device_common::warn_limited;

use crate::event::{
    ABS_MT_TRACKING_ID, EV_ABS, EV_KEY, EV_SYN, Event, FORWARDED_TYPES, KEY_REPEATED, SYN_DROPPED,
};
use crate::state::State;

/// Most events in the queue, and in one report. A keyboard fills it in minutes, a mouse with 1000 reports a second in a
/// third of a second.
pub const CAPACITY: usize = 1024;

/// What the next handler needs when the event queue has stopped.
#[derive(Clone, Debug, Default)]
pub struct Suspended {
    /// The state that the guest knows.
    pub guest: State,
    /// The rest of a report that the guest has partly received.
    pub pending: Vec<Event>,
}

/// The queue of reports for the guest.
#[derive(Debug, Default)]
pub struct Reports {
    /// The state of the device after all events that were read.
    current: State,
    /// The state that the guest knows once it has received all pending events.
    guest: State,
    /// The events of the report that is being read.
    report: Vec<Event>,
    /// Whole reports. The guest may have received a part of the first one.
    pending: VecDeque<Event>,
    /// Whether the guest has received a part of the first report.
    mid_report: bool,
    /// Whether the guest must receive the changes from `guest` to `current` before further reports.
    must_sync: bool,
    /// Whether events are ignored until the device state has been read, because some were lost.
    is_dropping: bool,
    /// Whether the device repeats held keys. The guest then repeats them itself.
    repeats_keys: bool,
}

impl Reports {
    /// Creates a queue for a guest that knows what `suspended` holds. The device state must be read first.
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

    /// Takes the next event of the device.
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
        // Without the events that are not forwarded, only the end of the report may remain.
        if !self.must_sync && report.len() > 1 {
            self.forward(&report);
        }
        report.clear();
        self.report = report;
    }

    /// Queues a whole report.
    fn forward(&mut self, report: &[Event]) {
        report.iter().for_each(|event| self.guest.apply(*event));
        self.pending.extend(report);
        let begins_touch = |event: &Event| {
            (event.kind, event.code) == (EV_ABS, ABS_MT_TRACKING_ID) && event.value >= 0
        };
        if report.iter().any(begins_touch) {
            // Axes of the slot that changed while it had no touch.
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
                "the guest does not fetch its input events; dropping new ones until it does"
            ));
        }
    }

    /// Ignores events until the next [`Reports::resync`], because some were lost or are outdated.
    pub fn drop_events(&mut self) {
        self.is_dropping = true;
    }

    /// Returns whether events are ignored. The caller must then read all pending events, read the device state, and
    /// call [`Reports::resync`].
    pub fn is_dropping(&self) -> bool {
        self.is_dropping
    }

    /// Sets the device state. It must include all events pushed so far.
    pub fn resync(&mut self, current: State) {
        self.current = current;
        self.report.clear();
        self.is_dropping = false;
        self.must_sync = true;
    }

    /// Releases all keys and ends all touches, because the device was unplugged.
    pub fn unplug(&mut self) {
        let mut current = std::mem::take(&mut self.current);
        current.release_all();
        self.resync(current);
    }

    /// Stops the queue and returns what the next one needs. The guest still receives the rest of a partly received
    /// report; everything else is sent as changes when the queue starts, whether the guest is the same or not.
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

    /// Queues the changes that the guest must receive, once no reports are pending. Further reports are forwarded from
    /// then on.
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

    /// Returns the next event for the guest.
    pub fn next(&mut self) -> Option<Event> {
        self.sync_guest();
        self.pending.front().copied()
    }

    /// Removes the next event, because the guest has received it.
    pub fn pop(&mut self) {
        if let Some(event) = self.pending.pop_front() {
            self.mid_report = !event.is_report();
        }
    }
}

#[cfg(test)]
mod tests;
