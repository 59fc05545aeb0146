// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The socket that sends statistics. What it has in common with the control socket is tested in `client_sockets`.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use vhost_device_tests::process::{PATIENCE, Program, Signal, inherit, option};

use crate::client_sockets::mode;
use crate::prometheus::Page;
use crate::{BLOCK, Binary, END, Setup, assert_serves, exists, for_each_program};

/// Returns the path of the statistics socket of `setup`.
pub fn stats_socket(setup: &Setup) -> PathBuf {
    setup.path("statistics")
}

/// Returns what a client gets that only reads.
pub fn page(path: &Path) -> String {
    let client = client(path);
    client.shutdown(Shutdown::Write).unwrap();
    rest(client)
}

fn client(path: &Path) -> UnixStream {
    let client = UnixStream::connect(path).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.set_write_timeout(Some(PATIENCE)).unwrap();
    client
}

fn rest(mut client: UnixStream) -> String {
    let mut text = String::new();
    client.read_to_string(&mut text).unwrap();
    text
}

fn ask(path: &Path, request: &str) -> String {
    let mut client = client(path);
    client.write_all(request.as_bytes()).unwrap();
    rest(client)
}

/// Returns the command, with statistics.
fn counting(setup: &Setup) -> Command {
    let mut command = setup.listening();
    command.arg(option("stats-socket", stats_socket(setup)));
    command
}

fn serve(setup: &Setup) -> Program {
    Program::serve(&mut counting(setup), &setup.socket()).unwrap()
}

pub fn assert_serves_statistics(path: &Path) {
    Page::parse(&page(path));
}

fn statistics_are_served_with_and_without_a_front_end(binary: &Binary) {
    let setup = Setup::new(binary);
    let mut program = serve(&setup);
    let front_ends = || {
        let page = Page::parse(&page(&stats_socket(&setup)));
        page.sum("vhost_device_front_ends_total", &[("device", binary.kind)])
    };
    assert_eq!(front_ends(), 0.0);
    let front_end = UnixStream::connect(setup.socket()).unwrap();
    assert_serves(&front_end);
    assert_eq!(front_ends(), 1.0);
    assert_serves(&front_end);
    drop(front_end);
    assert_eq!(program.end(Signal::TERM, END).unwrap().code(), Some(0));
    assert!(!exists(&stats_socket(&setup)), "the socket is left");
    assert!(!exists(&setup.socket()));
}

fn statistics_are_served_beside_an_inherited_socket(binary: &Binary) {
    const NUMBER: i32 = 300;
    let setup = Setup::new(binary);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut command = setup.command();
    command
        .arg(format!("--fd={NUMBER}"))
        .arg(option("stats-socket", stats_socket(&setup)))
        .arg("--socket-mode=0600");
    inherit(&mut command, theirs.into(), NUMBER);
    let mut program = Program::serve(&mut command, &stats_socket(&setup)).unwrap();
    assert_serves(&ours);
    assert_serves_statistics(&stats_socket(&setup));
    assert_eq!(mode(&stats_socket(&setup)), 0o600);
    drop(ours);
    assert_eq!(program.wait(PATIENCE).unwrap().code(), Some(0));
    assert!(!exists(&stats_socket(&setup)), "the socket is left");
}

for_each_program!(
    statistics_are_served_with_and_without_a_front_end,
    statistics_are_served_beside_an_inherited_socket,
);

#[test]
fn a_get_request_is_answered_as_by_a_web_server() {
    let setup = Setup::new(&BLOCK);
    let _program = serve(&setup);
    for request in [
        "GET /metrics HTTP/1.1\r\nHost: localhost\r\nUser-Agent: curl\r\nAccept: */*\r\n\r\n",
        "GET / HTTP/1.0\r\n\r\n",
        "GET /metrics\n\n",
    ] {
        let answer = ask(&stats_socket(&setup), request);
        let (head, body) = answer.split_once("\r\n\r\n").expect("a body");
        let mut lines = head.lines();
        assert_eq!(lines.next(), Some("HTTP/1.0 200 OK"));
        let header = |name: &str| {
            let lines: Vec<_> = head
                .lines()
                .filter_map(|line| line.strip_prefix(name))
                .collect();
            assert_eq!(lines.len(), 1, "{name} in {head}");
            lines[0]
        };
        assert_eq!(header("Content-Type: "), "text/plain; version=0.0.4");
        assert_eq!(header("Content-Length: "), body.len().to_string());
        Page::parse(body);
    }
}

#[test]
fn a_request_in_pieces_is_put_together() {
    let setup = Setup::new(&BLOCK);
    let _program = serve(&setup);
    let mut client = client(&stats_socket(&setup));
    for piece in ["G", "ET /metr", "ics HTTP/1.1\r\nHost: a\r", "\n\r", "\n"] {
        client.write_all(piece.as_bytes()).unwrap();
        // Another client is served meanwhile.
        assert_serves_statistics(&stats_socket(&setup));
    }
    assert!(rest(client).starts_with("HTTP/1.0 200 OK\r\n"));
}

#[test]
fn other_requests_are_refused() {
    let setup = Setup::new(&BLOCK);
    let mut program = serve(&setup);
    program.expect_no_leak().unwrap();
    for (request, status) in [
        ("POST /metrics HTTP/1.1\r\n\r\n", 405),
        ("\r\n\r\n", 405),
        ("\0\x01\x02\n\n", 405),
        (&"a".repeat(8193), 413),
        (&format!("GET /{}", "a".repeat(8192)), 413),
    ] {
        let answer = ask(&stats_socket(&setup), request);
        assert!(
            answer.starts_with(&format!("HTTP/1.0 {status} ")),
            "{answer}"
        );
        assert!(answer.ends_with("\r\n\r\n"), "{answer}");
    }
}
