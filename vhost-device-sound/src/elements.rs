// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Control elements: volume and mute switch of all outputs, volume of all inputs (VIRTIO 1.3, 5.14.6.10). Their names are those that
//! ALSA's mixers look for.

use zerocopy::IntoBytes;
use zerocopy::little_endian::U32;

use crate::protocol::{
    ALIGNED_ELEMENT_INFO_SIZE, ALIGNED_ELEMENT_RANGE, Direction, ELEMENT_INFO_SIZE, ELEMENT_RANGE,
    ElementInfo, IntegerRange,
};

/// Roles (VIRTIO_SND_CTL_ROLE_*).
const ROLE_VOLUME: u32 = 1;
const ROLE_MUTE: u32 = 2;
const ROLE_GAIN: u32 = 3;
/// Types (VIRTIO_SND_CTL_TYPE_*).
const TYPE_BOOLEAN: u32 = 0;
const TYPE_INTEGER: u32 = 1;
/// Access: READ, WRITE, TLV_READ.
const READ_WRITE: u32 = 1 | 1 << 1;
const TLV_READ: u32 = 1 << 4;

/// SNDRV_CTL_TLVT_DB_SCALE: minimum in 0.01 dB, then the step, with a flag for a minimum that is silent.
const TLV_DB_SCALE: u32 = 1;
const TLV_MUTE: u32 = 1 << 16;

/// Largest volume: 0 dB. 0 is silence.
const MAX_VOLUME: u32 = 120;
/// Step of the volume in 0.01 dB.
const VOLUME_STEP: u32 = 50;

/// Index of the volume of outputs.
const PLAYBACK_VOLUME: usize = 0;
/// Index of the mute switch of outputs: 1 if there is sound.
const PLAYBACK_SWITCH: usize = 1;
/// Index of the volume of inputs.
const CAPTURE_VOLUME: usize = 2;
/// Number of elements.
pub const COUNT: usize = 3;

/// What an element is.
struct Description {
    name: &'static str,
    role: u32,
    direction: Direction,
    is_switch: bool,
}

const DESCRIPTIONS: [Description; COUNT] = [
    Description {
        name: "Master Playback Volume",
        role: ROLE_VOLUME,
        direction: Direction::Output,
        is_switch: false,
    },
    Description {
        name: "Master Playback Switch",
        role: ROLE_MUTE,
        direction: Direction::Output,
        is_switch: true,
    },
    Description {
        name: "Capture Volume",
        role: ROLE_GAIN,
        direction: Direction::Input,
        is_switch: false,
    },
];

impl Description {
    fn max(&self) -> u32 {
        match self.is_switch {
            true => 1,
            false => MAX_VOLUME,
        }
    }
}

/// The values of all elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Elements([u32; COUNT]);

impl Default for Elements {
    /// Full volume.
    fn default() -> Self {
        Self(DESCRIPTIONS.map(|description| description.max()))
    }
}

impl Elements {
    /// Returns the elements with these values, or `None` if they cannot have them.
    pub fn with_values(values: &[u32]) -> Option<Self> {
        let values: [u32; COUNT] = values.try_into().ok()?;
        let mut pairs = values.iter().zip(&DESCRIPTIONS);
        pairs
            .all(|(value, description)| *value <= description.max())
            .then_some(Self(values))
    }

    /// Returns all values.
    pub fn values(&self) -> [u32; COUNT] {
        self.0
    }

    /// Returns the value of an element.
    pub fn value(&self, element: u32) -> Option<u32> {
        self.0.get(element as usize).copied()
    }

    /// Sets the value of an element. Returns whether it has changed, or `None` if the element does not exist or cannot have this value.
    pub fn set(&mut self, element: u32, value: u32) -> Option<bool> {
        let description = DESCRIPTIONS.get(element as usize)?;
        let place = self.0.get_mut(element as usize)?;
        (value <= description.max()).then(|| std::mem::replace(place, value) != value)
    }

    /// Returns the factor of a direction, or `None` for 0 dB.
    pub fn factor(&self, direction: Direction) -> Option<f64> {
        let [volume, switch] = match direction {
            Direction::Output => [self.0[PLAYBACK_VOLUME], self.0[PLAYBACK_SWITCH]],
            Direction::Input => [self.0[CAPTURE_VOLUME], 1],
        };
        match (volume, switch) {
            (0, _) | (_, 0) => Some(0.0),
            (MAX_VOLUME.., _) => None,
            (volume, _) => {
                let decibel = f64::from((MAX_VOLUME - volume) * VOLUME_STEP) / -100.0;
                Some(10f64.powf(decibel / 20.0))
            }
        }
    }
}

