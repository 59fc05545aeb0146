// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A vhost-user front-end in user space, and the shared code of test suites and benchmarks.

#![allow(
    unsafe_code,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unreachable,
    clippy::unwrap_used,
    reason = "a test ends by a panic, and a driver, an intruder and a load reach memory by pointers"
)]

pub mod arguments;
#[cfg(target_arch = "x86_64")]
pub mod attempts;
pub mod bench;
pub mod cache;
pub mod ended;
pub mod evdev;
pub mod front_end;
pub mod guest;
#[cfg(target_arch = "x86_64")]
pub mod intruder;
pub mod process;
pub mod relay;
pub mod shared_memory;
pub mod skip;
pub mod soak;
pub mod stand_in;
pub mod target;
pub mod transfer;
pub mod uml;
