// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The log goes to a stderr that nobody reads, is full, or recovers: the program works as if it had none.

use std::fs::{File, OpenOptions};
use std::io::{PipeReader, PipeWriter, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::pipe::fcntl_setpipe_size;
use vhost_device_tests::front_end::{FrontEnd, Options};
use vhost_device_tests::process::{PATIENCE, Program, Signal, inherit, option};

use crate::stats_socket::{page, stats_socket};
use crate::{BLOCK, Binary, END, Setup, assert_serves, for_each_program, read_request, run};

/// Messages of a front-end, each of which is logged with RUST_LOG=trace: more than pipe and program can hold.
const MESSAGES: usize = 8000;

/// Time limit for starting with a blocked stderr, or for ending when it cannot start.
const START: Duration = Duration::from_secs(5);

/// Creates a pipe of one page.
fn pipe() -> (PipeReader, PipeWriter) {
    let (reader, writer) = std::io::pipe().unwrap();
    fcntl_setpipe_size(&writer, 4096).unwrap();
    (reader, writer)
}

/// Creates a pipe that is full.
fn full_pipe() -> (PipeReader, PipeWriter) {
    let (reader, mut writer) = pipe();
    writer.write_all(&[b'\n'; 4096]).unwrap();
    (reader, writer)
}

fn with_stderr(command: &mut Command, stderr: impl Into<OwnedFd>) -> Program {
    inherit(command, stderr.into(), 2);
    Program::spawn(command).unwrap()
}

/// Returns the program, which logs each message to `stderr`.
fn serve(setup: &Setup, stderr: impl Into<OwnedFd>) -> Program {
    let mut command = setup.listening();
    command.env("RUST_LOG", "trace");
    command.arg(option("stats-socket", stats_socket(setup)));
    let mut program = with_stderr(&mut command, stderr);
    program.wait_for_listener(&setup.socket()).unwrap();
    program
}

/// Causes many log lines for a stderr that accepts none.
fn storm(setup: &Setup) {
    let stream = UnixStream::connect(setup.socket()).unwrap();
    for _ in 0..MESSAGES {
        assert_serves(&stream);
    }
}

fn assert_request_is_served(setup: &Setup) {
    let front_end = FrontEnd::connect(&setup.socket(), &Options::default()).unwrap();
    let mut queue = front_end.queue(0, 256).unwrap();
    queue.submit(&read_request(&front_end, 4096));
    assert!(queue.wait_used(PATIENCE));
}

fn assert_ends(program: &mut Program) {
    assert_eq!(program.end(Signal::TERM, END).unwrap().code(), Some(0));
}

fn a_log_that_nobody_reads_stops_nothing(binary: &Binary) {
    let setup = Setup::new(binary);
    let (_reader, writer) = pipe();
    let mut program = serve(&setup, writer);
    storm(&setup);
    assert_request_is_served(&setup);
    program.signal(Signal::USR1).unwrap();
    assert!(page(&stats_socket(&setup)).contains("vhost_device_"));
    assert_request_is_served(&setup);
    assert_ends(&mut program);
}

fn a_program_whose_log_nobody_reads_can_start(binary: &Binary) {
    let setup = Setup::new(binary);
    let (_reader, writer) = full_pipe();
    let mut program = serve(&setup, writer);
    assert_request_is_served(&setup);
    assert_ends(&mut program);
}

fn a_program_that_cannot_write_to_stderr_still_ends(binary: &Binary) {
    let setup = Setup::new(binary);
    let bad_options: [&[&str]; 2] = [&["--no-such-option"], &["--fd=999"]];
    for (options, code) in bad_options.into_iter().zip([2, 1]) {
        let (_reader, writer) = full_pipe();
        let mut command = setup.command();
        let mut program = with_stderr(command.args(options), writer);
        assert_eq!(program.wait(START).unwrap().code(), Some(code));
    }
}

/// Reads lines until one of them is the last.
fn read_until(reader: &mut PipeReader, is_last: impl Fn(&str) -> bool) -> Vec<String> {
    let deadline = Instant::now() + PATIENCE;
    let mut text = String::new();
    let mut bytes = [0; 4096];
    loop {
        let count = reader.read(&mut bytes).unwrap();
        text += str::from_utf8(&bytes[..count]).unwrap();
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        if whole.lines().any(&is_last) {
            return whole.lines().map(str::to_owned).collect();
        }
        assert!(Instant::now() < deadline, "{text}");
    }
}

fn dropped(line: &str) -> Option<usize> {
    let (count, _) = line.split_once(" log lines were dropped")?;
    count.rsplit(' ').next()?.parse().ok()
}

fn lines_that_were_dropped_are_counted_in_their_place(binary: &Binary) {
    let setup = Setup::new(binary);
    let (mut reader, writer) = pipe();
    let mut program = serve(&setup, writer);
    storm(&setup);
    let lines = read_until(&mut reader, |line| dropped(line).is_some());
    // The lines before it are complete.
    let prefix = format!("{}: ", binary.name);
    for line in &lines {
        assert!(line.starts_with(&prefix), "{line:?}");
    }
    let told = lines.iter().position(|line| dropped(line).is_some());
    let told = told.unwrap();
    assert!(lines[told].contains(": warn: "), "{}", lines[told]);
    let seen = lines[..told].len() + dropped(&lines[told]).unwrap();
    assert!(seen >= MESSAGES, "{seen} lines of {MESSAGES}");
    // The log continues.
    program.signal(Signal::USR1).unwrap();
    read_until(&mut reader, |line| line.contains("statistics:"));
    assert_ends(&mut program);
}

fn the_last_line_comes_out(binary: &Binary) {
    let setup = Setup::new(binary);
    for _ in 0..20 {
        let ended = run(setup.command().arg("--fd=999"));
        assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
        let mut program = setup.serve();
        assert_ends(&mut program);
        let last = program.stderr();
        assert!(last.contains("waiting for a front-end"), "{last}");
    }
}

fn a_log_on_a_full_disk_stops_nothing(binary: &Binary) {
    let setup = Setup::new(binary);
    let full: File = OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut program = serve(&setup, full);
    storm(&setup);
    assert_request_is_served(&setup);
    assert_ends(&mut program);
}

fn a_log_whose_reader_is_gone_stops_nothing(binary: &Binary) {
    let setup = Setup::new(binary);
    let (reader, writer) = pipe();
    drop(reader);
    let mut program = serve(&setup, writer);
    storm(&setup);
    assert_request_is_served(&setup);
    assert_ends(&mut program);
}

fn a_log_that_others_made_non_blocking_loses_nothing(binary: &Binary) {
    let setup = Setup::new(binary);
    let (mut reader, writer) = pipe();
    rustix::io::ioctl_fionbio(&writer, true).unwrap();
    let mut program = serve(&setup, writer);
    for _ in 0..10 {
        program.signal(Signal::USR1).unwrap();
        assert_request_is_served(&setup);
    }
    let is_last = |line: &str| line.contains("the front-end is gone");
    for line in read_until(&mut reader, is_last) {
        assert_eq!(dropped(&line), None, "{line}");
    }
    drop(reader);
    assert_ends(&mut program);
}

/// Libraries write to stderr directly.
fn stderr_is_non_blocking_for_the_program_alone(binary: &Binary) {
    let setup = Setup::new(binary);
    let (_reader, writer) = pipe();
    let program = serve(&setup, writer.try_clone().unwrap());
    let path = format!("/proc/{}/fdinfo/2", program.id());
    let info = std::fs::read_to_string(path).unwrap();
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = i32::from_str_radix(flags.unwrap().trim(), 8).unwrap();
    assert_ne!(flags & libc::O_NONBLOCK, 0);
    let flags = rustix::fs::fcntl_getfl(&writer).unwrap();
    assert!(!flags.contains(rustix::fs::OFlags::NONBLOCK));
}

/// Returns the lines that the program has logged after `cause`.
fn lines_after(binary: &Binary, cause: impl Fn(&Setup)) -> Vec<String> {
    let setup = Setup::new(binary);
    let mut command = setup.listening();
    if binary.name == BLOCK.name {
        // The kernel takes some time to release the memory of many io_uring rings.
        command.arg("--io-engine=threads");
    }
    let program = Program::serve(&mut command, &setup.socket()).unwrap();
    cause(&setup);
    program.stderr().lines().map(str::to_owned).collect()
}

/// Limit of log lines for this many events, all of which are caused by one guest or front-end.
const MOST_LINES: usize = 700;
const EVENTS: usize = 1000;

fn a_guest_that_starts_again_and_again_does_not_fill_the_log(binary: &Binary) {
    let lines = lines_after(binary, |setup| {
        let mut front_end = FrontEnd::connect(&setup.socket(), &Options::default()).unwrap();
        let features = front_end.features();
        let queue = front_end.queue(0, 16).unwrap();
        for _ in 0..EVENTS {
            front_end.stop(0).unwrap();
            front_end.set_features(features).unwrap();
            let start = queue.options().start();
            front_end.start(0, &queue, start).unwrap();
        }
    });
    assert!(lines.len() < MOST_LINES, "{} lines", lines.len());
}

fn a_front_end_that_connects_again_and_again_does_not_fill_the_log(binary: &Binary) {
    let lines = lines_after(binary, |setup| {
        for _ in 0..EVENTS {
            assert_serves(&UnixStream::connect(setup.socket()).unwrap());
        }
        // And a front-end that is disconnected each time.
        for _ in 0..EVENTS {
            let mut stream = UnixStream::connect(setup.socket()).unwrap();
            stream.write_all(&[0xff; 12]).unwrap();
            let _ = stream.read(&mut [0; 12]);
        }
    });
    assert!(lines.len() < MOST_LINES, "{} lines", lines.len());
}

fn each_start_and_stop_of_a_usual_guest_is_logged(binary: &Binary) {
    const BOOTS: usize = 10;
    let lines = lines_after(binary, |setup| {
        let front_end = FrontEnd::connect(&setup.socket(), &Options::default()).unwrap();
        let queue = front_end.queue(0, 16).unwrap();
        for _ in 1..BOOTS {
            front_end.stop(0).unwrap();
            let start = queue.options().start();
            front_end.start(0, &queue, start).unwrap();
        }
    });
    let count = |what: &str| lines.iter().filter(|line| line.contains(what)).count();
    assert_eq!(count("queue 0 started"), BOOTS);
    assert!(count("queue 0 stopped") >= BOOTS - 1);
}

for_each_program!(
    a_guest_that_starts_again_and_again_does_not_fill_the_log,
    a_front_end_that_connects_again_and_again_does_not_fill_the_log,
    each_start_and_stop_of_a_usual_guest_is_logged,
    stderr_is_non_blocking_for_the_program_alone,
    a_log_that_nobody_reads_stops_nothing,
    a_program_whose_log_nobody_reads_can_start,
    a_program_that_cannot_write_to_stderr_still_ends,
    lines_that_were_dropped_are_counted_in_their_place,
    the_last_line_comes_out,
    a_log_on_a_full_disk_stops_nothing,
    a_log_whose_reader_is_gone_stops_nothing,
    a_log_that_others_made_non_blocking_loses_nothing,
);