/// Returns the index of the element with this name.
pub fn find(name: &str) -> Option<u32> {
    let index = DESCRIPTIONS
        .iter()
        .position(|element| element.name == name)?;
    Some(index as u32)
}

/// Returns the names of all elements.
pub fn names() -> impl Iterator<Item = &'static str> {
    DESCRIPTIONS.iter().map(|description| description.name)
}

/// Returns the information about an element in a structure of `size` bytes. The specification has no padding in it, but Linux's
/// structure has.
pub fn info(element: u32, size: usize) -> Option<Vec<u8>> {
    let Description {
        name,
        role,
        direction,
        is_switch,
    } = DESCRIPTIONS.get(element as usize)?;
    let mut place = [0; 44];
    for (to, from) in place.iter_mut().zip(name.bytes()) {
        *to = from;
    }
    let (kind, access) = match is_switch {
        true => (TYPE_BOOLEAN, READ_WRITE),
        false => (TYPE_INTEGER, READ_WRITE | TLV_READ),
    };
    let info = ElementInfo {
        group: U32::new(0),
        role: U32::new(role << 1 | u32::from(direction.number())),
        kind: U32::new(kind),
        access: U32::new(access),
        count: U32::new(1),
        index: U32::new(0),
        name: place,
    };
    let range = IntegerRange {
        min: U32::new(0),
        max: U32::new(if *is_switch { 1 } else { MAX_VOLUME }),
        step: U32::new(1),
    };
    let (start, length) = match size >= ALIGNED_ELEMENT_INFO_SIZE {
        true => (ALIGNED_ELEMENT_RANGE, ALIGNED_ELEMENT_INFO_SIZE),
        false => (ELEMENT_RANGE, ELEMENT_INFO_SIZE),
    };
    let mut bytes = info.as_bytes().to_vec();
    bytes.resize(start, 0);
    bytes.extend(range.as_bytes());
    bytes.resize(length, 0);
    Some(bytes)
}

/// Returns the metadata of an element: its scale in dB. `None` if it has none.
pub fn metadata(element: u32) -> Option<[u8; 16]> {
    let description = DESCRIPTIONS.get(element as usize)?;
    let minimum = (MAX_VOLUME * VOLUME_STEP).wrapping_neg();
    let words = [TLV_DB_SCALE, 8, minimum, VOLUME_STEP | TLV_MUTE].map(U32::new);
    (!description.is_switch).then(|| zerocopy::transmute!(words))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_volume_is_in_steps_of_half_a_decibel() {
        let mut elements = Elements::default();
        assert_eq!(elements.factor(Direction::Output), None);
        assert_eq!(elements.set(0, 80), Some(true));
        assert_eq!(elements.set(0, 80), Some(false));
        let factor = elements.factor(Direction::Output).unwrap();
        assert!((factor - 0.1).abs() < 1e-9, "{factor}");
        assert_eq!(elements.factor(Direction::Input), None);
        assert_eq!(elements.set(1, 0), Some(true));
        assert_eq!(elements.factor(Direction::Output), Some(0.0));
        assert_eq!(elements.set(2, 0), Some(true));
        assert_eq!(elements.factor(Direction::Input), Some(0.0));
    }

    #[test]
    fn values_outside_their_range_are_refused() {
        let mut elements = Elements::default();
        for (element, value) in [(0, 121), (1, 2), (2, u32::MAX), (3, 0), (u32::MAX, 0)] {
            assert_eq!(elements.set(element, value), None, "{element} {value}");
        }
        assert_eq!(elements, Elements::default());
        assert_eq!(Elements::with_values(&[0, 2, 0]), None);
        assert_eq!(Elements::with_values(&[0, 0]), None);
        assert!(Elements::with_values(&[120, 0, 7]).is_some());
    }

    #[test]
    fn the_range_is_where_the_drivers_structure_has_it() {
        for (size, place) in [(92, 68), (95, 68), (96, 72), (200, 72)] {
            let bytes = info(0, size).unwrap();
            assert_eq!(bytes[place + 4..place + 8], 120u32.to_le_bytes(), "{size}");
            assert!(bytes.len() <= size);
        }
        assert_eq!(info(3, 96), None);
    }
}
