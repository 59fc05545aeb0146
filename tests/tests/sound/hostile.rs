// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A driver that breaks the rules hurts only itself.

use vhost_device_tests::front_end::Buffer;

use crate::{
    BAD_MSG, CONTROL, Device, EVENT, IO_ERR, NOT_SUPP, OK, PREPARE, Params, Pending, QUEUE_SIZE,
    RELEASE, RX, SET_PARAMS, START, STOP, TX, noise, words,
};

/// An address that is not guest memory.
const NOWHERE: u64 = 1 << 40;

#[test]
fn impossible_parameters_are_refused() {
    let device = Device::start(&[]);
    let mut driver = device.connect();
    let usual = Params::USUAL;
    for (params, status) in [
        (Params { period: 0, ..usual }, BAD_MSG),
        (Params { buffer: 0, ..usual }, BAD_MSG),
        (
            Params {
                buffer: 7681,
                ..usual
            },
            BAD_MSG,
        ),
        (
            Params {
                period: 1921,
                buffer: 3842,
                ..usual
            },
            BAD_MSG,
        ),
        (
            Params {
                period: 7680,
                buffer: 1920,
                ..usual
            },
            BAD_MSG,
        ),
        (
            Params {
                buffer: 1920 << 12,
                ..usual
            },
            NOT_SUPP,
        ),
        (
            Params {
                buffer: u32::MAX,
                period: u32::MAX,
                ..usual
            },
            NOT_SUPP,
        ),
        (
            Params {
                channels: 0,
                ..usual
            },
            NOT_SUPP,
        ),
        (
            Params {
                channels: 3,
                ..usual
            },
            NOT_SUPP,
        ),
        (
            Params {
                channels: 255,
                ..usual
            },
            NOT_SUPP,
        ),
        (Params { format: 0, ..usual }, NOT_SUPP),
        (
            Params {
                format: 20,
                ..usual
            },
            NOT_SUPP,
        ),
        (
            Params {
                format: 64,
                ..usual
            },
            NOT_SUPP,
        ),
        (
            Params {
                format: 255,
                ..usual
            },
            NOT_SUPP,
        ),
        (Params { rate: 0, ..usual }, NOT_SUPP),
        (Params { rate: 13, ..usual }, NOT_SUPP),
        (Params { rate: 255, ..usual }, NOT_SUPP),
        (
            Params {
                features: 1,
                ..usual
            },
            NOT_SUPP,
        ),
        (
            Params {
                features: 1 << 2,
                ..usual
            },
            NOT_SUPP,
        ),
        (
            Params {
                features: 1 << 3,
                ..usual
            },
            NOT_SUPP,
        ),
        (
            Params {
                features: 1 << 31,
                ..usual
            },
            NOT_SUPP,
        ),
    ] {
        assert_eq!(driver.status(&params.request(0)), status, "{params:?}");
        assert_eq!(driver.command(PREPARE, 0), BAD_MSG, "nothing is set");
    }
    // Padding is ignored.
    let mut request = usual.request(0);
    *request.last_mut().unwrap() = 0xff;
    request.extend([0xff; 100]);
    assert_eq!(driver.status(&request), OK);
}

#[test]
fn buffers_for_no_stream_fail() {
    let device = Device::start(&[]);
    let mut driver = device.connect();
    driver.prepare(0, &Params::USUAL);
    driver.prepare(1, &Params::USUAL);
    // Of the other direction, or not there.
    for stream in [1, 2, 255, u32::MAX] {
        driver.play(stream, &[0; 1920], 0);
        let done = driver.wait(TX);
        assert_eq!((done.status, done.used), (IO_ERR, 8));
    }
    for stream in [0, 2, 255, u32::MAX] {
        driver.record(stream, 1920, 0);
        let done = driver.wait(RX);
        assert_eq!((done.status, done.used), (IO_ERR, 8));
    }
}

/// Sends a chain, and returns how many bytes the device says it wrote.
#[track_caller]
fn send(driver: &mut crate::Driver, queue: usize, chain: &[Buffer]) -> u32 {
    driver.queues[queue].submit(chain);
    let used = driver.queues[queue].take_used_within(crate::PATIENCE);
    used.length
}

