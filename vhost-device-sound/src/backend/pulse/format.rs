// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Formats and channels in the server's words.

use pulseaudio::protocol::{ChannelMap, ChannelPosition, SampleFormat};

use crate::format::Format;

/// Returns the server's name of a format, if it has it.
pub fn sample_format(format: Format) -> Option<SampleFormat> {
    match format {
        Format::U8 => Some(SampleFormat::U8),
        Format::S16 => Some(SampleFormat::S16Le),
        Format::S24In3 => Some(SampleFormat::S24Le),
        Format::S24 => Some(SampleFormat::S24In32Le),
        Format::S32 => Some(SampleFormat::S32Le),
        Format::Float => Some(SampleFormat::Float32Le),
        Format::S8 | Format::Float64 => None,
    }
}

/// Returns the positions of channels in the order of the channel maps that the guest gets.
pub fn channel_map(channels: u8) -> ChannelMap {
    use ChannelPosition::{
        FrontCenter, FrontLeft, FrontRight, Lfe, Mono, RearCenter, RearLeft, RearRight, SideLeft,
        SideRight,
    };
    const ALL: [ChannelPosition; 8] = [
        FrontLeft,
        FrontRight,
        RearLeft,
        RearRight,
        FrontCenter,
        Lfe,
        SideLeft,
        SideRight,
    ];
    let positions: &[ChannelPosition] = match channels {
        1 => &[Mono],
        3 => &[FrontLeft, FrontRight, FrontCenter],
        7 => &[
            FrontLeft,
            FrontRight,
            RearLeft,
            RearRight,
            FrontCenter,
            Lfe,
            RearCenter,
        ],
        _ => ALL.get(..channels.into()).unwrap_or(&ALL),
    };
    ChannelMap::new(positions.iter().copied())
}
