// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a stream offers (`--streams`), and the parameters that a driver chooses from it.

use std::str::FromStr;

use serde::{Deserialize, Serialize};
use zerocopy::little_endian::{U32, U64};

use crate::format::{self, Format};
use crate::protocol::{Direction, PCM_F_EVT_XRUNS, PcmInfo, SetParams, Status};

/// Most channels of a stream.
pub const MAX_CHANNELS: u8 = 8;
/// Largest buffer of a driver in bytes, and so the largest request.
pub const MAX_BUFFER: u32 = 4 << 20;

/// What a stream offers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Profile {
    /// Its direction.
    pub direction: Direction,
    /// Minimum number of channels.
    pub channels_min: u8,
    /// Maximum number of channels.
    pub channels_max: u8,
    /// Sample formats.
    pub formats: Vec<Format>,
    /// Frame rates in Hz.
    pub rates: Vec<u32>,
}

impl Profile {
    /// Returns the default stream of a direction. Linux computes the sizes of its buffers from the largest values, so that a narrow
    /// range makes for small buffers.
    pub fn new(direction: Direction) -> Self {
        Self {
            direction,
            channels_min: 1,
            channels_max: 2,
            formats: vec![Format::S16, Format::S32, Format::Float],
            rates: vec![44_100, 48_000, 96_000],
        }
    }

    /// Returns the information for the driver. `group` is the number of the PCM device.
    pub fn info(&self, group: u32) -> PcmInfo {
        let bits = |numbers: &mut dyn Iterator<Item = u8>| {
            numbers.fold(0, |bits, number| bits | 1u64 << number)
        };
        let rates = self
            .rates
            .iter()
            .filter_map(|rate| format::rate_number(*rate));
        PcmInfo {
            group: U32::new(group),
            features: U32::new(PCM_F_EVT_XRUNS),
            formats: U64::new(bits(&mut self.formats.iter().map(|format| format.number()))),
            rates: U64::new(bits(&mut { rates })),
            direction: self.direction.number(),
            channels_min: self.channels_min,
            channels_max: self.channels_max,
            padding: [0; 5],
        }
    }

    /// Returns the parameters that a driver has chosen.
    ///
    /// # Errors
    /// The stream does not offer them, or they contradict each other.
    pub fn choose(&self, wanted: &SetParams) -> Result<Params, Status> {
        let format = Format::from_number(wanted.format).ok_or(Status::NotSupported)?;
        let rate = format::rate_from_number(wanted.rate).ok_or(Status::NotSupported)?;
        let features = wanted.features.get();
        if features & !PCM_F_EVT_XRUNS != 0 {
            return Err(Status::NotSupported);
        }
        let params = Params {
            buffer_bytes: wanted.buffer_bytes.get(),
            period_bytes: wanted.period_bytes.get(),
            xruns: features & PCM_F_EVT_XRUNS != 0,
            channels: wanted.channels,
            format,
            rate,
        };
        self.check(&params)?;
        Ok(params)
    }

    /// Checks parameters that [`Profile::choose`] returned, or that were saved.
    ///
    /// # Errors
    /// The stream does not offer them, or they contradict each other.
    pub fn check(&self, params: &Params) -> Result<(), Status> {
        let channels = self.channels_min..=self.channels_max;
        if !channels.contains(&params.channels)
            || !self.formats.contains(&params.format)
            || !self.rates.contains(&params.rate)
            || params.buffer_bytes > MAX_BUFFER
        {
            return Err(Status::NotSupported);
        }
        let is_multiple = |bytes: u32, of: u32| bytes > 0 && bytes.checked_rem(of) == Some(0);
        if !is_multiple(params.period_bytes, params.frame_bytes())
            || !is_multiple(params.buffer_bytes, params.period_bytes)
        {
            return Err(Status::BadMessage);
        }
        Ok(())
    }
}

impl FromStr for Profile {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut words = text.split(',');
        let direction = match words.next() {
            Some("output") => Direction::Output,
            Some("input") => Direction::Input,
            _ => return Err("must begin with `output` or `input`".to_owned()),
        };
        let mut profile = Self::new(direction);
        for word in words {
            match word.split_once('=') {
                Some(("channels", value)) => {
                    let (min, max) = value.split_once('-').unwrap_or((value, value));
                    let number = |text: &str| {
                        let number = text.parse().ok();
                        number.filter(|count| (1..=MAX_CHANNELS).contains(count))
                    };
                    let range = number(min).zip(number(max)).filter(|(min, max)| min <= max);
                    (profile.channels_min, profile.channels_max) = range.ok_or_else(|| {
                        format!("`channels` must be a number from 1 to {MAX_CHANNELS} or a range such as 1-2")
                    })?;
                }
                Some(("formats", value)) => {
                    let formats = value.split('+').map(Format::from_name);
                    profile.formats = formats.collect::<Option<_>>().ok_or_else(|| {
                        let names = Format::ALL.map(Format::name).join(", ");
                        format!("`formats` must be names joined by `+`, of: {names}")
                    })?;
                }
                Some(("rates", value)) => {
                    let rate = |text: &str| {
                        let rate = text.parse().ok();
                        rate.filter(|rate| format::rate_number(*rate).is_some())
                    };
                    let rates = value.split('+').map(rate);
                    profile.rates = rates.collect::<Option<_>>().ok_or_else(|| {
                        let rates: Vec<_> = format::rates().map(|rate| rate.to_string()).collect();
                        format!(
                            "`rates` must be numbers joined by `+`, of: {}",
                            rates.join(", ")
                        )
                    })?;
                }
                _ => {
                    return Err(format!(
                        "{word:?} is unknown; the properties are `channels=`, `formats=` and `rates=`"
                    ));
                }
            }
        }
        Ok(profile)
    }
}

