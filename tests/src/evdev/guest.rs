// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The state of an input device as a guest knows it from its events.

use std::collections::{BTreeMap, BTreeSet};

use super::codes::{ABS_MT_SLOT, ABS_MT_TOOL_Y, ABS_MT_TRACKING_ID, EV_ABS, EV_KEY, EV_SW};
use super::event::{Event, Report};
use super::node::Node;

/// The state of the guest's input device.
#[derive(Debug, Default)]
pub struct Guest {
    /// Keys that are down.
    pub keys: BTreeSet<u16>,
    /// Switches that are on.
    pub switches: BTreeSet<u16>,
    /// Axes that have moved.
    pub axes: BTreeMap<u16, i32>,
    /// The current slot of touch events.
    pub slot: i32,
    /// Axes of touches, by slot.
    pub touches: BTreeMap<(i32, u16), i32>,
}

impl Guest {
    /// Applies reports.
    pub fn take(&mut self, reports: &[Report]) {
        for event in reports.iter().flatten() {
            let Event { kind, code, value } = *event;
            match (kind, code) {
                (EV_KEY, _) if value == 0 => _ = self.keys.remove(&code),
                (EV_KEY, _) => _ = self.keys.insert(code),
                (EV_SW, _) if value == 0 => _ = self.switches.remove(&code),
                (EV_SW, _) => _ = self.switches.insert(code),
                (EV_ABS, ABS_MT_SLOT) => self.slot = value,
                (EV_ABS, ABS_MT_SLOT..=ABS_MT_TOOL_Y) => {
                    self.touches.insert((self.slot, code), value);
                }
                (EV_ABS, _) => _ = self.axes.insert(code, value),
                _ => (),
            }
        }
    }

    /// Returns an axis of the touch in a slot.
    pub fn touch(&self, slot: i32, code: u16) -> i32 {
        let nothing = if code == ABS_MT_TRACKING_ID { -1 } else { 0 };
        self.touches.get(&(slot, code)).copied().unwrap_or(nothing)
    }

    /// Panics unless the state agrees with the host's device.
    #[track_caller]
    pub fn assert_agrees(&self, node: &Node) {
        if let Some(difference) = self.difference(node) {
            panic!("{difference}; {self:?}");
        }
    }

    /// Returns a difference from the host's device.
    pub fn difference(&self, node: &Node) -> Option<String> {
        let keys: BTreeSet<u16> = node.keys().unwrap().into_iter().collect();
        if self.keys != keys {
            return Some(format!("keys of the host: {keys:?}"));
        }
        let switches: BTreeSet<u16> = node.switches().unwrap().into_iter().collect();
        if self.switches != switches {
            return Some(format!("switches of the host: {switches:?}"));
        }
        let axes = node.codes(EV_ABS).unwrap_or_default();
        let is_touch = |code: &u16| (ABS_MT_SLOT..=ABS_MT_TOOL_Y).contains(code);
        for &code in axes.iter().filter(|code| !is_touch(code)) {
            let value = node.axis(code).unwrap().value;
            if self.axes.get(&code).copied().unwrap_or_default() != value {
                return Some(format!("axis {code:#x} of the host: {value}"));
            }
        }
        if !axes.contains(&ABS_MT_SLOT) {
            return None;
        }
        let slot = node.axis(ABS_MT_SLOT).unwrap().value;
        if self.slot != slot {
            return Some(format!("slot of the host: {slot}"));
        }
        let ids = node.slots(ABS_MT_TRACKING_ID).unwrap();
        for &code in axes
            .iter()
            .filter(|code| is_touch(code) && **code != ABS_MT_SLOT)
        {
            for (slot, value) in (0..).zip(node.slots(code).unwrap()) {
                let counts = ids[slot as usize] >= 0 || code == ABS_MT_TRACKING_ID;
                if counts && self.touch(slot, code) != value {
                    return Some(format!(
                        "axis {code:#x} of slot {slot} of the host: {value}"
                    ));
                }
            }
        }
        None
    }
}
