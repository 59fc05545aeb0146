// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What another device must know to go on with a guest. Not the state of the keys here, which is that of other keys there:
//! the guest is told those when its queue starts, beginning with all that it was ever told of, so that no key sticks.

use serde::{Deserialize, Serialize};
use vhost_device_common::device::StateError;

use crate::config::Selection;
use crate::event::{Event, FORWARDED_TYPES};
use crate::report::Left;
use crate::state::{Control, State};

/// The state of the device, version 1.
#[derive(Debug, Serialize, Deserialize)]
pub struct Saved {
    selection: Selection,
    /// What the guest was told of.
    controls: Vec<Control>,
    /// The end of a report whose beginning the guest has.
    waiting: Vec<Event>,
}

impl Saved {
    pub fn new(selection: Selection, left: &Left) -> Self {
        Self {
            selection,
            controls: left.told.controls().collect(),
            waiting: left.waiting.clone(),
        }
    }

    /// What was saved, if it can be so.
    pub fn check(self) -> Result<(Selection, Left), StateError> {
        if !self.controls.iter().all(Control::is_valid) {
            return Err(StateError::Contents("a control that keeps no value"));
        }
        let is_end = match self.waiting.split_last() {
            Some((last, rest)) => last.is_report() && !rest.iter().any(Event::is_report),
            None => true,
        };
        let are_for_guest = self
            .waiting
            .iter()
            .all(|event| FORWARDED_TYPES.contains(&event.kind));
        if !is_end || !are_for_guest {
            return Err(StateError::Contents("an end of a report that is none"));
        }
        let left = Left {
            told: State::forgotten(self.controls),
            waiting: self.waiting,
        };
        Ok((self.selection, left))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{EV_ABS, EV_KEY, EV_LED, EV_REL};
    use crate::report::Reports;
    use vhost_device_common::state::{decode, encode};

    fn told(events: &[(u16, u16, i32)]) -> State {
        let mut state = State::default();
        for (kind, code, value) in events {
            state.apply(Event::new(*kind, *code, *value));
        }
        state
    }

    fn loaded(left: &Left) -> Result<Left, StateError> {
        let bytes = encode(&Saved::new(Selection::default(), left))?;
        Ok(decode::<Saved>(&bytes)?.check()?.1)
    }

    #[test]
    fn a_key_that_was_held_there_is_let_go_of_here_after_the_report_that_had_begun() {
        let mut reports = Reports::new(false, Left::default());
        reports.reload(told(&[]));
        reports.settle();
        let press = [(EV_KEY, 30, 1), (EV_KEY, 48, 1), (0, 0, 0)];
        for (kind, code, value) in press {
            reports.push(Event::new(kind, code, value));
        }
        assert_eq!(reports.next(), Some(Event::new(EV_KEY, 30, 1)));
        reports.pop();
        let left = loaded(&reports.stop()).unwrap();

        let mut reports = Reports::new(false, left);
        reports.reload(told(&[(EV_KEY, 48, 1)]));
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
        let state = told(&[(EV_ABS, 0x2f, 3), (EV_ABS, 0x39, 7), (EV_ABS, 0x35, 9)]);
        let left = loaded(&Left {
            told: state.clone(),
            waiting: Vec::new(),
        })
        .unwrap();
        let mut forgotten = state;
        forgotten.forget();
        assert_eq!(left.told, forgotten);
    }

    #[test]
    fn what_can_not_be_so_is_refused() {
        let waiting = |events: &[Event]| Left {
            told: State::default(),
            waiting: events.to_vec(),
        };
        let key = Event::new(EV_KEY, 30, 1);
        assert!(loaded(&waiting(&[key, Event::REPORT])).is_ok());
        assert!(loaded(&waiting(&[key])).is_err());
        assert!(loaded(&waiting(&[Event::REPORT, Event::REPORT])).is_err());
        let light = Event::new(EV_LED, 0, 1);
        assert!(loaded(&waiting(&[light, Event::REPORT])).is_err());
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
