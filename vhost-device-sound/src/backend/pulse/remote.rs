// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The server's end of a stream.

use std::collections::VecDeque;
use std::ffi::CString;
use std::time::{Duration, Instant};

use crate::profile::Params;
use crate::protocol::Direction;

/// A running stream that the server does not move for this long, or for three quarters of the guest's buffer if that is longer, goes on
/// by the clock of this host. ALSA in the guest gives up after the time of a buffer, or 100 ms.
const SHORTEST_STALL: Duration = Duration::from_millis(60);
/// The longest such time.
const LONGEST_STALL: Duration = Duration::from_millis(500);

/// A latency that the server has reported.
#[derive(Clone, Copy, Debug)]
pub struct Latency {
    /// When it was reported.
    pub at: Instant,
    /// Bytes that were sent by then.
    pub sent: u64,
    /// Bytes that were not audible yet, or not received yet.
    pub bytes: u64,
}

/// The server's end of a stream.
pub struct Remote {
    pub direction: Direction,
    pub name: CString,
    pub params: Option<Params>,
    /// From PREPARE to RELEASE.
    pub is_open: bool,
    pub is_running: bool,
    /// Distinguishes the stream from those before.
    pub generation: u64,
    /// The server's number, once it has created the stream.
    pub channel: Option<u32>,
    /// When to create the stream again, which the server has refused or ended.
    pub recreate: Option<Instant>,
    /// The number of an earlier stream, whose end is still to be heard.
    pub draining: Option<u32>,
    /// Bytes that the server has asked for.
    pub wanted: u64,
    /// Bytes that were recorded.
    pub recorded: VecDeque<u8>,
    /// Bytes that were sent or received.
    pub moved: u64,
    /// When the server last asked for sound, or sent some.
    pub active: Instant,
    pub latency: Option<Latency>,
    /// When to ask for the latency.
    pub next_latency: Instant,
    pub has_xrun: bool,
}

impl Remote {
    /// Returns whether the server is expected to move the stream.
    pub fn is_live(&self) -> bool {
        self.is_running && self.channel.is_some()
    }

    /// Drops the oldest recorded sound beyond so many bytes.
    pub fn keep(&mut self, most: usize, params: &Params) {
        let excess = self.recorded.len().saturating_sub(most);
        if excess > 0 {
            let whole = excess.next_multiple_of(params.frame_bytes().max(1) as usize);
            self.recorded.drain(..whole.min(self.recorded.len()));
            self.has_xrun = true;
        }
    }

    /// Returns how long the server may take.
    pub fn stall(&self) -> Duration {
        let Some(params) = &self.params else {
            return SHORTEST_STALL;
        };
        let second = u64::from(params.rate) * u64::from(params.frame_bytes());
        let most = u64::from(params.buffer_bytes) * 750;
        let time = Duration::from_millis(most.checked_div(second).unwrap_or(0));
        time.clamp(SHORTEST_STALL, LONGEST_STALL)
    }

    /// Returns how many bytes are not audible yet, or not fetched yet. While the stream is stopped, nothing is played.
    pub fn latency(&self, now: Instant) -> u64 {
        let (Some(latency), Some(params)) = (self.latency, self.params) else {
            return 0;
        };
        match self.direction {
            Direction::Output => {
                let sent = self.moved.saturating_sub(latency.sent);
                let second = u128::from(params.rate) * u128::from(params.frame_bytes());
                let time = match self.is_running {
                    true => now.saturating_duration_since(latency.at).as_nanos(),
                    false => 0,
                };
                let elapsed = (time * second / 1_000_000_000) as u64;
                latency.bytes.saturating_add(sent).saturating_sub(elapsed)
            }
            Direction::Input => latency.bytes.saturating_add(self.recorded.len() as u64),
        }
    }

    /// Returns whether it is the server's turn.
    pub fn is_waiting(&self) -> bool {
        self.wanted == 0 && self.recorded.is_empty()
    }
}
