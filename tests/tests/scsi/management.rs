// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Task management functions, while requests are in flight.

use std::time::Duration;

use vhost_device_tests::front_end::scsi::{
    ABORT_TASK, ABORT_TASK_SET, ABORTED, BAD_TARGET, BUSY, CLEAR_ACA, CLEAR_TASK_SET, Completion,
    FAILURE, GOOD, INCORRECT_LUN, NEXUS_RESET, OK, Prepared, QUERY_TASK, QUERY_TASK_SET, READ_16,
    REJECTED, REQUEST_QUEUE, RESET, Request, RequestArea, SUCCEEDED, UNIT_RESET, WRITE_16, address,
    transfer,
};

use crate::{Device, FIRST, Host, PATIENCE, SHORT, SIZE, for_each_engine};

const SECOND: [u8; 8] = [1, 1, 0x40, 0, 0, 0, 0, 0];
/// How late operations are: long enough for a function to come before they end.
const LATE: u32 = 300;

/// Makes a read of one block available, named `id`.
fn submit_read(host: &mut Host, lun: [u8; 8], id: u64) -> Prepared {
    let memory = host.front_end.memory().clone();
    let prepared = RequestArea::new(&memory, 4096).prepare(
        &memory,
        &Request {
            lun,
            id,
            cdb: &transfer(READ_16, 0, 1),
            reply_length: 512,
            ..Request::default()
        },
    );
    host.driver.queue.submit(&prepared.chain);
    prepared
}

/// Waits for requests in any order. Returns how they ended, in the order in which they were sent.
fn completions(host: &mut Host, requests: &[Prepared]) -> Vec<Completion> {
    let memory = host.front_end.memory().clone();
    for _ in requests {
        host.driver.queue.take_used_within(PATIENCE);
    }
    let completions = requests
        .iter()
        .map(|prepared| prepared.completion(&memory, 0));
    completions.collect()
}

fn two_disks(arguments: &[&str]) -> Host {
    let disks: [(&[u8], &str); 2] = [(&[1; SIZE], ""), (&[2; SIZE], "")];
    let mut host = Host::new(Device::start(&disks, arguments));
    for lun in [FIRST, SECOND] {
        host.driver.clear_attentions(lun);
    }
    host
}

#[test]
fn a_task_that_is_aborted_is_answered_before_the_function() {
    for_each_engine(|engine| {
        let mut host = two_disks(&[engine]);
        host.device.set_delay(LATE);
        let requests = [7, 8, 9].map(|id| submit_read(&mut host, FIRST, id));
        let response = host.control.function(ABORT_TASK, FIRST, 8);
        assert_eq!(response, OK, "{engine}");
        // At least the aborted one has been returned.
        assert!(host.driver.queue.has_used());
        let ended = completions(&mut host, &requests);
        let responses: Vec<_> = ended.iter().map(|one| one.response).collect();
        assert_eq!(responses, [OK, ABORTED, OK], "{engine}");
        assert_eq!(ended[0].data, [1; 512]);
    });
}

#[test]
fn a_function_finds_requests_that_were_made_available_just_before() {
    for_each_engine(|engine| {
        let mut host = two_disks(&[engine]);
        host.device.set_delay(20);
        for id in 0..50 {
            let request = submit_read(&mut host, FIRST, id);
            assert_eq!(host.control.function(ABORT_TASK, FIRST, id), OK);
            assert!(host.driver.queue.has_used(), "{engine}: {id}");
            let ended = completions(&mut host, &[request]);
            assert_eq!(ended[0].response, ABORTED, "{engine}: {id}");
        }
    });
}

#[test]
fn an_abort_that_races_completion_gives_one_answer() {
    for_each_engine(|engine| {
        let mut host = two_disks(&[engine]);
        for id in 0..300 {
            let request = submit_read(&mut host, FIRST, id);
            assert_eq!(host.control.function(ABORT_TASK, FIRST, id), OK);
            // Whatever the outcome, it is known when the function is answered.
            assert!(host.driver.queue.has_used(), "{engine}: {id}");
            let ended = completions(&mut host, &[request]);
            assert!([OK, ABORTED].contains(&ended[0].response), "{engine}");
            assert!(!host.driver.queue.has_used());
        }
    });
}

