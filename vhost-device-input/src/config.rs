// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the guest can ask about the device: its identity, and the config space that answers by
//! selection (VIRTIO 1.3, 5.8.4).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::event::{EV_ABS, EV_FF, EV_LED, EV_REP, EV_SND, Event, FF_GAIN};

/// Bytes of `struct virtio_input_config`.
pub const CONFIG_SIZE: usize = 136;
/// Most bytes of an answer.
const MAX_ANSWER: usize = 128;

// Values of `select`.
const ID_NAME: u8 = 0x01;
const ID_SERIAL: u8 = 0x02;
const ID_DEVIDS: u8 = 0x03;
const PROP_BITS: u8 = 0x10;
const EV_BITS: u8 = 0x11;
const ABS_INFO: u8 = 0x12;

/// `struct input_id`: `BUS_*`, and numbers of the vendor's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ids {
    /// `BUS_*`
    pub bus: u16,
    /// Who made the device.
    pub vendor: u16,
    /// Which of the vendor's devices it is.
    pub product: u16,
    /// Which version of it.
    pub version: u16,
}

/// What an axis can measure (`struct input_absinfo`, without the value).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Axis {
    /// Smallest value.
    pub minimum: i32,
    /// Largest value.
    pub maximum: i32,
    /// Changes up to this one are noise.
    pub fuzz: i32,
    /// Values up to this one are the middle.
    pub flat: i32,
    /// Units per millimetre, or per radian.
    pub resolution: i32,
}

/// A set of numbers, one bit each; without zeroes at its end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bitmap(Vec<u8>);

impl Bitmap {
    /// The set whose bitmap this is, lowest bit first.
    pub fn new(mut bytes: Vec<u8>) -> Self {
        let length = bytes.iter().rposition(|&byte| byte != 0);
        bytes.truncate(length.map_or(0, |last| last + 1));
        Self(bytes)
    }

    /// Whether the number is in the set.
    pub fn has(&self, number: u16) -> bool {
        let byte = self.0.get(usize::from(number / 8));
        byte.is_some_and(|byte| byte & 1 << (number % 8) != 0)
    }

    /// The numbers, in their order.
    pub fn iter(&self) -> impl Iterator<Item = u16> {
        (0u16..).take(self.0.len() * 8).filter(|&n| self.has(n))
    }
}

/// What a device is. An evdev node that comes back is the same device if all of this is the same.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// What people call it.
    pub name: Vec<u8>,
    /// What tells devices of a kind apart; often empty.
    pub serial: Vec<u8>,
    /// What programs call it.
    pub ids: Ids,
    /// `INPUT_PROP_*`
    pub properties: Bitmap,
    /// Codes of each event type.
    pub codes: BTreeMap<u16, Bitmap>,
    /// For each code of EV_ABS.
    pub axes: BTreeMap<u16, Axis>,
}

impl Identity {
    /// Whether the device has events of `kind` with this code.
    pub fn has(&self, kind: u16, code: u16) -> bool {
        self.codes.get(&kind).is_some_and(|codes| codes.has(code))
    }

    /// Whether the device repeats keys that are held. The guest does so itself then.
    pub fn repeats_keys(&self) -> bool {
        self.codes.contains_key(&EV_REP)
    }

    /// Whether an event from the guest is one for the device: lights, sounds, the rate of repeated
    /// keys, and force feedback.
    pub fn takes(&self, event: Event) -> bool {
        match event.kind {
            EV_LED | EV_SND | EV_REP => self.has(event.kind, event.code),
            // What is no setting is the number of an effect.
            EV_FF if event.code < FF_GAIN => self.codes.contains_key(&EV_FF),
            EV_FF => self.has(EV_FF, event.code),
            _ => false,
        }
    }

    /// The answer to a selection: empty for what the device has not, or VIRTIO knows not.
    fn answer(&self, selection: Selection) -> Vec<u8> {
        let mut answer = match (selection.select, selection.subsel) {
            (ID_NAME, 0) => self.name.clone(),
            (ID_SERIAL, 0) => self.serial.clone(),
            (ID_DEVIDS, 0) => {
                let Ids {
                    bus,
                    vendor,
                    product,
                    version,
                } = self.ids;
                [bus, vendor, product, version]
                    .map(u16::to_le_bytes)
                    .concat()
            }
            (PROP_BITS, 0) => self.properties.0.clone(),
            (EV_BITS, kind) => match self.codes.get(&kind.into()) {
                Some(codes) => codes.0.clone(),
                None => Vec::new(),
            },
            (ABS_INFO, code) if self.has(EV_ABS, code.into()) => {
                let axis = self.axes.get(&code.into()).copied().unwrap_or_default();
                let Axis {
                    minimum,
                    maximum,
                    fuzz,
                    flat,
                    resolution,
                } = axis;
                [minimum, maximum, fuzz, flat, resolution]
                    .map(i32::to_le_bytes)
                    .concat()
            }
            _ => Vec::new(),
        };
        answer.truncate(MAX_ANSWER);
        answer
    }

    /// The whole config space: the selection, the size of the answer, five bytes of nothing, the answer.
    pub(crate) fn config(&self, selection: Selection) -> Vec<u8> {
        let answer = self.answer(selection);
        let mut config = vec![selection.select, selection.subsel, answer.len() as u8];
        config.resize(CONFIG_SIZE - MAX_ANSWER, 0);
        config.extend(answer);
        config.resize(CONFIG_SIZE, 0);
        config
    }
}

