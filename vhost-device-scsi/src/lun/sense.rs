// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Sense data (SPC-5, 4.4).

/// Sense keys (SPC-5, table 27).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Key {
    NoSense = 0x0,
    NotReady = 0x2,
    MediumError = 0x3,
    HardwareError = 0x4,
    IllegalRequest = 0x5,
    UnitAttention = 0x6,
    DataProtect = 0x7,
    CopyAborted = 0xa,
    AbortedCommand = 0xb,
    Miscompare = 0xe,
}

/// Additional sense codes: ASC in the upper byte, ASCQ in the lower one (SPC-5, annex F).
pub mod code {
    pub const NONE: u16 = 0x0000;
    pub const UNREACHABLE_COPY_TARGET: u16 = 0x0804;
    pub const COPY_TARGET_NOT_REACHABLE: u16 = 0x0d02;
    pub const WRITE_ERROR: u16 = 0x0c00;
    pub const UNRECOVERED_READ_ERROR: u16 = 0x1100;
    pub const PARAMETER_LIST_LENGTH: u16 = 0x1a00;
    pub const MISCOMPARE: u16 = 0x1d00;
    pub const INVALID_OPCODE: u16 = 0x2000;
    pub const LBA_OUT_OF_RANGE: u16 = 0x2100;
    pub const INVALID_FIELD_IN_CDB: u16 = 0x2400;
    pub const LOGICAL_UNIT_NOT_SUPPORTED: u16 = 0x2500;
    pub const INVALID_FIELD_IN_PARAMETERS: u16 = 0x2600;
    pub const INVALID_RELEASE: u16 = 0x2604;
    pub const TOO_MANY_TARGET_DESCRIPTORS: u16 = 0x2606;
    pub const UNSUPPORTED_TARGET_DESCRIPTOR: u16 = 0x2607;
    pub const TOO_MANY_SEGMENT_DESCRIPTORS: u16 = 0x2608;
    pub const UNSUPPORTED_SEGMENT_DESCRIPTOR: u16 = 0x2609;
    pub const INLINE_DATA_LENGTH: u16 = 0x260b;
    pub const WRITE_PROTECTED: u16 = 0x2700;
    pub const SOFTWARE_WRITE_PROTECTED: u16 = 0x2702;
    pub const SPACE_ALLOCATION_FAILED: u16 = 0x2707;
    pub const POWER_ON: u16 = 0x2901;
    pub const DEVICE_RESET: u16 = 0x2903;
    pub const NEXUS_LOSS: u16 = 0x2907;
    pub const MODE_CHANGED: u16 = 0x2a01;
    pub const RESERVATIONS_PREEMPTED: u16 = 0x2a03;
    pub const RESERVATIONS_RELEASED: u16 = 0x2a04;
    pub const REGISTRATIONS_PREEMPTED: u16 = 0x2a05;
    pub const CAPACITY_CHANGED: u16 = 0x2a09;
    pub const MEDIUM_CHANGED: u16 = 0x2800;
    pub const SEQUENCE_ERROR: u16 = 0x2c00;
    pub const SAVING_NOT_SUPPORTED: u16 = 0x3900;
    pub const MEDIUM_NOT_PRESENT: u16 = 0x3a00;
    pub const LUNS_CHANGED: u16 = 0x3f0e;
    pub const INTERNAL_FAILURE: u16 = 0x4400;
    pub const MEDIUM_REMOVAL_PREVENTED: u16 = 0x5302;
    pub const REGISTRATION_RESOURCES: u16 = 0x5504;
}

/// Where an illegal field is (SPC-5, 4.4.2.4.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// The field is in the CDB rather than in the parameter list.
    pub in_cdb: bool,
    /// The first byte of the field.
    pub byte: u16,
    /// The most significant bit of the field, if it does not begin at the top of that byte.
    pub bit: Option<u8>,
}

/// Why a command failed, or which unit attention there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sense {
    pub key: Key,
    /// ASC and ASCQ, one of [`code`].
    pub code: u16,
    /// INFORMATION: for most errors the first block concerned.
    pub information: Option<u64>,
    pub field: Option<Field>,
}

impl Sense {
    /// Returns sense data without INFORMATION and field pointer.
    pub const fn new(key: Key, code: u16) -> Self {
        Self {
            key,
            code,
            information: None,
            field: None,
        }
    }

    /// Returns ILLEGAL REQUEST with this code.
    pub const fn illegal(code: u16) -> Self {
        Self::new(Key::IllegalRequest, code)
    }

    /// Returns INVALID FIELD IN CDB for the field that begins at `byte`.
    pub const fn cdb(byte: u16) -> Self {
        Self::illegal(code::INVALID_FIELD_IN_CDB).at(true, byte, None)
    }

