// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One stream: its state, its clock, and the buffers that the driver has queued for it.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vhost_device_common::chain::{Chain, ChainError};
use vhost_device_common::statistics::Outcome;
use vhost_device_common::warn_limited;
use zerocopy::IntoBytes;
use zerocopy::little_endian::U32;

use crate::backend::{Pace, Port};
use crate::clock::Clock;
use crate::gain;
use crate::lifecycle::{Command, State};
use crate::profile::{MAX_BUFFER, Params, Profile};
use crate::protocol::{Direction, PCM_STATUS_SIZE, PcmStatus, SetParams, Status};
use crate::request_type;

/// Bytes that are copied at a time.
const PIECE: usize = 32 << 10;
/// How long a stream at the guest's pace waits after the guest has queued a buffer before it finishes the next one. Linux's driver
/// counts wrongly if buffers come back while it handles earlier ones.
const SPACING: Duration = Duration::from_millis(1);
/// The same, if the guest queues none.
const PATIENCE: Duration = Duration::from_millis(20);

/// How long the last buffer is held back at most.
const LONGEST_HOLD: Duration = Duration::from_millis(100);

/// A buffer of the guest.
struct Buffer {
    chain: Chain,
    /// Position in its queue, for all streams of the queue.
    sequence: u64,
    /// Bytes that were played or recorded.
    moved: u32,
    /// Bytes that are left, in whole frames.
    left: u64,
    failed: bool,
}

/// A buffer whose request is to be completed.
pub struct Finished {
    /// The request.
    pub chain: Chain,
    /// Bytes that the device wrote.
    pub written: u32,
    /// For statistics.
    pub outcome: Outcome,
}

/// One stream.
pub struct Stream {
    profile: Profile,
    port: Box<dyn Port>,
    /// Factor of the volume, or `None` for 0 dB.
    factor: Option<f64>,
    state: State,
    params: Option<Params>,
    buffers: VecDeque<Buffer>,
    /// Whether the queue of the buffers runs and is enabled.
    is_active: bool,
    /// Runs while the stream runs and its queue does.
    clock: Option<Clock>,
    /// The pace at the last tick.
    pace: Pace,
    /// When the stream started, or last moved.
    moved_at: Instant,
    /// At the guest's pace: when to finish the next buffer even if the guest queues none.
    overdue: Option<Instant>,
    /// The last buffer, which is done although the guest has not yet reacted to the one before, and when to complete it at the latest.
    /// Linux computes the position from completed buffers, modulo the size of all: if it found all completed at once, it would see no
    /// progress, and its programs would fail after a while.
    held: Option<(Finished, Instant)>,
    /// The driver has queued a buffer since one was completed.
    has_reacted: bool,
    /// Buffers were taken, and [`Stream::move_taken`] was not called yet.
    has_taken: bool,
    /// The last period lacked a buffer, or the host has noticed an underrun or overrun since it last moved the stream.
    in_xrun: bool,
    /// Bytes that were moved of a buffer that was put back into its ring. The first buffer begins there.
    resume_at: u32,
    piece: Vec<u8>,
    /// Frames that were played or recorded.
    frames: u64,
    /// Underruns or overruns.
    xruns: u64,
}

/// What is saved of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SavedStream {
    state: State,
    params: Option<Params>,
    resume_at: u32,
}

impl Stream {
    /// Creates a stream whose sound goes to, or comes from, `port`.
    pub fn new(profile: Profile, port: Box<dyn Port>) -> Self {
        Self {
            profile,
            port,
            factor: None,
            state: State::default(),
            params: None,
            buffers: VecDeque::new(),
            is_active: false,
            clock: None,
            pace: Pace::Clock,
            moved_at: Instant::now(),
            overdue: None,
            held: None,
            has_reacted: true,
            has_taken: false,
            in_xrun: false,
            resume_at: 0,
            piece: Vec::new(),
            frames: 0,
            xruns: 0,
        }
    }

    /// Returns what the stream offers.
    pub fn profile(&self) -> &Profile {
        &self.profile
    }

    /// Returns the direction.
    pub fn direction(&self) -> Direction {
        self.profile.direction
    }