/// What the guest wants to know: the first two bytes of the config space, the only ones that it can
/// write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Selection {
    select: u8,
    subsel: u8,
}

impl Selection {
    /// The guest, or its front-end for it, writes `data` at `offset`: any part of the config space, of
    /// which QEMU always writes all.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        let byte = |place: usize| data.get(place.checked_sub(offset)?).copied();
        self.select = byte(0).unwrap_or(self.select);
        self.subsel = byte(1).unwrap_or(self.subsel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{EV_KEY, EV_REL};

    fn tablet() -> Identity {
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

    /// The config space after QEMU wrote `select` and `subsel`, of which it has checked what is the
    /// same for all answers.
    fn ask(select: u8, subsel: u8) -> Vec<u8> {
        let config = tablet().config(Selection { select, subsel });
        assert_eq!(config.len(), CONFIG_SIZE);
        assert_eq!(config[..2], [select, subsel]);
        assert_eq!(config[3..8], [0; 5]);
        let (answer, rest) = config[8..].split_at(config[2].into());
        assert!(rest.iter().all(|&byte| byte == 0));
        answer.to_vec()
    }

    #[test]
    fn names_have_no_zero_at_their_end() {
        assert_eq!(ask(ID_NAME, 0), b"Pen Tablet");
        assert_eq!(ask(ID_SERIAL, 0), b"0123-x");
    }

    #[test]
    fn a_name_is_cut_to_what_an_answer_can_hold() {
        let mut identity = tablet();
        identity.name = vec![b'n'; 300];
        let select = ID_NAME;
        let config = identity.config(Selection { select, subsel: 0 });
        assert_eq!(config.len(), CONFIG_SIZE);
        assert_eq!(config[2], 128);
        assert_eq!(config[8..], [b'n'; 128]);
    }

    #[test]
    fn ids_are_four_little_endian_numbers() {
        assert_eq!(
            ask(ID_DEVIDS, 0),
            [3, 0, 0x6a, 0x05, 0x34, 0x12, 0x11, 0x01]
        );
    }

    #[test]
    fn bitmaps_end_with_their_last_bit() {
        assert_eq!(ask(PROP_BITS, 0), [1, 2]);
        assert_eq!(ask(EV_BITS, EV_LED as u8), [2]);
        assert_eq!(ask(EV_BITS, EV_REP as u8), [3]);
        let keys = ask(EV_BITS, EV_KEY as u8);
        assert_eq!(keys.len(), 0x14a / 8 + 1);
        assert_eq!(keys[0x140 / 8..], [1, 4]);
        assert!(keys[..0x140 / 8].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn an_axis_has_its_range_fuzz_flat_and_resolution() {
        let expected = [-1, 8191, 2, 3, 100].map(i32::to_le_bytes).concat();
        assert_eq!(ask(ABS_INFO, 0x18), expected);
    }

    #[test]
    fn what_the_device_has_not_has_no_size() {
        for (select, subsel) in [
            (0, 0),
            (0, 1),
            (ID_NAME, 1),
            (ID_SERIAL, 3),
            (ID_DEVIDS, 1),
            (PROP_BITS, 1),
            (EV_BITS, EV_REL as u8),
            (EV_BITS, 0),
            (EV_BITS, 255),
            (ABS_INFO, 0),
            (ABS_INFO, 0x40),
            (ABS_INFO, 255),
            (4, 0),
            (0x13, 0),
            (255, 255),
        ] {
            assert_eq!(ask(select, subsel), [0; 0], "{select:#x} {subsel:#x}");
        }
        let mut identity = tablet();
        identity.serial.clear();
        let selection = Selection {
            select: ID_SERIAL,
            subsel: 0,
        };
        assert_eq!(identity.config(selection)[2], 0);
    }

    #[test]
    fn only_the_selection_can_be_written() {
        let written = |writes: &[(usize, &[u8])]| {
            let mut selection = Selection {
                select: 7,
                subsel: 8,
            };
            for (offset, data) in writes {
                selection.write(*offset, data);
            }
            (selection.select, selection.subsel)
        };
        assert_eq!(written(&[]), (7, 8));
        assert_eq!(written(&[(0, &[1])]), (1, 8));
        assert_eq!(written(&[(1, &[2])]), (7, 2));
        assert_eq!(written(&[(1, &[2]), (0, &[1])]), (1, 2));
        assert_eq!(written(&[(2, &[3; 134])]), (7, 8));
        assert_eq!(written(&[(0, &[])]), (7, 8));
        assert_eq!(written(&[(1, &[5; 135])]), (7, 5));
        // As QEMU does, which knows the rest from reading it.
        assert_eq!(written(&[(0, &[0x11; 136])]), (0x11, 0x11));
    }

    #[test]
    fn the_guest_can_set_only_what_the_device_has() {
        let takes = |kind, code| tablet().takes(Event::new(kind, code, 1));
        assert!(takes(EV_LED, 1));
        assert!(!takes(EV_LED, 0));
        assert!(!takes(EV_SND, 1));
        assert!(takes(EV_REP, 1));
        assert!(!takes(EV_REP, 2));
        assert!(takes(EV_FF, 0), "an effect");
        assert!(takes(EV_FF, FF_GAIN));
        assert!(!takes(EV_FF, FF_GAIN + 1));
        assert!(!takes(EV_KEY, 0x140));
        assert!(!takes(EV_ABS, 0x18));
        assert!(!takes(0, 0));
        assert!(!takes(u16::MAX, u16::MAX));
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
