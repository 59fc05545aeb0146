// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the guest records, byte by byte.

use crate::{
    Device, Driver, FORMATS, NOT_SUPP, OK, PCM_INFO, PREPARE, Params, RATES, RELEASE, RX, START,
    STOP, assert_same, noise, samples, words,
};

/// An input that can do everything. It is stream 0.
const ALL: &str = "--streams=input,channels=1-8,formats=s8+u8+s16+s24-3+s24+s32+float+float64,rates=8000+11025+16000+22050+32000+44100+48000+64000+88200+96000+176400+192000";

/// Records so many buffers of a period.
fn record(driver: &mut Driver, stream: u32, period: u32, count: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    for tag in 0..4 {
        driver.record(stream, period, tag);
    }
    driver.commands(&[START], stream);
    for tag in 0..count as u32 {
        let done = driver.wait(RX);
        assert_eq!((done.tag, done.status, done.used), (tag, OK, period + 8));
        bytes.extend(done.data);
        driver.record(stream, period, tag + 4);
    }
    driver.commands(&[STOP, RELEASE], stream);
    while driver.take(RX).is_some() {}
    bytes
}

/// The header of a WAV file.
fn header(tag: u16, channels: u16, rate: u32, bits: u16, length: u32) -> Vec<u8> {
    let frame = channels * bits / 8;
    let mut header = b"RIFF\0\0\0\0WAVEfmt \x10\0\0\0".to_vec();
    header.extend(tag.to_le_bytes());
    header.extend(channels.to_le_bytes());
    header.extend(rate.to_le_bytes());
    header.extend((rate * u32::from(frame)).to_le_bytes());
    header.extend(frame.to_le_bytes());
    header.extend(bits.to_le_bytes());
    header.extend(b"data");
    header.extend(length.to_le_bytes());
    header
}

#[test]
fn all_formats_channels_and_rates_come_from_a_file_byte_by_byte() {
    let contents = noise(1 << 20, 5);
    let device = Device::with_capture("sound", &contents, &[ALL, "--file-clock=free"]);
    let mut driver = device.connect();
    for (format, _, sample) in FORMATS {
        for (rate, hertz) in RATES {
            let channels = 1 + (format + rate) % 8;
            let period = sample * u32::from(channels) * (hertz / 100);
            let params = Params {
                buffer: period * 4,
                period,
                features: 0,
                channels,
                format,
                rate,
            };
            driver.prepare(0, &params);
            let bytes = record(&mut driver, 0, period, 6);
            assert_same(&bytes, &contents[..period as usize * 6]);
        }
    }
}

#[test]
fn real_time_loses_no_sample_either() {
    let contents = noise(1920 * 40, 5);
    let device = Device::with_capture("sound", &contents, &["--streams=input"]);
    let mut driver = device.connect();
    driver.prepare(0, &Params::USUAL);
    let bytes = record(&mut driver, 0, 1920, 30);
    if device.stream(0)["xruns"] == 0 {
        assert_same(&bytes, &contents[..bytes.len()]);
    }
}

#[test]
fn silence_follows_the_end_of_the_file() {
    for (name, silence) in [("s16", 0), ("u8", 0x80)] {
        let contents = noise(5000, 5);
        let streams = format!("--streams=input,formats={name}");
        let device = Device::with_capture("sound", &contents, &[&streams, "--file-clock=free"]);
        let mut driver = device.connect();
        let format = if name == "u8" { 4 } else { 5 };
        let params = Params {
            format,
            ..Params::USUAL
        };
        driver.prepare(0, &params);
        let bytes = record(&mut driver, 0, 1920, 5);
        let mut expected = contents;
        expected.resize(1920 * 5, silence);
        assert_same(&bytes, &expected);
    }
}

#[test]
fn the_null_back_end_records_silence() {
    for (name, format, silence) in [("s16", 5, 0), ("u8", 4, 0x80)] {
        let device = Device::start(&[&format!("--streams=input,formats={name}")]);
        let mut driver = device.connect();
        driver.prepare(
            0,
            &Params {
                format,
                ..Params::USUAL
            },
        );
        let bytes = record(&mut driver, 0, 1920, 2);
        assert!(bytes.iter().all(|byte| *byte == silence), "{name}");
    }
}