    /// Sets the factor of the volume, `None` for 0 dB.
    pub fn set_factor(&mut self, factor: Option<f64>) {
        self.factor = factor;
    }

    /// Discards all state of the driver.
    pub fn reset(&mut self) {
        self.port.stop(Instant::now());
        self.port.release(false);
        self.state = State::default();
        self.params = None;
        self.buffers.clear();
        self.held = None;
        self.in_xrun = false;
        self.resume_at = 0;
        self.clock = None;
        self.overdue = None;
    }

    /// Carries out a command. `params` are those of SET_PARAMS. Buffers that the command discards are added to `finished`.
    ///
    /// # Errors
    /// The command is not possible in this state, or not supported.
    pub fn command(
        &mut self,
        command: Command,
        params: Option<&SetParams>,
        now: Instant,
        finished: &mut Vec<Finished>,
    ) -> Result<(), Status> {
        let next = self.state.after(command).ok_or(Status::BadMessage)?;
        if let Some(params) = params {
            let params = self.profile.choose(params)?;
            self.port.set_params(&params)?;
            self.params = Some(params);
        }
        self.state = next;
        match command {
            Command::SetParams => self.flush(now, finished),
            Command::Prepare => {
                self.in_xrun = false;
                self.resume_at = 0;
                self.port.prepare();
            }
            Command::Start => self.resume(now, finished),
            Command::Stop => self.pause(now),
            Command::Release => {
                let was_played = self.buffers.is_empty();
                self.flush(now, finished);
                self.port.release(was_played);
            }
        }
        Ok(())
    }

    /// Notes whether the queue of the buffers runs and is enabled.
    pub fn set_active(&mut self, is_active: bool, now: Instant, finished: &mut Vec<Finished>) {
        self.is_active = is_active;
        match is_active {
            true => self.resume(now, finished),
            false => self.pause(now),
        }
    }

    /// Starts the clock if the stream runs. It begins with a whole period.
    fn resume(&mut self, now: Instant, finished: &mut Vec<Finished>) {
        if let (State::Running, Some(params), true) = (self.state, self.params, self.is_active) {
            self.clock = Some(Clock::new(now, params.rate, params.period_frames()));
            self.port.start(now);
            self.pace = self.port.pace(now);
            self.moved_at = now;
            self.move_at_once(now, finished);
        }
    }

    fn pause(&mut self, now: Instant) {
        if self.clock.take().is_some() {
            self.port.stop(now);
        }
        self.overdue = None;
    }

    /// Takes a buffer whose header was read and whose status was split off. `sequence` is its position in its queue. If it cannot be
    /// used, it is added to `finished`.
    pub fn take(
        &mut self,
        chain: Chain,
        sequence: u64,
        now: Instant,
        finished: &mut Vec<Finished>,
    ) {
        let params = self.params.filter(|_| self.state.takes_buffers());
        let Some(params) = params else {
            return finished.push(self.refuse(chain, Status::IoError));
        };
        if let Err(error) = chain.check() {
            warn_limited(format_args!("invalid buffer of a stream: {error}"));
            return finished.push(self.refuse(chain, Status::IoError));
        }
        let length = match self.direction() {
            Direction::Output => chain.readable_len(),
            Direction::Input => chain.writable_len(),
        };
        // At the guest's pace, a request is moved at once: more would hold up everything else.
        if length > u64::from(MAX_BUFFER) {
            return finished.push(self.refuse(chain, Status::BadMessage));
        }
        let mut buffer = Buffer {
            chain,
            sequence,
            moved: 0,
            left: params.whole_frames(length),
            failed: false,
        };
        let moved = std::mem::take(&mut self.resume_at);
        if moved > 0 && u64::from(moved) < buffer.left {
            let skipped = match self.direction() {
                Direction::Output => buffer.chain.skip_readable(moved.into()),
                Direction::Input => buffer.chain.skip_writable(moved.into()),
            };
            if skipped.is_ok() {
                buffer.left -= u64::from(moved);
                buffer.moved = moved;
            }
        }
        if buffer.left == 0 {
            return finished.push(self.finish(buffer, now));
        }
        self.complete_held(finished);
        self.has_reacted = true;
        self.has_taken = true;
        self.buffers.push_back(buffer);
    }

