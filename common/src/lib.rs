// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The core of all vhost-user device back-ends of this workspace.
//!
//! A request passes through the rooms in this order: [`program`] (arguments, the socket, signals, exit
//! status), [`session`] (one connection of a front-end), [`memory`] (the guest's memory), [`ring`]
//! (virtqueues), [`chain`] (one request), [`worker`] (the thread that takes requests and gives them
//! back), [`device`] (what a device implements). What a device knows of its guest goes to another process as
//! a [`state`]. What happens meanwhile is counted ([`statistics`]).

pub mod chain;
pub mod device;
mod file_limit;
mod limit;
pub mod memory;
pub mod program;
pub mod ring;
pub mod session;
pub mod state;
pub mod statistics;
pub mod worker;

pub use limit::{info_limited, warn_limited};
