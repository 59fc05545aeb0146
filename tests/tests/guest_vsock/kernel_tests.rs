// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The kernel's own tests of AF_VSOCK, whose server and client are two guests.

use std::process::Command;

use super::siblings::Siblings;
use super::{Format, GUEST, SIBLING};
use vhost_device_tests::uml::vsock_test;

/// Tests that do not apply, and why.
const SKIPPED: [(&str, &str); 2] = [
    (
        "SOCK_SEQPACKET msg bounds",
        "it counts MSG_EOR, which unix sockets do not pass on",
    ),
    (
        "SOCK_STREAM SHUT_RD",
        "a unix socket does not report that the other end receives no more; the guest learns it at its next packet",
    ),
];

/// Returns the numbers of the tests and their names.
fn list(program: &std::path::Path) -> Vec<(String, String)> {
    let output = Command::new(program).arg("--list").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines()
        .skip(1)
        .filter_map(|line| line.split_once('\t'))
        .map(|(number, name)| (number.to_owned(), name.to_owned()))
        .collect()
}

fn run(format: Format) {
    let program = vsock_test::prepare().unwrap();
    let tests = list(&program);
    assert!(tests.len() > 20, "{tests:?}");
    let mut options = String::new();
    for (name, reason) in SKIPPED {
        let (number, _) = tests
            .iter()
            .find(|(_, other)| other == name)
            .unwrap_or_else(|| panic!("{name} is none of {tests:?}"));
        println!("{name} is left out: {reason}");
        options.push_str(&format!(" --skip={number}"));
    }
    let siblings = Siblings::start(format);
    let program = program.display();
    siblings.run(
        &format!(
            "{program} --mode=client --control-host={SIBLING} --control-port=2000 --peer-cid={SIBLING} {options} > $work/log 2>&1 || {{ cat $work/log; exit 2; }}"
        ),
        &format!(
            "{program} --mode=server --control-port=2000 --peer-cid={GUEST} {options} > $work/log 2>&1 || {{ cat $work/log; exit 2; }}"
        ),
        "log",
        "listening",
    );
    for log in [siblings.one.read("log"), siblings.other.read("log")] {
        for (number, name) in &tests {
            let result = match SKIPPED.iter().any(|(skipped, _)| skipped == name) {
                true => "skipped",
                false => "ok",
            };
            let line = format!("{number} - {name}...{result}");
            assert!(
                log.lines().any(|other| other.starts_with(&line)),
                "{line}: {log}"
            );
        }
    }
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn the_tests_of_the_kernel_pass_between_two_guests_on_split_rings() {
    run(Format::Split);
}

#[test]
#[ignore = "boots a guest: cargo xtask test"]
fn the_tests_of_the_kernel_pass_between_two_guests_on_packed_rings() {
    run(Format::Packed);
}
