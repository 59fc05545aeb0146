// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the device offers: config space and queries.

use crate::{
    BAD_MSG, CHMAP_INFO, CTL_INFO, Device, Driver, JACK_INFO, JACK_REMAP, NOT_SUPP, OK, PCM_INFO,
    word, words,
};

fn query(driver: &mut Driver, code: u32, start: u32, count: u32, size: u32) -> (u32, Vec<u8>) {
    let request = words(&[code, start, count, size]);
    driver.request(&request, 4 + count * size)
}

/// Returns the items of a query that must succeed.
fn items(driver: &mut Driver, code: u32, count: u32, size: u32) -> Vec<Vec<u8>> {
    let (status, bytes) = query(driver, code, 0, count, size);
    assert_eq!(status, OK);
    assert_eq!(bytes.len() as u32, count * size);
    bytes.chunks(size as usize).map(<[u8]>::to_vec).collect()
}

#[test]
fn there_are_one_output_and_one_input_by_default() {
    let device = Device::start(&[]);
    let mut driver = device.connect();
    assert_eq!(driver.front_end.queue_count(), 4);
    let config = driver.front_end.config(0, 12).unwrap();
    // Jacks, streams, channel maps.
    assert_eq!(config, words(&[2, 2, 4]));
    assert_eq!(driver.front_end.offered() & 1, 0, "no control elements");
    let infos = items(&mut driver, PCM_INFO, 2, 32);
    for (direction, info) in infos.iter().enumerate() {
        assert_eq!(word(info, 0), 0, "group");
        assert_eq!(word(info, 1), 1 << 4, "features");
        let formats = u64::from_le_bytes(info[8..16].try_into().unwrap());
        assert_eq!(formats, 1 << 5 | 1 << 17 | 1 << 19);
        let rates = u64::from_le_bytes(info[16..24].try_into().unwrap());
        assert_eq!(rates, 1 << 6 | 1 << 7 | 1 << 10);
        assert_eq!(info[24..], [direction as u8, 1, 2, 0, 0, 0, 0, 0]);
    }
}

#[test]
fn streams_are_as_the_options_say() {
    let device = Device::start(&[
        "--streams=output,channels=2-8,formats=s8+u8+s24-3+s24+float64,rates=8000+192000",
        "--streams=output,channels=1",
        "--streams=input,rates=16000",
    ]);
    let mut driver = device.connect();
    let config = driver.front_end.config(0, 12).unwrap();
    assert_eq!(config, words(&[3, 3, 7 + 1 + 2]));
    let infos = items(&mut driver, PCM_INFO, 3, 32);
    // The second output is PCM device 1, and the input is PCM device 0.
    assert_eq!(
        [0, 1, 2].map(|index: usize| word(&infos[index], 0)),
        [0, 1, 0]
    );
    let formats = u64::from_le_bytes(infos[0][8..16].try_into().unwrap());
    assert_eq!(formats, 1 << 3 | 1 << 4 | 1 << 11 | 1 << 15 | 1 << 20);
    let rates = u64::from_le_bytes(infos[0][16..24].try_into().unwrap());
    assert_eq!(rates, 1 << 1 | 1 << 12);
    assert_eq!(infos[0][24..27], [0, 2, 8]);
    assert_eq!(infos[1][24..27], [0, 1, 1]);
    assert_eq!(infos[2][24..27], [1, 1, 2]);
}

#[test]
fn each_number_of_channels_has_a_map() {
    let device = Device::start(&["--streams=output,channels=1-8", "--streams=input"]);
    let mut driver = device.connect();
    let maps = items(&mut driver, CHMAP_INFO, 10, 24);
    for (index, map) in maps.iter().enumerate() {
        let (direction, channels) = match index {
            0..8 => (0, index as u8 + 1),
            _ => (1, index as u8 - 7),
        };
        assert_eq!(word(map, 0), 0);
        assert_eq!(map[4..6], [direction, channels], "{index}");
        let (positions, rest) = map[6..].split_at(channels.into());
        assert!(rest.iter().all(|position| *position == 0), "{index}");
        let mut sorted = positions.to_vec();
        sorted.sort_unstable();
        sorted.dedup();
        assert_eq!(sorted.len(), positions.len(), "{index}: {positions:?}");
        assert!(positions.iter().all(|position| (2..=36).contains(position)));
    }
    assert_eq!(maps[0][6], 2, "mono");
    assert_eq!(maps[1][6..8], [3, 4], "front left and right");
    assert_eq!(maps[5][6..12], [3, 4, 5, 6, 7, 8]);
}

