// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The socket: which existing one is replaced, how it is created, and that it is removed.

use std::fs::{self, File};
use std::net::{TcpListener, UdpSocket};
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with, socketpair};
use vhost_device_tests::front_end::{FrontEnd, Options};
use vhost_device_tests::process::{self, PATIENCE, Program, Signal, inherit, option};

use crate::{
    Binary, END, Setup, assert_refused, assert_serves, exists, for_each_program, read_request,
};

/// Above the numbers of a test process, so that nothing of it is replaced in the child.
const NUMBER: RawFd = 300;

fn with_fd(setup: &Setup, file: impl Into<OwnedFd>) -> Command {
    let mut command = setup.command();
    command.arg(format!("--fd={NUMBER}"));
    inherit(&mut command, file.into(), NUMBER);
    command
}

fn a_connected_fd_is_served_until_its_end(binary: &Binary) {
    let setup = Setup::new(binary);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut program = Program::spawn(&mut with_fd(&setup, theirs)).unwrap();
    assert_serves(&ours);
    assert_serves(&ours);
    drop(ours);
    assert_eq!(program.wait(PATIENCE).unwrap().code(), Some(0));
}

fn a_front_end_that_leaves_a_connected_fd_with_rings_running_ends_the_program(binary: &Binary) {
    let setup = Setup::new(binary);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut program = Program::spawn(&mut with_fd(&setup, theirs)).unwrap();
    let front_end = FrontEnd::from_stream(ours, &Options::default()).unwrap();
    let mut queue = front_end.queue(0, 256).unwrap();
    queue.submit(&read_request(&front_end, 4096));
    assert!(queue.wait_used(PATIENCE));
    drop(front_end);
    assert_eq!(program.wait(PATIENCE).unwrap().code(), Some(0));
}

fn a_connected_fd_closed_before_the_start_is_no_failure(binary: &Binary) {
    let setup = Setup::new(binary);
    let (_, theirs) = UnixStream::pair().unwrap();
    let mut program = Program::spawn(&mut with_fd(&setup, theirs)).unwrap();
    assert_eq!(program.wait(PATIENCE).unwrap().code(), Some(0));
}

fn signals_end_the_program_on_a_connected_fd(binary: &Binary) {
    for signal in [Signal::TERM, Signal::INT] {
        let setup = Setup::new(binary);
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut program = Program::spawn(&mut with_fd(&setup, theirs)).unwrap();
        assert_serves(&ours);
        assert_eq!(
            program.end(signal, END).unwrap().code(),
            Some(0),
            "{signal:?}"
        );
    }
}

fn connections_to_a_listening_fd_are_served_one_after_the_other(binary: &Binary) {
    let setup = Setup::new(binary);
    let listener = UnixListener::bind(setup.socket()).unwrap();
    let mut program = Program::spawn(&mut with_fd(&setup, listener)).unwrap();
    for _ in 0..3 {
        assert_serves(&UnixStream::connect(setup.socket()).unwrap());
    }
    assert_eq!(program.end(Signal::TERM, END).unwrap().code(), Some(0));
    assert!(
        exists(&setup.socket()),
        "the path belongs to whoever passed the fd"
    );
}

fn an_fd_that_is_not_open_is_refused(binary: &Binary) {
    let setup = Setup::new(binary);
    assert_refused(
        setup.command().arg(format!("--fd={NUMBER}")),
        1,
        NUMBER.to_string(),
    );
}

fn an_fd_that_is_no_unix_stream_socket_is_refused(binary: &Binary) {
    let setup = Setup::new(binary);
    let refuse = |file: OwnedFd| assert_refused(&mut with_fd(&setup, file), 1, NUMBER.to_string());
    refuse(File::open(setup.image()).unwrap().into());
    refuse(std::io::pipe().unwrap().0.into());
    refuse(UdpSocket::bind("127.0.0.1:0").unwrap().into());
    refuse(TcpListener::bind("127.0.0.1:0").unwrap().into());
    refuse(UnixDatagram::pair().unwrap().0.into());
    refuse(
        socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap()
        .0,
    );
}

fn an_fd_that_is_neither_connected_nor_listening_is_refused(binary: &Binary) {
    let setup = Setup::new(binary);
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    assert_refused(&mut with_fd(&setup, socket), 1, NUMBER.to_string());
}

fn a_stale_socket_is_replaced(binary: &Binary) {
    let setup = Setup::new(binary);
    drop(UnixListener::bind(setup.socket()).unwrap());
    assert!(exists(&setup.socket()));
    let _program = setup.serve();
    assert_serves(&UnixStream::connect(setup.socket()).unwrap());
}

fn a_socket_left_by_a_killed_program_is_replaced(binary: &Binary) {
    let setup = Setup::new(binary);
    setup.serve().end(Signal::KILL, PATIENCE).unwrap();
    assert!(exists(&setup.socket()));
    let _program = setup.serve();
    assert_serves(&UnixStream::connect(setup.socket()).unwrap());
}

