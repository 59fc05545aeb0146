// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Takes commands from both queues and completes them in order.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use vhost_device_common::chain::Chain;
use vhost_device_common::device::QueueHandler;
use vhost_device_common::memory::GuestMemory;
use vhost_device_common::statistics;
use vhost_device_common::warn_limited;
use vhost_device_common::worker::{Queue, Queues, Readiness, Timer, Watcher};
use zerocopy::IntoBytes;

use crate::capsets::Capsets;
use crate::command::display_info::{default_response, display_response};
use crate::command::{self, Outcome, cursor};
use crate::display::Query;
use crate::protocol::{CommandError, Header, Response, read};
use crate::state::{Shared, State};
use crate::three_d::ThreeD;

/// Index of the control queue. The other queue is the cursor queue.
const CONTROL: u16 = 0;
/// Tokens of the files that the handler watches, beside that of the display.
const TIMER: u32 = 1;
const FENCES: u32 = 2;
/// How long a display or renderer may make no progress before the device continues without it.
const TIMEOUT: Duration = Duration::from_secs(1);

/// What a command waits for.
#[derive(Clone, Copy, Debug)]
enum Wait {
    Flush,
    Reply(Query),
}

/// A command that waits for the display. The commands after it stay in the queue.
struct Held {
    chain: Chain,
    header: Header,
    wait: Wait,
    /// When the display last made progress, and the value of [`Display::progress`](crate::display::Display::progress)
    /// then.
    since: Instant,
    progress: u64,
}

/// A command that has been executed and whose response waits for a fence of the renderer. Later commands are executed,
/// but their fences do not signal before this one.
struct Fenced {
    chain: Chain,
    header: Header,
    response: Response,
    /// The renderer's fence that it waits for.
    fence: u32,
}

/// A command whose response has been written.
struct Completion {
    chain: Chain,
    /// Size of the response in bytes.
    written: u32,
    /// Whether the response is an error.
    failed: bool,
}

/// Processes both queues.
pub struct GpuHandler {
    shared: Arc<Shared>,
    timer: Timer,
    /// Whether the timer is running. It is not restarted for each command, which would cost a system call.
    timer_is_set: bool,
    held: Option<Held>,
    /// Commands to return to the driver, together with the held command if there is one.
    completions: Vec<Completion>,
    three_d: Option<ThreeD>,
    fenced: VecDeque<Fenced>,
    /// The value of [`State::generation`] that the contents of `three_d` belong to.
    generation: u64,
}

