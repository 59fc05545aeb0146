// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests that do not apply to this host, or to the back-end under test.
//!
//! A test that skips reports it here, once, and returns without testing anything. `cargo test` counts it as passed; `cargo xtask test`
//! reads the line and counts it as skipped. In CI it accepts only the reasons on its list.

use std::cell::Cell;
use std::io::{self, Write};

/// Prefix of the line: `SKIPPED test: reason`.
pub const MARK: &str = "SKIPPED ";

/// Stands for the name of a test that does not know it.
pub const NAMELESS: &str = "a test";

thread_local! {
    /// The name of the test that runs in this thread, if it has said so.
    static NAME: Cell<&'static str> = const { Cell::new(NAMELESS) };
}

/// Sets the name of the test that this thread runs, which the thread does not know when tests run one at a time.
pub fn set_name(test: &'static str) {
    NAME.set(test);
}

/// Reports that the running test is skipped, and why, past the capture of its output.
pub fn skip(reason: &str) {
    skip_test(NAME.get(), reason);
}

/// Reports that the test with this name is skipped, like [`skip`].
pub fn skip_test(test: &str, reason: &str) {
    let thread = std::thread::current();
    let name = thread.name().filter(|name| *name != "main").unwrap_or(test);
    // In one write, so that other output does not split the line.
    let line = format!("{MARK}{name}: {reason}\n");
    let _ = io::stderr().write_all(line.as_bytes());
}