#[test]
fn requests_without_room_or_header_come_back() {
    let device = Device::start(&[]);
    let mut driver = device.connect();
    driver.prepare(0, &Params::USUAL);
    driver.prepare(1, &Params::USUAL);
    driver.commands(&[START], 0);
    driver.commands(&[START], 1);
    let place = driver.allocate(8192);
    driver.front_end.memory().fill(place, 8192, 0);
    let header = Buffer::readable(place, 4);
    for queue in [TX, RX] {
        for length in 1..8 {
            let short = Buffer::writable(place + 4096, length);
            assert_eq!(
                send(&mut driver, queue, &[header, short]),
                0,
                "{queue} {length}"
            );
        }
        // No status at all, and no header at all.
        assert_eq!(send(&mut driver, queue, &[header]), 0);
        let status = Buffer::writable(place + 4096, 8);
        assert_eq!(send(&mut driver, queue, &[status]), 8);
        assert_eq!(
            send(&mut driver, queue, &[Buffer::readable(place, 3), status]),
            8
        );
    }
    // The control queue.
    for length in 0..4 {
        let chain = [header, Buffer::writable(place + 4096, length.max(1))];
        assert_eq!(send(&mut driver, CONTROL, &chain), 0, "{length}");
    }
    assert_eq!(send(&mut driver, CONTROL, &[header]), 0);
    driver.commands(&[STOP, RELEASE], 0);
    // Event buffers that are too short, or that cannot be written.
    for chain in [
        &[Buffer::writable(place, 7)][..],
        &[Buffer::readable(place, 8)],
    ] {
        driver.queues[EVENT].submit(chain);
    }
    driver.assert_alive();
}

#[test]
fn buffers_outside_guest_memory_fail() {
    let device = Device::start(&[]);
    let mut driver = device.connect();
    driver.prepare(0, &Params::USUAL);
    driver.prepare(1, &Params::USUAL);
    let place = driver.allocate(8192);
    driver.front_end.memory().fill(place, 8192, 0);
    driver.front_end.memory().write_u32(place + 100, 1);
    let status = place + 4096;
    let chains: [(usize, &[Buffer]); 6] = [
        (
            TX,
            &[
                Buffer::readable(place, 4),
                Buffer::readable(NOWHERE, 1920),
                Buffer::writable(status, 8),
            ],
        ),
        (
            TX,
            &[Buffer::readable(NOWHERE, 1924), Buffer::writable(status, 8)],
        ),
        (
            TX,
            &[Buffer::readable(place, 1924), Buffer::writable(NOWHERE, 8)],
        ),
        (
            RX,
            &[
                Buffer::readable(place + 100, 4),
                Buffer::writable(NOWHERE, 1920),
                Buffer::writable(status, 8),
            ],
        ),
        (
            RX,
            &[
                Buffer::readable(place + 100, 4),
                Buffer::writable(NOWHERE, 1928),
            ],
        ),
        (
            RX,
            &[Buffer::readable(NOWHERE, 4), Buffer::writable(place, 1928)],
        ),
    ];
    for (queue, chain) in chains {
        let pending = Pending {
            tag: 0,
            data: place,
            length: 0,
            status,
        };
        driver.front_end.memory().write_u32(status, 0);
        driver.submit(queue, chain, pending);
        let done = driver.wait(queue);
        if done.used > 0 && queue == TX {
            assert_eq!(done.status, IO_ERR);
        }
    }
    for chain in [
        [Buffer::readable(NOWHERE, 16), Buffer::writable(place, 100)],
        [Buffer::readable(place, 16), Buffer::writable(NOWHERE, 100)],
    ] {
        send(&mut driver, CONTROL, &chain);
    }
    driver.queues[EVENT].submit(&[Buffer::writable(NOWHERE, 8)]);
    driver.commands(&[START, STOP, RELEASE], 0);
    driver.assert_alive();
}

