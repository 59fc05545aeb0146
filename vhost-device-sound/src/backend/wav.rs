// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! WAV files: the header, and samples that a WAV file stores in another form than the guest.

use std::borrow::Cow;

use crate::format::Format;
use crate::profile::Params;

/// Size of the header that [`header`] returns.
pub const HEADER_SIZE: usize = 44;
/// Length of a header that is read. The samples must begin before its end.
pub const MAX_HEADER: usize = 64 << 10;

/// Numbers of WAVE formats.
const PCM: u16 = 1;
const FLOAT: u16 = 3;
const EXTENSIBLE: u16 = 0xfffe;

/// Returns whether the samples of a WAV file have this form: the format number, and the bits of a sample.
fn wave_format(format: Format) -> (u16, u16) {
    match format {
        Format::S8 | Format::U8 => (PCM, 8),
        Format::S16 => (PCM, 16),
        Format::S24In3 | Format::S24 => (PCM, 24),
        Format::S32 => (PCM, 32),
        Format::Float => (FLOAT, 32),
        Format::Float64 => (FLOAT, 64),
    }
}

/// Returns the size of a sample in a WAV file, in bytes.
pub fn sample_size(format: Format) -> usize {
    usize::from(wave_format(format).1 / 8)
}

/// Returns the header of a file with so many bytes of samples. If they are too many for the header, it says as many as it can.
pub fn header(params: &Params, data: u64) -> [u8; HEADER_SIZE] {
    let (tag, bits) = wave_format(params.format);
    let channels = u16::from(params.channels);
    let frame = channels * (bits / 8);
    let data = u32::try_from(data).unwrap_or(u32::MAX);
    let rate = params.rate;
    let mut header = [0; HEADER_SIZE];
    let fields: [&[u8]; 13] = [
        b"RIFF",
        &data.saturating_add(HEADER_SIZE as u32 - 8).to_le_bytes(),
        b"WAVEfmt ",
        &16u32.to_le_bytes(),
        &tag.to_le_bytes(),
        &channels.to_le_bytes(),
        &rate.to_le_bytes(),
        &rate.saturating_mul(frame.into()).to_le_bytes(),
        &frame.to_le_bytes(),
        &bits.to_le_bytes(),
        b"data",
        &data.to_le_bytes(),
        &[],
    ];
    for (to, from) in header.iter_mut().zip(fields.concat()) {
        *to = from;
    }
    header
}

/// Converts whole samples of the guest to those of a WAV file, which has neither signed samples of 8 bits nor 24 bits in 4 bytes.
pub fn encode(format: Format, bytes: &[u8]) -> Cow<'_, [u8]> {
    match format {
        Format::S8 => bytes.iter().map(|byte| byte ^ 0x80).collect(),
        Format::S24 => {
            let (samples, _) = bytes.as_chunks::<4>();
            let packed = samples
                .iter()
                .flat_map(|[low, middle, high, _]| [*low, *middle, *high]);
            packed.collect()
        }
        _ => Cow::Borrowed(bytes),
    }
}

/// Converts samples of a WAV file to those of the guest, which fill `bytes`.
pub fn decode(format: Format, samples: &[u8], bytes: &mut [u8]) {
    match format {
        Format::S8 => {
            for (to, from) in bytes.iter_mut().zip(samples) {
                *to = from ^ 0x80;
            }
        }
        Format::S24 => {
            let (places, _) = bytes.as_chunks_mut::<4>();
            let (samples, _) = samples.as_chunks::<3>();
            for (place, [low, middle, high]) in places.iter_mut().zip(samples) {
                let sign = if high & 0x80 == 0 { 0 } else { 0xff };
                *place = [*low, *middle, *high, sign];
            }
        }
        _ => {
            for (to, from) in bytes.iter_mut().zip(samples) {
                *to = *from;
            }
        }
    }
}

/// What a WAV file contains.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contents {
    /// Formats in which the guest can have the samples.
    pub formats: Vec<Format>,
    /// Number of channels.
    pub channels: u8,
    /// Frames a second.
    pub rate: u32,
    /// Offset of the first sample in the file.
    pub start: u64,
    /// Offset of the end of the last sample.
    pub end: u64,
}