#[test]
fn a_file_begins_again_with_new_parameters_but_not_after_a_pause() {
    let contents = noise(1920 * 20, 5);
    let arguments = ["--streams=input", "--file-clock=free"];
    let device = Device::with_capture("sound", &contents, &arguments);
    let mut driver = device.connect();
    driver.prepare(0, &Params::USUAL);
    let first = record(&mut driver, 0, 1920, 4);
    // The buffers that were queued at the end have taken some, too.
    driver.commands(&[PREPARE], 0);
    let second = record(&mut driver, 0, 1920, 4);
    assert_same(&first, &contents[..7680]);
    assert_ne!(second, first);
    driver.prepare(0, &Params::USUAL);
    let third = record(&mut driver, 0, 1920, 4);
    assert_same(&third, &first);
}

#[test]
fn a_wav_file_decides_what_its_stream_offers() {
    for (tag, bits, formats) in [
        (1, 8, &[4][..]),
        (1, 16, &[5]),
        (1, 24, &[11, 15]),
        (1, 32, &[17]),
        (3, 32, &[19]),
        (3, 64, &[20]),
    ] {
        let data = noise(48_000, bits.into());
        let mut file = header(tag, 3, 22_050, bits, 24_000);
        file.extend(&data);
        let arguments = ["--streams=input", "--file-clock=free"];
        let device = Device::with_capture("sound.WAV", &file, &arguments);
        let mut driver = device.connect();
        let (_, info) = driver.request(&words(&[PCM_INFO, 0, 1, 32]), 36);
        let offered = u64::from_le_bytes(info[8..16].try_into().unwrap());
        assert_eq!(
            offered,
            formats.iter().fold(0, |bits, format| bits | 1 << format)
        );
        assert_eq!(info[16..24], (1u64 << 4).to_le_bytes());
        assert_eq!(info[24..27], [1, 3, 3]);
        for format in formats {
            let sample = if *format == 15 {
                4
            } else {
                u32::from(bits) / 8
            };
            let period = sample * 3 * 220;
            let params = Params {
                buffer: period * 4,
                period,
                features: 0,
                channels: 3,
                format: *format,
                rate: 4,
            };
            driver.prepare(0, &params);
            let bytes = record(&mut driver, 0, period, 8);
            let mut expected = match format {
                15 => {
                    let packed = data[..24_000].chunks(3);
                    packed
                        .flat_map(|sample| {
                            let sign = if sample[2] & 0x80 == 0 { 0 } else { 0xff };
                            [sample[0], sample[1], sample[2], sign]
                        })
                        .collect()
                }
                _ => data[..24_000].to_vec(),
            };
            // Silence after the length that the header says.
            expected.resize(
                bytes.len().max(expected.len()),
                if bits == 8 { 0x80 } else { 0 },
            );
            expected.truncate(bytes.len());
            assert_same(&bytes, &expected);
        }
        let wrong = Params {
            channels: 2,
            ..Params::USUAL
        };
        assert_eq!(driver.status(&wrong.request(0)), NOT_SUPP);
    }
}

#[test]
fn what_is_played_to_a_wav_file_can_be_recorded_from_it() {
    for (format, name, sample) in FORMATS {
        // The format of WAV files with 8 bits is unsigned.
        if name == "s8" {
            continue;
        }
        let streams = ["output", "input"].map(|direction| {
            format!("--streams={direction},formats={name},channels=2,rates=48000")
        });
        let playing = Device::with_playback("loop.wav", &[&streams[0], "--file-clock=free"]);
        let mut driver = playing.connect();
        let period = sample * 2 * 480;
        let params = Params {
            buffer: period * 4,
            period,
            format,
            ..Params::USUAL
        };
        driver.prepare(0, &params);
        driver.commands(&[START], 0);
        let bytes = samples(format, period as usize * 4, 3);
        for chunk in bytes.chunks(period as usize) {
            driver.play(0, chunk, 0);
            driver.wait(crate::TX);
        }
        drop(driver);
        let file = playing.read("loop.wav");
        let recording =
            Device::with_capture("loop.wav", &file, &[&streams[1], "--file-clock=free"]);
        let mut driver = recording.connect();
        driver.prepare(0, &params);
        let recorded = record(&mut driver, 0, period, 4);
        assert_same(&recorded, &bytes);
    }
}
