// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `vhost-device-ctl`: what a person types, and what is printed.

use std::io::Read;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;
use vhost_device_tests::ended::{Ended, assert_refused, run};
use vhost_device_tests::process::{self, PATIENCE, Program};

use crate::control_socket::{control_socket, controlled};
use crate::{BLOCK, END, Setup, assert_serves};

fn ctl(socket: &Path, arguments: &[&str]) -> Command {
    let mut command = process::command("vhost-device-ctl").unwrap();
    command.arg(socket).args(arguments);
    command
}

fn serve(setup: &Setup) -> Program {
    let mut program = Program::spawn(&mut controlled(setup)).unwrap();
    program.wait_for_listener(&setup.socket()).unwrap();
    program
}

/// Runs what must succeed, and gives what it prints.
fn succeed(setup: &Setup, arguments: &[&str]) -> String {
    let Ended {
        code,
        stdout,
        stderr,
    } = run(&mut ctl(&control_socket(setup), arguments));
    assert_eq!((code, stderr.as_str()), (Some(0), ""), "{arguments:?}");
    stdout
}

#[test]
fn query_is_for_people_and_with_json_for_programs() {
    let setup = Setup::new(&BLOCK);
    let program = serve(&setup);
    let text = succeed(&setup, &["query"]);
    for line in [
        "program: vhost-device-block",
        "type: block",
        "front-end: none",
    ] {
        assert!(text.lines().any(|other| other == line), "{line}: {text}");
    }
    let json: Value = serde_json::from_str(&succeed(&setup, &["query", "--json"])).unwrap();
    assert_eq!(json["pid"], program.id());
}

#[test]
fn help_lists_the_commands_of_the_device() {
    let setup = Setup::new(&BLOCK);
    let _program = serve(&setup);
    let all = succeed(&setup, &["help"]);
    assert_eq!(succeed(&setup, &[]), all);
    let json = succeed(&setup, &["--json", "help"]);
    let json: Value = serde_json::from_str(&json).unwrap();
    let own = run(process::command("vhost-device-ctl").unwrap().arg("--help")).stdout;
    for command in json.as_array().unwrap() {
        let name = command["name"].as_str().unwrap();
        let help = command["help"].as_str().unwrap();
        assert!(all.contains(name) && all.contains(help), "{name}: {all}");
        assert!(own.contains(&format!("- {name}:")), "{name}: {own}");
        assert!(all.contains(&succeed(&setup, &["help", name])));
        let one = succeed(&setup, &["--json", "help", name]);
        assert_eq!(
            serde_json::from_str::<Value>(&one).unwrap(),
            serde_json::json!([command])
        );
    }
}

#[test]
fn arguments_are_given_in_order_or_by_name() {
    let setup = Setup::new(&BLOCK);
    let _program = serve(&setup);
    for (argument, level) in [("debug", "debug"), ("level=warn", "warn")] {
        assert_eq!(
            succeed(&setup, &["log-level", argument]),
            format!("level: {level}\n")
        );
        assert!(succeed(&setup, &["query"]).contains(&format!("log-level: {level}\n")));
    }
    assert_eq!(succeed(&setup, &["reload"]), "");
}

#[test]
fn what_cannot_be_done_is_one_line_and_a_status() {
    let setup = Setup::new(&BLOCK);
    let program = serve(&setup);
    let socket = control_socket(&setup);
    let refuse = |arguments: &[&str], code, word: &str| {
        assert_refused(&mut ctl(&socket, arguments), code, word);
    };
    refuse(&["shout"], 2, "shout");
    refuse(&["help", "shout"], 2, "shout");
    refuse(&["help", "query", "quit"], 2, "quit");
    refuse(&["events", "all"], 2, "all");
    refuse(&["log-level", "loud"], 1, "loud");
    refuse(&["log-level", "info", "warn"], 2, "warn");
    refuse(&["query", "--file=/nonexistent"], 1, "/nonexistent");
    refuse(&["query", "--file=/dev/null"], 1, "file descriptors");
    drop(program);
    refuse(&["query"], 1, "--control-socket");
    let missing = setup.path("missing");
    assert_refused(&mut ctl(&missing, &["query"]), 1, &missing);
}

#[test]
fn a_program_that_is_no_back_end_is_refused() {
    let setup = Setup::new(&BLOCK);
    let listener = UnixListener::bind(control_socket(&setup)).unwrap();
    for greeting in ["{}\n", "HTTP/1.0 200 OK\r\n", ""] {
        let mut program = Program::spawn(&mut ctl(&control_socket(&setup), &["query"])).unwrap();
        let (mut stream, _) = listener.accept().unwrap();
        std::io::Write::write_all(&mut stream, greeting.as_bytes()).unwrap();
        drop(stream);
        assert_eq!(program.wait(PATIENCE).unwrap().code(), Some(1));
        assert_eq!(program.stderr().lines().count(), 1, "{}", program.stderr());
    }
}

#[test]
fn a_back_end_that_answers_byte_by_byte_has_no_more_time() {
    let setup = Setup::new(&BLOCK);
    let listener = UnixListener::bind(control_socket(&setup)).unwrap();
    let mut program = Program::spawn(&mut ctl(&control_socket(&setup), &["query"])).unwrap();
    let (mut stream, _) = listener.accept().unwrap();
    let begin = Instant::now();
    while std::io::Write::write_all(&mut stream, b" ").is_ok() {
        assert!(begin.elapsed() < PATIENCE, "it still waits");
        std::thread::sleep(Duration::from_millis(500));
    }
    assert_eq!(program.wait(PATIENCE).unwrap().code(), Some(1));
    assert!(
        program.stderr().contains("within 10 s"),
        "{}",
        program.stderr()
    );
}

#[test]
fn events_are_printed_until_the_back_end_exits() {
    let setup = Setup::new(&BLOCK);
    let mut program = serve(&setup);
    let mut command = ctl(&control_socket(&setup), &["events"]);
    let (mut reader, writer) = std::io::pipe().unwrap();
    process::inherit(&mut command, writer.into(), 1);
    let mut events = Program::spawn(&mut command).unwrap();
    drop(command);
    let mut text = String::new();
    // It must have negotiated before something happens.
    while !text.contains("FRONT_END_DISCONNECTED") {
        let front_end = UnixStream::connect(setup.socket()).unwrap();
        assert_serves(&front_end);
        drop(front_end);
        if rustix::io::ioctl_fionread(&reader).unwrap() > 0 {
            let mut bytes = [0; 4096];
            let count = reader.read(&mut bytes).unwrap();
            text += std::str::from_utf8(&bytes[..count]).unwrap();
        }
    }
    succeed(&setup, &["quit"]);
    program.wait(END).unwrap();
    assert_eq!(events.wait(PATIENCE).unwrap().code(), Some(0));
    reader.read_to_string(&mut text).unwrap();
    assert!(text.contains(" FRONT_END_CONNECTED\n"), "{text}");
    assert!(text.ends_with(" SHUTDOWN\n"), "{text}");
}
