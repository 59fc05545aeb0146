// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The counters of the program, in the log and on its socket.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use vhost_device_tests::front_end::device::{EVENT_IDX, RING_PACKED};
use vhost_device_tests::front_end::{BlockDriver, FrontEnd, Options, Queue};
use vhost_device_tests::process::{PATIENCE, Program, Signal, option};

use crate::prometheus::Page;
use crate::stats_socket::{page, stats_socket};
use crate::{BLOCK, GPU, IMAGE_SIZE, RNG, Setup, read_request};

const PAGE: u32 = 4096;

/// The program, with statistics, and a queue of its front-end.
fn counting(setup: &Setup, change: impl FnOnce(&mut Command)) -> Program {
    let mut command = setup.listening();
    command.arg(option("stats-socket", stats_socket(setup)));
    change(&mut command);
    let mut program = Program::serve(&mut command, &setup.socket()).unwrap();
    program.expect_no_leak().unwrap();
    program
}

/// Creates a front-end that always wants calls, or suppresses some.
fn connect(socket: &Path, packed: bool) -> FrontEnd {
    let usual = Options::default();
    let features = usual.features & !(EVENT_IDX | RING_PACKED);
    let options = Options {
        features: features | if packed { RING_PACKED } else { 0 },
        ..usual
    };
    FrontEnd::connect(socket, &options).unwrap()
}

/// Waits until the page has the expected values. A request is counted shortly after its driver sees it.
#[track_caller]
fn wait_for(setup: &Setup, what: &str, holds: impl Fn(&Page) -> bool) -> Page {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let text = page(&stats_socket(setup));
        let page = Page::parse(&text);
        if holds(&page) {
            return page;
        }
        assert!(Instant::now() < deadline, "no {what}:\n{text}");
    }
}

/// Does the same for one number.
#[track_caller]
fn wait_for_sum(setup: &Setup, name: &str, labels: &[(&str, &str)], sum: f64) -> Page {
    let name = format!("vhost_device_{name}");
    wait_for(setup, &format!("{name} of {sum}"), |page| {
        page.sum(&name, labels) == sum
    })
}

fn requests_are_counted_by_type(packed: bool, arguments: &[&str]) {
    let setup = Setup::new(&BLOCK);
    let program = counting(&setup, |command| {
        command.args(arguments);
    });
    let front_end = connect(&setup.socket(), packed);
    let queue = front_end.queue(0, 256).unwrap();
    let mut driver = BlockDriver::new(front_end.memory(), queue, PAGE);
    let start = Instant::now();
    for sector in 0..3 {
        driver.read(sector, PAGE).unwrap();
    }
    driver.write(8, &[1; 1024]).unwrap();
    // Beyond the end of the image.
    let failed = driver.write(IMAGE_SIZE / 512, &[1; 512]).unwrap();
    assert_ne!(failed.status, 0);
    driver.flush().unwrap();
    driver.get_id().unwrap();
    driver.discard(0, 16).unwrap();
    driver.write_zeroes(16, 8, 0).unwrap();
    let unknown = vhost_device_tests::front_end::block::Request {
        kind: 99,
        ..Default::default()
    };
    driver.request(&unknown).unwrap();
    // Each was taken alone, and returned with a call.
    let page = wait_for(&setup, "10 requests, batches and calls", |page| {
        let names = [
            "requests_total",
            "batch_requests_sum",
            "batch_requests_count",
            "calls_total",
        ];
        let mut sums = names
            .iter()
            .map(|name| page.sum(&format!("vhost_device_{name}"), &[]));
        sums.all(|sum| sum == 10.0)
    });
    let elapsed = start.elapsed().as_secs_f64();
    for (kind, requests, bytes, errors) in [
        ("read", 3.0, 3.0 * 4096.0, 0.0),
        ("write", 2.0, 1024.0, 1.0),
        ("flush", 1.0, 0.0, 0.0),
        ("get_id", 1.0, 20.0, 0.0),
        ("discard", 1.0, 8192.0, 0.0),
        ("write_zeroes", 1.0, 4096.0, 0.0),
        ("other", 1.0, 0.0, 1.0),
    ] {
        let labels = [("device", "block"), ("queue", "0"), ("type", kind)];
        let sum = |name: &str| page.sum(&format!("vhost_device_{name}"), &labels);
        assert_eq!(sum("requests_total"), requests, "{kind}");
        assert_eq!(sum("request_bytes_total"), bytes, "{kind}");
        assert_eq!(sum("request_errors_total"), errors, "{kind}");
        assert_eq!(sum("request_duration_seconds_count"), requests, "{kind}");
        let seconds = sum("request_duration_seconds_sum");
        assert!(seconds > 0.0 && seconds < elapsed, "{kind}: {seconds} s");
    }
    assert_eq!(page.sum("vhost_device_calls_suppressed_total", &[]), 0.0);
    let kicks = page.sum("vhost_device_kicks_total", &[]);
    assert!(kicks <= driver.queue.kicks() as f64, "{kicks} kicks");
    drop((driver, front_end));
    assert!(
        !program.stderr().contains("sandbox"),
        "{}",
        program.stderr()
    );
}

