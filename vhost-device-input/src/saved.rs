// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The device state for migration and snapshots. It does not contain the state of keys, because the destination has
//! another device. When the queue starts there, the guest receives the state of every key that it knows, so that no key
//! sticks.

use serde::{Deserialize, Serialize};
use vhost_device_common::device::StateError;

use crate::config::Selection;
use crate::event::{Event, FORWARDED_TYPES};
use crate::report::Suspended;
use crate::state::{Control, State};

/// The device state, version 1.
#[derive(Debug, Serialize, Deserialize)]
pub struct Saved {
    selection: Selection,
    /// The controls whose state the guest knows.
    controls: Vec<Control>,
    /// The rest of a report that the guest has partly received.
    pending: Vec<Event>,
}

impl Saved {
    /// Creates the state to save.
    pub fn new(selection: Selection, suspended: &Suspended) -> Self {
        Self {
            selection,
            controls: suspended.guest.controls().collect(),
            pending: suspended.pending.clone(),
        }
    }

    /// Checks a decoded state.
    ///
    /// # Errors
    /// The state is invalid.
    pub fn check(self) -> Result<(Selection, Suspended), StateError> {
        if !self.controls.iter().all(Control::is_valid) {
            return Err(StateError::Contents("an invalid control"));
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
            return Err(StateError::Contents("an invalid rest of a report"));
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
    fn a_key_held_at_the_source_is_released_after_the_rest_of_the_report() {
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
    fn an_invalid_state_is_refused() {
        let pending = |events: &[Event]| Suspended {
            guest: State::default(),
            pending: events.to_vec(),
        };
        let key = Event::new(EV_KEY, 30, 1);
        assert!(loaded(&pending(&[key, Event::REPORT])).is_ok());
        assert!(loaded(&pending(&[key])).is_err());
        assert!(loaded(&pending(&[Event::REPORT, Event::REPORT])).is_err());
        let led = Event::new(EV_LED, 0, 1);
        assert!(loaded(&pending(&[led, Event::REPORT])).is_err());
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