impl GpuHandler {
    /// Creates the handler. `capsets` is `None` without `--virgl`.
    pub fn new(
        shared: Arc<Shared>,
        capsets: Option<Arc<Capsets>>,
        watcher: Watcher,
    ) -> io::Result<Self> {
        let timer = Timer::new()?;
        watcher.add(&timer, Readiness::READABLE, TIMER)?;
        let start_3d = |capsets| ThreeD::new(capsets, watcher.clone(), FENCES);
        let three_d = capsets.map(start_3d).transpose()?;
        shared.lock().display.set_watcher(watcher)?;
        Ok(Self {
            shared,
            timer,
            timer_is_set: false,
            held: None,
            completions: Vec::new(),
            three_d,
            fenced: VecDeque::new(),
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
        let mut state = shared.lock();
        self.sync_generation(&state);
        while self.held.is_none()
            && let Some(mut chain) = queue.take()
        {
            let Ok(header) = read::<Header>(&mut chain) else {
                self.respond(
                    chain,
                    &Header::default(),
                    &CommandError::InvalidParameter.into(),
                );
                continue;
            };
            log::trace!("command {:#x}", header.kind);
            let outcome = chain.check().map_err(CommandError::from).and_then(|()| {
                let three_d = accepted_3d(&shared, &mut self.three_d);
                command::process(&mut state, three_d, &header, &mut chain)
            });
            match outcome {
                Ok(Outcome::Done(response)) => self.finish(chain, header, response),
                Ok(Outcome::AwaitFlush) => self.hold(&mut state, queue, chain, header, Wait::Flush),
                Ok(Outcome::AwaitReply(query)) => {
                    if state.display.start_query(query) {
                        self.hold(&mut state, queue, chain, header, Wait::Reply(query));
                    } else {
                        let response = default_response(query, &state.display);
                        self.finish(chain, header, response);
                    }
                }
                Err(error) => {
                    let kind = header.kind.get();
                    warn_limited(format_args!("command {kind:#x} failed: {error}"));
                    self.finish(chain, header, error.into());
                }
            }
        }
        self.retire_fences(queue);
        if self.held.is_none() {
            self.advance_display(&mut state, queue, false);
            self.complete(queue);
        }
    }

    /// Completes a command that has been executed: immediately or, if it is fenced, once the renderer has finished it
    /// and all commands before it.
    fn finish(&mut self, chain: Chain, header: Header, response: Response) {
        if header.is_fenced() {
            let last = self.fenced.back().map(|fenced| fenced.fence);
            let renderer = self.three_d.as_mut().and_then(ThreeD::started_renderer);
            let fence = match renderer {
                Some(renderer) if header.is_3d() => renderer.create_fence().ok().or(last),
                _ => last,
            };
            if let Some(fence) = fence {
                self.fenced.push_back(Fenced {
                    chain,
                    header,
                    response,
                    fence,
                });
                return;
            }
        }
        self.respond(chain, &header, &response);
    }

    /// Completes the commands whose fences have signalled.
    fn retire_fences(&mut self, queue: &mut Queue) {
        let Some(three_d) = self.three_d.as_mut().filter(|_| !self.fenced.is_empty()) else {
            return;
        };
        let done = three_d.poll();
        // Fence numbers wrap around.
        let is_done = |fenced: &Fenced| done.wrapping_sub(fenced.fence) as i32 >= 0;
        let before = self.fenced.len();
        while self.fenced.front().is_some_and(is_done)
            && let Some(fenced) = self.fenced.pop_front()
        {
            self.completions
                .push(respond(fenced.chain, &fenced.header, &fenced.response));
        }
        if !self.fenced.is_empty() {
            three_d.expect_fence();
        }
        if self.fenced.len() < before {
            self.complete(queue);
        }
    }

    /// Waits for the renderer, for at most [`TIMEOUT`], and completes all fenced commands.
    fn wait_for_fences(&mut self, queue: &mut Queue) {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            self.retire_fences(queue);
            let left = deadline.saturating_duration_since(Instant::now());
            let Some(three_d) = self.three_d.as_ref().filter(|_| !self.fenced.is_empty()) else {
                return;
            };
            if left.is_zero() {
                break;
            }
            let mut fences = [PollFd::from_borrowed_fd(three_d.poll_fd(), PollFlags::IN)];
            let _ = poll(&mut fences, left.try_into().ok().as_ref());
        }
        warn_limited(format_args!(
            "renderer unresponsive for 1 s; continuing without it"
        ));
        for fenced in self.fenced.drain(..) {
            self.completions
                .push(respond(fenced.chain, &fenced.header, &fenced.response));
        }
    }

    /// Lets a command wait for the display, unless the display can satisfy it immediately.
    fn hold(
        &mut self,
        state: &mut State,
        queue: &mut Queue,
        chain: Chain,
        header: Header,
        wait: Wait,
    ) {
        let since = Instant::now();
        self.held = Some(Held {
            chain,
            header,
            wait,
            since,
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
        let State {
            resources, display, ..
        } = state;
        let reply = display.advance(resources, readable);
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
        let mut state = self.shared.lock();
        let response = match held.wait {
            Wait::Flush => Response::no_data(),
            Wait::Reply(query) => default_response(query, &state.display),
        };
        state.display.cancel_query();
        drop(state);
        self.release(queue, response);
    }

    fn release(&mut self, queue: &mut Queue, response: Response) {
        if let Some(Held { chain, header, .. }) = self.held.take() {
            self.finish(chain, header, response);
        }
        self.complete(queue);
    }

    fn timer_expired(&mut self, queue: &mut Queue) {
        self.timer_is_set = false;
        let progress = self.shared.lock().display.progress();
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
        self.shared.lock().display.mark_unresponsive();
        self.respond_without_display(queue);
        // The display may be usable although it did not reply.
        let shared = Arc::clone(&self.shared);
        self.advance_display(&mut shared.lock(), queue, false);
    }

    fn respond(&mut self, chain: Chain, header: &Header, response: &Response) {
        self.completions.push(respond(chain, header, response));
    }

    /// Returns all completed commands to the driver.
    fn complete(&mut self, queue: &mut Queue) {
        for completion in self.completions.drain(..) {
            complete(queue, completion);
        }
    }
}

/// Returns a command to the driver.
fn complete(queue: &mut Queue, completion: Completion) {
    let outcome = statistics::Outcome {
        bytes: completion.written.into(),
        failed: completion.failed,
        ..Default::default()
    };
    queue.complete_with(completion.chain, completion.written, outcome);
}

/// Returns the 3D state if the driver has accepted VIRTIO_GPU_F_VIRGL.
fn accepted_3d<'a>(shared: &Shared, three_d: &'a mut Option<ThreeD>) -> Option<&'a mut ThreeD> {
    three_d.as_mut().filter(|_| shared.accepts_3d())
}

/// Writes the response to a command.
fn respond(mut chain: Chain, header: &Header, response: &Response) -> Completion {
    let mut kind = response.kind;
    let mut body = response.body.as_slice();
    if chain.writable_len() < (size_of::<Header>() + body.len()) as u64 {
        // The driver did not leave enough room for the response.
        (kind, body) = (CommandError::InvalidParameter as u32, &[]);
    }
    let head = header.response(kind);
    let written = chain
        .write(head.as_bytes())
        .and_then(|()| chain.write(body))
        .map_or(0, |()| size_of::<Header>() + body.len());
    Completion {
        chain,
        written: written as u32,
        failed: kind >= CommandError::Unspecified as u32,
    }
}

impl QueueHandler for GpuHandler {
    fn process(&mut self, queue: &mut Queue) {
        if queue.index() == CONTROL {
            return self.process_control(queue);
        }
        let shared = Arc::clone(&self.shared);
        let mut state = shared.lock();
        self.sync_generation(&state);
        while let Some(mut chain) = queue.take() {
            let three_d = accepted_3d(&shared, &mut self.three_d);
            let outcome = cursor::process(&mut state, three_d, &mut chain);
            if let Err(error) = &outcome {
                warn_limited(format_args!("cursor command failed: {error}"));
            }
            // Drivers provide no buffer for a response here.
            let reply = Completion {
                chain,
                written: 0,
                failed: outcome.is_err(),
            };
            complete(queue, reply);
        }
        let State {
            resources, display, ..
        } = &mut *state;
        // A command of the control queue may still wait for a reply, or for the last pixels to be sent.
        display.send_all(resources);
    }

