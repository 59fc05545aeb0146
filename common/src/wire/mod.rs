// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What goes over the sockets of a front-end: messages in both directions.

mod front_end;
mod message;
mod shared_memory;

pub use front_end::{Channel, FrontEnd};
pub use message::{Connection, Message, MessageError, PayloadError, leading_object};
pub use shared_memory::{Mapping, Replies, Reply, SharedMemoryError, SharedRange, SharedRegion};
