// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Arguments: which are refused, how, and the help text.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

use vhost_device_tests::process::{self, Program, Signal, inherit, option};

use crate::{
    BLOCK, Binary, END, Setup, assert_refused, assert_refused_without_socket, for_each_program,
    for_each_program_with_a_file, run,
};

pub const USAGE: i32 = 2;
const FAILURE: i32 = 1;

/// The user `nobody`.
const NOBODY: u32 = 65534;

fn neither_socket_path_nor_fd_is_a_usage_error(binary: &Binary) {
    let setup = Setup::new(binary);
    assert_refused(&mut setup.command(), USAGE, "--socket-path");
}

fn socket_path_and_fd_together_are_a_usage_error(binary: &Binary) {
    let setup = Setup::new(binary);
    assert_refused_without_socket(&setup, setup.listening().arg("--fd=3"), USAGE, "--fd");
}

#[test]
fn no_image_is_a_usage_error() {
    let setup = Setup::new(&BLOCK);
    let mut command = BLOCK.command();
    command.arg(option("socket-path", setup.socket()));
    assert_refused_without_socket(&setup, &mut command, USAGE, "--blk-file");
}

fn an_unknown_option_is_a_usage_error(binary: &Binary) {
    let setup = Setup::new(binary);
    assert_refused_without_socket(
        &setup,
        setup.listening().arg("--no-such-option"),
        USAGE,
        "--no-such-option",
    );
}

fn an_argument_that_is_no_option_is_a_usage_error(binary: &Binary) {
    let setup = Setup::new(binary);
    assert_refused_without_socket(&setup, setup.listening().arg("stray"), USAGE, "stray");
}

fn a_value_out_of_range_is_a_usage_error_that_names_the_option(binary: &Binary) {
    const MODES: (&str, &[&str]) = (
        "socket-mode",
        &["9", "0o660", "rw", "77777777777", "-1", ""],
    );
    const POLLING: (&str, &[&str]) = ("poll-us", &["on", "-1", "0.5", "1000001", ""]);
    for (name, values) in binary.bad_values.iter().chain([&MODES, &POLLING]) {
        for value in *values {
            let setup = Setup::new(binary);
            assert_refused_without_socket(
                &setup,
                setup.listening().arg(option(name, value)),
                USAGE,
                format!("--{name}"),
            );
        }
    }
}

fn an_fd_that_is_no_number_is_a_usage_error(binary: &Binary) {
    let setup = Setup::new(binary);
    for value in ["-1", "three", "3.0", "99999999999", ""] {
        assert_refused(setup.command().arg(option("fd", value)), USAGE, "--fd");
    }
}

fn an_option_given_twice_is_a_usage_error(binary: &Binary) {
    let setup = Setup::new(binary);
    assert_refused_without_socket(
        &setup,
        setup.listening().arg(option("socket-path", setup.socket())),
        USAGE,
        "--socket-path",
    );
}

#[test]
fn a_serial_of_twenty_bytes_is_accepted() {
    let setup = Setup::new(&BLOCK);
    let _program = Program::serve(
        setup.listening().arg("--serial=exactly 20 bytes ok!"),
        &setup.socket(),
    )
    .unwrap();
}

fn a_missing_image_is_a_failure_before_the_socket_exists(binary: &Binary) {
    let setup = Setup::new(binary);
    fs::remove_file(setup.image()).unwrap();
    assert_refused_without_socket(&setup, &mut setup.listening(), FAILURE, setup.image());
}

fn a_directory_as_image_is_a_failure_before_the_socket_exists(binary: &Binary) {
    let setup = Setup::new(binary);
    fs::remove_file(setup.image()).unwrap();
    fs::create_dir(setup.image()).unwrap();
    assert_refused_without_socket(&setup, &mut setup.listening(), FAILURE, setup.image());
}

fn an_image_without_rights_is_a_failure_before_the_socket_exists(binary: &Binary) {
    let setup = Setup::new(binary);
    fs::set_permissions(setup.image(), Permissions::from_mode(0o400)).unwrap();
    let mut command = unprivileged(&setup);
    command
        .args(setup.file_option())
        .arg(option("socket-path", setup.socket()));
    assert_refused_without_socket(&setup, &mut command, FAILURE, setup.image());
}