    fn ready(&mut self, token: u32, readiness: Readiness, queues: &mut Queues) {
        if token == FENCES {
            if let Some(three_d) = &mut self.three_d {
                three_d.poll();
            }
            if let Some(queue) = queues.get_mut(CONTROL) {
                self.retire_fences(queue);
            }
            return;
        }
        let readable = readiness.contains(Readiness::READABLE);
        let Some(queue) = queues.get_mut(CONTROL) else {
            // The timer reports its expiry only once.
            self.timer_is_set &= token != TIMER;
            // No driver is active; keep serving the display.
            let mut state = self.shared.lock();
            let State {
                resources, display, ..
            } = &mut *state;
            display.advance(resources, readable);
            return;
        };
        if token == TIMER {
            return self.timer_expired(queue);
        }
        let shared = Arc::clone(&self.shared);
        let mut state = shared.lock();
        self.advance_display(&mut state, queue, readable);
    }

    fn drain(&mut self, queue: &mut Queue) {
        if queue.index() == CONTROL {
            self.respond_without_display(queue);
            self.wait_for_fences(queue);
            self.complete(queue);
            let shared = Arc::clone(&self.shared);
            let mut state = shared.lock();
            self.sync_generation(&state);
            let renderer = self.three_d.as_mut().and_then(ThreeD::started_renderer);
            state.has_contexts = renderer.is_some_and(|renderer| renderer.has_contexts());
        }
    }

    fn memory_changed(&mut self, memory: &Arc<GuestMemory>) {
        let shared = Arc::clone(&self.shared);
        let state = shared.lock();
        self.sync_generation(&state);
        if let Some(three_d) = &mut self.three_d {
            three_d.set_memory(&state.resources, memory);
        }
    }
}
