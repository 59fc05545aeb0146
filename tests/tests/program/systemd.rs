// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The interface to systemd: the passed socket, and the notification that the service is ready.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::net::{TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use vhost_device_tests::guest::find_program;
use vhost_device_tests::process::{PATIENCE, Program, Signal, inherit, listens, option};
use vhost_device_tests::skip::skip;

use crate::arguments::USAGE;
use crate::{
    Binary, END, Setup, assert_refused, assert_serves, exists, for_each_program,
    for_each_program_with_a_file,
};

/// Returns `command` as systemd starts it: with `socket` as file descriptor 3, and `count` as number of sockets.
fn activated(command: &Command, socket: impl Into<OwnedFd>, count: &str) -> Command {
    let mut shell = Command::new("sh");
    shell
        .args([
            "-c",
            "exec 3<&0 </dev/null; export LISTEN_PID=$$; exec \"$0\" \"$@\"",
        ])
        .arg(command.get_program())
        .args(command.get_args())
        .env_remove("RUST_LOG")
        .env("LISTEN_FDS", count)
        .stdin(Stdio::from(socket.into()));
    shell
}

/// The receiver of NOTIFY_SOCKET.
struct Notifications(UnixDatagram);

impl Notifications {
    fn at(address: &SocketAddr) -> Self {
        let socket = UnixDatagram::bind_addr(address).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Self(socket)
    }

    fn at_path(path: &Path) -> Self {
        Self::at(&SocketAddr::from_pathname(path).unwrap())
    }

    fn next(&self) -> String {
        let mut message = [0; 4096];
        let size = self.0.recv(&mut message).expect("a notification");
        String::from_utf8(message[..size].to_vec()).unwrap()
    }

    /// Asserts that the program has ended, and `STOPPING=1` was its last notification.
    fn assert_stopped(&self) {
        assert_eq!(self.next(), "STOPPING=1");
        self.0.set_nonblocking(true).unwrap();
        let more = self.0.recv(&mut [0]);
        assert!(more.is_err_and(|error| error.kind() == ErrorKind::WouldBlock));
    }
}

fn a_passed_socket_is_served_and_left_in_place(binary: &Binary) {
    let setup = Setup::new(binary);
    let listener = UnixListener::bind(setup.socket()).unwrap();
    let mut program = Program::spawn(&mut activated(&setup.command(), listener, "1")).unwrap();
    for _ in 0..3 {
        assert_serves(&UnixStream::connect(setup.socket()).unwrap());
    }
    assert_eq!(program.end(Signal::TERM, END).unwrap().code(), Some(0));
    assert!(exists(&setup.socket()), "the socket belongs to systemd");
}

fn a_passed_connection_is_served_until_its_end(binary: &Binary) {
    let setup = Setup::new(binary);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut program = Program::spawn(&mut activated(&setup.command(), theirs, "1")).unwrap();
    assert_serves(&ours);
    drop(ours);
    assert_eq!(program.wait(PATIENCE).unwrap().code(), Some(0));
}

fn an_option_wins_over_a_passed_socket(binary: &Binary) {
    let setup = Setup::new(binary);
    let passed = setup.path("passed");
    let listener = UnixListener::bind(&passed).unwrap();
    let mut program = Program::serve(
        &mut activated(&setup.listening(), listener, "1"),
        &setup.socket(),
    )
    .unwrap();
    assert_serves(&UnixStream::connect(setup.socket()).unwrap());

    let (ours, theirs) = UnixStream::pair().unwrap();
    let listener = UnixListener::bind(setup.path("other")).unwrap();
    let mut command = setup.command();
    command.arg("--fd=300");
    let mut command = activated(&command, listener, "1");
    inherit(&mut command, theirs.into(), 300);
    program.end(Signal::TERM, END).unwrap();
    let _program = Program::spawn(&mut command).unwrap();
    assert_serves(&ours);
}

fn more_or_fewer_sockets_than_one_are_refused(binary: &Binary) {
    for count in ["0", "2", "4294967297", "-1", "one", ""] {
        let setup = Setup::new(binary);
        let listener = UnixListener::bind(setup.socket()).unwrap();
        assert_refused(
            &mut activated(&setup.command(), listener, count),
            1,
            format!("LISTEN_FDS={count}:"),
        );
    }
}

