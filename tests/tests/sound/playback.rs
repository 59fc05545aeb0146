// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the guest plays, byte by byte.

use std::time::{Duration, Instant};

use vhost_device_tests::front_end::Buffer;

use crate::{
    Device, Driver, FORMATS, NOT_SUPP, OK, PREPARE, Params, Pending, RATES, RELEASE, START, STOP,
    TX, assert_same, noise, samples,
};

/// A stream that can do everything.
const ALL: &str = "--streams=output,channels=1-8,formats=s8+u8+s16+s24-3+s24+s32+float+float64,rates=8000+11025+16000+22050+32000+44100+48000+64000+88200+96000+176400+192000";

/// Plays bytes in buffers of a period, at most `ahead` at a time, and waits until all are played.
fn play_all(driver: &mut Driver, stream: u32, bytes: &[u8], period: usize, ahead: usize) {
    let mut rest = bytes.chunks(period);
    let mut queued = 0;
    for chunk in rest.by_ref().take(ahead) {
        driver.play(stream, chunk, 0);
        queued += 1;
    }
    driver.commands(&[START], stream);
    while queued > 0 {
        let done = driver.wait(TX);
        assert_eq!((done.status, done.used), (OK, 8));
        queued -= 1;
        if let Some(chunk) = rest.next() {
            driver.play(stream, chunk, 0);
            queued += 1;
        }
    }
    driver.commands(&[STOP, RELEASE], stream);
}

/// Returns the samples of a WAV file, after a check of its header.
fn wav(file: &[u8], params: &Params, tag: u16, size: u32) -> Vec<u8> {
    let (_, _, sample) = FORMATS
        .into_iter()
        .find(|(number, ..)| *number == params.format)
        .unwrap();
    let (_, rate) = RATES
        .into_iter()
        .find(|(number, _)| *number == params.rate)
        .unwrap();
    let channels = u16::from(params.channels);
    // 24 bits in 4 bytes are stored in 3.
    let sample = if params.format == 15 {
        3
    } else {
        sample as u16
    };
    let data = file.len() as u32 - 44;
    let mut header = b"RIFF".to_vec();
    header.extend((data + 36).to_le_bytes());
    header.extend(b"WAVEfmt \x10\0\0\0");
    header.extend(tag.to_le_bytes());
    header.extend(channels.to_le_bytes());
    header.extend(rate.to_le_bytes());
    header.extend((rate * u32::from(channels * sample)).to_le_bytes());
    header.extend((channels * sample).to_le_bytes());
    header.extend((sample * 8).to_le_bytes());
    header.extend(b"data");
    header.extend(data.to_le_bytes());
    assert_same(&file[..44], &header);
    assert_eq!(data, size);
    file[44..].to_vec()
}

#[test]
fn all_formats_channels_and_rates_reach_a_file_byte_by_byte() {
    let device = Device::with_playback("played", &[ALL, "--file-clock=free"]);
    let mut driver = device.connect();
    let mut expected = Vec::new();
    for (format, _, sample) in FORMATS {
        for (rate, hertz) in RATES {
            let channels = 1 + (format + rate) % 8;
            let frame = sample * u32::from(channels);
            let period = frame * (hertz / 100);
            let params = Params {
                buffer: period * 4,
                period,
                features: 0,
                channels,
                format,
                rate,
            };
            driver.prepare(0, &params);
            let bytes = noise(
                period as usize * 6,
                u64::from(format) << 8 | u64::from(rate),
            );
            play_all(&mut driver, 0, &bytes, period as usize, 4);
            expected.extend(&bytes);
            assert_same(&device.read("played"), &expected);
        }
    }
}

#[test]
fn all_channels_reach_a_wav_file_in_all_formats() {
    for (format, _, sample) in FORMATS {
        for channels in [1, 2, 8] {
            let device = Device::with_playback("played.wav", &[ALL, "--file-clock=free"]);
            let mut driver = device.connect();
            let period = sample * u32::from(channels) * 480;
            let params = Params {
                buffer: period * 2,
                period,
                features: 0,
                channels,
                format,
                rate: 7,
            };
            driver.prepare(0, &params);
            let bytes = samples(format, period as usize * 5, format.into());
            play_all(&mut driver, 0, &bytes, period as usize, 2);
            let file = device.read("played.wav");
            let tag = if format >= 19 { 3 } else { 1 };
            let expected = match format {
                // WAV has unsigned samples of 8 bits.
                3 => bytes.iter().map(|byte| byte ^ 0x80).collect(),
                15 => bytes
                    .chunks(4)
                    .flat_map(|sample| &sample[..3])
                    .copied()
                    .collect(),
                _ => bytes,
            };
            let stored = wav(&file, &params, tag, expected.len() as u32);
            assert_same(&stored, &expected);
        }
    }
}

#[test]
fn real_time_loses_no_sample_either() {
    let device = Device::with_playback("played", &[]);
    let mut driver = device.connect();
    driver.prepare(0, &Params::USUAL);
    let bytes = noise(1920 * 60, 1);
    let begin = Instant::now();
    // The machine may be too busy for four periods ahead: the time between them would be recorded as silence.
    play_all(&mut driver, 0, &bytes, 1920, 30);
    assert!(begin.elapsed() >= Duration::from_millis(600));
    let file = device.read("played");
    let has_xrun = device.stream(0)["xruns"] != 0;
    if !has_xrun {
        assert_same(&file, &bytes);
    }
}

