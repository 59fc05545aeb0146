// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Hostile guests and front-ends, made of arbitrary bytes: what `cargo xtask fuzz` has libFuzzer look for.
//!
//! Each target has an `Input`, which is made of bytes in such a way that most of them are a guest or a front-end that does as it
//! should, with a mistake here and there. `Input::run` plays it, and panics where the device is wrong: it ends, writes
//! where it may not, keeps what it should give back, or says what is not so.

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
mod driver;
pub mod gpu;
mod guest;
pub mod input;
mod packed;
pub mod ring;
pub mod session;
mod split;

/// The targets: programs in `fuzz_targets`.
pub const TARGETS: [&str; 5] = ["block", "gpu", "input", "ring", "session"];
