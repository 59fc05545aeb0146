// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Malicious guests and front-ends, generated from arbitrary bytes by libFuzzer (`cargo xtask fuzz`).
//!
//! Each target has an `Input`. Most inputs are a guest or a front-end that is correct except for a few mistakes. `Input::run` runs it and
//! panics if the device fails: it panics itself, writes where it must not, keeps what it must return, or returns a wrong result.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unreachable,
    clippy::unwrap_used,
    reason = "findings are panics"
)]

mod bench;
pub mod block;
pub mod console;
mod driver;
pub mod gpu;
mod guest;
pub mod input;
mod packed;
pub mod ring;
pub mod scsi;
pub mod session;
pub mod sound;
mod split;
pub mod vsock;

/// The targets: programs in `fuzz_targets`.
pub const TARGETS: [&str; 9] = [
    "block", "console", "gpu", "input", "ring", "scsi", "session", "sound", "vsock",
];
