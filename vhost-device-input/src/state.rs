// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The lasting state of a device (keys, switches, axes and touches), and the events that lead from one state to
//! another.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::event::{
    ABS_MT_FIRST, ABS_MT_LAST, ABS_MT_SLOT, ABS_MT_TRACKING_ID, EV_ABS, EV_KEY, EV_SW, Event,
    KEY_REPEATED,
};

/// Tracking ID of a slot without a touch.
const NO_TOUCH: i32 = -1;

/// A key, switch or axis, which keeps its value until an event changes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Control {
    /// Its multi-touch slot.
    slot: Option<i32>,
    kind: u16,
    code: u16,
}

impl Control {
    /// Returns whether a [`State`] can contain this control.
    pub fn is_valid(&self) -> bool {
        match (self.kind, self.code) {
            (EV_ABS, ABS_MT_SLOT) => false,
            (EV_ABS, ABS_MT_FIRST..=ABS_MT_LAST) => self.slot.is_some(),
            (EV_KEY | EV_SW | EV_ABS, _) => self.slot.is_none(),
            _ => false,
        }
    }

    fn is_touch(&self) -> bool {
        self.slot.is_some() && self.code == ABS_MT_TRACKING_ID
    }

    /// Returns the value before the first event. The value of an axis is unknown.
    fn default_value(&self) -> Option<i32> {
        match self.kind {
            EV_ABS if self.is_touch() => Some(NO_TOUCH),
            EV_ABS => None,
            _ => Some(0),
        }
    }
}

/// The values of all controls. The default is that no key is held and there is no touch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// `None` for an unknown value.
    values: BTreeMap<Control, Option<i32>>,
    /// The current slot, which events of multi-touch axes refer to. `None` for a device without slots.
    slot: Option<i32>,
}

impl State {
    /// Updates the state with an event.
    pub fn apply(&mut self, event: Event) {
        let Event { kind, code, value } = event;
        let slot = match (kind, code) {
            (EV_KEY, _) if value == KEY_REPEATED => return,
            (EV_KEY | EV_SW, _) => None,
            (EV_ABS, ABS_MT_SLOT) => {
                self.slot = Some(value);
                return;
            }
            // Without slots, each report contains all touches.
            (EV_ABS, ABS_MT_FIRST..=ABS_MT_LAST) if self.slot.is_none() => return,
            (EV_ABS, ABS_MT_FIRST..=ABS_MT_LAST) => self.slot,
            (EV_ABS, _) => None,
            _ => return,
        };
        let control = Control { slot, kind, code };
        self.values.insert(control, Some(value));
    }

    /// Releases all keys and ends all touches.
    pub fn release_all(&mut self) {
        for (control, value) in &mut self.values {
            if control.kind == EV_KEY || control.is_touch() {
                *value = control.default_value();
            }
        }
    }

    /// Makes the value of every control unknown, except for those that have never changed.
    pub fn forget(&mut self) {
        self.values.values_mut().for_each(|value| *value = None);
        self.slot = None;
    }

    /// Returns the controls that have changed at least once. [`State::unknown`] restores a forgotten state from them.
    pub fn controls(&self) -> impl Iterator<Item = Control> {
        self.values.keys().copied()
    }

    /// Creates a state in which the values of these controls are unknown.
    pub fn unknown(controls: impl IntoIterator<Item = Control>) -> Self {
        let values = controls.into_iter().map(|control| (control, None));
        Self {
            values: values.collect(),
            slot: None,
        }
    }

    fn value(&self, control: &Control) -> Option<i32> {
        match self.values.get(control) {
            Some(value) => *value,
            None => control.default_value(),
        }
    }

    fn is_touched(&self, slot: i32) -> bool {
        let touch = Control {
            slot: Some(slot),
            kind: EV_ABS,
            code: ABS_MT_TRACKING_ID,
        };
        self.value(&touch).is_some_and(|id| id >= 0)
    }

