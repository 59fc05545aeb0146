// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Takes commands from both queues and completes them in order.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vhost_device_common::device::QueueHandler;
use vhost_device_common::memory::GuestMemory;
use vhost_device_common::worker::{Queue, Queues, Readiness, Timer, Watcher};
use vhost_device_common::{lock, warn_limited};

use crate::capsets::Capsets;
use crate::command::display_info::{default_response, display_response};
use crate::command::{self, Outcome, Wait, cursor};
use crate::completion::{Command, Completions, TIMEOUT, complete};
use crate::protocol::{CommandError, Header, Response, read};
use crate::state::State;
use crate::three_d::ThreeD;

/// Index of the control queue. The other queue is the cursor queue.
const CONTROL: u16 = 0;
/// Tokens of the files that the handler watches, beside that of the display.
const TIMER: u32 = 1;
const FENCES: u32 = 2;

/// A command that waits for the display. The commands after it stay in the queue.
struct Held {
    command: Command,
    wait: Wait,
    /// When the display last made progress, and the value of [`Display::progress`](crate::display::Display::progress)
    /// then.
    since: Instant,
    progress: u64,
}

/// Processes both queues.
pub struct GpuHandler {
    shared: Arc<Mutex<State>>,
    timer: Timer,
    /// Whether the timer is running. It is not restarted for each command, which would cost a system call.
    timer_is_set: bool,
    held: Option<Held>,
    completions: Completions,
    three_d: Option<ThreeD>,
    /// The value of [`State::generation`] that the contents of `three_d` belong to.
    generation: u64,
}

impl GpuHandler {
    /// Creates the handler. `capsets` is `None` without `--virgl`.
    pub fn new(
        shared: Arc<Mutex<State>>,
        capsets: Option<Arc<Capsets>>,
        watcher: Watcher,
    ) -> io::Result<Self> {
        let timer = Timer::new()?;
        watcher.add(&timer, Readiness::READABLE, TIMER)?;
        let start_3d = |capsets| ThreeD::new(capsets, watcher.clone(), FENCES);
        let three_d = capsets.map(start_3d).transpose()?;
        lock(&shared).display.set_watcher(watcher)?;
        Ok(Self {
            shared,
            timer,
            timer_is_set: false,
            held: None,
            completions: Completions::default(),
            three_d,
            generation: 0,
        })
    }

    /// Clears the renderer if the driver has changed.
    fn sync_generation(&mut self, state: &State) {
        if self.generation != state.generation {
            self.generation = state.generation;
            if let Some(three_d) = &mut self.three_d {
                three_d.clear();
            }
        }
    }

    fn process_control(&mut self, queue: &mut Queue) {
        let shared = Arc::clone(&self.shared);
        let state = &mut *lock(&shared);
        self.sync_generation(state);
        while self.held.is_none()
            && let Some(mut chain) = queue.take()
        {
            let Ok(header) = read::<Header>(&mut chain) else {
                let header = Header::default();
                let response = CommandError::InvalidParameter.into();
                self.finish(Command { chain, header }, response);
                continue;
            };
            log::trace!("command {:#x}", header.kind);
            let outcome = chain.check().map_err(CommandError::from).and_then(|()| {
                let three_d = self.three_d.as_mut().filter(|_| state.accepts_3d);
                command::process(state, three_d, &header, &mut chain)
            });
            let command = Command { chain, header };
            match outcome {
                Ok(Outcome::Done(response)) => self.finish(command, response),
                Ok(Outcome::Wait(wait)) => self.hold(state, queue, command, wait),
                Err(error) => {
                    let kind = header.kind.get();
                    warn_limited(format_args!("command {kind:#x} failed: {error}"));
                    self.finish(command, error.into());
                }
            }
        }
        self.completions.retire_fences(self.three_d.as_mut(), queue);
        if self.held.is_none() {
            self.advance_display(state, queue, false);
            self.completions.complete(queue);
        }
    }

    /// Lets a command wait for the display, unless it can be completed immediately.
    fn hold(&mut self, state: &mut State, queue: &mut Queue, command: Command, wait: Wait) {
        if let Wait::Reply(query) = wait
            && !state.display.start_query(query)
        {
            return self.finish(command, default_response(query, &state.display));
        }
        self.held = Some(Held {
            command,
            wait,
            since: Instant::now(),
            progress: 0,
        });
        self.advance_display(state, queue, false);
        if let Some(held) = &mut self.held {
            held.progress = state.display.progress();
            self.set_timer(TIMEOUT);
        }
    }

    fn set_timer(&mut self, time: Duration) {
        if !self.timer_is_set {
            self.timer_is_set = true;
            self.timer.set(time);
        }
    }