/// The parameters of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Params {
    /// Size of the driver's buffer, a multiple of the period.
    pub buffer_bytes: u32,
    /// Size of a period, a multiple of the frame.
    pub period_bytes: u32,
    /// The driver wants an event for each underrun or overrun.
    pub xruns: bool,
    /// Number of channels.
    pub channels: u8,
    /// Sample format.
    pub format: Format,
    /// Frames a second.
    pub rate: u32,
}

impl Params {
    /// Returns the size of a frame in bytes: a sample for each channel.
    pub fn frame_bytes(&self) -> u32 {
        u32::from(self.channels) * self.format.size() as u32
    }

    /// Returns the frames of a period.
    pub fn period_frames(&self) -> u32 {
        self.period_bytes
            .checked_div(self.frame_bytes())
            .unwrap_or(0)
    }

    /// Returns `bytes` without an incomplete frame at their end.
    pub fn whole_frames(&self, bytes: u64) -> u64 {
        bytes - bytes.checked_rem(self.frame_bytes().into()).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_has_a_direction_and_properties() {
        let default = "output".parse::<Profile>().unwrap();
        assert_eq!(default, Profile::new(Direction::Output));
        let text = "input,channels=1-8,formats=s8+float64,rates=8000+192000";
        let profile = text.parse::<Profile>().unwrap();
        assert_eq!(profile.direction, Direction::Input);
        assert_eq!((profile.channels_min, profile.channels_max), (1, 8));
        assert_eq!(profile.formats, [Format::S8, Format::Float64]);
        assert_eq!(profile.rates, [8000, 192_000]);
        let mono = "output,channels=1".parse::<Profile>().unwrap();
        assert_eq!((mono.channels_min, mono.channels_max), (1, 1));
        for (text, word) in [
            ("", "begin with"),
            ("both", "begin with"),
            ("output,channels=0", "from 1 to 8"),
            ("output,channels=9", "from 1 to 8"),
            ("output,channels=3-2", "from 1 to 8"),
            ("output,channels=", "from 1 to 8"),
            ("output,formats=s16+x", "s24-3"),
            ("output,rates=48000+1", "176400"),
            ("output,rate=48000", "unknown"),
            ("output,", "unknown"),
        ] {
            let error = text.parse::<Profile>().unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    fn wanted() -> SetParams {
        SetParams {
            buffer_bytes: 7680.into(),
            period_bytes: 1920.into(),
            features: 0.into(),
            channels: 2,
            format: 5,
            rate: 7,
            padding: 0,
        }
    }

    #[test]
    fn parameters_must_be_offered_and_fit_each_other() {
        let profile = Profile::new(Direction::Output);
        let params = profile.choose(&wanted()).unwrap();
        assert_eq!(params.frame_bytes(), 4);
        assert_eq!(params.period_frames(), 480);
        assert_eq!((params.format, params.rate), (Format::S16, 48_000));
        let change = |change: &dyn Fn(&mut SetParams)| {
            let mut wanted = wanted();
            change(&mut wanted);
            profile.choose(&wanted)
        };
        assert!(change(&|wanted| wanted.features = 16.into()).unwrap().xruns);
        assert!(change(&|wanted| wanted.padding = 1).is_ok());
        for features in [1, 2, 4, 8, 32, 1 << 31] {
            let refused = change(&|wanted| wanted.features = features.into());
            assert_eq!(refused, Err(Status::NotSupported), "{features}");
        }
        let refusals: [&dyn Fn(&mut SetParams); 9] = [
            &|wanted| wanted.channels = 0,
            &|wanted| wanted.channels = 3,
            &|wanted| wanted.channels = 255,
            &|wanted| wanted.format = 3,
            &|wanted| wanted.format = 255,
            &|wanted| wanted.rate = 8,
            &|wanted| wanted.rate = 255,
            &|wanted| wanted.buffer_bytes = (MAX_BUFFER + 1920).into(),
            &|wanted| wanted.buffer_bytes = u32::MAX.into(),
        ];
        for (index, refusal) in refusals.into_iter().enumerate() {
            assert_eq!(change(refusal), Err(Status::NotSupported), "{index}");
        }
        for (period, buffer) in [
            (0, 7680),
            (1920, 0),
            (1920, 1921),
            (1922, 3844),
            (7680, 1920),
        ] {
            let refused = change(&|wanted| {
                wanted.period_bytes = period.into();
                wanted.buffer_bytes = buffer.into();
            });
            assert_eq!(refused, Err(Status::BadMessage), "{period} {buffer}");
        }
    }
}