    /// Returns the events that lead from the state `known` to this one. Leaves out the axes of a slot without a touch.
    pub fn differences(&self, known: &State) -> Vec<Event> {
        let mut changed: Vec<_> = self
            .values
            .keys()
            .chain(known.values.keys())
            .filter(|control| self.value(control) != known.value(control))
            .filter(|control| match control.slot {
                Some(slot) => control.is_touch() || self.is_touched(slot),
                None => true,
            })
            .collect();
        // A touch starts with its tracking ID.
        changed.sort_by_key(|control| (control.slot, !control.is_touch(), *control));
        changed.dedup();
        let mut events = Vec::new();
        let mut slot = known.slot;
        for control in changed {
            let Some(value) = self.value(control) else {
                continue;
            };
            if control.slot.is_some() && control.slot != slot {
                slot = control.slot;
                events.extend(slot.map(|slot| Event::new(EV_ABS, ABS_MT_SLOT, slot)));
            }
            events.push(Event::new(control.kind, control.code, value));
        }
        if self.slot.is_some() && self.slot != slot {
            events.extend(self.slot.map(|slot| Event::new(EV_ABS, ABS_MT_SLOT, slot)));
        }
        events
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::EV_REL;

    const KEY_A: u16 = 30;
    const ABS_X: u16 = 0;
    const MT_X: u16 = 0x35;

    fn state(events: &[(u16, u16, i32)]) -> State {
        let mut state = State::default();
        for &(kind, code, value) in events {
            state.apply(Event::new(kind, code, value));
        }
        state
    }

    fn differences(current: &State, known: &State) -> Vec<(u16, u16, i32)> {
        let events = current.differences(known);
        events.iter().map(|e| (e.kind, e.code, e.value)).collect()
    }

    #[test]
    fn equal_states_need_no_event() {
        let current = state(&[(EV_KEY, KEY_A, 1), (EV_ABS, ABS_X, 5), (EV_SW, 0, 1)]);
        assert_eq!(differences(&current, &current), []);
        assert_eq!(differences(&State::default(), &State::default()), []);
    }

    #[test]
    fn relative_motion_and_repeats_are_not_part_of_the_state() {
        let current = state(&[(EV_REL, 0, 5), (4, 4, 1), (EV_KEY, KEY_A, KEY_REPEATED)]);
        assert_eq!(current, State::default());
    }

    #[test]
    fn changed_keys_switches_and_axes_are_differences() {
        let known = state(&[(EV_KEY, KEY_A, 1), (EV_ABS, ABS_X, 5), (EV_ABS, 1, 7)]);
        let current = state(&[
            (EV_KEY, KEY_A, 1),
            (EV_KEY, KEY_A, 0),
            (EV_KEY, 48, 1),
            (EV_ABS, ABS_X, 0),
            (EV_ABS, 1, 7),
            (EV_SW, 0, 1),
        ]);
        let expected = [
            (EV_KEY, KEY_A, 0),
            (EV_KEY, 48, 1),
            (EV_ABS, ABS_X, 0),
            (EV_SW, 0, 1),
        ];
        assert_eq!(differences(&current, &known), expected);
    }

    #[test]
    fn a_new_guest_gets_all_axes_but_no_released_keys() {
        let current = state(&[
            (EV_KEY, KEY_A, 0),
            (EV_KEY, 48, 1),
            (EV_ABS, ABS_X, 0),
            (EV_SW, 0, 0),
        ]);
        let expected = [(EV_KEY, 48, 1), (EV_ABS, ABS_X, 0)];
        assert_eq!(differences(&current, &State::default()), expected);
    }

    #[test]
    fn a_forgotten_state_differs_in_all_controls_that_were_known() {
        let current = state(&[(EV_KEY, KEY_A, 1), (EV_KEY, 48, 0), (EV_ABS, ABS_X, 9)]);
        let mut known = state(&[(EV_KEY, KEY_A, 1), (EV_KEY, 48, 1), (EV_ABS, ABS_X, 9)]);
        known.forget();
        let expected = [(EV_KEY, KEY_A, 1), (EV_KEY, 48, 0), (EV_ABS, ABS_X, 9)];
        assert_eq!(differences(&current, &known), expected);
    }

    #[test]
    fn a_release_changes_only_keys_and_touches() {
        let mut current = state(&[
            (EV_KEY, KEY_A, 1),
            (EV_SW, 0, 1),
            (EV_ABS, ABS_X, 9),
            (EV_ABS, ABS_MT_SLOT, 1),
            (EV_ABS, ABS_MT_TRACKING_ID, 45),
            (EV_ABS, MT_X, 100),
        ]);
        let known = current.clone();
        current.release_all();
        let expected = [(EV_KEY, KEY_A, 0), (EV_ABS, ABS_MT_TRACKING_ID, -1)];
        assert_eq!(differences(&current, &known), expected);
    }

    #[test]
    fn each_touch_starts_with_its_slot_and_tracking_id() {
        let touches = [
            (EV_ABS, ABS_MT_SLOT, 0),
            (EV_ABS, MT_X, 10),
            (EV_ABS, ABS_MT_TRACKING_ID, 45),
            (EV_ABS, ABS_MT_SLOT, 3),
            (EV_ABS, MT_X, 20),
            (EV_ABS, ABS_MT_TRACKING_ID, 46),
            (EV_ABS, ABS_MT_SLOT, 1),
        ];
        let expected = [
            (EV_ABS, ABS_MT_SLOT, 0),
            (EV_ABS, ABS_MT_TRACKING_ID, 45),
            (EV_ABS, MT_X, 10),
            (EV_ABS, ABS_MT_SLOT, 3),
            (EV_ABS, ABS_MT_TRACKING_ID, 46),
            (EV_ABS, MT_X, 20),
            (EV_ABS, ABS_MT_SLOT, 1),
        ];
        assert_eq!(differences(&state(&touches), &State::default()), expected);
    }

    #[test]
    fn a_touch_that_ended_differs_only_in_its_tracking_id() {
        let known = state(&[
            (EV_ABS, ABS_MT_SLOT, 0),
            (EV_ABS, ABS_MT_TRACKING_ID, 45),
            (EV_ABS, MT_X, 10),
        ]);
        let mut current = known.clone();
        current.apply(Event::new(EV_ABS, MT_X, 30));
        current.apply(Event::new(EV_ABS, ABS_MT_TRACKING_ID, -1));
        let expected = [(EV_ABS, ABS_MT_TRACKING_ID, -1)];
        assert_eq!(differences(&current, &known), expected);
        // A guest that does not know the touch only needs the current slot.
        let expected = [(EV_ABS, ABS_MT_SLOT, 0)];
        assert_eq!(differences(&current, &State::default()), expected);
    }

    #[test]
    fn a_new_touch_in_a_slot_gets_its_new_tracking_id() {
        let known = state(&[(EV_ABS, ABS_MT_SLOT, 2), (EV_ABS, ABS_MT_TRACKING_ID, 45)]);
        let current = state(&[(EV_ABS, ABS_MT_SLOT, 2), (EV_ABS, ABS_MT_TRACKING_ID, 47)]);
        let expected = [(EV_ABS, ABS_MT_TRACKING_ID, 47)];
        assert_eq!(differences(&current, &known), expected);
    }

    #[test]
    fn touches_without_slots_are_not_part_of_the_state() {
        let current = state(&[(EV_ABS, MT_X, 10), (EV_ABS, ABS_MT_TRACKING_ID, 1)]);
        assert_eq!(current, State::default());
    }
}
