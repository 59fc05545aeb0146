// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Programs that are started at once with one socket: one gets it, and the others end.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use vhost_device_tests::process::{PATIENCE, Program, Signal, option};

use crate::stats_socket::{page, stats_socket};
use crate::{Binary, END, Setup, assert_serves, exists, for_each_program};

const ROUNDS: usize = 20;
const PROGRAMS: usize = 4;

/// Starts programs at once, each with its options, and returns the one that continues. The others must report the running one.
fn start_all(setups: &[Setup], options: impl Fn(&Setup) -> Vec<OsString>) -> Program {
    let mut programs: Vec<_> = setups
        .iter()
        .map(|setup| Program::spawn(setup.command().args(options(setup))).unwrap())
        .collect();
    let deadline = Instant::now() + PATIENCE;
    loop {
        let ended = |program: &mut Program| program.status().unwrap().is_some();
        let running = programs
            .iter_mut()
            .filter_map(|program| (!ended(program)).then_some(()));
        match running.count() {
            0 => panic!("all have ended"),
            1 => break,
            count if Instant::now() > deadline => panic!("{count} programs live"),
            _ => std::thread::sleep(Duration::from_millis(2)),
        }
    }
    let mut left = None;
    for mut program in programs {
        match program.status().unwrap() {
            None => left = Some(program),
            Some(status) => {
                let stderr = program.stderr();
                assert_eq!(status.code(), Some(1), "{stderr}");
                assert_eq!(stderr.lines().count(), 1, "{stderr}");
                assert!(stderr.contains("another program listens on"), "{stderr}");
            }
        }
    }
    left.unwrap()
}

fn setups(binary: &Binary) -> Vec<Setup<'_>> {
    (0..PROGRAMS).map(|_| Setup::new(binary)).collect()
}

fn only_one_of_programs_started_at_once_gets_the_socket(binary: &Binary) {
    let setups = setups(binary);
    let path = setups[0].socket();
    for round in 0..ROUNDS {
        if round % 2 == 1 {
            // A socket that an earlier process has left behind.
            drop(UnixListener::bind(&path).unwrap());
        }
        let mut program = start_all(&setups, |_| vec![option("socket-path", &path)]);
        program.wait_for_listener(&path).unwrap();
        assert_serves(&UnixStream::connect(&path).unwrap());
        assert_eq!(program.end(Signal::TERM, END).unwrap().code(), Some(0));
        assert!(!exists(&path));
    }
}

fn only_one_of_programs_started_at_once_gets_the_statistics_socket(binary: &Binary) {
    let setups = setups(binary);
    let path = stats_socket(&setups[0]);
    for round in 0..ROUNDS / 2 {
        if round % 2 == 1 {
            drop(UnixListener::bind(&path).unwrap());
        }
        let mut program = start_all(&setups, |setup| {
            let socket = option("socket-path", setup.socket());
            vec![socket, option("stats-socket", &path)]
        });
        program.wait_for_listener(&path).unwrap();
        assert!(page(&path).contains("vhost_device_"));
        assert_eq!(program.end(Signal::TERM, END).unwrap().code(), Some(0));
        assert!(setups.iter().all(|setup| !exists(&setup.socket())));
        assert!(!exists(&path));
    }
}

fn programs_started_at_once_in_one_directory_all_live(binary: &Binary) {
    let setup = Setup::new(binary);
    let others = setups(binary);
    let start = |(number, other): (usize, &Setup)| {
        let sockets = ["socket-path", "stats-socket"];
        let sockets = sockets.map(|name| option(name, setup.path(&format!("{name}-{number}"))));
        Program::spawn(other.command().args(sockets)).unwrap()
    };
    let programs: Vec<_> = others.iter().enumerate().map(start).collect();
    for (number, mut program) in programs.into_iter().enumerate() {
        let socket = setup.path(&format!("socket-path-{number}"));
        program.wait_for_listener(&socket).unwrap();
        assert_serves(&UnixStream::connect(&socket).unwrap());
    }
}

/// Anyone who can read a directory can lock it.
fn a_directory_that_stays_locked_keeps_no_program_from_starting(binary: &Binary) {
    let setup = Setup::new(binary);
    let directory = File::open(setup.path("")).unwrap();
    flock(&directory, FlockOperation::LockExclusive).unwrap();
    let program = setup.serve();
    let log = program.stderr();
    assert!(log.contains("locked (flock)"), "{log}");
}

for_each_program!(
    only_one_of_programs_started_at_once_gets_the_socket,
    only_one_of_programs_started_at_once_gets_the_statistics_socket,
    programs_started_at_once_in_one_directory_all_live,
    a_directory_that_stays_locked_keeps_no_program_from_starting,
);
