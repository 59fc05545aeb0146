// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Input devices of Linux: nodes that a program reads, and devices that a program creates.
//!
//! A [`Device`] is created with uinput from a [`Description`]; [`devices`] has descriptions of real devices. A [`Node`] reads the events of any device,
//! and asks the kernel for its capabilities and state.

mod codes;
pub mod devices;
mod event;
mod guest;
mod node;
mod uinput;

pub use codes::*;
pub use event::{Event, Report, report};
pub use guest::Guest;
pub use node::{Node, Value};
pub use uinput::{Axis, Description, Device};
