// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Limits of one disk, which do not delay others.

use std::time::{Duration, Instant};

use vhost_device_tests::front_end::scsi::{GOOD, READ_16, Request, RequestArea, transfer};

use crate::{Device, FIRST, Host, PATIENCE, SIZE, for_each_engine};

const SECOND: [u8; 8] = [1, 1, 0x40, 0, 0, 0, 0, 0];
/// Requests in a second, and at once.
const KEYS: &str = ",iops=100,iops-burst=1";

#[test]
fn a_limited_disk_does_not_delay_another_one_on_the_same_queue() {
    for_each_engine(|engine| {
        let disks: [(&[u8], &str); 2] = [(&[1; SIZE], KEYS), (&[2; SIZE], "")];
        let mut host = Host::new(Device::start(&disks, &[engine]));
        for lun in [FIRST, SECOND] {
            host.driver.clear_attentions(lun);
        }
        let memory = host.front_end.memory().clone();
        let begin = Instant::now();
        let waiting: Vec<_> = (0..20)
            .map(|id| {
                let prepared = RequestArea::new(&memory, 4096).prepare(
                    &memory,
                    &Request {
                        id,
                        cdb: &transfer(READ_16, 0, 1),
                        reply_length: 512,
                        ..Request::default()
                    },
                );
                (host.driver.queue.submit(&prepared.chain), prepared)
            })
            .collect();
        // The other disk is as fast as ever: its request overtakes most of them.
        let prepared = RequestArea::new(&memory, 4096).prepare(
            &memory,
            &Request {
                lun: SECOND,
                cdb: &transfer(READ_16, 0, 1),
                reply_length: 512,
                ..Request::default()
            },
        );
        let other = host.driver.queue.submit(&prepared.chain);
        let mut before = 0;
        while host.driver.queue.take_used_within(PATIENCE).head != other {
            before += 1;
        }
        assert!(
            before < 10,
            "{engine}: {before} requests of the limited disk"
        );
        for _ in before..waiting.len() {
            host.driver.queue.take_used_within(PATIENCE);
        }
        assert!(begin.elapsed() > Duration::from_millis(150), "{engine}");
        for (_, prepared) in waiting {
            assert_eq!(prepared.completion(&memory, 0).status, GOOD);
        }
    });
}

#[test]
fn requests_that_wait_for_a_limit_do_not_delay_a_stop() {
    let disks: [(&[u8], &str); 1] = [(&[1; SIZE], ",iops=1,iops-burst=1")];
    let mut host = Host::new(Device::start(&disks, &[]));
    host.driver.clear_attentions(FIRST);
    let memory = host.front_end.memory().clone();
    for id in 0..10 {
        let prepared = RequestArea::new(&memory, 4096).prepare(
            &memory,
            &Request {
                id,
                cdb: &transfer(READ_16, 0, 1),
                reply_length: 512,
                ..Request::default()
            },
        );
        host.driver.queue.submit(&prepared.chain);
    }
    host.driver.queue.take_used_within(PATIENCE);
    let begin = Instant::now();
    host.front_end.stop(2).unwrap();
    assert!(begin.elapsed() < Duration::from_secs(2));
}

/// VERIFY(16).
const VERIFY_16: u8 = 0x8f;

#[test]
fn a_command_that_reads_the_disk_without_data_for_the_driver_is_limited_too() {
    let mut host = Host::new(Device::start(&[(&[1; SIZE], KEYS)], &[]));
    host.driver.clear_attentions(FIRST);
    let begin = Instant::now();
    for _ in 0..20 {
        let completion = host.driver.command(FIRST, &transfer(VERIFY_16, 0, 1), 0);
        assert_eq!(completion.status, GOOD);
    }
    assert!(begin.elapsed() > Duration::from_millis(150));
}