/// Reads the header of a file of `size` bytes from its first bytes, [`MAX_HEADER`] at most.
///
/// # Errors
/// Returns what is wrong with the file.
pub fn parse(bytes: &[u8], size: u64) -> Result<Contents, &'static str> {
    let field = |place: usize, length: usize| {
        let end = place.checked_add(length)?;
        bytes.get(place..end)
    };
    let u16_at = |place| Some(u16::from_le_bytes(field(place, 2)?.try_into().ok()?));
    let u32_at = |place| Some(u32::from_le_bytes(field(place, 4)?.try_into().ok()?));
    if field(0, 4) != Some(b"RIFF") || field(8, 4) != Some(b"WAVE") {
        return Err("it is not a WAV file");
    }
    let mut form = None;
    let mut place = 12usize;
    loop {
        let name = field(place, 4).ok_or("it has no samples")?;
        let length = u32_at(place + 4).ok_or("it has no samples")?;
        let content = place + 8;
        if name == b"fmt " {
            let read = || {
                let mut tag = u16_at(content)?;
                if tag == EXTENSIBLE {
                    tag = u16_at(content + 24)?;
                }
                Some((
                    tag,
                    u16_at(content + 2)?,
                    u32_at(content + 4)?,
                    u16_at(content + 14)?,
                ))
            };
            form = Some(read().ok_or("its header is too short")?);
        } else if name == b"data" {
            let (tag, channels, rate, bits) =
                form.ok_or("its format does not precede its samples")?;
            let fits = |format: &Format| {
                // Samples of 8 bits are unsigned.
                wave_format(*format) == (tag, bits) && *format != Format::S8
            };
            let formats: Vec<_> = Format::ALL.into_iter().filter(fits).collect();
            if formats.is_empty() {
                return Err("its samples have an unknown format; use 8 to 32 bits or float");
            }
            let start = content as u64;
            // Programs that write to a pipe do not know the length.
            let length = match length {
                0 | u32::MAX => u64::MAX,
                length => length.into(),
            };
            return Ok(Contents {
                formats,
                channels: u8::try_from(channels).unwrap_or(0),
                rate,
                start,
                end: start.saturating_add(length).min(size),
            });
        }
        // Chunks are padded to an even length.
        let next = usize::try_from(length)
            .ok()
            .and_then(|length| content.checked_add(length)?.checked_next_multiple_of(2));
        place = next.ok_or("it has no samples")?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params(format: Format) -> Params {
        Params {
            buffer_bytes: 0,
            period_bytes: 0,
            xruns: false,
            channels: 2,
            format,
            rate: 48_000,
        }
    }

    #[test]
    fn a_header_that_is_written_can_be_read() {
        for format in Format::ALL {
            let header = header(&params(format), 960);
            let contents = parse(&header, 44 + 960).unwrap();
            let readable = if format == Format::S8 {
                Format::U8
            } else {
                format
            };
            assert!(contents.formats.contains(&readable), "{format:?}");
            assert_eq!((contents.channels, contents.rate), (2, 48_000));
            assert_eq!((contents.start, contents.end), (44, 1004));
        }
        // A file whose writer was killed.
        let header = header(&params(Format::S16), 0);
        assert_eq!(parse(&header, 5000).unwrap().end, 5000);
    }

    #[test]
    fn samples_come_back_as_they_were() {
        let bytes: Vec<u8> = (0..=255).collect();
        for format in Format::ALL {
            if format == Format::S24 {
                continue;
            }
            let samples = encode(format, &bytes);
            let mut back = vec![0; bytes.len()];
            decode(format, &samples, &mut back);
            assert_eq!(back, bytes, "{format:?}");
        }
        let words: Vec<u8> = [1i32, -1, 0x7f_ffff, -0x80_0000, 0]
            .into_iter()
            .flat_map(i32::to_le_bytes)
            .collect();
        let samples = encode(Format::S24, &words);
        assert_eq!(samples.len(), 15);
        let mut back = vec![0; words.len()];
        decode(Format::S24, &samples, &mut back);
        assert_eq!(back, words);
    }

    #[test]
    fn a_header_with_other_chunks_is_read() {
        let plain = header(&params(Format::S16), 8);
        let mut bytes = plain[..36].to_vec();
        bytes.extend(b"LIST\x03\0\0\0abc\0");
        bytes.extend(&plain[36..]);
        bytes.extend([1; 8]);
        let contents = parse(&bytes, bytes.len() as u64).unwrap();
        assert_eq!((contents.start, contents.end), (56, 64));
    }

    #[test]
    fn a_damaged_header_is_refused() {
        let good = header(&params(Format::S16), 8);
        for length in 0..HEADER_SIZE {
            assert!(parse(&good[..length], 52).is_err(), "{length}");
        }
        for place in 0..HEADER_SIZE {
            for value in [0, 0x80, 0xff] {
                let mut bytes = good;
                bytes[place] = value;
                if let Ok(contents) = parse(&bytes, 52) {
                    assert!(contents.start <= 52 && contents.end <= 52, "{place}");
                }
            }
        }
        let mut bits = good;
        bits[34] = 12;
        assert!(parse(&bits, 52).unwrap_err().contains("unknown format"));
    }
}
