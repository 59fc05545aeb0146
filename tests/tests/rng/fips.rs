// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The statistical tests of FIPS 140-2 (section 4.9.1, with change notice 1) on the output of the default source.

use std::ops::RangeInclusive;

use crate::{Device, LARGEST};

/// Size of a block in bytes: each test uses 20 000 bits.
const BLOCK: usize = 20_000 / 8;

/// Permitted number of ones.
const ONES: RangeInclusive<u32> = 9726..=10_274;
/// Permitted numbers of runs with 1, 2, 3, 4, 5, and 6 or more bits, for zeroes and for ones.
const RUNS: [RangeInclusive<u32>; 6] = [
    2315..=2685,
    1114..=1386,
    527..=723,
    240..=384,
    103..=209,
    103..=209,
];
/// No run may have this many bits.
const LONG_RUN: usize = 26;

/// The tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Failure {
    Monobit,
    Poker,
    Runs,
    LongRun,
}

/// Returns the tests that a block fails.
fn failures(block: &[u8]) -> Vec<Failure> {
    assert_eq!(block.len(), BLOCK);
    let runs = Runs::of(block);
    [
        (Failure::Monobit, monobit(block)),
        (Failure::Poker, poker(block)),
        (Failure::Runs, runs.are_usual()),
        (Failure::LongRun, runs.longest < LONG_RUN),
    ]
    .into_iter()
    .filter_map(|(failure, passes)| (!passes).then_some(failure))
    .collect()
}

fn monobit(block: &[u8]) -> bool {
    ONES.contains(&block.iter().map(|byte| byte.count_ones()).sum())
}

/// The distribution of the 16 values of four bits: 16 / 5000 * (sum of squares) - 5000 must be between 2.16 and 46.17.
fn poker(block: &[u8]) -> bool {
    let mut counts = [0u64; 16];
    for byte in block {
        counts[usize::from(byte >> 4)] += 1;
        counts[usize::from(byte & 15)] += 1;
    }
    let squares: u64 = counts.iter().map(|count| count * count).sum();
    let x = 16.0 / 5000.0 * squares as f64 - 5000.0;
    2.16 < x && x < 46.17
}

/// The runs of equal bits in a block.
struct Runs {
    /// Number of runs with 1, 2, 3, 4, 5, and 6 or more bits, for zeroes and for ones.
    counts: [[u32; 6]; 2],
    longest: usize,
}

impl Runs {
    fn of(block: &[u8]) -> Self {
        let mut runs = Runs {
            counts: [[0; 6]; 2],
            longest: 0,
        };
        let mut bit = block[0] >> 7;
        let mut length = 0;
        for &byte in block {
            let (mut rest, mut left) = (byte, 8);
            while left > 0 {
                let next = rest >> 7;
                let equal = if next == 1 {
                    rest.leading_ones()
                } else {
                    rest.leading_zeros().min(left)
                };
                if next != bit {
                    runs.add(bit, length);
                    (bit, length) = (next, 0);
                }
                length += equal as usize;
                left -= equal;
                rest = rest.unbounded_shl(equal);
            }
        }
        runs.add(bit, length);
        runs
    }

    fn add(&mut self, bit: u8, length: usize) {
        self.counts[usize::from(bit)][length.min(6) - 1] += 1;
        self.longest = self.longest.max(length);
    }

    fn are_usual(&self) -> bool {
        let usual = |counts: &[u32; 6]| RUNS.iter().zip(counts).all(|(r, count)| r.contains(count));
        self.counts.iter().all(usual)
    }
}

/// Returns how many of the blocks in `bytes` fail a test.
fn failed_blocks(bytes: &[u8]) -> usize {
    bytes
        .chunks_exact(BLOCK)
        .filter(|block| !failures(block).is_empty())
        .count()
}

/// Of good bytes, 0.08 % of the blocks fail: 5 in 16 MiB. More than 30 do in one of 10^13 attempts.
#[test]
fn sixteen_mebibytes_of_the_default_source_pass() {
    const SIZE: usize = 16 << 20;
    let device = Device::start(&[]);
    let mut driver = device.connect();
    let mut bytes = Vec::with_capacity(SIZE);
    while bytes.len() < SIZE {
        bytes.extend(driver.read(LARGEST));
    }
    let failed = failed_blocks(&bytes);
    println!("{failed} of {} blocks failed", SIZE / BLOCK);
    assert!(failed <= 30, "{failed} blocks failed");
}

#[test]
fn good_bytes_pass() {
    let mut bytes = vec![0; 1000 * BLOCK];
    fastrand::Rng::with_seed(1).fill(&mut bytes);
    assert!(failed_blocks(&bytes) < 10);
}

#[test]
fn equal_bytes_fail() {
    use Failure::{LongRun, Monobit, Poker, Runs};
    for byte in [0, 0xff] {
        assert_eq!(failures(&[byte; BLOCK]), [Monobit, Poker, Runs, LongRun]);
    }
    assert_eq!(failures(&[0b0101_0101; BLOCK]), [Poker, Runs]);
}

#[test]
fn runs_are_counted() {
    let mut block = [0b0101_0101; BLOCK];
    block[..4].copy_from_slice(&[0b1110_0100, 0b0000_0000, 0b0000_0111, 0b1111_1101]);
    let runs = Runs::of(&block);
    let pairs = 4 * (BLOCK as u32 - 4);
    // 111 00 1 000000000000000 11111111 1 0 1, where the last one is joined to nothing: 0101 follows.
    assert_eq!(runs.longest, 15);
    assert_eq!(runs.counts[0], [1 + pairs, 1, 0, 0, 0, 1]);
    assert_eq!(runs.counts[1], [2 + pairs, 0, 1, 0, 0, 1]);
}

#[test]
fn a_counter_fails() {
    let bytes: Vec<u8> = (0..BLOCK as u32 * 4).flat_map(u32::to_be_bytes).collect();
    assert_eq!(failed_blocks(&bytes), 16);
}

#[test]
fn biased_bits_fail() {
    let mut random = fastrand::Rng::with_seed(2);
    // Of a thousand bits, 540 are ones.
    let mut byte = || (0..8).fold(0, |byte, _| byte << 1 | u8::from(random.u32(..1000) < 540));
    let bytes: Vec<u8> = (0..100 * BLOCK).map(|_| byte()).collect();
    assert_eq!(failed_blocks(&bytes), 100);
}

#[test]
fn correlated_bits_fail() {
    let mut random = fastrand::Rng::with_seed(3);
    let mut last = 0;
    // As many ones as zeroes, but each bit is like the one before in 55 of 100 cases.
    let mut bit = || {
        last ^= u8::from(random.u32(..100) < 45);
        last
    };
    let mut byte = || (0..8).fold(0, |byte, _| byte << 1 | bit());
    let bytes: Vec<u8> = (0..100 * BLOCK).map(|_| byte()).collect();
    assert!(failed_blocks(&bytes) > 95);
}

#[test]
fn a_run_of_26_equal_bits_fails() {
    let mut bytes = vec![0; BLOCK];
    fastrand::Rng::with_seed(4).fill(&mut bytes);
    assert_eq!(failures(&bytes), []);
    // 25 and 26 ones.
    bytes[100..105].copy_from_slice(&[0, 0xff, 0xff, 0xff, 0x80]);
    assert_eq!(failures(&bytes), []);
    bytes[104] = 0xc0;
    assert_eq!(failures(&bytes), [Failure::LongRun]);
}
