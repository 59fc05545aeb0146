// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The control thread, when it accepts clients and executes commands.

use std::path::Path;
use std::process::Command;

use serde_json::json;
use vhost_device_tests::attempts::{CREATE, EXECUTABLE, FORBIDDEN, PROGRAMS_AND_SOCKETS};
use vhost_device_tests::guest::Qmp;
use vhost_device_tests::process::option;

use crate::{BLOCK, RNG, mode};

const CONTROL: &str = "control";

/// Has the device accept clients in its directory.
fn with_sockets(directory: &Path, command: &mut Command) {
    for name in ["control-socket", "stats-socket"] {
        command.arg(option(name, directory.join(name)));
    }
}

#[test]
fn what_ends_the_process_ends_it_in_the_thread_that_executes_commands() {
    if !RNG.is_possible() {
        return;
    }
    let all = [PROGRAMS_AND_SOCKETS, FORBIDDEN, EXECUTABLE, &[CREATE]];
    for attempt in all.into_iter().flatten() {
        let mut scene = RNG.start_with(&with_sockets);
        attempt.assert_ends(&mut scene.running.program, CONTROL);
    }
}

#[test]
fn commands_make_no_system_call_that_would_end_the_process() {
    if !BLOCK.is_possible() {
        return;
    }
    let mut scene = BLOCK.start_with(&|directory, command| {
        with_sockets(directory, command);
        command.arg(mode("log"));
    });
    let path = scene.directory().join("control-socket");
    let mut qmp = Qmp::connect(&path).unwrap();
    for (name, arguments) in [
        ("query", json!({})),
        ("query-commands", json!({})),
        ("log-level", json!({"level": "debug"})),
        ("reload", json!({})),
    ] {
        qmp.execute(name, arguments).unwrap();
    }
    let file = std::fs::File::open("/dev/null").unwrap();
    let refused = qmp.execute_with_file("query", json!({}), std::os::fd::AsFd::as_fd(&file));
    assert!(refused.is_err());
    scene.assert_serves();
    qmp.execute("quit", json!({})).unwrap();
    let program = &mut scene.running.program;
    let status = program.wait(vhost_device_tests::process::PATIENCE).unwrap();
    assert_eq!(status.code(), Some(0));
    let stderr = program.stderr();
    assert!(!stderr.contains("would end"), "{stderr}");
}
