// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The config space: the guest selects a property and reads its value (VIRTIO 1.3, 5.8.4).

use serde::{Deserialize, Serialize};

use crate::event::EV_ABS;
use crate::identity::Identity;

/// Size of `struct virtio_input_config` in bytes.
pub const CONFIG_SIZE: usize = 136;
/// Size of the largest value in bytes.
const MAX_ANSWER: usize = 128;

// Values of `select`.
const ID_NAME: u8 = 0x01;
const ID_SERIAL: u8 = 0x02;
const ID_DEVIDS: u8 = 0x03;
const PROP_BITS: u8 = 0x10;
const EV_BITS: u8 = 0x11;
const ABS_INFO: u8 = 0x12;

/// The selected property: the first two bytes of the config space. The guest can write only these.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Selection {
    select: u8,
    subsel: u8,
}

impl Selection {
    /// Takes a write of `data` at `offset`. It may cover any part of the config space; QEMU always writes the whole
    /// space.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        let byte = |place: usize| data.get(place.checked_sub(offset)?).copied();
        self.select = byte(0).unwrap_or(self.select);
        self.subsel = byte(1).unwrap_or(self.subsel);
    }
}

/// Returns the value of the selected property. It is empty if the device does not have the property or VIRTIO does not
/// define it.
fn answer(identity: &Identity, selection: Selection) -> Vec<u8> {
    let mut answer = match (selection.select, selection.subsel) {
        (ID_NAME, 0) => identity.name.clone(),
        (ID_SERIAL, 0) => identity.serial.clone(),
        (ID_DEVIDS, 0) => {
            let ids: [u16; 4] = zerocopy::transmute!(identity.ids);
            ids.map(u16::to_le_bytes).concat()
        }
        (PROP_BITS, 0) => identity.properties.as_bytes().to_vec(),
        (EV_BITS, kind) => match identity.codes.get(&kind.into()) {
            Some(codes) => codes.as_bytes().to_vec(),
            None => Vec::new(),
        },
        (ABS_INFO, code) if identity.has(EV_ABS, code.into()) => {
            let axis = identity.axes.get(&code.into()).copied().unwrap_or_default();
            let axis: [i32; 5] = zerocopy::transmute!(axis);
            axis.map(i32::to_le_bytes).concat()
        }
        _ => Vec::new(),
    };
    answer.truncate(MAX_ANSWER);
    answer
}

/// Returns the whole config space: selection, size of the value, five reserved bytes, value.
pub fn config_space(identity: &Identity, selection: Selection) -> Vec<u8> {
    let answer = answer(identity, selection);
    let mut config = vec![selection.select, selection.subsel, answer.len() as u8];
    config.resize(CONFIG_SIZE - MAX_ANSWER, 0);
    config.extend(answer);
    config.resize(CONFIG_SIZE, 0);
    config
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{EV_KEY, EV_LED, EV_REL, EV_REP};
    use crate::identity::tests::tablet;

    /// Returns the selected value, after checking the rest of the config space.
    fn ask(select: u8, subsel: u8) -> Vec<u8> {
        let config = config_space(&tablet(), Selection { select, subsel });
        assert_eq!(config.len(), CONFIG_SIZE);
        assert_eq!(config[..2], [select, subsel]);
        assert_eq!(config[3..8], [0; 5]);
        let (answer, rest) = config[8..].split_at(config[2].into());
        assert!(rest.iter().all(|&byte| byte == 0));
        answer.to_vec()
    }

    #[test]
    fn strings_are_not_zero_terminated() {
        assert_eq!(ask(ID_NAME, 0), b"Pen Tablet");
        assert_eq!(ask(ID_SERIAL, 0), b"0123-x");
    }

    #[test]
    fn a_long_name_is_truncated() {
        let mut identity = tablet();
        identity.name = vec![b'n'; 300];
        let select = ID_NAME;
        let config = config_space(&identity, Selection { select, subsel: 0 });
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
    fn bitmaps_end_with_the_last_set_bit() {
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
    fn properties_that_do_not_exist_have_size_0() {
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
        assert_eq!(config_space(&identity, selection)[2], 0);
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
        // QEMU writes the whole space with the values that it has read.
        assert_eq!(written(&[(0, &[0x11; 136])]), (0x11, 0x11));
    }
}