fn a_passed_file_that_is_no_unix_stream_socket_is_refused(binary: &Binary) {
    let setup = Setup::new(binary);
    let refuse = |file: OwnedFd| {
        assert_refused(&mut activated(&setup.command(), file, "1"), 1, "LISTEN_FDS")
    };
    refuse(File::open(setup.image()).unwrap().into());
    refuse(UdpSocket::bind("127.0.0.1:0").unwrap().into());
    refuse(TcpListener::bind("127.0.0.1:0").unwrap().into());
    refuse(UnixDatagram::pair().unwrap().0.into());
    let unbound = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    );
    refuse(unbound.unwrap());
}

fn sockets_for_another_process_are_ignored(binary: &Binary) {
    for id in ["1", "", "self", "-1"] {
        let setup = Setup::new(binary);
        assert_refused(
            setup.command().env("LISTEN_PID", id).env("LISTEN_FDS", "1"),
            USAGE,
            "--socket-path",
        );
    }
}

fn the_mode_of_a_passed_socket_cannot_be_set(binary: &Binary) {
    let setup = Setup::new(binary);
    let listener = UnixListener::bind(setup.socket()).unwrap();
    let mut command = setup.command();
    command.arg("--socket-mode=0600");
    assert_refused(
        &mut activated(&command, listener, "1"),
        USAGE,
        "--socket-path",
    );
}

fn systemd_hears_when_the_socket_listens_and_when_the_program_ends(binary: &Binary) {
    let setup = Setup::new(binary);
    let notifications = Notifications::at_path(&setup.path("notify"));
    let mut command = setup.listening();
    command.env("NOTIFY_SOCKET", setup.path("notify"));
    let mut program = Program::spawn(&mut command).unwrap();
    assert_eq!(notifications.next(), "READY=1");
    assert!(listens(&setup.socket()).unwrap());
    assert_serves(&UnixStream::connect(setup.socket()).unwrap());
    assert_eq!(program.end(Signal::TERM, END).unwrap().code(), Some(0));
    notifications.assert_stopped();
}

fn systemd_hears_that_the_socket_it_passed_is_served(binary: &Binary) {
    let setup = Setup::new(binary);
    let notifications = Notifications::at_path(&setup.path("notify"));
    let listener = UnixListener::bind(setup.socket()).unwrap();
    let mut command = activated(&setup.command(), listener, "1");
    command.env("NOTIFY_SOCKET", setup.path("notify"));
    let mut program = Program::spawn(&mut command).unwrap();
    assert_eq!(notifications.next(), "READY=1");
    assert_eq!(program.end(Signal::TERM, END).unwrap().code(), Some(0));
    notifications.assert_stopped();
}

fn systemd_hears_that_a_connection_is_served(binary: &Binary) {
    let setup = Setup::new(binary);
    let notifications = Notifications::at_path(&setup.path("notify"));
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut command = activated(&setup.command(), theirs, "1");
    command.env("NOTIFY_SOCKET", setup.path("notify"));
    let mut program = Program::spawn(&mut command).unwrap();
    assert_eq!(notifications.next(), "READY=1");
    drop(ours);
    assert_eq!(program.wait(PATIENCE).unwrap().code(), Some(0));
    notifications.assert_stopped();
}

fn systemd_may_listen_in_the_abstract_namespace(binary: &Binary) {
    let setup = Setup::new(binary);
    // A unique name.
    let name = setup.path("notify").into_os_string();
    let address = SocketAddr::from_abstract_name(name.as_bytes()).unwrap();
    let notifications = Notifications::at(&address);
    let mut command = setup.listening();
    command.env(
        "NOTIFY_SOCKET",
        [OsStr::new("@"), &name].join(OsStr::new("")),
    );
    let _program = Program::spawn(&mut command).unwrap();
    assert_eq!(notifications.next(), "READY=1");
}

fn a_program_that_cannot_start_is_never_ready(binary: &Binary) {
    let setup = Setup::new(binary);
    let notifications = Notifications::at_path(&setup.path("notify"));
    fs::remove_file(setup.image()).unwrap();
    let mut command = setup.listening();
    command.env("NOTIFY_SOCKET", setup.path("notify"));
    assert_refused(&mut command, 1, setup.image());
    notifications.0.set_nonblocking(true).unwrap();
    assert!(notifications.0.recv(&mut [0]).is_err());
}

