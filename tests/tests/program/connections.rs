// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Connections over the life of the program, and how signals end it.

use std::io::Write;
use std::os::unix::net::UnixStream;

use vhost_device_tests::process::{PATIENCE, Program, Signal};

use crate::{END, Setup, answer, ask, assert_serves, exists};

/// What a front-end may be doing when the program is told to end.
type Scene = (&'static str, fn(&Setup, &mut Program) -> Vec<UnixStream>);

/// A connection that the program has accepted.
fn accepted(setup: &Setup, program: &mut Program) -> UnixStream {
    let before = program.resources().unwrap().files;
    let stream = UnixStream::connect(setup.socket()).unwrap();
    let id = program.id();
    program
        .wait_until("accept a connection", PATIENCE, || {
            Ok(std::fs::read_dir(format!("/proc/{id}/fd"))?.count() > before)
        })
        .unwrap();
    stream
}

const SCENES: [Scene; 5] = [
    ("nobody connected", |_, _| Vec::new()),
    ("a client that says nothing", |setup, program| {
        vec![accepted(setup, program)]
    }),
    ("a client in the middle of a message", |setup, program| {
        let mut stream = accepted(setup, program);
        stream.write_all(&[1, 0, 0, 0, 1]).unwrap();
        vec![stream]
    }),
    ("a client that talks", |setup, _| {
        let stream = UnixStream::connect(setup.socket()).unwrap();
        assert_serves(&stream);
        vec![stream]
    }),
    ("a client that waits behind another", |setup, _| {
        let stream = UnixStream::connect(setup.socket()).unwrap();
        assert_serves(&stream);
        let waiting = UnixStream::connect(setup.socket()).unwrap();
        ask(&waiting);
        vec![stream, waiting]
    }),
];

fn assert_signal_ends(signal: Signal) {
    for (name, scene) in SCENES {
        let setup = Setup::new();
        let mut program = setup.serve();
        let _connections = scene(&setup, &mut program);
        let status = program.end(signal, END).unwrap();
        assert_eq!(status.code(), Some(0), "{name}: {status}");
        assert!(
            !exists(&setup.socket()),
            "{name}: the socket is still there"
        );
    }
}

#[test]
fn sigterm_ends_the_program_and_removes_the_socket() {
    assert_signal_ends(Signal::TERM);
}

#[test]
fn sigint_ends_the_program_and_removes_the_socket() {
    assert_signal_ends(Signal::INT);
}

#[test]
fn connections_are_served_one_after_the_other() {
    let setup = Setup::new();
    let mut program = setup.serve();
    for _ in 0..5 {
        assert_serves(&UnixStream::connect(setup.socket()).unwrap());
    }
    assert!(program.status().unwrap().is_none());
}

#[test]
fn a_second_connection_waits_until_the_first_is_gone() {
    let setup = Setup::new();
    let _program = setup.serve();
    let first = UnixStream::connect(setup.socket()).unwrap();
    assert_serves(&first);
    let second = UnixStream::connect(setup.socket()).unwrap();
    ask(&second);
    for _ in 0..100 {
        assert_serves(&first);
    }
    second.set_nonblocking(true).unwrap();
    assert!(
        std::io::Read::read(&mut &second, &mut [0])
            .is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock)
    );
    second.set_nonblocking(false).unwrap();
    drop(first);
    answer(&second);
}

#[test]
fn the_program_stays_in_the_foreground() {
    let setup = Setup::new();
    let mut program = setup.serve();
    assert_serves(&UnixStream::connect(setup.socket()).unwrap());
    assert!(
        program.status().unwrap().is_none(),
        "the process that was started has ended"
    );
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", program.id())).unwrap();
    // After the name in parentheses: state, parent, process group, session.
    let session = stat
        .rsplit_once(')')
        .unwrap()
        .1
        .split_whitespace()
        .nth(3)
        .unwrap()
        .parse()
        .unwrap();
    assert_eq!(
        Some(session),
        rustix::process::getsid(None)
            .ok()
            .map(|session| session.as_raw_nonzero().get())
    );
}
