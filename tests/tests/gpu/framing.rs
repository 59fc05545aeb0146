// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Commands and responses divided among descriptors in any way (VIRTIO 1.3, section 2.7.4.1).

use fastrand::Rng;
use vhost_device_tests::front_end::gpu::{
    GpuDriver, HEADER_SIZE, Response, command, number, words,
};
use vhost_device_tests::front_end::{Buffer, QueueOptions};
use vhost_device_tests::process::PATIENCE;

use crate::{B8G8R8X8, Device};

/// Size of the longest response in bytes.
const LONGEST: usize = 1056;

/// Calls a function with a headless device and a driver, with direct and with indirect chains.
fn for_each_ring(test: impl Fn(&mut GpuDriver)) {
    for indirect in [0, 1024] {
        let device = Device::start(&["--headless"]);
        let mut driver = device.connect();
        driver.front_end.stop(0).unwrap();
        let options = QueueOptions {
            indirect,
            ..driver.front_end.queue_options(1024)
        };
        driver.control = driver.front_end.queue_with(0, options).unwrap();
        test(&mut driver);
    }
}

/// Returns each kind of command on resource 1, in an order in which all succeed, with the size of its response.
fn commands() -> Vec<(Vec<u8>, usize)> {
    let all = [0, 0, 8, 8];
    let entries = [
        [0x10_0000, 0, 100, 0],
        [0x20_0000, 0, 56, 0],
        [0x30_0000, 0, 100, 0],
    ];
    let with = |first: &[u32], rest: &[u32]| words(&[first, rest].concat());
    [
        (number::CREATE_2D, words(&[1, B8G8R8X8, 8, 8]), 0),
        (
            number::ATTACH_BACKING,
            with(&[1, 3], entries.as_flattened()),
            0,
        ),
        (number::TRANSFER_TO_HOST_2D, with(&all, &[0, 0, 1, 0]), 0),
        (number::SET_SCANOUT, with(&all, &[0, 1]), 0),
        (number::FLUSH, with(&all, &[1, 0]), 0),
        (number::ASSIGN_UUID, words(&[1, 0]), 16),
        (number::GET_DISPLAY_INFO, Vec::new(), 384),
        (number::DETACH_BACKING, words(&[1, 0]), 0),
        (number::UNREF, words(&[1, 0]), 0),
    ]
    .into_iter()
    .map(|(kind, body, size)| (command(kind, &body), HEADER_SIZE + size))
    .collect()
}

/// Runs a command that is cut into pieces of these sizes, like the buffers for its response.
fn run(
    driver: &mut GpuDriver,
    command: &[u8],
    room: usize,
    readable: &[u32],
    writable: &[u32],
) -> Response {
    let memory = driver.front_end.memory();
    let (question, answer) = (24 << 20, (1 << 32) + (24 << 20));
    memory.write(question, command);
    memory.fill(answer, LONGEST + 1, 0xdd);
    let mut chain = Buffer::readable(question, command.len() as u32).split(readable);
    chain.extend(Buffer::writable(answer, room as u32).split(writable));
    driver.control.submit(&chain);
    assert!(
        driver.control.wait_used(PATIENCE),
        "not answered: {chain:?}"
    );
    let length = driver.control.take_used().unwrap().length as usize;
    let memory = driver.front_end.memory();
    assert_eq!(memory.read_u8(answer + length as u64), 0xdd);
    Response {
        bytes: memory.read_vec(answer, length),
    }
}

fn assert_succeeds(driver: &mut GpuDriver, cut: impl Fn(usize) -> Vec<u32>) {
    for (command, size) in commands() {
        let (readable, writable) = (cut(command.len()), cut(size));
        let response = run(driver, &command, size, &readable, &writable);
        assert_eq!(
            (response.kind() & 0xff00, response.bytes.len()),
            (number::OK_NODATA, size),
            "command {:x?} in {readable:?}, response in {writable:?}",
            &command[..4]
        );
    }
}

#[test]
fn commands_and_responses_may_be_cut_anywhere() {
    for_each_ring(|driver| {
        for cut in 1..80 {
            assert_succeeds(driver, |size| vec![cut.min(size as u32 - 1)]);
        }
    });
}

#[test]
fn every_byte_may_have_a_descriptor_of_its_own() {
    for_each_ring(|driver| assert_succeeds(driver, |size| vec![1; size]));
}

#[test]
fn commands_and_responses_may_be_in_many_pieces() {
    for_each_ring(|driver| {
        for seed in 0..100 {
            assert_succeeds(driver, |size| {
                let mut random = Rng::with_seed(seed);
                let mut pieces = Vec::new();
                let mut left = size as u32;
                while left > 0 {
                    let piece = random.u32(1..=left.min(40));
                    pieces.push(piece);
                    left -= piece;
                }
                pieces
            });
        }
    });
}

#[test]
fn surplus_buffer_space_makes_no_difference() {
    for_each_ring(|driver| {
        for (command, size) in commands() {
            let command = [command, vec![0xff; 30]].concat();
            let response = run(driver, &command, LONGEST, &[7], &[3, 100]);
            assert_eq!(response.bytes.len(), size);
            assert_eq!(response.kind() & 0xff00, number::OK_NODATA);
        }
    });
}

#[test]
fn commands_that_are_cut_short_are_refused() {
    for_each_ring(|driver| {
        for (whole, size) in commands() {
            // A list of entries may be cut where its end can be recognized.
            for length in 1..whole.len() {
                let response = run(driver, &whole[..length], LONGEST, &[], &[]);
                assert_eq!(response.kind(), number::INVALID_PARAMETER, "{length} bytes");
                assert_eq!(response.bytes.len(), HEADER_SIZE);
            }
            let response = run(driver, &whole, size, &[], &[]);
            assert_eq!(response.kind() & 0xff00, number::OK_NODATA);
        }
    });
}

#[test]
fn a_response_that_does_not_fit_is_replaced_by_a_short_one() {
    for_each_ring(|driver| {
        let question = command(number::GET_DISPLAY_INFO, &[]);
        for room in 1..HEADER_SIZE {
            assert!(run(driver, &question, room, &[], &[]).bytes.is_empty());
        }
        for room in HEADER_SIZE..HEADER_SIZE + 384 {
            let response = run(driver, &question, room, &[5], &[11]);
            assert_eq!(response.kind(), number::INVALID_PARAMETER);
            assert_eq!(response.bytes.len(), HEADER_SIZE);
        }
    });
}