/// Asserts that what `make` creates at the socket path keeps the program from starting, and does not change.
fn assert_left_alone<T>(binary: &Binary, make: impl FnOnce(&Path) -> T) {
    let setup = Setup::new(binary);
    let path = setup.socket();
    let _kept = make(&path);
    let state = || {
        let metadata = path.symlink_metadata().unwrap();
        (metadata.ino(), metadata.mode(), metadata.len())
    };
    let before = state();
    assert_refused(&mut setup.listening(), 1, &path);
    assert_eq!(state(), before);
}

fn a_socket_that_somebody_listens_on_is_left_alone(binary: &Binary) {
    assert_left_alone(binary, |path| UnixListener::bind(path).unwrap());
}

fn a_regular_file_at_the_socket_path_is_left_alone(binary: &Binary) {
    assert_left_alone(binary, |path| fs::write(path, "of value").unwrap());
}

fn a_directory_at_the_socket_path_is_left_alone(binary: &Binary) {
    assert_left_alone(binary, |path| fs::create_dir(path).unwrap());
}

fn a_dangling_link_at_the_socket_path_is_left_alone(binary: &Binary) {
    assert_left_alone(binary, |path| symlink("nowhere", path).unwrap());
}

fn a_link_to_a_stale_socket_is_left_alone(binary: &Binary) {
    assert_left_alone(binary, |path| {
        let target = path.with_file_name("target");
        drop(UnixListener::bind(&target).unwrap());
        symlink(target, path).unwrap();
    });
}

fn the_running_program_keeps_a_second_one_from_its_socket(binary: &Binary) {
    let setup = Setup::new(binary);
    let _program = setup.serve();
    let other = Setup::new(binary);
    assert_refused(
        other.command().arg(option("socket-path", setup.socket())),
        1,
        setup.socket(),
    );
    assert_serves(&UnixStream::connect(setup.socket()).unwrap());
}

fn a_path_in_no_directory_is_refused(binary: &Binary) {
    let setup = Setup::new(binary);
    let path = setup.path("none/socket");
    assert_refused(setup.command().arg(option("socket-path", &path)), 1, &path);
}

fn a_path_too_long_for_a_socket_is_refused(binary: &Binary) {
    let setup = Setup::new(binary);
    let path = setup.path(&"x".repeat(108));
    assert_refused(setup.command().arg(option("socket-path", &path)), 1, &path);
}

/// Returns the mode of the socket that the program creates with this `umask`.
fn socket_mode(binary: &Binary, umask: &str, arguments: &[&str]) -> u32 {
    let setup = Setup::new(binary);
    let mut command = Command::new("sh");
    command
        .args(["-c", &format!("umask {umask}; exec \"$0\" \"$@\"")])
        .arg(process::binary(binary.name).unwrap())
        .args(setup.listening().get_args())
        .args(arguments);
    let _program = Program::serve(&mut command, &setup.socket()).unwrap();
    let metadata = fs::symlink_metadata(setup.socket()).unwrap();
    assert!(metadata.file_type().is_socket());
    metadata.permissions().mode() & 0o7777
}

fn the_socket_is_for_owner_and_group_whatever_the_umask(binary: &Binary) {
    for umask in ["000", "022", "077", "777"] {
        assert_eq!(socket_mode(binary, umask, &[]), 0o660, "umask {umask}");
    }
}

fn socket_mode_is_honoured_whatever_the_umask(binary: &Binary) {
    for umask in ["000", "077"] {
        assert_eq!(
            socket_mode(binary, umask, &["--socket-mode=0600"]),
            0o600,
            "umask {umask}"
        );
        assert_eq!(
            socket_mode(binary, umask, &["--socket-mode=666"]),
            0o666,
            "umask {umask}"
        );
        assert_eq!(
            socket_mode(binary, umask, &["--socket-mode=0"]),
            0,
            "umask {umask}"
        );
    }
}

for_each_program!(
    a_connected_fd_is_served_until_its_end,
    a_front_end_that_leaves_a_connected_fd_with_rings_running_ends_the_program,
    a_connected_fd_closed_before_the_start_is_no_failure,
    signals_end_the_program_on_a_connected_fd,
    connections_to_a_listening_fd_are_served_one_after_the_other,
    an_fd_that_is_not_open_is_refused,
    an_fd_that_is_no_unix_stream_socket_is_refused,
    an_fd_that_is_neither_connected_nor_listening_is_refused,
    a_stale_socket_is_replaced,
    a_socket_left_by_a_killed_program_is_replaced,
    a_socket_that_somebody_listens_on_is_left_alone,
    a_regular_file_at_the_socket_path_is_left_alone,
    a_directory_at_the_socket_path_is_left_alone,
    a_dangling_link_at_the_socket_path_is_left_alone,
    a_link_to_a_stale_socket_is_left_alone,
    the_running_program_keeps_a_second_one_from_its_socket,
    a_path_in_no_directory_is_refused,
    a_path_too_long_for_a_socket_is_refused,
    the_socket_is_for_owner_and_group_whatever_the_umask,
    socket_mode_is_honoured_whatever_the_umask,
);
