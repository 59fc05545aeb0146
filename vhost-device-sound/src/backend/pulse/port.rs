// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The port of a stream: what the stream asks of the server.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use vhost_device_common::lock;

use super::Pulse;
use crate::backend::{Pace, Port};
use crate::profile::Params;
use crate::protocol::{Direction, Status};

/// How much recorded sound is kept for a guest that does not fetch it, in periods.
const KEPT_PERIODS: usize = 8;

/// The port of a stream.
pub struct PulsePort {
    pulse: Arc<Mutex<Pulse>>,
    index: usize,
    silence: u8,
}

impl PulsePort {
    /// Creates the port of stream `index`.
    pub fn new(pulse: Arc<Mutex<Pulse>>, index: usize) -> Self {
        Self {
            pulse,
            index,
            silence: 0,
        }
    }
}

impl Port for PulsePort {
    fn pace(&self, now: Instant) -> Pace {
        let pulse = lock(&self.pulse);
        let Some(stream) = pulse.streams.get(self.index) else {
            return Pace::Clock;
        };
        let is_late = now.saturating_duration_since(stream.active) >= stream.stall();
        match stream.is_live() && !(stream.is_waiting() && is_late) {
            true => Pace::Host,
            false => Pace::Clock,
        }
    }

    fn due(&self) -> u64 {
        let pulse = lock(&self.pulse);
        let stream = pulse.streams.get(self.index);
        stream.map_or(0, |stream| match stream.direction {
            Direction::Output => stream.wanted,
            Direction::Input => stream.recorded.len() as u64,
        })
    }

    fn deadline(&self) -> Option<Instant> {
        let pulse = lock(&self.pulse);
        let stream = pulse.streams.get(self.index)?;
        let is_waiting = stream.is_live() && stream.is_waiting();
        is_waiting.then(|| stream.active + stream.stall())
    }

    fn take_xrun(&mut self) -> bool {
        let mut pulse = lock(&self.pulse);
        let Some(stream) = pulse.streams.get_mut(self.index) else {
            return false;
        };
        if let Some(params) = stream.params {
            let most = (params.period_bytes as usize).saturating_mul(KEPT_PERIODS);
            stream.keep(most, &params);
        }
        std::mem::take(&mut stream.has_xrun)
    }

    fn latency(&self, now: Instant) -> u32 {
        let pulse = lock(&self.pulse);
        let Some(stream) = pulse.streams.get(self.index) else {
            return 0;
        };
        let bytes = stream.latency(now);
        let frames = stream.params.map_or(0, |params| params.whole_frames(bytes));
        frames.try_into().unwrap_or(u32::MAX)
    }

    fn set_params(&mut self, params: &Params) -> Result<(), Status> {
        self.silence = params.format.silence();
        let mut pulse = lock(&self.pulse);
        pulse.close(self.index, false);
        if let Some(stream) = pulse.streams.get_mut(self.index) {
            stream.params = Some(*params);
        }
        Ok(())
    }

    fn prepare(&mut self) {
        let pulse = &mut *lock(&self.pulse);
        let Some(stream) = pulse.streams.get_mut(self.index) else {
            return;
        };
        if !std::mem::replace(&mut stream.is_open, true)
            && pulse.is_ready
            && let Err(error) = pulse.create(self.index)
        {
            pulse.lose(&error);
        }
    }

    fn start(&mut self, now: Instant) {
        lock(&self.pulse).run(self.index, true, now);
    }

    fn play(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut pulse = lock(&self.pulse);
        let pulse = &mut *pulse;
        let (Some(stream), Some(link)) = (pulse.streams.get_mut(self.index), &mut pulse.link)
        else {
            return Ok(());
        };
        let Some(channel) = stream.channel.filter(|_| stream.wanted > 0) else {
            return Ok(());
        };
        stream.wanted = stream.wanted.saturating_sub(bytes.len() as u64);
        stream.moved = stream.moved.saturating_add(bytes.len() as u64);
        if let Err(error) = link.sound(channel, bytes) {
            pulse.lose(&error);
        }
        Ok(())
    }

    fn record(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        let mut pulse = lock(&self.pulse);
        bytes.fill(self.silence);
        if let Some(stream) = pulse.streams.get_mut(self.index) {
            let count = bytes.len().min(stream.recorded.len());
            for (to, from) in bytes.iter_mut().zip(stream.recorded.drain(..count)) {
                *to = from;
            }
        }
        Ok(())
    }

    fn stop(&mut self, now: Instant) {
        lock(&self.pulse).run(self.index, false, now);
    }

    fn release(&mut self, was_played: bool) {
        let pulse = &mut *lock(&self.pulse);
        let mut streams = pulse.streams.iter();
        let stream = streams.nth(self.index);
        let is_output = stream.is_some_and(|stream| stream.direction == Direction::Output);
        pulse.close(self.index, was_played && is_output);
    }
}