/// Asserts that the program warns of a NOTIFY_SOCKET that cannot be used, and serves.
fn assert_serves_despite(setup: &Setup, notify: &OsStr) {
    let mut command = setup.listening();
    command.env("NOTIFY_SOCKET", notify);
    let mut program = Program::serve(&mut command, &setup.socket()).unwrap();
    assert_serves(&UnixStream::connect(setup.socket()).unwrap());
    assert_eq!(program.end(Signal::TERM, END).unwrap().code(), Some(0));
    let stderr = program.stderr();
    for message in ["READY=1", "STOPPING=1"] {
        assert!(
            stderr.contains(&format!("warn: cannot send {message} to NOTIFY_SOCKET=")),
            "NOTIFY_SOCKET={notify:?}: {stderr}"
        );
    }
}

fn a_notify_socket_that_nobody_listens_on_is_no_reason_to_fail(binary: &Binary) {
    let setup = Setup::new(binary);
    drop(UnixDatagram::bind(setup.path("stale")).unwrap());
    let stream = setup.path("stream");
    let _listener = UnixListener::bind(&stream).unwrap();
    for notify in [
        OsStr::new(""),
        OsStr::new("@"),
        OsStr::new("@no such name"),
        OsStr::new("no such file"),
        OsStr::from_bytes(&[0xff; 200]),
        setup.image().as_os_str(),
        setup.path("stale").as_os_str(),
        stream.as_os_str(),
    ] {
        assert_serves_despite(&setup, notify);
    }
}

fn a_notify_socket_that_nobody_reads_from_is_no_reason_to_fail(binary: &Binary) {
    let setup = Setup::new(binary);
    let path = setup.path("notify");
    let _notifications = Notifications::at_path(&path);
    let sender = UnixDatagram::unbound().unwrap();
    sender.set_nonblocking(true).unwrap();
    while sender.send_to(b"STATUS=", &path).is_ok() {}
    assert_serves_despite(&setup, path.as_os_str());
}

fn systemd_socket_activate_starts_the_program_at_the_first_connection(binary: &Binary) {
    let Some(activate) = find_program("systemd-socket-activate") else {
        return skip("systemd-socket-activate is not installed");
    };
    let setup = Setup::new(binary);
    let notifications = Notifications::at_path(&setup.path("notify"));
    let program = setup.command();
    let mut command = Command::new(activate);
    command
        .arg(option("listen", setup.socket()))
        .arg(format!(
            "--setenv=NOTIFY_SOCKET={}",
            setup.path("notify").display()
        ))
        // It passes no other environment on, and a program that is built with counters needs this (`cargo xtask coverage`).
        .arg("--setenv=LLVM_PROFILE_FILE")
        .arg(program.get_program())
        .args(program.get_args());
    let mut program = Program::serve(&mut command, &setup.socket()).unwrap();
    for _ in 0..3 {
        assert_serves(&UnixStream::connect(setup.socket()).unwrap());
    }
    assert_eq!(notifications.next(), "READY=1");
    assert_eq!(program.end(Signal::TERM, END).unwrap().code(), Some(0));
    notifications.assert_stopped();
}

for_each_program!(
    a_passed_socket_is_served_and_left_in_place,
    a_passed_connection_is_served_until_its_end,
    an_option_wins_over_a_passed_socket,
    more_or_fewer_sockets_than_one_are_refused,
    a_passed_file_that_is_no_unix_stream_socket_is_refused,
    sockets_for_another_process_are_ignored,
    the_mode_of_a_passed_socket_cannot_be_set,
    systemd_hears_when_the_socket_listens_and_when_the_program_ends,
    systemd_hears_that_the_socket_it_passed_is_served,
    systemd_hears_that_a_connection_is_served,
    systemd_may_listen_in_the_abstract_namespace,
    a_notify_socket_that_nobody_listens_on_is_no_reason_to_fail,
    a_notify_socket_that_nobody_reads_from_is_no_reason_to_fail,
    systemd_socket_activate_starts_the_program_at_the_first_connection,
);

mod with_a_file {
    use super::*;

    for_each_program_with_a_file!(a_program_that_cannot_start_is_never_ready);
}