#[test]
fn requests_of_a_split_ring_are_counted_by_type() {
    requests_are_counted_by_type(false, &["--io-engine=io_uring"]);
}

#[test]
fn requests_of_a_packed_ring_are_counted_by_type() {
    requests_are_counted_by_type(true, &["--io-engine=threads"]);
}

#[test]
fn requests_that_are_carried_out_at_once_are_counted_by_type() {
    requests_are_counted_by_type(false, &[]);
}

#[test]
fn the_sandbox_allows_what_statistics_need() {
    requests_are_counted_by_type(false, &["--sandbox=log"]);
}

/// Makes all requests of a full batch available at once.
fn add_many(queue: &mut Queue, front_end: &FrontEnd, count: usize) {
    let chain = read_request(front_end, 512);
    for _ in 0..count {
        queue.add(&chain).unwrap();
    }
    queue.publish();
}

fn take_all(queue: &mut Queue, count: usize) {
    let deadline = Instant::now() + PATIENCE;
    for _ in 0..count {
        while queue.take_used().is_none() {
            assert!(Instant::now() < deadline, "requests are not answered");
            std::thread::yield_now();
        }
    }
}

fn batches_kicks_and_calls_are_counted(packed: bool) {
    let setup = Setup::new(&BLOCK);
    let _program = counting(&setup, |_| ());
    let front_end = connect(&setup.socket(), packed);
    let mut queue = Queue::new(front_end.memory(), front_end.queue_options(256));
    // All are there when the ring starts.
    queue.disarm_interrupt();
    add_many(&mut queue, &front_end, 40);
    front_end.start(0, &queue, queue.options().start()).unwrap();
    take_all(&mut queue, 40);
    let page = wait_for_sum(&setup, "batch_requests_sum", &[("queue", "0")], 40.0);
    let sum = |name: &str, labels: &[_]| page.sum(&format!("vhost_device_{name}"), labels);
    assert_eq!(sum("batch_requests_count", &[]), 1.0);
    assert_eq!(sum("batch_requests_bucket", &[("le", "32")]), 0.0);
    assert_eq!(sum("batch_requests_bucket", &[("le", "64")]), 1.0);
    assert_eq!(sum("batches_unkicked_total", &[]), 1.0);
    assert_eq!(sum("kicks_total", &[]), 0.0);

    // Requests published earlier have been counted when this one is.
    queue.kick_anyway();
    let page = wait_for_sum(&setup, "kicks_total", &[("queue", "0")], 1.0);
    assert_eq!(page.sum("vhost_device_calls_total", &[]), 0.0);
    let suppressed = page.sum("vhost_device_calls_suppressed_total", &[]);
    assert!(suppressed >= 1.0, "{suppressed} calls suppressed");

    assert!(!queue.arm_interrupt());
    queue.submit(&read_request(&front_end, 512));
    assert!(queue.wait_call(PATIENCE));
    take_all(&mut queue, 1);
    wait_for_sum(&setup, "batch_requests_sum", &[], 41.0);
    let page = wait_for_sum(&setup, "calls_total", &[], 1.0);
    let after = page.sum("vhost_device_calls_suppressed_total", &[]);
    assert_eq!(after, suppressed);
}

#[test]
fn batches_kicks_and_calls_of_a_split_ring_are_counted() {
    batches_kicks_and_calls_are_counted(false);
}

#[test]
fn batches_kicks_and_calls_of_a_packed_ring_are_counted() {
    batches_kicks_and_calls_are_counted(true);
}

