// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Connections during the life of the program, and signals.

use std::any::Any;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::TryRecvError;
use std::time::Duration;

use vhost::vhost_user::message::FrontendReq;
use vhost_device_tests::front_end::connection::{VERSION, message};
use vhost_device_tests::front_end::{FrontEnd, Options, Queue};
use vhost_device_tests::process::{PATIENCE, Program, Signal};

use crate::{
    Binary, END, Setup, answer, ask, assert_serves, exists, for_each_program, read_request,
};

/// Activity of a front-end when the program receives a signal. The result is kept until the program has ended.
type Scene = (&'static str, fn(&Setup, &mut Program) -> Box<dyn Any>);

/// Opens a connection that the program has accepted.
fn accepted(setup: &Setup, program: &mut Program) -> UnixStream {
    let before = program.resources().unwrap().files;
    let stream = UnixStream::connect(setup.socket()).unwrap();
    let id = program.id();
    let accepts = || Ok(std::fs::read_dir(format!("/proc/{id}/fd"))?.count() > before);
    program
        .wait_until("accept a connection", PATIENCE, accepts)
        .unwrap();
    stream
}

/// Connects a front-end with a ring of many requests that were just made available.
fn busy(setup: &Setup) -> (FrontEnd, Queue) {
    let front_end = FrontEnd::connect(&setup.socket(), &Options::default()).unwrap();
    let mut queue = front_end.queue(0, 256).unwrap();
    let chain = read_request(&front_end, 1 << 16);
    while queue.add(&chain).is_some() {}
    queue.publish();
    queue.kick_anyway();
    (front_end, queue)
}

const SCENES: [Scene; 8] = [
    ("nobody connected", |_, _| Box::new(())),
    ("a client that says nothing", |setup, program| {
        Box::new(accepted(setup, program))
    }),
    ("a client in the middle of a message", |setup, program| {
        let mut stream = accepted(setup, program);
        stream.write_all(&[1, 0, 0, 0, 1]).unwrap();
        Box::new(stream)
    }),
    ("a client that talks", |setup, _| {
        let stream = UnixStream::connect(setup.socket()).unwrap();
        assert_serves(&stream);
        Box::new(stream)
    }),
    ("a client that waits behind another", |setup, _| {
        let stream = UnixStream::connect(setup.socket()).unwrap();
        assert_serves(&stream);
        let waiting = UnixStream::connect(setup.socket()).unwrap();
        ask(&waiting);
        Box::new((stream, waiting))
    }),
    (
        "a client that asks and never reads the answers",
        |setup, _| {
            let mut stream = UnixStream::connect(setup.socket()).unwrap();
            stream
                .set_write_timeout(Some(Duration::from_millis(100)))
                .unwrap();
            let requests = message(FrontendReq::GET_FEATURES, VERSION, &[]).repeat(100);
            while stream.write_all(&requests).is_ok() {}
            Box::new(stream)
        },
    ),
    ("a guest with requests on their way", |setup, _| {
        Box::new(busy(setup))
    }),
    ("a guest that never stops asking", |setup, _| {
        let (front_end, mut queue) = busy(setup);
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        // Ends when its channel is dropped.
        std::thread::spawn(move || {
            let mut index = queue.split().avail_index();
            while stopped.try_recv() == Err(TryRecvError::Empty) {
                // The chains that are already in the ring, again.
                while queue.split().used_index() == index.wrapping_sub(256) {
                    if stopped.try_recv() != Err(TryRecvError::Empty) {
                        return;
                    }
                }
                index = queue.split().used_index().wrapping_add(256);
                queue.split().set_avail_index(index);
                queue.kick_anyway();
            }
        });
        Box::new((front_end, stop))
    }),
];

fn assert_signal_ends(binary: &Binary, signal: Signal) {
    for (name, scene) in SCENES {
        let setup = Setup::new(binary);
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

fn sigterm_ends_the_program_and_removes_the_socket(binary: &Binary) {
    assert_signal_ends(binary, Signal::TERM);
}

fn sigint_ends_the_program_and_removes_the_socket(binary: &Binary) {
    assert_signal_ends(binary, Signal::INT);
}

fn connections_are_served_one_after_the_other(binary: &Binary) {
    let setup = Setup::new(binary);
    let mut program = setup.serve();
    for _ in 0..5 {
        assert_serves(&UnixStream::connect(setup.socket()).unwrap());
    }
    assert!(program.status().unwrap().is_none());
}

fn a_second_connection_waits_for_the_end_of_the_first(binary: &Binary) {
    let setup = Setup::new(binary);
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

/// Returns the session that a process belongs to, 0 if it is of another process namespace. `process` is its id, or `self`.
fn session(process: &str) -> u32 {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
    // After the name in parentheses: state, parent, process group, session.
    let fields = stat.rsplit_once(')').unwrap().1;
    fields.split_whitespace().nth(3).unwrap().parse().unwrap()
}

fn the_program_stays_in_the_foreground(binary: &Binary) {
    let setup = Setup::new(binary);
    let mut program = setup.serve();
    assert_serves(&UnixStream::connect(setup.socket()).unwrap());
    assert!(
        program.status().unwrap().is_none(),
        "the process that was started has ended"
    );
    let id = program.id().to_string();
    assert_eq!(session(&id), session("self"));
}

for_each_program!(
    sigterm_ends_the_program_and_removes_the_socket,
    sigint_ends_the_program_and_removes_the_socket,
    connections_are_served_one_after_the_other,
    a_second_connection_waits_for_the_end_of_the_first,
    the_program_stays_in_the_foreground,
);
