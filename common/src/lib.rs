// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The core of all vhost-user device back-ends of this workspace.
//!
//! The modules, from the top down; each uses those below it and none above (`cargo xtask test` checks that):
//!
//! | module | contents |
//! |---|---|
//! | [`program`] | what every binary does: arguments, descriptor, socket, signals, exit status |
//! | [`session`] | one connection of a front-end |
//! | [`device`] | what a device implements |
//! | `wire` | messages in both directions |
//! | [`worker`] | threads that own rings |
//! | [`sandbox`] | what the process may do once all is open |
//! | [`state`] | the state of a device, as bytes |
//! | [`ring`] | virtqueues |
//! | [`chain`] | one request |
//! | [`memory`] | the memory of the guest |
//! | [`statistics`] | counters, and the present state of the connection |
//!
//! Below them are `verb`, `log_limit`, `stderr`, `file_limit`, `lock` and `error`.

pub mod chain;
pub mod device;
mod error;
mod file_limit;
mod lock;
mod log_limit;
pub mod memory;
pub mod program;
pub mod ring;
pub mod sandbox;
pub mod session;
pub mod state;
pub mod statistics;
mod stderr;
mod verb;
mod wire;
pub mod worker;

pub use lock::lock;
pub use log_limit::{info_limited, warn_limited};