    /// Completes a request whose buffer is not used.
    pub fn refuse(&self, chain: Chain, status: Status) -> Finished {
        complete(chain, self.direction(), status, 0, 0)
    }

    /// Completes all queued buffers.
    fn flush(&mut self, now: Instant, finished: &mut Vec<Finished>) {
        self.pause(now);
        self.resume_at = 0;
        self.complete_held(finished);
        while let Some(buffer) = self.buffers.pop_front() {
            finished.push(self.finish(buffer, now));
        }
    }

    fn finish(&self, buffer: Buffer, now: Instant) -> Finished {
        let status = match buffer.failed {
            true => Status::IoError,
            false => Status::Ok,
        };
        let latency = self.port.latency(now);
        complete(
            buffer.chain,
            self.direction(),
            status,
            buffer.moved,
            latency,
        )
    }

    /// Returns the positions of all queued buffers in their queue.
    pub fn sequences(&self) -> impl Iterator<Item = u64> {
        self.buffers.iter().map(|buffer| buffer.sequence)
    }

    /// Returns the requests of the queued buffers from position `first` on, with their positions, to be put back into their ring. Those
    /// before are added to `finished`.
    pub fn take_back(
        &mut self,
        first: u64,
        now: Instant,
        finished: &mut Vec<Finished>,
    ) -> impl Iterator<Item = (u64, Chain)> {
        self.complete_held(finished);
        while self
            .buffers
            .front()
            .is_some_and(|buffer| buffer.sequence < first)
            && let Some(buffer) = self.buffers.pop_front()
        {
            finished.push(self.finish(buffer, now));
        }
        // A queue that stops again before it has taken the buffer changes nothing.
        if let Some(first) = self.buffers.front() {
            self.resume_at = first.moved;
        }
        let buffers = self.buffers.drain(..);
        buffers.map(|buffer| (buffer.sequence, buffer.chain))
    }

    /// Returns when to call [`Stream::tick`] next, if the stream runs.
    pub fn next_tick(&self, now: Instant) -> Option<Instant> {
        let clock = self.clock?;
        let held = self.held.as_ref().map(|(_, time)| *time);
        let next = match self.port.pace(now) {
            Pace::Clock => Some(clock.next()),
            Pace::Guest => self.overdue,
            Pace::Host => self.port.deadline(),
        };
        held.into_iter().chain(next).min()
    }

    /// Completes a buffer that was held back.
    fn complete_held(&mut self, finished: &mut Vec<Finished>) {
        finished.extend(self.held.take().map(|(held, _)| held));
    }

    /// Moves what is due. Returns whether an underrun or overrun begins that the driver wants to know of.
    pub fn tick(&mut self, now: Instant, finished: &mut Vec<Finished>) -> bool {
        let (Some(params), Some(clock)) = (self.params, &mut self.clock) else {
            return false;
        };
        // A guest that does not have its last buffer back yet could not know that it is to queue another one.
        let is_excused = self.held.is_some();
        if self.held.as_ref().is_some_and(|(_, time)| *time <= now) {
            finished.extend(self.held.take().map(|(held, _)| held));
        }
        let pace = self.port.pace(now);
        if std::mem::replace(&mut self.pace, pace) != pace && pace == Pace::Clock {
            // The host has moved the stream until then. Waiting for another period would take longer than a guest with few periods allows.
            let begin = now.checked_sub(clock.length()).unwrap_or(now);
            let begin = begin.max(self.moved_at);
            *clock = Clock::new(begin, params.rate, params.period_frames());
        }
        let begins = match pace {
            Pace::Guest => {
                if self.overdue.is_some_and(|time| time <= now) {
                    self.finish_next(now, finished);
                }
                false
            }
            Pace::Host => {
                self.move_at_once(now, finished);
                self.port.take_xrun() && !std::mem::replace(&mut self.in_xrun, true)
            }
            Pace::Clock => {
                let due = clock.elapse(now).saturating_mul(params.period_bytes.into());
                self.move_due(due, is_excused, now, finished)
            }
        };
        self.xruns += u64::from(begins);
        begins && params.xruns
    }

