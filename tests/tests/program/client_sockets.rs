// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the sockets for statistics and for commands have in common: where they may be, who may connect, and that no client disturbs
//! anybody.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use vhost_device_tests::process::{PATIENCE, Program, Signal, option};

use crate::control_socket::assert_executes;
use crate::stats_socket::assert_serves_statistics;
use crate::{BLOCK, END, Setup, assert_refused, assert_serves, exists};

/// One of the sockets.
struct Kind {
    /// Its option.
    option: &'static str,
    /// Asks something of the one at this path, and has an answer.
    assert_answers: fn(&Path),
    /// A request that takes no notice of its answer.
    request: &'static [u8],
    /// The beginning of a request.
    part: &'static [u8],
    /// Clients that ask nothing may stay, until others need their place.
    keeps_idle: bool,
}

const STATISTICS: Kind = Kind {
    option: "stats-socket",
    assert_answers: assert_serves_statistics,
    request: b"GET / HTTP/1.0\r\n\r\n",
    part: b"GET /",
    keeps_idle: false,
};

const CONTROL: Kind = Kind {
    option: "control-socket",
    assert_answers: assert_executes,
    request: b"{\"execute\":\"query\"}",
    part: b"{\"execute\":",
    keeps_idle: true,
};

impl Kind {
    fn path(&self, setup: &Setup) -> PathBuf {
        setup.path(self.option)
    }

    fn command(&self, setup: &Setup) -> Command {
        let mut command = setup.listening();
        command.arg(option(self.option, self.path(setup)));
        command
    }

    fn serve(&self, setup: &Setup) -> Program {
        let mut program = Program::spawn(&mut self.command(setup)).unwrap();
        program.wait_for_listener(&setup.socket()).unwrap();
        program
    }
}

/// Permissions of a file.
pub fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
}

fn the_mode_of_the_sockets_applies_to_it(kind: &Kind) {
    let setup = Setup::new(&BLOCK);
    let path = kind.path(&setup);
    let mut command = kind.command(&setup);
    let mut program = Program::spawn(command.arg("--socket-mode=0666")).unwrap();
    program.wait_for_listener(&setup.socket()).unwrap();
    assert_eq!(mode(&path), 0o666);
    drop(program);
    let mut program = kind.serve(&setup);
    program.wait_for_listener(&path).unwrap();
    assert_eq!(mode(&path), 0o660, "a stale socket is replaced");
    assert_eq!(program.end(Signal::TERM, END).unwrap().code(), Some(0));
    assert!(!exists(&path), "the socket is left");
}

fn a_path_that_cannot_be_used_is_refused_and_leaves_nothing(kind: &Kind) {
    let setup = Setup::new(&BLOCK);
    let refuse = |path: &Path| {
        let mut command = setup.listening();
        command.arg(option(kind.option, path));
        assert_refused(&mut command, 1, path);
        assert!(!exists(&setup.socket()), "the other socket is left");
    };
    File::create(setup.path("file")).unwrap();
    refuse(&setup.path("file"));
    assert!(setup.path("file").is_file());
    refuse(setup.directory.path());
    refuse(&setup.path("missing/socket"));
    refuse(&setup.path(&"long".repeat(50)));
    refuse(&setup.socket());
    // Another name of the same place.
    let mut command = setup.listening();
    let name = setup.directory.path().file_name().unwrap();
    let other = setup.directory.path().join("..").join(name).join("socket");
    command.arg(option(kind.option, &other));
    assert_refused(&mut command, 1, format!("--{}", kind.option));
    let path = kind.path(&setup);
    let _listener = UnixListener::bind(&path).unwrap();
    refuse(&path);
    assert!(exists(&path));
}

fn a_socket_that_is_used_is_not_taken_by_another_program(kind: &Kind) {
    let setup = Setup::new(&BLOCK);
    let _program = kind.serve(&setup);
    let other = Setup::new(&BLOCK);
    let mut command = other.listening();
    command.arg(option(kind.option, kind.path(&setup)));
    assert_refused(&mut command, 1, format!("--{}", kind.option));
    (kind.assert_answers)(&kind.path(&setup));
}

fn clients_that_stall_flood_or_vanish_disturb_nobody(kind: &Kind) {
    let setup = Setup::new(&BLOCK);
    let mut program = kind.serve(&setup);
    program.expect_no_leak().unwrap();
    let path = kind.path(&setup);
    // Without end, and without reading.
    let mut endless = UnixStream::connect(&path).unwrap();
    endless.write_all(kind.part).unwrap();
    let ended = loop {
        if let Err(error) = endless.write_all(&[b'a'; 4096]) {
            break error.kind();
        }
    };
    assert!(
        matches!(ended, ErrorKind::BrokenPipe | ErrorKind::ConnectionReset),
        "{ended}"
    );
    // Gone before the answer.
    for _ in 0..100 {
        let mut client = UnixStream::connect(&path).unwrap();
        let _ = client.write_all(kind.request);
    }
    // Requests without end, of which no answer is read.
    let mut deaf = UnixStream::connect(&path).unwrap();
    deaf.set_nonblocking(true).unwrap();
    while deaf.write(kind.request).is_ok() {}
    // Nothing at all, and a part of a request.
    let idle: Vec<_> = (0..20)
        .map(|number| {
            let mut client = UnixStream::connect(&path).unwrap();
            if number % 2 == 0 {
                let _ = client.write_all(kind.part);
            }
            client
        })
        .collect();
    // Front-ends and signals do not wait for them.
    let front_end = UnixStream::connect(setup.socket()).unwrap();
    let start = Instant::now();
    assert_serves(&front_end);
    program.signal(Signal::USR1).unwrap();
    let is_logged = |program: &Program| program.stderr().contains("statistics:");
    while !is_logged(&program) {
        assert!(start.elapsed() < PATIENCE, "nothing is logged");
        std::thread::yield_now();
    }
    let before = program.processor_time().unwrap();
    (kind.assert_answers)(&path);
    let spent = program.processor_time().unwrap() - before;
    assert!(
        spent.as_millis() < 500,
        "{spent:?} of processor time while clients wait"
    );
    for (number, mut client) in idle.into_iter().enumerate() {
        if kind.keeps_idle && number % 2 == 1 {
            continue;
        }
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        // Each is let go, without an answer.
        let mut rest = Vec::new();
        let _ = client.read_to_end(&mut rest);
        let lines = rest.split(|byte| *byte == b'\n').count();
        assert!(lines <= 2, "{}", String::from_utf8_lossy(&rest));
    }
}

/// Makes of each function that takes a [`Kind`] a test for each socket.
macro_rules! for_each_socket {
    ($($test:ident),+ $(,)?) => {
        mod statistics {
            $(#[test] fn $test() { super::$test(&super::STATISTICS) })+
        }
        mod control {
            $(#[test] fn $test() { super::$test(&super::CONTROL) })+
        }
    };
}

for_each_socket!(
    the_mode_of_the_sockets_applies_to_it,
    a_path_that_cannot_be_used_is_refused_and_leaves_nothing,
    a_socket_that_is_used_is_not_taken_by_another_program,
    clients_that_stall_flood_or_vanish_disturb_nobody,
);

#[test]
fn the_sockets_for_statistics_and_for_commands_must_differ() {
    let setup = Setup::new(&BLOCK);
    let path = setup.path("same");
    let mut command = setup.listening();
    command.args([STATISTICS, CONTROL].map(|kind| option(kind.option, &path)));
    assert_refused(&mut command, 1, "--control-socket");
    assert!(!exists(&path) && !exists(&setup.socket()));
}