#[test]
fn each_queue_is_counted_apart_and_over_all_connections() {
    let setup = Setup::new(&BLOCK);
    let _program = counting(&setup, |command| {
        command.arg("--num-queues=3");
    });
    wait_for_sum(&setup, "front_ends_total", &[], 0.0);
    for connection in 1..=3 {
        let front_end = connect(&setup.socket(), false);
        for (index, count) in [(0, 1), (2, 5)] {
            // The same ring twice.
            for _ in 0..2 {
                let mut queue = front_end.queue(index, 64).unwrap();
                for _ in 0..count {
                    queue.submit(&read_request(&front_end, 512));
                    assert!(queue.wait_used(PATIENCE));
                    take_all(&mut queue, 1);
                }
                front_end.stop(index).unwrap();
            }
        }
        let connection = f64::from(connection);
        let page = wait_for_sum(&setup, "requests_total", &[], 12.0 * connection);
        let sum =
            |name: &str, queue| page.sum(&format!("vhost_device_{name}"), &[("queue", queue)]);
        assert_eq!(page.sum("vhost_device_front_ends_total", &[]), connection);
        assert_eq!(sum("requests_total", "0"), 2.0 * connection);
        assert_eq!(sum("requests_total", "1"), 0.0);
        assert_eq!(sum("requests_total", "2"), 10.0 * connection);
        assert_eq!(sum("request_bytes_total", "2"), 5120.0 * connection);
    }
}

#[test]
fn a_device_with_one_type_of_requests_counts_what_it_wrote() {
    let setup = Setup::new(&RNG);
    std::fs::write(setup.image(), [1; 4096]).unwrap();
    let _program = counting(&setup, |_| ());
    let front_end = connect(&setup.socket(), false);
    let mut queue = front_end.queue(0, 64).unwrap();
    let mut bytes = 0;
    for _ in 0..3 {
        queue.submit(&read_request(&front_end, 256));
        assert!(queue.wait_used(PATIENCE));
        bytes += queue.take_used().unwrap().length;
    }
    let labels = [("device", "rng"), ("queue", "0"), ("type", "request")];
    let page = wait_for_sum(&setup, "requests_total", &labels, 3.0);
    let counted = page.sum("vhost_device_request_bytes_total", &labels);
    assert_eq!(counted, f64::from(bytes));
}

/// Returns the lines of the log that are statistics.
fn logged(program: &Program) -> Vec<String> {
    let stderr = program.stderr();
    let lines = stderr.lines().filter_map(|line| {
        let (_, line) = line.split_once(": info: statistics: ")?;
        Some(line.to_owned())
    });
    lines.collect()
}

/// Sends SIGUSR1, and waits for more statistics.
fn ask_for_log(program: &mut Program) -> Vec<String> {
    let before = logged(program).len();
    program.signal(Signal::USR1).unwrap();
    let deadline = Instant::now() + PATIENCE;
    loop {
        let lines = logged(program);
        if lines.len() > before {
            return lines[before..].to_vec();
        }
        assert!(Instant::now() < deadline, "nothing is logged");
        assert!(program.status().unwrap().is_none(), "the program has ended");
        std::thread::yield_now();
    }
}

#[test]
fn sigusr1_logs_statistics_with_and_without_a_front_end() {
    for binary in [&BLOCK, &GPU, &RNG] {
        let setup = Setup::new(binary);
        let mut program = setup.serve();
        let lines = ask_for_log(&mut program);
        assert_eq!(lines, ["front-ends so far: 0"]);
        // An idle client is served all the time.
        let front_end = connect(&setup.socket(), false);
        let lines = ask_for_log(&mut program);
        assert_eq!(lines, ["front-ends so far: 1"]);
        drop(front_end);
        assert_eq!(program.end(Signal::TERM, PATIENCE).unwrap().code(), Some(0));
    }
}

#[test]
fn sigusr1_logs_statistics_under_load() {
    let setup = Setup::new(&BLOCK);
    let mut program = setup.serve();
    let front_end = connect(&setup.socket(), false);
    let mut queue = front_end.queue(0, 256).unwrap();
    let chain = read_request(&front_end, PAGE);
    for round in 1..=20 {
        let mut count = 0;
        while queue.add(&chain).is_some() {
            count += 1;
        }
        queue.publish();
        queue.kick();
        program.signal(Signal::USR1).unwrap();
        take_all(&mut queue, count);
        let line = format!("queue 0: read: {} requests, ", round * count);
        let deadline = Instant::now() + PATIENCE;
        while !logged(&program)
            .iter()
            .any(|logged| logged.starts_with(&line))
        {
            assert!(Instant::now() < deadline, "{line} is not logged");
            program.signal(Signal::USR1).unwrap();
            std::thread::yield_now();
        }
    }
}
