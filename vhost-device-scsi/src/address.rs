// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Addresses of logical units (VIRTIO 1.3, 5.6.6.1).

use std::fmt;

/// The most logical units of a target: numbers have 14 bits.
pub const MAX_LUNS: u16 = 16384;

/// The first byte of an address.
const FIRST: u8 = 1;
/// The address method of a single level number in bytes 2 and 3 (SAM-6, 4.7): peripheral device, flat space, or a well-known unit.
const PERIPHERAL: u8 = 0x00;
const FLAT: u8 = 0x40;
const METHOD: u8 = 0xc0;
/// The well-known logical unit REPORT LUNS.
const REPORT_LUNS: [u8; 2] = [0xc1, 0x01];

/// The address of a logical unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address {
    /// Number of the target.
    pub target: u8,
    /// Number of the logical unit, below [`MAX_LUNS`].
    pub lun: u16,
}

/// What the field `lun` of a request addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Addressed {
    /// A logical unit, which may not exist.
    Unit(Address),
    /// The well-known logical unit of a target that lists the others.
    ReportLuns(u8),
    /// A number in a format that no logical unit of this target has.
    Unknown(u8),
    /// No target.
    Nothing,
}

impl Addressed {
    /// Decodes the field.
    pub fn decode(field: [u8; 8]) -> Self {
        let [first, target, high, low, rest @ ..] = field;
        if first != FIRST {
            return Self::Nothing;
        }
        if rest != [0; 4] {
            return Self::Unknown(target);
        }
        if [high, low] == REPORT_LUNS {
            return Self::ReportLuns(target);
        }
        let lun = match high & METHOD {
            FLAT => u16::from_be_bytes([high & !METHOD, low]),
            // The lower bits are a bus, of which there is one.
            PERIPHERAL if high == 0 => low.into(),
            _ => return Self::Unknown(target),
        };
        Self::Unit(Address { target, lun })
    }

    /// Returns the target, if one is addressed.
    pub fn target(self) -> Option<u8> {
        match self {
            Self::Unit(Address { target, .. }) | Self::ReportLuns(target) => Some(target),
            Self::Unknown(target) => Some(target),
            Self::Nothing => None,
        }
    }
}

impl Address {
    /// Encodes the address for an event.
    pub fn encode(self) -> [u8; 8] {
        let [high, low] = self.lun.to_be_bytes();
        // Linux takes a number in events without the address method; both forms name the same unit.
        let method = if self.lun < 256 { PERIPHERAL } else { FLAT };
        [FIRST, self.target, method | high, low, 0, 0, 0, 0]
    }
}

impl fmt::Display for Address {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "target {} lun {}", self.target, self.lun)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_a_number_address_the_same_unit() {
        let unit = |target, lun| Addressed::Unit(Address { target, lun });
        assert_eq!(Addressed::decode([1, 3, 0, 7, 0, 0, 0, 0]), unit(3, 7));
        assert_eq!(Addressed::decode([1, 3, 0x40, 7, 0, 0, 0, 0]), unit(3, 7));
        let last = Addressed::decode([1, 255, 0x7f, 0xff, 0, 0, 0, 0]);
        assert_eq!(last, unit(255, MAX_LUNS - 1));
    }

    #[test]
    fn what_is_no_address_of_a_unit_is_none() {
        assert_eq!(Addressed::decode([0; 8]), Addressed::Nothing);
        assert_eq!(
            Addressed::decode([0xc1, 1, 0, 0, 0, 0, 0, 0]),
            Addressed::Nothing
        );
        let wellknown = Addressed::decode([1, 2, 0xc1, 1, 0, 0, 0, 0]);
        assert_eq!(wellknown, Addressed::ReportLuns(2));
        for field in [
            [1, 2, 1, 7, 0, 0, 0, 0],
            [1, 2, 0x80, 7, 0, 0, 0, 0],
            [1, 2, 0xc1, 2, 0, 0, 0, 0],
            [1, 2, 0x40, 7, 0, 0, 0, 1],
            [1, 2, 0x40, 7, 1, 0, 0, 0],
        ] {
            assert_eq!(Addressed::decode(field), Addressed::Unknown(2), "{field:?}");
        }
    }

    #[test]
    fn an_encoded_address_is_decoded_again() {
        for lun in [0, 1, 255, 256, MAX_LUNS - 1] {
            let address = Address { target: 9, lun };
            assert_eq!(
                Addressed::decode(address.encode()),
                Addressed::Unit(address)
            );
        }
    }
}