    /// Moves what need not wait for the clock of this host, if buffers were taken since the last call.
    pub fn move_taken(&mut self, now: Instant, finished: &mut Vec<Finished>) {
        if std::mem::take(&mut self.has_taken) {
            self.move_at_once(now, finished);
        }
    }

    /// Moves what need not wait for the clock of this host.
    fn move_at_once(&mut self, now: Instant, finished: &mut Vec<Finished>) {
        let (Some(params), true) = (self.params, self.clock.is_some()) else {
            return;
        };
        match self.port.pace(now) {
            Pace::Clock => {}
            Pace::Guest => {
                let soon = now + SPACING;
                self.overdue = Some(self.overdue.map_or(soon, |time| time.min(soon)));
            }
            Pace::Host => {
                let due = params.whole_frames(self.port.due());
                let moved = self.advance(due, now, finished);
                self.in_xrun &= moved == 0;
            }
        }
    }

    /// Moves the bytes of periods that have elapsed. Returns whether there begin to be too few; not if that `is_excused`.
    fn move_due(
        &mut self,
        due: u64,
        is_excused: bool,
        now: Instant,
        finished: &mut Vec<Finished>,
    ) -> bool {
        let missing = due.saturating_sub(self.advance(due, now, finished));
        if missing == 0 {
            // Without an elapsed period nothing is known.
            self.in_xrun &= due == 0;
            return false;
        }
        match self.direction() {
            Direction::Output => self.port.pad(missing),
            Direction::Input => self.port.skip(missing),
        }
        !is_excused && !std::mem::replace(&mut self.in_xrun, true)
    }

    /// Finishes the next buffer of a stream at the guest's pace. Never all at once: Linux computes the position from finished buffers,
    /// modulo the size of all, and would notice nothing.
    fn finish_next(&mut self, now: Instant, finished: &mut Vec<Finished>) {
        let next = self.buffers.front().map_or(0, |buffer| buffer.left);
        self.advance(next, now, finished);
        self.overdue = (!self.buffers.is_empty()).then(|| now + PATIENCE);
    }

