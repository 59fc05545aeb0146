// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Types of requests in statistics: indices of [`NAMES`].

/// A request on the control queue.
pub const CONTROL: usize = 0;
/// An event.
pub const EVENT: usize = 1;
/// A buffer of an output stream.
pub const PLAYBACK: usize = 2;
/// A buffer of an input stream.
pub const CAPTURE: usize = 3;
/// Their names.
pub const NAMES: &[&str] = &["control", "event", "playback", "capture"];
