// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Fields of CDBs and parameter lists, which are big-endian. Bytes that are missing are read as 0.

/// Bytes that an initiator has sent.
#[derive(Clone, Copy, Debug)]
pub struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    fn array<const N: usize>(self, at: usize) -> [u8; N] {
        let bytes = self.0.get(at..).unwrap_or_default();
        if let Some(array) = bytes.first_chunk() {
            return *array;
        }
        let mut array = [0; N];
        for (to, from) in array.iter_mut().zip(bytes) {
            *to = *from;
        }
        array
    }

    /// Returns the byte at `at`.
    pub fn byte(self, at: usize) -> u8 {
        u8::from_be_bytes(self.array(at))
    }

    /// Returns whether `bit` of the byte at `at` is set.
    pub fn bit(self, at: usize, bit: u8) -> bool {
        self.byte(at) >> bit & 1 == 1
    }

    /// Returns the two bytes at `at` as a number.
    pub fn u16(self, at: usize) -> u16 {
        u16::from_be_bytes(self.array(at))
    }

    /// Returns the four bytes at `at` as a number.
    pub fn u32(self, at: usize) -> u32 {
        u32::from_be_bytes(self.array(at))
    }

    /// Returns the eight bytes at `at` as a number.
    pub fn u64(self, at: usize) -> u64 {
        u64::from_be_bytes(self.array(at))
    }

    /// Returns the bytes in `range` that there are.
    pub fn part(self, range: std::ops::Range<usize>) -> Fields<'a> {
        let end = range.end.min(self.0.len());
        Fields(self.0.get(range.start..end).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_big_endian_and_missing_bytes_are_zero() {
        let fields = Fields(&[0x12, 0x34, 0x56, 0x78, 0x9a]);
        assert_eq!(fields.byte(4), 0x9a);
        assert_eq!(fields.byte(5), 0);
        assert_eq!(fields.u16(1), 0x3456);
        assert_eq!(fields.u32(0), 0x1234_5678);
        assert_eq!(fields.u32(3), 0x789a_0000);
        assert_eq!(fields.u64(usize::MAX), 0);
        assert!(fields.bit(0, 4) && !fields.bit(0, 0));
        assert_eq!(fields.part(3..9).0, [0x78, 0x9a]);
        assert!(fields.part(9..12).0.is_empty());
    }
}
