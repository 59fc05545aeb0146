// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Sample formats and frame rates.

use serde::{Deserialize, Serialize};

/// A sample format. All are little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Format {
    /// 8 bits, signed.
    S8,
    /// 8 bits, unsigned.
    U8,
    /// 16 bits.
    S16,
    /// 24 bits in 3 bytes.
    S24In3,
    /// 24 bits in the lower part of 4 bytes.
    S24,
    /// 32 bits.
    S32,
    /// 32-bit float.
    Float,
    /// 64-bit float.
    Float64,
}

impl Format {
    /// All formats.
    pub const ALL: [Self; 8] = [
        Self::S8,
        Self::U8,
        Self::S16,
        Self::S24In3,
        Self::S24,
        Self::S32,
        Self::Float,
        Self::Float64,
    ];

    /// Returns its name in options.
    pub fn name(self) -> &'static str {
        match self {
            Self::S8 => "s8",
            Self::U8 => "u8",
            Self::S16 => "s16",
            Self::S24In3 => "s24-3",
            Self::S24 => "s24",
            Self::S32 => "s32",
            Self::Float => "float",
            Self::Float64 => "float64",
        }
    }

    /// Returns the format with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|format| format.name() == name)
    }

    /// Returns its number (VIRTIO_SND_PCM_FMT_*).
    pub fn number(self) -> u8 {
        match self {
            Self::S8 => 3,
            Self::U8 => 4,
            Self::S16 => 5,
            Self::S24In3 => 11,
            Self::S24 => 15,
            Self::S32 => 17,
            Self::Float => 19,
            Self::Float64 => 20,
        }
    }

    /// Returns the format with this number.
    pub fn from_number(number: u8) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|format| format.number() == number)
    }

    /// Returns the size of a sample in bytes.
    pub fn size(self) -> usize {
        match self {
            Self::S8 | Self::U8 => 1,
            Self::S16 => 2,
            Self::S24In3 => 3,
            Self::S24 | Self::S32 | Self::Float => 4,
            Self::Float64 => 8,
        }
    }

    /// Returns the byte of which silence consists.
    pub fn silence(self) -> u8 {
        match self {
            Self::U8 => 0x80,
            _ => 0,
        }
    }
}

/// Frame rates in Hz, with their numbers (VIRTIO_SND_PCM_RATE_*).
const RATES: [(u32, u8); 12] = [
    (8000, 1),
    (11025, 2),
    (16000, 3),
    (22050, 4),
    (32000, 5),
    (44100, 6),
    (48000, 7),
    (64000, 8),
    (88200, 9),
    (96000, 10),
    (176_400, 11),
    (192_000, 12),
];

/// Returns all frame rates that streams can have, in Hz.
pub fn rates() -> impl Iterator<Item = u32> {
    RATES.into_iter().map(|(rate, _)| rate)
}

/// Returns the number of a frame rate.
pub fn rate_number(rate: u32) -> Option<u8> {
    let mut rates = RATES.into_iter();
    rates.find_map(|(hertz, number)| (hertz == rate).then_some(number))
}

/// Returns the frame rate with this number, in Hz.
pub fn rate_from_number(number: u8) -> Option<u32> {
    let mut rates = RATES.into_iter();
    rates.find_map(|(hertz, other)| (other == number).then_some(hertz))
}