#[test]
fn a_set_of_tasks_is_that_of_one_unit() {
    for_each_engine(|engine| {
        for function in [ABORT_TASK_SET, CLEAR_TASK_SET] {
            let mut host = two_disks(&[engine]);
            host.device.set_delay(LATE);
            let requests = [
                submit_read(&mut host, FIRST, 1),
                submit_read(&mut host, SECOND, 1),
                submit_read(&mut host, FIRST, 2),
            ];
            assert_eq!(host.control.function(function, FIRST, 0), OK);
            let ended = completions(&mut host, &requests);
            let responses: Vec<_> = ended.iter().map(|one| one.response).collect();
            assert_eq!(responses, [ABORTED, OK, ABORTED], "{engine}");
        }
    });
}

#[test]
fn a_reset_ends_the_tasks_of_its_unit_or_target_and_leaves_a_unit_attention() {
    for_each_engine(|engine| {
        for function in [UNIT_RESET, NEXUS_RESET] {
            let mut host = two_disks(&[engine]);
            host.device.set_delay(LATE);
            let requests = [
                submit_read(&mut host, FIRST, 1),
                submit_read(&mut host, SECOND, 1),
            ];
            host.control.submit_function(function, FIRST, 0);
            std::thread::sleep(Duration::from_millis(u64::from(LATE) / 3));
            // This one is not ended: it waits until the reset is over.
            let late = submit_read(&mut host, FIRST, 3);
            let requests = [requests.as_slice(), &[late]].concat();
            assert_eq!(host.control.answer(PATIENCE), [OK as u8]);
            let ended = completions(&mut host, &requests);
            let responses: Vec<_> = ended.iter().map(|one| one.response).collect();
            assert_eq!(responses, [RESET, OK, OK], "{engine}");
            if function == UNIT_RESET {
                assert_eq!(ended[2].sense_codes(), (6, 0x29, 3), "{engine}");
            }
            host.device.set_delay(0);
            host.driver.clear_attentions(FIRST);
            assert_eq!(host.driver.command(SECOND, &[0; 6], 0).status, GOOD);
        }
    });
}

#[test]
fn queries_say_whether_a_task_is_in_hand() {
    for_each_engine(|engine| {
        let mut host = two_disks(&[engine]);
        host.device.set_delay(LATE);
        let request = submit_read(&mut host, FIRST, 5);
        let mut ask = |function, lun, id| host.control.function(function, lun, id);
        assert_eq!(ask(QUERY_TASK, FIRST, 5), SUCCEEDED, "{engine}");
        assert_eq!(ask(QUERY_TASK_SET, FIRST, 0), SUCCEEDED);
        assert_eq!(ask(QUERY_TASK, FIRST, 6), OK);
        assert_eq!(ask(QUERY_TASK, SECOND, 5), OK);
        assert_eq!(ask(QUERY_TASK_SET, SECOND, 0), OK);
        assert_eq!(completions(&mut host, &[request])[0].response, OK);
        assert_eq!(host.control.function(QUERY_TASK_SET, FIRST, 0), OK);
    });
}

#[test]
fn functions_for_what_does_not_exist_say_so() {
    let mut host = two_disks(&[]);
    let mut ask = |function, lun| host.control.function(function, lun, 1);
    for function in [
        ABORT_TASK,
        ABORT_TASK_SET,
        UNIT_RESET,
        QUERY_TASK,
        QUERY_TASK_SET,
    ] {
        assert_eq!(ask(function, address(9, 0)), BAD_TARGET);
        assert_eq!(ask(function, [0; 8]), BAD_TARGET);
        assert_eq!(ask(function, address(0, 1)), INCORRECT_LUN);
        assert_eq!(ask(function, FIRST), OK);
    }
    assert_eq!(ask(NEXUS_RESET, address(0, 1)), OK, "it is for the target");
    assert_eq!(ask(CLEAR_ACA, FIRST), REJECTED);
    assert_eq!(ask(8, FIRST), REJECTED);
}

