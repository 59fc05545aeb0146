// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Input devices as Linux has them: nodes that a program reads, and devices that a program makes.
//!
//! A [`Device`] is made with uinput from a [`Description`], of which [`devices`] has some of real devices. A [`Node`] reads any of them, and asks
//! the kernel what it is and how its keys and axes are.

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
