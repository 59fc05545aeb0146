// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What goes over the sockets of a front-end: messages in both directions.

mod config_change;
mod message;

pub use config_change::ConfigChange;
pub use message::{Connection, Message, MessageError, leading_object};