/// Returns the program as a user for whom file permissions apply, which they do not for root.
fn unprivileged(setup: &Setup) -> Command {
    let name = setup.binary.name;
    // The binary may be in a directory that only its owner can enter. `cp` copies: a file that this process has
    // written could still be open in the child of another test, and could not be executed.
    let binary = setup.path(name);
    let source = process::binary(name).unwrap();
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

fn version_is_printed_and_nothing_else_done(binary: &Binary) {
    let setup = Setup::new(binary);
    let ended = run(setup.listening().arg("--version"));
    assert_eq!(ended.code, Some(0));
    assert_eq!(
        ended.stdout,
        format!("{} {}\n", binary.name, env!("CARGO_PKG_VERSION"))
    );
    assert_eq!(ended.stderr, "");
    assert!(!setup.socket().exists());
}

fn help_explains_each_option_with_its_unit_and_default(binary: &Binary) {
    let ended = run(binary.command().arg("--help"));
    assert_eq!(ended.code, Some(0));
    assert_eq!(ended.stderr, "");
    const COMMON: &[(&str, &[&str], &str)] = &[
        ("socket-path", &["PATH"], ""),
        ("fd", &["FDNUM"], ""),
        ("socket-mode", &["OCTAL"], "660"),
        ("stats-socket", &["PATH", "Prometheus", "SIGUSR1"], ""),
        ("poll-us", &["off", "microseconds"], "auto"),
        ("print-capabilities", &["JSON"], ""),
        ("print-descriptor", &["JSON"], ""),
        ("version", &[], ""),
        ("help", &[], ""),
    ];
    for (name, words, default) in COMMON.iter().chain(binary.options) {
        let paragraph = paragraph(&ended.stdout, name)
            .unwrap_or_else(|| panic!("--{name} is missing:\n{}", ended.stdout));
        assert!(
            paragraph.split_whitespace().count() > 3,
            "--{name} is not explained: {paragraph}"
        );
        for word in *words {
            assert!(
                paragraph.contains(word),
                "--{name} should mention {word:?}: {paragraph}"
            );
        }
        if !default.is_empty() {
            let (_, after) = paragraph
                .split_once("default")
                .unwrap_or_else(|| panic!("no default: {paragraph}"));
            assert!(
                after.contains(default),
                "--{name} should give its default {default}: {paragraph}"
            );
        }
    }
}

/// Returns the part of `help` about the option `name`: from the line that starts with it to the next option.
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

fn a_failure_to_print_is_an_error(binary: &Binary) {
    for option in [
        "--help",
        "-h",
        "--version",
        "--print-capabilities",
        "--print-descriptor",
    ] {
        let full = fs::OpenOptions::new()
            .write(true)
            .open("/dev/full")
            .unwrap();
        let mut command = binary.command();
        inherit(&mut command, full.into(), 1);
        assert_refused(command.arg(option), FAILURE, "cannot print");
    }
}

fn nothing_is_written_to_stdout_while_serving(binary: &Binary) {
    let setup = Setup::new(binary);
    let mut program = setup.serve();
    assert_eq!(program.end(Signal::TERM, END).unwrap().code(), Some(0));
    assert_eq!(program.stdout(), "");
}

for_each_program!(
    neither_socket_path_nor_fd_is_a_usage_error,
    socket_path_and_fd_together_are_a_usage_error,
    an_unknown_option_is_a_usage_error,
    an_argument_that_is_no_option_is_a_usage_error,
    a_value_out_of_range_is_a_usage_error_that_names_the_option,
    an_fd_that_is_no_number_is_a_usage_error,
    an_option_given_twice_is_a_usage_error,
    version_is_printed_and_nothing_else_done,
    help_explains_each_option_with_its_unit_and_default,
    a_failure_to_print_is_an_error,
    nothing_is_written_to_stdout_while_serving,
);

mod with_a_file {
    use super::*;

    for_each_program_with_a_file!(
        a_missing_image_is_a_failure_before_the_socket_exists,
        a_directory_as_image_is_a_failure_before_the_socket_exists,
        an_image_without_rights_is_a_failure_before_the_socket_exists,
    );
}