#[test]
fn buffers_may_have_any_size_and_any_split() {
    let device = Device::with_playback("played", &["--file-clock=free"]);
    let mut driver = device.connect();
    driver.prepare(0, &Params::USUAL);
    driver.commands(&[START], 0);
    let mut random = fastrand::Rng::with_seed(9);
    let mut expected = Vec::new();
    for round in 0..300 {
        // Whole frames, and sometimes a part of one, which is dropped.
        let frames = random.usize(0..2000);
        let odd = random.usize(0..4);
        let bytes = noise(frames * 4 + odd, round);
        expected.extend(&bytes[..frames * 4]);
        let place = driver.allocate(bytes.len() as u64 + 4);
        let status = driver.allocate(8);
        driver.front_end.memory().write_u32(place, 0);
        driver.front_end.memory().write(place + 4, &bytes);
        let all = Buffer::readable(place, bytes.len() as u32 + 4);
        let mut pieces = Vec::new();
        let mut left = all.length;
        while left > 0 && pieces.len() < 5 {
            let piece = random.u32(1..=left.min(1000));
            pieces.push(piece);
            left -= piece;
        }
        let mut chain = all.split(&pieces);
        chain.extend(Buffer::writable(status, 8).split(&[random.u32(1..8)]));
        let pending = Pending {
            tag: 0,
            data: place,
            length: 0,
            status,
        };
        driver.submit(TX, &chain, pending);
        let done = driver.wait(TX);
        assert_eq!((done.status, done.used), (OK, 8));
    }
    driver.commands(&[STOP, RELEASE], 0);
    assert_same(&device.read("played"), &expected);
}

#[test]
fn an_empty_buffer_comes_back_at_once() {
    let device = Device::start(&[]);
    let mut driver = device.connect();
    driver.prepare(0, &Params::USUAL);
    for length in 0..4 {
        driver.play(0, &vec![1; length], 0);
        let done = driver.wait(TX);
        assert_eq!((done.status, done.used), (OK, 8));
    }
}

#[test]
fn each_output_has_its_own_file() {
    let device = Device::start(&[
        "--backend=file",
        "--playback-file=DIR/first",
        "--playback-file=DIR/second",
        "--file-clock=free",
        "--streams=output",
        "--streams=output",
    ]);
    let mut driver = device.connect();
    let mut expected = [Vec::new(), Vec::new()];
    for stream in [0, 1] {
        driver.prepare(stream, &Params::USUAL);
        driver.commands(&[START], stream);
    }
    for round in 0..40 {
        for stream in [0, 1] {
            let bytes = noise(1920, round << 1 | u64::from(stream));
            driver.play(stream, &bytes, stream);
            expected[stream as usize].extend(bytes);
        }
        for _ in 0..2 {
            assert_eq!(driver.wait(TX).status, OK);
        }
    }
    assert_same(&device.read("first"), &expected[0]);
    assert_same(&device.read("second"), &expected[1]);
}

#[test]
fn a_wav_file_keeps_the_format_of_its_first_sound() {
    let device = Device::with_playback("played.wav", &["--file-clock=free"]);
    let mut driver = device.connect();
    let other = Params {
        channels: 1,
        ..Params::USUAL
    };
    // Nothing was played yet.
    driver.prepare(0, &other);
    driver.commands(&[START, STOP, RELEASE], 0);
    driver.prepare(0, &Params::USUAL);
    play_all(&mut driver, 0, &noise(7680, 1), 1920, 2);
    assert_eq!(driver.status(&other.request(0)), NOT_SUPP);
    assert!(device.program.stderr().contains("played.wav has 48000 Hz"));
    // The refusal changes nothing.
    driver.commands(&[PREPARE], 0);
    play_all(&mut driver, 0, &noise(3840, 2), 1920, 2);
    let file = device.read("played.wav");
    let bytes = wav(&file, &Params::USUAL, 1, 7680 + 3840);
    assert_same(&bytes, &[noise(7680, 1), noise(3840, 2)].concat());
}

#[test]
fn a_wav_file_is_complete_at_any_time() {
    let device = Device::with_playback("played.wav", &[]);
    let mut driver = device.connect();
    driver.prepare(0, &Params::USUAL);
    // A control request waits for no file: the header comes with the first sound.
    assert_eq!(device.read("played.wav"), [0; 0]);
    for tag in 0..4 {
        driver.play(0, &noise(1920, tag), 0);
    }
    driver.commands(&[START], 0);
    for tag in 0..4 {
        assert_eq!(driver.wait(TX).status, OK);
        let played = device.read("played.wav");
        let length = u32::from_le_bytes(played[40..44].try_into().unwrap());
        assert!(length >= 1920 * (tag + 1) && length <= 1920 * 4, "{length}");
        assert!(played.len() as u32 >= 44 + length);
    }
}