#[test]
fn other_requests_on_the_control_queue_are_answered() {
    let mut host = two_disks(&[]);
    for kind in [1u32, 2] {
        let mut request = kind.to_le_bytes().to_vec();
        request.extend(FIRST);
        request.extend(u32::MAX.to_le_bytes());
        assert_eq!(host.control.request(&request, 5), [0; 5], "no events");
    }
    let mut unknown = 77u32.to_le_bytes().to_vec();
    unknown.extend([0; 20]);
    assert_eq!(host.control.request(&unknown, 1), [FAILURE as u8]);
    // Too short to be a function.
    assert!(host.control.request(&[0; 23], 1).is_empty());
    assert!(host.control.request(&[], 1).is_empty());
    assert_eq!(host.control.function(QUERY_TASK, FIRST, 1), OK);
}

#[test]
fn a_queue_stops_while_functions_and_requests_wait() {
    for_each_engine(|engine| {
        let mut host = two_disks(&[engine]);
        host.device.set_delay(LATE);
        let requests = [1, 2].map(|id| submit_read(&mut host, FIRST, id));
        host.control.submit_function(UNIT_RESET, FIRST, 0);
        std::thread::sleep(SHORT);
        for queue in [0, 2] {
            host.front_end.stop(queue).unwrap();
        }
        let ended = completions(&mut host, &requests);
        assert!(
            ended.iter().all(|one| one.response == RESET),
            "{engine}: {ended:?}"
        );
        assert_eq!(host.control.answer(SHORT), [OK as u8]);
    });
}

/// COMPARE AND WRITE must not see half of a write, and no write may come between.
#[test]
fn writes_wait_for_a_command_that_excludes_them() {
    for_each_engine(|engine| {
        let mut host = two_disks(&[engine]);
        let memory = host.front_end.memory().clone();
        host.device.set_delay(LATE);
        let area = RequestArea::new(&memory, 4096);
        let write = area.prepare(
            &memory,
            &Request {
                cdb: &transfer(WRITE_16, 0, 1),
                data: &[5; 512],
                ..Request::default()
            },
        );
        host.driver.queue.submit(&write.chain);
        std::thread::sleep(SHORT);
        let mut cdb = [0; 16];
        (cdb[0], cdb[13]) = (0x89, 1);
        // It compares with what the write leaves.
        let data = [[5; 512], [6; 512]].concat();
        let compare = RequestArea::new(&memory, 4096).prepare(
            &memory,
            &Request {
                cdb: &cdb,
                data: &data,
                ..Request::default()
            },
        );
        host.driver.queue.submit(&compare.chain);
        let ended = completions(&mut host, &[write, compare]);
        assert!(
            ended.iter().all(|one| one.status == GOOD),
            "{engine}: {ended:?}"
        );
        assert_eq!(host.device.contents(0)[..512], [6; 512], "{engine}");
    });
}

/// A queue that stops does not wait for procedures that have not begun: the driver is asked to send them again.
#[test]
fn procedures_that_have_not_begun_are_sent_again_when_the_queue_stops() {
    for_each_engine(|engine| {
        let mut host = two_disks(&[engine]);
        let memory = host.front_end.memory().clone();
        host.device.set_delay(LATE);
        let mut submit = |cdb: &[u8], data: &[u8]| {
            let request = Request {
                cdb,
                data,
                ..Request::default()
            };
            let prepared = RequestArea::new(&memory, 4096).prepare(&memory, &request);
            host.driver.queue.submit(&prepared.chain);
            std::thread::sleep(SHORT);
            prepared
        };
        let write = submit(&transfer(WRITE_16, 0, 1), &[5; 512]);
        let mut cdb = [0; 16];
        (cdb[0], cdb[13]) = (0x89, 1);
        // It waits for the write.
        let data = [[5; 512], [6; 512]].concat();
        let compare = submit(&cdb, &data);
        host.front_end.stop(REQUEST_QUEUE).unwrap();
        let ended = completions(&mut host, &[write, compare]);
        assert_eq!(
            (ended[0].response, ended[0].status),
            (OK, GOOD),
            "{engine}: {ended:?}"
        );
        assert_eq!(ended[1].response, BUSY, "{engine}: {ended:?}");
        assert_eq!(host.device.contents(0)[..512], [5; 512], "{engine}");
    });
}