/// A guest can name the same memory many times in a request: at its own pace, all of it would be written at once.
#[test]
fn requests_above_the_largest_buffer_fail() {
    const MIB: u32 = 1 << 20;
    let device = Device::with_playback("played", &["--file-clock=free"]);
    let mut driver = device.connect();
    driver.prepare(0, &Params::USUAL);
    driver.prepare(1, &Params::USUAL);
    let place = driver.allocate(MIB.into());
    let memory = driver.front_end.memory();
    memory.fill(place, MIB as usize, 0);
    let headers = [driver.allocate(4), driver.allocate(4)];
    let status = driver.allocate(8);
    let memory = driver.front_end.memory();
    memory.write_u32(headers[0], 0);
    memory.write_u32(headers[1], 1);
    driver.commands(&[START], 0);
    driver.commands(&[START], 1);
    for (queue, header) in [(TX, headers[0]), (RX, headers[1])] {
        let piece = match queue {
            TX => Buffer::readable(place, MIB),
            _ => Buffer::writable(place, MIB),
        };
        let mut chain = vec![Buffer::readable(header, 4)];
        chain.extend([piece; 40]);
        chain.push(Buffer::writable(status, 8));
        let pending = Pending {
            tag: 0,
            data: place,
            length: 0,
            status,
        };
        driver.submit(queue, &chain, pending);
        let done = driver.wait(queue);
        assert_eq!((done.status, done.used), (BAD_MSG, 8), "{queue}");
    }
    assert_eq!(device.read("played").len(), 0);
    // The largest buffer itself is played.
    let mut chain = vec![Buffer::readable(headers[0], 4)];
    chain.extend([Buffer::readable(place, MIB); 4]);
    chain.push(Buffer::writable(status, 8));
    let pending = Pending {
        tag: 1,
        data: place,
        length: 0,
        status,
    };
    driver.submit(TX, &chain, pending);
    assert_eq!(driver.wait(TX).status, OK);
    assert_eq!(device.read("played").len(), 4 << 20);
}

#[test]
fn a_flood_of_control_requests_does_not_stop_the_sound() {
    let device = Device::with_playback("played", &[]);
    let mut driver = device.connect();
    driver.prepare(0, &Params::USUAL);
    for tag in 0..30 {
        driver.play(0, &noise(1920, tag), tag as u32);
    }
    driver.commands(&[START], 0);
    let place = driver.allocate(4096);
    driver
        .front_end
        .memory()
        .write(place, &words(&[PREPARE, 0]));
    let chain = [Buffer::readable(place, 8), Buffer::writable(place + 64, 4)];
    let mut played = 0;
    let mut asked = 0u64;
    while played < 30 {
        while driver.queues[CONTROL].add(&chain).is_some() {}
        driver.queues[CONTROL].publish();
        driver.queues[CONTROL].kick();
        while driver.queues[CONTROL].take_used().is_some() {
            asked += 1;
        }
        while driver.take(TX).is_some() {
            played += 1;
        }
    }
    assert!(asked > 100, "{asked}");
}

#[test]
fn as_many_buffers_as_fit_the_ring_are_played() {
    let device = Device::with_playback("played", &["--file-clock=free"]);
    let mut driver = device.connect();
    driver.prepare(0, &Params::USUAL);
    let mut expected = Vec::new();
    for tag in 0..QUEUE_SIZE {
        let bytes = noise(4, tag.into());
        driver.play(0, &bytes, tag.into());
        expected.extend(bytes);
    }
    driver.commands(&[START], 0);
    for tag in 0..QUEUE_SIZE {
        assert_eq!(driver.wait(TX).tag, u32::from(tag));
    }
    crate::assert_same(&device.read("played"), &expected);
}

/// Random commands and buffers: the process lives, every request comes back, and nothing is written after that.
#[test]
fn random_requests_all_come_back() {
    let device = Device::start(&[
        "--streams=output",
        "--streams=input",
        "--streams=output",
        "--streams=input",
    ]);
    let mut driver = device.connect();
    let mut random = fastrand::Rng::with_seed(77);
    for _ in 0..4000 {
        let stream = random.u32(0..5);
        match random.u8(0..10) {
            0..5 => {
                let code = random
                    .choice([SET_PARAMS, PREPARE, RELEASE, START, STOP])
                    .unwrap();
                match code {
                    SET_PARAMS => {
                        let period = random.choice([0, 4, 192, 1920, 1922]).unwrap();
                        let params = Params {
                            period,
                            buffer: period * random.u32(0..4),
                            ..Params::USUAL
                        };
                        driver.status(&params.request(stream));
                    }
                    code => {
                        driver.command(code, stream);
                    }
                }
            }
            5..7 if driver.queues[TX].free_descriptors() > 4 => {
                driver.play(stream, &vec![0; random.usize(0..4000)], 0);
            }
            7..9 if driver.queues[RX].free_descriptors() > 4 => {
                driver.record(stream, random.u32(1..4000), 0);
            }
            _ => {
                for queue in [TX, RX] {
                    while driver.take(queue).is_some() {}
                }
            }
        }
    }
    for stream in 0..4 {
        driver.command(STOP, stream);
        driver.command(RELEASE, stream);
    }
    for queue in [TX, RX] {
        while driver.take(queue).is_some() {}
    }
    assert!(driver.pending.is_empty(), "{:?}", driver.pending.len());
    driver.assert_alive();
}