#[test]
fn each_stream_has_a_jack_that_cannot_be_remapped() {
    let device = Device::start(&[]);
    let mut driver = device.connect();
    let jacks = items(&mut driver, JACK_INFO, 2, 24);
    for jack in &jacks {
        assert_eq!(word(jack, 0), 0, "group");
        assert_eq!(word(jack, 1), 0, "features");
        assert_eq!(jack[16..], [1, 0, 0, 0, 0, 0, 0, 0], "connected");
    }
    // Default devices of HDA 7.3.3.31: a line output and a microphone.
    assert_eq!(word(&jacks[0], 2) >> 20 & 15, 0);
    assert_eq!(word(&jacks[1], 2) >> 20 & 15, 10);
    let remap = |jack| words(&[JACK_REMAP, jack, 1, 1]);
    assert_eq!(driver.status(&remap(0)), NOT_SUPP);
    assert_eq!(driver.status(&remap(2)), BAD_MSG);
}

#[test]
fn a_query_gets_items_of_the_size_that_the_driver_knows() {
    let device = Device::start(&[]);
    let mut driver = device.connect();
    for size in [32, 33, 40, 256, 1024] {
        let infos = items(&mut driver, PCM_INFO, 2, size);
        assert_eq!(infos[1][24], 1, "direction of the second stream");
        assert!(
            infos
                .iter()
                .all(|info| info[32..].iter().all(|byte| *byte == 0))
        );
    }
    let (status, info) = query(&mut driver, PCM_INFO, 1, 1, 32);
    assert_eq!((status, info[24]), (OK, 1));
    let (status, none) = query(&mut driver, PCM_INFO, 2, 0, 32);
    assert_eq!((status, none.len()), (OK, 0));
}

#[test]
fn an_impossible_query_is_refused() {
    let device = Device::start(&[]);
    let mut driver = device.connect();
    for code in [JACK_INFO, PCM_INFO, CHMAP_INFO] {
        for (start, count, size) in [
            (0, 5, 32),
            (4, 1, 32),
            (u32::MAX, 1, 32),
            (u32::MAX, u32::MAX, 32),
            (1, u32::MAX, 32),
            (0, 1, 0),
            (0, 1, 23),
            (0, 1, 1025),
            (0, 1, u32::MAX),
            (0, u32::MAX, u32::MAX),
            (0, 1 << 16, 1 << 16),
        ] {
            let (status, rest) = driver.request(&words(&[code, start, count, size]), 1000);
            assert_eq!(
                (status, rest.len()),
                (BAD_MSG, 0),
                "{code} {start} {count} {size}"
            );
        }
        // Too little room.
        let (status, _) = driver.request(&words(&[code, 0, 2, 32]), 4 + 63);
        assert_eq!(status, BAD_MSG);
        let (status, _) = driver.request(&words(&[code, 0, 2, 32]), 4 + 64);
        assert_eq!(status, OK);
        // Too short a request.
        for length in 1..4 {
            assert_eq!(
                driver.status(&words(&[code, 0, 1, 32])[..4 * length]),
                BAD_MSG
            );
        }
    }
    assert_eq!(driver.status(&words(&[CTL_INFO, 0, 1, 96])), NOT_SUPP);
    for code in [0, 3, 0xff, 0x106, 0x201, 0x307, 0x1000, u32::MAX] {
        assert_eq!(
            driver.status(&words(&[code, 0, 0, 0])),
            NOT_SUPP,
            "{code:#x}"
        );
    }
}
