// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What another device must know to go on with a guest. Not the state of the keys here, which is that of other keys there:
//! the guest is told those when its queue starts, beginning with all that it was ever told of, so that no key sticks.

use serde::{Deserialize, Serialize};
use vhost_device_common::device::StateError;

use crate::config::Selection;
use crate::event::{Event, FORWARDED_TYPES};
use crate::report::Suspended;
use crate::state::{Control, State};

/// The state of the device, version 1.
#[derive(Debug, Serialize, Deserialize)]
pub struct Saved {
    selection: Selection,
    /// What the guest was told of.
    controls: Vec<Control>,
    /// The end of a report whose beginning the guest has.
    pending: Vec<Event>,
}

impl Saved {
    pub fn new(selection: Selection, suspended: &Suspended) -> Self {
        Self {
            selection,
            controls: suspended.guest.controls().collect(),
            pending: suspended.pending.clone(),
        }
    }

    /// What was saved, if it can be so.
    pub fn check(self) -> Result<(Selection, Suspended), StateError> {
        if !self.controls.iter().all(Control::is_valid) {
            return Err(StateError::Contents("a control that keeps no value"));
        }
        let is_end = match self.pending.split_last() {
            Some((last, rest)) => last.is_report() && !rest.iter().any(Event::is_report),
            None => true,
        };
        let are_for_guest = self
            .pending
            .iter()
            .all(|event| FORWARDED_TYPES.contains(&event.kind));
        if !is_end || !are_for_guest {
            return Err(StateError::Contents("an end of a report that is none"));
        }
        let suspended = Suspended {
            guest: State::unknown(self.controls),
            pending: self.pending,
        };
        Ok((self.selection, suspended))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{EV_ABS, EV_KEY, EV_LED, EV_REL};
    use crate::report::Reports;
    use vhost_device_common::state::{decode, encode};

    fn state_of(events: &[(u16, u16, i32)]) -> State {
        let mut state = State::default();
        for (kind, code, value) in events {
            state.apply(Event::new(*kind, *code, *value));
        }
        state
    }

    fn loaded(suspended: &Suspended) -> Result<Suspended, StateError> {
        let bytes = encode(&Saved::new(Selection::default(), suspended))?;
        Ok(decode::<Saved>(&bytes)?.check()?.1)
    }

    #[test]
    fn a_key_that_was_held_there_is_let_go_of_here_after_the_report_that_had_begun() {
        let mut reports = Reports::new(false, Suspended::default());
        reports.resync(state_of(&[]));
        reports.sync_guest();
        let press = [(EV_KEY, 30, 1), (EV_KEY, 48, 1), (0, 0, 0)];
        for (kind, code, value) in press {
            reports.push(Event::new(kind, code, value));
        }
        assert_eq!(reports.next(), Some(Event::new(EV_KEY, 30, 1)));
        reports.pop();
        let suspended = loaded(&reports.stop()).unwrap();

        let mut reports = Reports::new(false, suspended);
        reports.resync(state_of(&[(EV_KEY, 48, 1)]));
        let mut seen = Vec::new();
        while let Some(event) = reports.next() {
            reports.pop();
            seen.push(event);
        }
        let expected = [
            Event::new(EV_KEY, 48, 1),
            Event::REPORT,
            Event::new(EV_KEY, 30, 0),
            Event::new(EV_KEY, 48, 1),
            Event::REPORT,
        ];
        assert_eq!(seen, expected);
    }

    #[test]
    fn touches_keep_their_slots() {
        let state = state_of(&[(EV_ABS, 0x2f, 3), (EV_ABS, 0x39, 7), (EV_ABS, 0x35, 9)]);
        let suspended = loaded(&Suspended {
            guest: state.clone(),
            pending: Vec::new(),
        })
        .unwrap();
        let mut forgotten = state;
        forgotten.forget();
        assert_eq!(suspended.guest, forgotten);
    }

    #[test]
    fn what_can_not_be_so_is_refused() {
        let pending = |events: &[Event]| Suspended {
            guest: State::default(),
            pending: events.to_vec(),
        };
        let key = Event::new(EV_KEY, 30, 1);
        assert!(loaded(&pending(&[key, Event::REPORT])).is_ok());
        assert!(loaded(&pending(&[key])).is_err());
        assert!(loaded(&pending(&[Event::REPORT, Event::REPORT])).is_err());
        let light = Event::new(EV_LED, 0, 1);
        assert!(loaded(&pending(&[light, Event::REPORT])).is_err());
        let wrong: [(Option<i32>, u16, u16); 5] = [
            (None, EV_REL, 0),
            (None, EV_ABS, 0x35),
            (None, EV_ABS, 0x2f),
            (Some(0), EV_KEY, 30),
            (Some(0), EV_ABS, 0),
        ];
        for control in wrong {
            let control = encode(&control).unwrap();
            let control: Control = decode(&control).unwrap();
            assert!(!control.is_valid(), "{control:?}");
        }
    }
}