    /// Moves up to `due` bytes between the buffers and the port. Returns how many it has moved.
    fn advance(&mut self, due: u64, now: Instant, finished: &mut Vec<Finished>) -> u64 {
        let Some(params) = self.params else {
            return 0;
        };
        let holds = self.port.pace(now) != Pace::Guest;
        let most = params.whole_frames(PIECE as u64);
        let mut moved = 0;
        while moved < due
            && let Some(buffer) = self.buffers.front_mut()
        {
            let length = (due - moved).min(buffer.left).min(most);
            self.piece.resize(length as usize, 0);
            let outcome = match self.profile.direction {
                Direction::Output => play(&mut buffer.chain, &mut self.piece, |bytes| {
                    scale(&params, bytes, self.factor);
                    self.port.play(bytes)
                }),
                Direction::Input => {
                    let recorded = self.port.record(&mut self.piece);
                    if recorded.is_err() {
                        self.piece.fill(params.format.silence());
                    }
                    scale(&params, &mut self.piece, self.factor);
                    buffer.chain.write(&self.piece).map(|()| recorded)
                }
            };
            match outcome {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    warn_limited(format_args!(
                        "{} failed: {error}; sound is lost",
                        self.profile.direction.name()
                    ));
                    buffer.failed = true;
                }
                // The memory was checked when the buffer was taken.
                Err(error) => {
                    warn_limited(format_args!("invalid buffer of a stream: {error}"));
                    buffer.failed = true;
                }
            }
            moved += length;
            buffer.moved = buffer.moved.saturating_add(length as u32);
            buffer.left -= length;
            if buffer.left == 0
                && let Some(buffer) = self.buffers.pop_front()
            {
                let done = self.finish(buffer, now);
                let has_reacted = std::mem::replace(&mut self.has_reacted, false);
                match has_reacted || !self.buffers.is_empty() || !holds {
                    true => finished.push(done),
                    false => self.held = Some((done, now + hold_time(&params))),
                }
            }
        }
        if moved > 0 {
            self.moved_at = now;
        }
        let frame = u64::from(params.frame_bytes());
        self.frames += moved.checked_div(frame).unwrap_or(0);
        moved
    }

    /// Returns what another process needs to continue.
    pub fn save(&self) -> SavedStream {
        SavedStream {
            state: self.state,
            params: self.params,
            resume_at: self.resume_at,
        }
    }

    /// Returns whether the stream can have this state.
    pub fn accepts(&self, saved: &SavedStream) -> bool {
        let resume_at = u64::from(saved.resume_at);
        match &saved.params {
            Some(params) => {
                self.profile.check(params).is_ok()
                    && resume_at == params.whole_frames(resume_at)
                    && (resume_at == 0 || saved.state.takes_buffers())
            }
            None => saved.state == State::Reset && resume_at == 0,
        }
    }

    /// Continues from a state that [`Stream::accepts`].
    ///
    /// # Errors
    /// The port does not support the parameters.
    pub fn load(&mut self, saved: SavedStream) -> Result<(), Status> {
        self.reset();
        if let Some(params) = &saved.params {
            self.port.set_params(params)?;
        }
        if saved.state.takes_buffers() {
            self.port.prepare();
        }
        self.state = saved.state;
        self.params = saved.params;
        self.resume_at = saved.resume_at;
        Ok(())
    }

    /// Returns the state for people and programs.
    pub fn report(&self) -> Value {
        let params = self.params.map(|params| {
            json!({
                "format": params.format.name(),
                "channels": params.channels,
                "rate": params.rate,
                "period-frames": params.period_frames(),
                "buffer-frames": params.buffer_bytes.checked_div(params.frame_bytes()),
            })
        });
        json!({
            "direction": self.direction().name(),
            "state": self.state.name(),
            "params": params,
            "buffers": self.buffers.len(),
            "latency-frames": self.params.map(|params| {
                self.port.latency(Instant::now()).checked_div(params.frame_bytes())
            }),
            "frames": self.frames,
            "xruns": self.xruns,
        })
    }
}

/// Returns how long the last buffer is held back at most: half a period, or [`LONGEST_HOLD`] if that is shorter.
fn hold_time(params: &Params) -> Duration {
    let rate = u64::from(params.rate.max(1));
    let period = Duration::from_nanos(u64::from(params.period_frames()) * 1_000_000_000 / rate);
    (period / 2).min(LONGEST_HOLD)
}

/// Reads whole frames from a request, and plays them.
fn play(
    chain: &mut Chain,
    piece: &mut [u8],
    play: impl FnOnce(&mut [u8]) -> std::io::Result<()>,
) -> Result<std::io::Result<()>, ChainError> {
    chain.read(piece)?;
    Ok(play(piece))
}

fn scale(params: &Params, bytes: &mut [u8], factor: Option<f64>) {
    if let Some(factor) = factor {
        gain::apply(params.format, bytes, factor);
    }
}

/// Writes the status of a buffer. `moved` are the bytes that were played or recorded, `latency` those that are on
/// their way.
pub fn complete(
    mut chain: Chain,
    direction: Direction,
    status: Status,
    moved: u32,
    latency: u32,
) -> Finished {
    let bytes = PcmStatus {
        status: U32::new(status.number()),
        latency_bytes: U32::new(latency),
    };
    let recorded = match direction {
        Direction::Output => 0,
        Direction::Input => moved,
    };
    let written = match chain.write_tail(bytes.as_bytes()) {
        Ok(()) => recorded.saturating_add(PCM_STATUS_SIZE),
        // The buffer has no room for a status.
        Err(_) => 0,
    };
    Finished {
        chain,
        written,
        outcome: Outcome {
            request: match direction {
                Direction::Output => request_type::PLAYBACK,
                Direction::Input => request_type::CAPTURE,
            },
            bytes: moved.into(),
            failed: status != Status::Ok,
        },
    }
}
