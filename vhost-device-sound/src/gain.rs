// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Volume: multiplies samples.

use crate::format::Format;

/// Multiplies each sample in `bytes`, which are whole samples, by `factor`. Integers are rounded and clipped.
pub fn apply(format: Format, bytes: &mut [u8], factor: f64) {
    match format {
        Format::S8 => each(bytes, |[byte]| {
            [(f64::from(byte as i8) * factor).round() as i8 as u8]
        }),
        Format::U8 => each(bytes, |[byte]| {
            let sample = f64::from(byte) - 128.0;
            [((sample * factor).round() + 128.0) as u8]
        }),
        Format::S16 => each(bytes, |bytes| {
            let sample = f64::from(i16::from_le_bytes(bytes));
            ((sample * factor).round() as i16).to_le_bytes()
        }),
        Format::S24In3 => each(bytes, |[low, middle, high]| {
            let [low, middle, high, _] = scale24([low, middle, high], factor);
            [low, middle, high]
        }),
        Format::S24 => each(bytes, |[low, middle, high, _]| {
            scale24([low, middle, high], factor)
        }),
        Format::S32 => each(bytes, |bytes| {
            let sample = f64::from(i32::from_le_bytes(bytes));
            ((sample * factor).round() as i32).to_le_bytes()
        }),
        Format::Float => each(bytes, |bytes| {
            let sample = f64::from(f32::from_le_bytes(bytes));
            ((sample * factor) as f32).to_le_bytes()
        }),
        Format::Float64 => each(bytes, |bytes| {
            (f64::from_le_bytes(bytes) * factor).to_le_bytes()
        }),
    }
}

/// Multiplies a sample of 24 bits. Returns it with its sign extended to 32 bits.
fn scale24([low, middle, high]: [u8; 3], factor: f64) -> [u8; 4] {
    const MAX: f64 = 8_388_607.0;
    let sample = i32::from_le_bytes([0, low, middle, high]) >> 8;
    let scaled = (f64::from(sample) * factor).round().clamp(-MAX - 1.0, MAX);
    (scaled as i32).to_le_bytes()
}

fn each<const N: usize>(bytes: &mut [u8], change: impl Fn([u8; N]) -> [u8; N]) {
    let (samples, _) = bytes.as_chunks_mut::<N>();
    for sample in samples {
        *sample = change(*sample);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_of_all_formats_are_halved_and_clipped() {
        let scaled = |format, bytes: &[u8], factor| {
            let mut bytes = bytes.to_vec();
            apply(format, &mut bytes, factor);
            bytes
        };
        assert_eq!(scaled(Format::S8, &[100, 0x9c, 1], 0.5), [50, 0xce, 1]);
        assert_eq!(scaled(Format::S8, &[100, 0x9c], 2.0), [127, 0x80]);
        assert_eq!(scaled(Format::U8, &[228, 28, 128], 0.5), [178, 78, 128]);
        assert_eq!(scaled(Format::U8, &[228, 28], 2.0), [255, 0]);
        assert_eq!(
            scaled(Format::S16, &[0, 0x40, 0, 0xc0], 0.5),
            [0, 0x20, 0, 0xe0]
        );
        assert_eq!(scaled(Format::S16, &[0, 0x80], 2.0), [0, 0x80]);
        assert_eq!(scaled(Format::S24In3, &[0, 0, 0x80], 0.5), [0, 0, 0xc0]);
        assert_eq!(
            scaled(Format::S24In3, &[0, 0, 0x70], 2.0),
            [0xff, 0xff, 0x7f]
        );
        assert_eq!(
            scaled(Format::S24, &[0, 0, 0x80, 0xff], 0.5),
            [0, 0, 0xc0, 0xff]
        );
        assert_eq!(
            scaled(Format::S24, &[0, 0, 0x80, 0], 1.5),
            [0, 0, 0x80, 0xff]
        );
        let half = |sample: i32| scaled(Format::S32, &sample.to_le_bytes(), 0.5);
        assert_eq!(half(-20), (-10i32).to_le_bytes());
        let float = scaled(Format::Float, &0.5f32.to_le_bytes(), 0.5);
        assert_eq!(float, 0.25f32.to_le_bytes());
        let float = scaled(Format::Float64, &0.5f64.to_le_bytes(), 4.0);
        assert_eq!(float, 2.0f64.to_le_bytes());
    }

    #[test]
    fn a_factor_of_1_changes_nothing() {
        let mut random = 1u32;
        let bytes: Vec<u8> = (0..480)
            .map(|_| {
                random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (random >> 24) as u8
            })
            .collect();
        for format in [
            Format::S8,
            Format::U8,
            Format::S16,
            Format::S24In3,
            Format::S32,
        ] {
            let mut scaled = bytes.clone();
            apply(format, &mut scaled, 1.0);
            assert_eq!(scaled, bytes, "{format:?}");
        }
    }
}
