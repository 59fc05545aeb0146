// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Arguments: what is refused, how, and what the help says.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

use vhost_device_tests::process::{self, Program, Signal, option};

use crate::{BINARY, END, Setup, assert_refused, assert_refused_without_socket, program, run};

pub const USAGE: i32 = 2;
const FAILURE: i32 = 1;

/// The user that owns nothing.
const NOBODY: u32 = 65534;

#[test]
fn neither_socket_path_nor_fd_is_a_usage_error() {
    let setup = Setup::new();
    assert_refused(&mut setup.command(), USAGE, "--socket-path");
}

#[test]
fn socket_path_and_fd_together_are_a_usage_error() {
    let setup = Setup::new();
    assert_refused_without_socket(&setup, setup.listening().arg("--fd=3"), USAGE, "--fd");
}

#[test]
fn no_image_is_a_usage_error() {
    let setup = Setup::new();
    let mut command = program();
    command.arg(option("socket-path", setup.socket()));
    assert_refused_without_socket(&setup, &mut command, USAGE, "--blk-file");
}

#[test]
fn an_unknown_option_is_a_usage_error() {
    let setup = Setup::new();
    assert_refused_without_socket(
        &setup,
        setup.listening().arg("--no-such-option"),
        USAGE,
        "--no-such-option",
    );
}

#[test]
fn an_argument_that_is_no_option_is_a_usage_error() {
    let setup = Setup::new();
    assert_refused_without_socket(&setup, setup.listening().arg("stray"), USAGE, "stray");
}

#[test]
fn a_value_out_of_range_is_a_usage_error_that_names_the_option() {
    for (name, values) in [
        (
            "num-queues",
            &["0", "-1", "many", "65537", "4294967297", ""][..],
        ),
        (
            "queue-size",
            &["0", "3", "65536", "131072", "-2", "big", ""],
        ),
        (
            "logical-block-size",
            &["0", "511", "1000", "8192", "4k", ""],
        ),
        ("io-engine", &["aio", "Auto ", ""]),
        ("discard", &["zero", ""]),
        (
            "socket-mode",
            &["9", "0o660", "rw", "77777777777", "-1", ""],
        ),
        ("serial", &["twenty-one characters", "zwölf ärgerliche öö"]),
    ] {
        for value in values {
            let setup = Setup::new();
            assert_refused_without_socket(
                &setup,
                setup.listening().arg(option(name, value)),
                USAGE,
                format!("--{name}"),
            );
        }
    }
}

#[test]
fn an_fd_that_is_no_number_is_a_usage_error() {
    let setup = Setup::new();
    for value in ["-1", "three", "3.0", "99999999999", ""] {
        assert_refused(setup.command().arg(option("fd", value)), USAGE, "--fd");
    }
}

#[test]
fn an_option_given_twice_is_a_usage_error() {
    let setup = Setup::new();
    assert_refused_without_socket(
        &setup,
        setup.listening().arg(option("blk-file", setup.image())),
        USAGE,
        "--blk-file",
    );
}

#[test]
fn a_serial_of_twenty_bytes_is_accepted() {
    let setup = Setup::new();
    let mut program =
        Program::spawn(setup.listening().arg("--serial=exactly 20 bytes ok!")).unwrap();
    program.wait_for_listener(&setup.socket()).unwrap();
}

#[test]
fn a_missing_image_is_a_failure_before_the_socket_exists() {
    let setup = Setup::new();
    fs::remove_file(setup.image()).unwrap();
    assert_refused_without_socket(&setup, &mut setup.listening(), FAILURE, setup.image());
}

#[test]
fn a_directory_as_image_is_a_failure_before_the_socket_exists() {
    let setup = Setup::new();
    fs::remove_file(setup.image()).unwrap();
    fs::create_dir(setup.image()).unwrap();
    assert_refused_without_socket(&setup, &mut setup.listening(), FAILURE, setup.image());
    assert_refused_without_socket(
        &setup,
        setup.listening().arg("--read-only"),
        FAILURE,
        setup.image(),
    );
}

#[test]
fn an_image_without_rights_is_a_failure_before_the_socket_exists() {
    let setup = Setup::new();
    fs::set_permissions(setup.image(), Permissions::from_mode(0o400)).unwrap();
    let mut command = unprivileged(&setup);
    command
        .arg(option("blk-file", setup.image()))
        .arg(option("socket-path", setup.socket()));
    assert_refused_without_socket(&setup, &mut command, FAILURE, setup.image());
}

