// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Ports that lead to terminals: pseudoterminals, standard input and output, and inherited files.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::process::Stdio;

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};
use vhost_device_tests::front_end::console::event;
use vhost_device_tests::process::{Signal, inherit};

use super::*;

/// Opens a terminal.
fn open(path: impl AsRef<std::path::Path>) -> File {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_NOCTTY);
    options.open(path).unwrap()
}

/// Creates a terminal, and returns its master and its other end.
fn terminal() -> (File, File) {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let path = ptsname(&master, Vec::new()).unwrap().into_string().unwrap();
    (master.into(), open(path))
}

fn resize(file: impl AsFd, columns: u16, rows: u16) {
    let size = Winsize {
        ws_col: columns,
        ws_row: rows,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(file, size).unwrap();
}

/// Reads exactly `count` bytes.
fn read(mut file: &File, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    file.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn a_pseudoterminal_is_a_client() {
    let device = Device::start(&["pty=DIR/tty"], &[]);
    let mut driver = device.connect();
    driver.write(0, b"early ", PATIENCE);
    for round in 0..3 {
        let tty = open(device.path("tty"));
        let early = b"early line\r\nline\r\nline\r\n";
        driver.write(0, b"line\r\n", PATIENCE);
        assert_eq!(
            read(&tty, 6 + 6 * (round + 1)),
            early[..6 + 6 * (round + 1)]
        );
        // Raw: no echo, no translation, no signals.
        let typed = b"key\r\x03\x04\x1a\xff";
        { &tty }.write_all(typed).unwrap();
        assert_eq!(driver.read(0, typed.len(), PATIENCE), typed);
        device.wait_for_clients(0, 1);
        drop(tty);
        device.wait_for_clients(0, 0);
    }
}

#[test]
fn a_paste_of_1_mib_into_a_pseudoterminal_arrives_intact() {
    let device = Device::start(&["pty=DIR/tty"], &[]);
    let tty = open(device.path("tty"));
    let mut driver = device.connect();
    let paste = text(1 << 20);
    let sent = paste.clone();
    let sender = std::thread::spawn(move || {
        { &tty }.write_all(&sent).unwrap();
        tty
    });
    assert_same(&driver.read(0, paste.len(), PATIENCE), &paste);
    sender.join().unwrap();
}

#[test]
fn what_was_typed_before_a_terminal_was_closed_arrives() {
    let device = Device::start(&["pty=DIR/tty"], &[]);
    let mut driver = device.connect();
    for round in 0..20 {
        let line = format!("echo {round}\n");
        std::fs::write(device.path("tty"), &line).unwrap();
        assert_eq!(driver.read(0, line.len(), PATIENCE), line.as_bytes());
    }
}

#[test]
fn the_guest_learns_of_a_channel_that_is_a_pseudoterminal() {
    let device = Device::start(&["pty", "name=channel,pty=DIR/tty"], &[]);
    let mut driver = device.connect();
    for _ in 0..3 {
        let tty = open(device.path("tty"));
        assert_eq!(driver.expect(event::PORT_OPEN, PATIENCE).value, 1);
        drop(tty);
        assert_eq!(driver.expect(event::PORT_OPEN, PATIENCE).value, 0);
    }
}

#[test]
fn the_console_follows_the_size_of_its_pseudoterminal() {
    let device = Device::start(&["pty=DIR/tty"], &[]);
    let mut driver = device.connect();
    let tty = open(device.path("tty"));
    resize(&tty, 132, 43);
    assert_eq!(driver.expect(event::RESIZE, PATIENCE).rest, [132, 0, 43, 0]);
    assert_eq!(driver.front_end.config(0, 4).unwrap(), [132, 0, 43, 0]);
    // As `stty -F` does, while nobody else has it open.
    drop(tty);
    device.wait_for_clients(0, 0);
    resize(open(device.path("tty")), 80, 24);
    assert_eq!(driver.expect(event::RESIZE, PATIENCE).rest, [80, 0, 24, 0]);
}

#[test]
fn the_link_to_a_pseudoterminal_is_removed_at_the_end() {
    let mut device = Device::start(&["pty=DIR/tty"], &[]);
    assert!(device.path("tty").is_symlink());
    device.program.end(Signal::TERM, PATIENCE).unwrap();
    assert!(!device.path("tty").is_symlink());
}

/// Starts a device whose standard input and output are a terminal.
fn start_on_terminal() -> (Device, File, File) {
    let (master, tty) = terminal();
    let device = Device::start_configured(&["stdio"], &[], |command| {
        command.stdin(tty.try_clone().unwrap());
        inherit(command, tty.try_clone().unwrap().into(), 1);
    });
    (device, master, tty)
}

#[test]
fn the_terminal_of_the_program_is_the_console() {
    let (mut device, master, tty) = start_on_terminal();
    let is_raw = || {
        !tcgetattr(&tty)
            .unwrap()
            .local_modes
            .contains(LocalModes::ECHO)
    };
    assert!(!is_raw(), "without a front-end");
    resize(&master, 90, 30);
    let mut driver = device.connect();
    assert!(is_raw());
    driver.write(0, b"login: ", PATIENCE);
    assert_eq!(read(&master, 7), b"login: ");
    { &master }.write_all(b"root\x03\r").unwrap();
    assert_eq!(driver.read(0, 6, PATIENCE), b"root\x03\r");
    drop(driver);
    device.wait_for(0, |_| !is_raw());
    let _driver = device.connect();
    device.program.end(Signal::TERM, PATIENCE).unwrap();
    assert!(!is_raw(), "after the end");
}

#[test]
fn three_escapes_end_the_program_even_if_the_guest_reads_nothing() {
    let (mut device, master, tty) = start_on_terminal();
    let _driver = device.connect_with(&Options::default());
    { &master }.write_all(b"\x1d\x1dx\x1d").unwrap();
    std::thread::sleep(QUIET);
    assert_eq!(device.program.status().unwrap(), None);
    { &master }.write_all(b"\x1d\x1d").unwrap();
    assert!(device.program.wait(PATIENCE).unwrap().success());
    assert!(
        tcgetattr(&tty)
            .unwrap()
            .local_modes
            .contains(LocalModes::ECHO)
    );
}

#[test]
fn the_console_follows_the_size_of_the_terminal_of_the_program() {
    let (mut device, master, tty) = start_on_terminal();
    let mut driver = device.connect();
    resize(&master, 100, 50);
    // The kernel sends the signal to the group of processes that controls the terminal, which this program is not in here.
    device.program.signal(Signal::WINCH).unwrap();
    assert_eq!(driver.expect(event::RESIZE, PATIENCE).rest, [100, 0, 50, 0]);
    drop(tty);
}

#[test]
fn a_terminal_that_does_not_read_does_not_make_the_guest_wait() {
    let (device, _master, _tty) = start_on_terminal();
    let mut driver = device.connect();
    driver.write(0, &text(4 << 20), PATIENCE);
    assert_alive(&driver);
}

#[test]
fn standard_input_and_output_can_be_files_and_pipes() {
    let (output, theirs) = std::io::pipe().unwrap();
    let device = Device::start_configured(&["stdio"], &[], |command| {
        let mut input = tempfile::tempfile().unwrap();
        input.write_all(b"script\n").unwrap();
        std::io::Seek::rewind(&mut input).unwrap();
        command.stdin(input);
        inherit(command, theirs.into(), 1);
    });
    let mut driver = device.connect();
    assert_eq!(driver.read(0, 7, PATIENCE), b"script\n");
    driver.write(0, b"result\n", PATIENCE);
    let output = File::from(OwnedFd::from(output));
    assert_eq!(read(&output, 7), b"result\n");
    // Its other end is gone.
    drop(output);
    driver.write(0, b"more\n", PATIENCE);
    assert_alive(&driver);
}

#[test]
fn an_inherited_socket_is_a_client() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    let device = Device::start_configured(&["fd=9"], &[], |command| {
        command.stdin(Stdio::null());
        inherit(command, theirs.into(), 9);
    });
    let mut driver = device.connect();
    driver.write(0, b"out", PATIENCE);
    assert_eq!(receive(&ours, 3), b"out");
    { &ours }.write_all(b"in").unwrap();
    assert_eq!(driver.read(0, 2, PATIENCE), b"in");
    drop(ours);
    driver.write(0, b"gone", PATIENCE);
    assert_alive(&driver);
}

#[test]
fn one_end_of_a_pipe_is_a_client_in_one_direction() {
    let (reader, writer) = std::io::pipe().unwrap();
    let device = Device::start_configured(&["fd=9"], &[], |command| {
        inherit(command, writer.into(), 9);
    });
    let mut driver = device.connect();
    driver.write(0, b"line", PATIENCE);
    assert_eq!(read(&OwnedFd::from(reader).into(), 4), b"line");
}
