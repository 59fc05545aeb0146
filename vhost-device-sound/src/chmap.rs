// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Channel maps: where the channels of a stream are, for each number of channels (VIRTIO 1.3, 5.14.6.9).

use zerocopy::little_endian::U32;

use crate::profile::Profile;
use crate::protocol::{CHMAP_POSITIONS, ChmapInfo};

const MONO: u8 = 2;
const FL: u8 = 3;
const FR: u8 = 4;
const RL: u8 = 5;
const RR: u8 = 6;
const FC: u8 = 7;
const LFE: u8 = 8;
const SL: u8 = 9;
const SR: u8 = 10;
const RC: u8 = 11;

/// Positions by the number of channels, in ALSA's order.
const POSITIONS: [&[u8]; 8] = [
    &[MONO],
    &[FL, FR],
    &[FL, FR, FC],
    &[FL, FR, RL, RR],
    &[FL, FR, RL, RR, FC],
    &[FL, FR, RL, RR, FC, LFE],
    &[FL, FR, RL, RR, FC, LFE, RC],
    &[FL, FR, RL, RR, FC, LFE, SL, SR],
];

/// Returns the channel maps of a stream, one for each number of channels. `group` is the number of its PCM device.
pub fn maps(profile: &Profile, group: u32) -> impl Iterator<Item = ChmapInfo> {
    (profile.channels_min..=profile.channels_max).filter_map(move |channels| {
        let known = POSITIONS.get(usize::from(channels).checked_sub(1)?)?;
        let mut positions = [0; CHMAP_POSITIONS];
        for (to, from) in positions.iter_mut().zip(*known) {
            *to = *from;
        }
        Some(ChmapInfo {
            group: U32::new(group),
            direction: profile.direction.number(),
            channels,
            positions,
        })
    })
}
