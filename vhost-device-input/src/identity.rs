// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The identity of an input device: name, ids, event codes and axes.

use std::collections::BTreeMap;

use zerocopy::{FromBytes, IntoBytes};

use crate::event::{EV_FF, EV_LED, EV_REP, EV_SND, Event, FF_GAIN};

/// The ids of a device, in the layout of `struct input_id`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes)]
#[repr(C)]
pub struct Ids {
    /// `BUS_*`
    pub bus: u16,
    /// Vendor id.
    pub vendor: u16,
    /// Product id.
    pub product: u16,
    /// Product version.
    pub version: u16,
}

/// The properties of an axis, in the layout of `struct input_absinfo` without the value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes)]
#[repr(C)]
pub struct Axis {
    /// Smallest value.
    pub minimum: i32,
    /// Largest value.
    pub maximum: i32,
    /// Changes up to this size are noise.
    pub fuzz: i32,
    /// Values up to this distance from the centre count as the centre.
    pub flat: i32,
    /// Resolution in units per millimetre, or per radian.
    pub resolution: i32,
}

/// A set of numbers as a bitmap, without zero bytes at the end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bitmap(Vec<u8>);

impl Bitmap {
    /// Creates a set from a bitmap, lowest bit first.
    pub fn new(mut bytes: Vec<u8>) -> Self {
        let length = bytes.iter().rposition(|&byte| byte != 0);
        bytes.truncate(length.map_or(0, |last| last + 1));
        Self(bytes)
    }

    /// Returns the bitmap, lowest bit first.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Returns whether the set contains the number.
    pub fn has(&self, number: u16) -> bool {
        let byte = self.0.get(usize::from(number / 8));
        byte.is_some_and(|byte| byte & 1 << (number % 8) != 0)
    }

    /// Returns the numbers in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = u16> {
        (0u16..).take(self.0.len() * 8).filter(|&n| self.has(n))
    }
}

/// The identity of a device. A node that returns belongs to the same device if its identity is equal.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// Name of the device.
    pub name: Vec<u8>,
    /// Serial number (`EVIOCGUNIQ`); often empty.
    pub serial: Vec<u8>,
    /// Numeric ids.
    pub ids: Ids,
    /// `INPUT_PROP_*`
    pub properties: Bitmap,
    /// The codes of each event type.
    pub codes: BTreeMap<u16, Bitmap>,
    /// The properties of each EV_ABS code.
    pub axes: BTreeMap<u16, Axis>,
}

impl Identity {
    /// Returns whether the device has this event.
    pub fn has(&self, kind: u16, code: u16) -> bool {
        self.codes.get(&kind).is_some_and(|codes| codes.has(code))
    }

    /// Returns whether the device repeats held keys. The guest then repeats them itself.
    pub fn repeats_keys(&self) -> bool {
        self.codes.contains_key(&EV_REP)
    }

    /// Returns whether the guest may send this event to the device: LEDs, sounds, repeat rate and force feedback.
    pub fn accepts(&self, event: Event) -> bool {
        match event.kind {
            EV_LED | EV_SND | EV_REP => self.has(event.kind, event.code),
            // Other codes are the numbers of effects.
            EV_FF if event.code < FF_GAIN => self.codes.contains_key(&EV_FF),
            EV_FF => self.has(EV_FF, event.code),
            _ => false,
        }
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::event::{EV_ABS, EV_KEY};

    pub fn tablet() -> Identity {
        let pressure = Axis {
            minimum: -1,
            maximum: 8191,
            fuzz: 2,
            flat: 3,
            resolution: 100,
        };
        let bitmap = |bits: &[u16]| {
            let mut bytes = vec![0; 96];
            for &bit in bits {
                bytes[usize::from(bit / 8)] |= 1 << (bit % 8);
            }
            Bitmap::new(bytes)
        };
        Identity {
            name: b"Pen Tablet".to_vec(),
            serial: b"0123-x".to_vec(),
            ids: Ids {
                bus: 3,
                vendor: 0x56a,
                product: 0x1234,
                version: 0x111,
            },
            properties: bitmap(&[0, 9]),
            codes: BTreeMap::from([
                (EV_KEY, bitmap(&[0x140, 0x14a])),
                (EV_ABS, bitmap(&[0x18])),
                (EV_LED, bitmap(&[1])),
                (EV_REP, bitmap(&[0, 1])),
                (EV_FF, bitmap(&[0x50, FF_GAIN])),
            ]),
            axes: BTreeMap::from([(0x18, pressure)]),
        }
    }

    #[test]
    fn only_settings_of_the_device_are_accepted() {
        let accepts = |kind, code| tablet().accepts(Event::new(kind, code, 1));
        assert!(accepts(EV_LED, 1));
        assert!(!accepts(EV_LED, 0));
        assert!(!accepts(EV_SND, 1));
        assert!(accepts(EV_REP, 1));
        assert!(!accepts(EV_REP, 2));
        assert!(accepts(EV_FF, 0), "an effect");
        assert!(accepts(EV_FF, FF_GAIN));
        assert!(!accepts(EV_FF, FF_GAIN + 1));
        assert!(!accepts(EV_KEY, 0x140));
        assert!(!accepts(EV_ABS, 0x18));
        assert!(!accepts(0, 0));
        assert!(!accepts(u16::MAX, u16::MAX));
    }

    #[test]
    fn a_bitmap_lists_its_numbers() {
        let bitmap = Bitmap::new(vec![0b1000_0001, 0, 2, 0]);
        assert_eq!(bitmap.iter().collect::<Vec<_>>(), [0, 7, 17]);
        assert!(bitmap.has(17));
        assert!(!bitmap.has(16));
        assert!(!bitmap.has(u16::MAX));
    }
}