    /// Sends to and receives from the display, and completes the held command if its condition is met.
    fn advance_display(&mut self, state: &mut State, queue: &mut Queue, readable: bool) {
        let display = &mut state.display;
        let reply = display.advance(&state.resources, readable);
        let Some(held) = &self.held else { return };
        let response = match held.wait {
            Wait::Flush if display.is_flushed() => Response::no_data(),
            Wait::Reply(query) => match reply {
                Some(reply) => display_response(query, &reply),
                None if !display.awaits_reply() => default_response(query, display),
                None => return,
            },
            Wait::Flush => return,
        };
        self.release(queue, response);
    }

    /// Completes the held command without waiting for the display.
    fn respond_without_display(&mut self, queue: &mut Queue) {
        let Some(held) = &self.held else { return };
        let mut state = lock(&self.shared);
        let response = match held.wait {
            Wait::Flush => Response::no_data(),
            Wait::Reply(query) => default_response(query, &state.display),
        };
        state.display.cancel_query();
        drop(state);
        self.release(queue, response);
    }

    fn release(&mut self, queue: &mut Queue, response: Response) {
        if let Some(held) = self.held.take() {
            self.finish(held.command, response);
        }
        self.completions.complete(queue);
    }

    fn finish(&mut self, command: Command, response: Response) {
        let three_d = self.three_d.as_mut();
        self.completions.finish(three_d, command, response);
    }

    fn timer_expired(&mut self, queue: &mut Queue) {
        self.timer_is_set = false;
        let progress = lock(&self.shared).display.progress();
        let Some(held) = &mut self.held else { return };
        if held.progress != progress {
            (held.progress, held.since) = (progress, Instant::now());
        }
        let left = TIMEOUT.saturating_sub(held.since.elapsed());
        if !left.is_zero() {
            return self.set_timer(left);
        }
        warn_limited(format_args!(
            "display unresponsive for 1 s; continuing without it"
        ));
        lock(&self.shared).display.mark_unresponsive();
        self.respond_without_display(queue);
        // The display may be usable although it did not reply.
        let shared = Arc::clone(&self.shared);
        self.advance_display(&mut lock(&shared), queue, false);
    }
}

impl QueueHandler for GpuHandler {
    fn process(&mut self, queue: &mut Queue) {
        if queue.index() == CONTROL {
            return self.process_control(queue);
        }
        let shared = Arc::clone(&self.shared);
        let state = &mut *lock(&shared);
        self.sync_generation(state);
        while let Some(mut chain) = queue.take() {
            let three_d = self.three_d.as_mut().filter(|_| state.accepts_3d);
            let outcome = cursor::process(state, three_d, &mut chain);
            if let Err(error) = &outcome {
                warn_limited(format_args!("cursor command failed: {error}"));
            }
            // Drivers provide no buffer for a response here.
            complete(queue, chain, 0, outcome.is_err());
        }
        // A command of the control queue may still wait for a reply, or for the last pixels to be sent.
        state.display.send_all(&state.resources);
    }

    fn ready(&mut self, token: u32, readiness: Readiness, queues: &mut Queues) {
        if token == FENCES {
            if let Some(three_d) = &mut self.three_d {
                three_d.poll();
            }
            if let Some(queue) = queues.get_mut(CONTROL) {
                self.completions.retire_fences(self.three_d.as_mut(), queue);
            }
            return;
        }
        let readable = readiness.contains(Readiness::READABLE);
        let Some(queue) = queues.get_mut(CONTROL) else {
            // The timer reports its expiry only once.
            self.timer_is_set &= token != TIMER;
            // No driver is active; keep serving the display.
            let state = &mut *lock(&self.shared);
            state.display.advance(&state.resources, readable);
            return;
        };
        if token == TIMER {
            return self.timer_expired(queue);
        }
        let shared = Arc::clone(&self.shared);
        self.advance_display(&mut lock(&shared), queue, readable);
    }

    fn drain(&mut self, queue: &mut Queue) {
        if queue.index() == CONTROL {
            self.respond_without_display(queue);
            self.completions
                .wait_for_fences(self.three_d.as_mut(), queue);
            self.completions.complete(queue);
            let shared = Arc::clone(&self.shared);
            let mut state = lock(&shared);
            self.sync_generation(&state);
            let renderer = self.three_d.as_mut().and_then(ThreeD::started_renderer);
            state.has_contexts = renderer.is_some_and(|renderer| renderer.has_contexts());
        }
    }

    fn memory_changed(&mut self, memory: &Arc<GuestMemory>) {
        let shared = Arc::clone(&self.shared);
        let state = lock(&shared);
        self.sync_generation(&state);
        if let Some(three_d) = &mut self.three_d {
            three_d.set_memory(&state.resources, memory);
        }
    }
}
