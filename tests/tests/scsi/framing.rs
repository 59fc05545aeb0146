// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Requests in any division over descriptors, and requests that are no requests.

use vhost_device_tests::front_end::Buffer;
use vhost_device_tests::front_end::scsi::{
    FAILURE, GOOD, OK, READ_16, Request, UNTOUCHED, transfer,
};

use crate::{Device, FIRST, Host, PATIENCE, SIZE, noise};

/// An address without memory.
const NOWHERE: u64 = 1 << 50;

fn host() -> (Host, Vec<u8>) {
    let contents = noise(5, SIZE);
    let mut host = Host::new(Device::start(&[(&contents, "")], &[]));
    host.driver.clear_attentions(FIRST);
    (host, contents)
}

/// Sends a chain, and returns the used length.
fn send(host: &mut Host, chain: &[Buffer]) -> u32 {
    host.driver.queue.submit(chain);
    host.driver.queue.take_used_within(PATIENCE).length
}

#[test]
fn a_request_may_be_divided_over_descriptors_as_the_driver_likes() {
    let (mut host, contents) = host();
    let cdb = transfer(READ_16, 3, 4);
    for (readable, writable) in [
        (&[][..], &[][..]),
        (&[1, 7, 11], &[108]),
        (&[19], &[4, 4, 4, 96, 700]),
        (&[50], &[107, 2]),
    ] {
        let mut prepared = host.driver.area.prepare(
            host.front_end.memory(),
            &Request {
                cdb: &cdb,
                reply_length: 2048,
                ..Request::default()
            },
        );
        let [request, response] = prepared.chain[..] else {
            panic!("two buffers");
        };
        prepared.chain = [request.split(readable), response.split(writable)].concat();
        let completion = host.driver.run(&prepared);
        assert_eq!((completion.response, completion.status), (OK, GOOD));
        assert!(
            completion.data == contents[3 * 512..7 * 512],
            "{readable:?}"
        );
    }
}

#[test]
fn a_request_that_is_too_short_fails() {
    let (mut host, _) = host();
    let memory = host.front_end.memory().clone();
    let prepared = host.driver.area.prepare(&memory, &Request::default());
    let [request, response] = prepared.chain[..] else {
        panic!("two buffers");
    };
    for length in [1, 8, 18, 19, 50] {
        let short = Buffer::readable(request.address, length);
        assert_eq!(send(&mut host, &[short, response]), 108);
        assert_eq!(prepared.completion(&memory, 108).response, FAILURE);
    }
    assert_eq!(send(&mut host, &[response]), 108);
    // Without room for a response there is none.
    for length in [1, 11, 12, 107] {
        memory.fill(response.address, 108, UNTOUCHED);
        let short = Buffer::writable(response.address, length);
        assert_eq!(send(&mut host, &[request, short]), 0);
        assert_eq!(memory.read_vec(response.address, 108), [UNTOUCHED; 108]);
    }
    assert_eq!(send(&mut host, &[request]), 0);
    host.driver.clear_attentions(FIRST);
}

#[test]
fn a_request_with_data_in_both_directions_or_outside_memory_fails() {
    let (mut host, _) = host();
    let memory = host.front_end.memory().clone();
    let completion = host.driver.request(&Request {
        data: &[0; 512],
        reply_length: 512,
        ..Request::default()
    });
    assert_eq!(completion.response, FAILURE);
    let cdb = transfer(READ_16, 0, 1);
    let prepared = host.driver.area.prepare(
        &memory,
        &Request {
            cdb: &cdb,
            ..Request::default()
        },
    );
    let [request, response] = prepared.chain[..] else {
        panic!("two buffers");
    };
    let chain = [request, response, Buffer::writable(NOWHERE, 512)];
    assert_eq!(send(&mut host, &chain), 108);
    assert_eq!(prepared.completion(&memory, 108).response, FAILURE);
    // The response itself is nowhere.
    let chain = [request, Buffer::writable(NOWHERE, 620)];
    assert_eq!(send(&mut host, &chain), 0);
    host.driver.clear_attentions(FIRST);
}

/// Every operation code, with every amount of data that matters, in both directions: each request is answered, and the device survives.
#[test]
fn every_command_is_answered_whatever_its_data() {
    let (mut host, _) = host();
    for operation in 0..=255u8 {
        for fill in [0, 0xff] {
            let mut cdb = [fill; 32];
            cdb[0] = operation;
            for length in [0, 1, 4, 511, 512, 4096] {
                let data = vec![fill; length];
                let requests = [
                    Request {
                        cdb: &cdb,
                        data: &data,
                        ..Request::default()
                    },
                    Request {
                        cdb: &cdb,
                        reply_length: length as u32,
                        ..Request::default()
                    },
                ];
                for request in requests {
                    let completion = host.driver.request(&request);
                    let moved = completion.used - 108;
                    assert!(moved <= request.reply_length, "{operation:#x}");
                    assert!(completion.residual as usize <= length, "{operation:#x}");
                    let has_sense = !completion.sense.is_empty();
                    assert_eq!(has_sense, completion.status == 2, "{operation:#x}");
                }
            }
        }
    }
    // START STOP UNIT: one of them has stopped it.
    host.driver.command(FIRST, &[0x1b, 0, 0, 0, 1, 0], 0);
    host.driver.clear_attentions(FIRST);
}
