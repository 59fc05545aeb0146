// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The log goes to a stderr that nobody reads, is full, or comes to life again: the program works as if it had none.

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
use crate::{Binary, END, Setup, assert_serves, for_each_program, read_request, run};

/// Messages of a front-end, each of which is logged with RUST_LOG=trace: more than pipe and program keep.
const MESSAGES: usize = 8000;

/// How long a program may take to start with a stderr that takes nothing, or to end because it cannot start.
const START: Duration = Duration::from_secs(5);

/// A pipe of one page.
fn pipe() -> (PipeReader, PipeWriter) {
    let (reader, writer) = std::io::pipe().unwrap();
    fcntl_setpipe_size(&writer, 4096).unwrap();
    (reader, writer)
}

/// The same, with no room left.
fn full_pipe() -> (PipeReader, PipeWriter) {
    let (reader, mut writer) = pipe();
    writer.write_all(&[b'\n'; 4096]).unwrap();
    (reader, writer)
}

fn with_stderr(command: &mut Command, stderr: impl Into<OwnedFd>) -> Program {
    inherit(command, stderr.into(), 2);
    Program::spawn(command).unwrap()
}

/// The program, which logs each message to `stderr`.
fn serve(setup: &Setup, stderr: impl Into<OwnedFd>) -> Program {
    let mut command = setup.listening();
    command.env("RUST_LOG", "trace");
    command.arg(option("stats-socket", stats_socket(setup)));
    let mut program = with_stderr(&mut command, stderr);
    program.wait_for_listener(&setup.socket()).unwrap();
    program
}

/// Causes many lines, all of which are for a stderr that takes none.
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

fn a_program_that_cannot_say_why_ends_all_the_same(binary: &Binary) {
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
    // What came before it is whole.
    let prefix = format!("{}: ", binary.name);
    for line in &lines {
        assert!(line.starts_with(&prefix), "{line:?}");
    }
    let told = lines.iter().position(|line| dropped(line).is_some());
    let told = told.unwrap();
    assert!(lines[told].contains(": warn: "), "{}", lines[told]);
    let seen = lines[..told].len() + dropped(&lines[told]).unwrap();
    assert!(seen >= MESSAGES, "{seen} lines of {MESSAGES}");
    // The log goes on.
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

for_each_program!(
    a_log_that_nobody_reads_stops_nothing,
    a_program_whose_log_nobody_reads_can_start,
    a_program_that_cannot_say_why_ends_all_the_same,
    lines_that_were_dropped_are_counted_in_their_place,
    the_last_line_comes_out,
    a_log_on_a_full_disk_stops_nothing,
    a_log_whose_reader_is_gone_stops_nothing,
    a_log_that_others_made_non_blocking_loses_nothing,
);