    /// Returns INVALID FIELD IN CDB for the field that begins at `bit` of `byte`.
    pub const fn cdb_bit(byte: u16, bit: u8) -> Self {
        Self::illegal(code::INVALID_FIELD_IN_CDB).at(true, byte, Some(bit))
    }

    /// Returns INVALID FIELD IN PARAMETER LIST for the field that begins at `byte`.
    pub const fn parameter(byte: u16) -> Self {
        Self::illegal(code::INVALID_FIELD_IN_PARAMETERS).at(false, byte, None)
    }

    /// Adds a pointer to the illegal field.
    pub const fn at(self, in_cdb: bool, byte: u16, bit: Option<u8>) -> Self {
        Self {
            field: Some(Field { in_cdb, byte, bit }),
            ..self
        }
    }

    /// Adds INFORMATION.
    pub const fn with_information(self, information: u64) -> Self {
        Self {
            information: Some(information),
            ..self
        }
    }

    /// Returns the sense data in fixed format (SPC-5, 4.4.3) or in descriptor format (SPC-5, 4.4.2).
    pub fn to_bytes(self, descriptors: bool) -> Vec<u8> {
        if descriptors {
            self.in_descriptors()
        } else {
            self.fixed()
        }
    }

    fn fixed(self) -> Vec<u8> {
        let [asc, ascq] = self.code.to_be_bytes();
        // INFORMATION has four bytes here. What does not fit is left out, and VALID stays 0.
        let information = self.information.and_then(|value| u32::try_from(value).ok());
        let mut bytes = vec![
            0x70 | u8::from(information.is_some()) << 7,
            0,
            self.key as u8,
        ];
        bytes.extend(information.unwrap_or(0).to_be_bytes());
        bytes.push(10);
        bytes.extend([0; 4]);
        bytes.extend([asc, ascq, 0]);
        bytes.extend(self.field.map_or([0; 3], Field::to_bytes));
        bytes
    }

    fn in_descriptors(self) -> Vec<u8> {
        let [asc, ascq] = self.code.to_be_bytes();
        let mut bytes = vec![0x72, self.key as u8, asc, ascq, 0, 0, 0, 0];
        if let Some(information) = self.information {
            bytes.extend([0x00, 0x0a, 0x80, 0]);
            bytes.extend(information.to_be_bytes());
        }
        if let Some(field) = self.field {
            bytes.extend([0x02, 0x06, 0, 0]);
            bytes.extend(field.to_bytes());
            bytes.push(0);
        }
        let additional = bytes.len().saturating_sub(8) as u8;
        if let Some(length) = bytes.get_mut(7) {
            *length = additional;
        }
        bytes
    }
}

impl Field {
    fn to_bytes(self) -> [u8; 3] {
        let bit = self.bit.map_or(0, |bit| 0x08 | bit & 7);
        let [high, low] = self.byte.to_be_bytes();
        [0x80 | u8::from(self.in_cdb) << 6 | bit, high, low]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fixed_sense_data_has_its_fields_where_spc_puts_them() {
        let sense = Sense::new(Key::Miscompare, code::MISCOMPARE).with_information(0x1234_5678);
        let expected = [
            0xf0, 0, 0x0e, 0x12, 0x34, 0x56, 0x78, 10, 0, 0, 0, 0, 0x1d, 0, 0, 0, 0, 0,
        ];
        assert_eq!(sense.to_bytes(false), expected);
        let sense = Sense::cdb_bit(2, 4).to_bytes(false);
        assert_eq!(
            (sense[0], sense[2], sense[12], sense[13]),
            (0x70, 5, 0x24, 0)
        );
        assert_eq!(sense[15..18], [0xcc, 0, 2]);
    }

    #[test]
    fn information_that_does_not_fit_fixed_sense_data_is_not_valid() {
        let sense = Sense::new(Key::MediumError, code::WRITE_ERROR).with_information(1 << 32);
        assert_eq!(sense.to_bytes(false)[..7], [0x70, 0, 3, 0, 0, 0, 0]);
        let bytes = sense.to_bytes(true);
        assert_eq!(bytes[8..12], [0, 10, 0x80, 0]);
        assert_eq!(bytes[12..], (1u64 << 32).to_be_bytes());
    }

    #[test]
    fn sense_data_in_descriptors_says_how_long_they_are() {
        let bytes = Sense::illegal(code::INVALID_OPCODE).to_bytes(true);
        assert_eq!(bytes, [0x72, 5, 0x20, 0, 0, 0, 0, 0]);
        let bytes = Sense::parameter(0x102).with_information(7).to_bytes(true);
        assert_eq!(bytes[..8], [0x72, 5, 0x26, 0, 0, 0, 0, 20]);
        assert_eq!(bytes[20..], [2, 6, 0, 0, 0x80, 1, 2, 0]);
    }
}