/// The program as a user for whom file permissions hold, which they do not for root.
fn unprivileged(setup: &Setup) -> Command {
    // Where the binary was built, only its owner may be able to reach it. `cp` copies: a file that this process has
    // written could still be open in the child of another test, and then it can not be executed.
    let binary = setup.path(BINARY);
    let source = process::binary(BINARY).unwrap();
    assert!(
        Command::new("cp")
            .arg(source)
            .arg(&binary)
            .status()
            .unwrap()
            .success()
    );
    let mut command = Command::new(binary);
    command.env_remove("RUST_LOG");
    if rustix::process::geteuid().is_root() {
        fs::set_permissions(setup.directory.path(), Permissions::from_mode(0o777)).unwrap();
        command.uid(NOBODY).gid(NOBODY);
    }
    command
}

#[test]
fn version_is_printed_and_nothing_else_done() {
    let setup = Setup::new();
    let ended = run(setup.listening().arg("--version"));
    assert_eq!(ended.code, Some(0));
    assert_eq!(
        ended.stdout,
        format!("{BINARY} {}\n", env!("CARGO_PKG_VERSION"))
    );
    assert_eq!(ended.stderr, "");
    assert!(!setup.socket().exists());
}

#[test]
fn help_explains_each_option_with_its_unit_and_default() {
    let ended = run(program().arg("--help"));
    assert_eq!(ended.code, Some(0));
    assert_eq!(ended.stderr, "");
    for (name, words) in [
        ("socket-path", &["PATH"][..]),
        ("fd", &["FDNUM"]),
        ("socket-mode", &["OCTAL", "660"]),
        ("print-capabilities", &["JSON"]),
        ("print-descriptor", &["JSON"]),
        ("blk-file", &["PATH"]),
        ("read-only", &[]),
        ("serial", &["20", "bytes"]),
        ("num-queues", &["16"]),
        ("queue-size", &["1024"]),
        ("logical-block-size", &["512", "4096", "bytes"]),
        ("direct", &["O_DIRECT"]),
        ("io-engine", &["auto", "io_uring", "threads"]),
        ("discard", &["unmap", "ignore"]),
        ("version", &[]),
        ("help", &[]),
    ] {
        let paragraph = paragraph(&ended.stdout, name)
            .unwrap_or_else(|| panic!("--{name} is missing:\n{}", ended.stdout));
        assert!(
            paragraph.split_whitespace().count() > 3,
            "--{name} is not explained: {paragraph}"
        );
        for word in words {
            assert!(
                paragraph.contains(word),
                "--{name} should mention {word:?}: {paragraph}"
            );
        }
    }
    for (name, default) in [
        ("socket-mode", "660"),
        ("num-queues", "16"),
        ("queue-size", "1024"),
        ("logical-block-size", "512"),
        ("io-engine", "auto"),
        ("discard", "unmap"),
    ] {
        let paragraph = paragraph(&ended.stdout, name).unwrap();
        let (_, after) = paragraph
            .split_once("default")
            .unwrap_or_else(|| panic!("no default: {paragraph}"));
        assert!(
            after.contains(default),
            "--{name} should give its default {default}: {paragraph}"
        );
    }
}

/// What `help` says about the option `name`: from the line that starts with it to the one that starts with the next option.
fn paragraph(help: &str, name: &str) -> Option<String> {
    // A short form may come first; list items have a space after their dash.
    let option = |line: &str| {
        let words = line.trim_start().split([' ', ',', '=', '[']);
        let mut names = words.take_while(|word| word.starts_with('-') || word.is_empty());
        names.find_map(|word| word.strip_prefix("--").map(str::to_owned))
    };
    let mut lines = help
        .lines()
        .skip_while(|line| option(line).as_deref() != Some(name));
    let first = lines.next()?;
    let rest = lines.take_while(|line| option(line).is_none());
    Some(
        std::iter::once(first)
            .chain(rest)
            .collect::<Vec<_>>()
            .join("\n"),
    )
}

#[test]
fn nothing_is_written_to_stdout_while_serving() {
    let setup = Setup::new();
    let mut program = setup.serve();
    assert_eq!(program.end(Signal::TERM, END).unwrap().code(), Some(0));
    assert_eq!(program.stdout(), "");
}
