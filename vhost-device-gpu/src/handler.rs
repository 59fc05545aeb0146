// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Takes commands from the two queues, and answers them in order.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use vhost_device_common::chain::Chain;
use vhost_device_common::device::QueueHandler;
use vhost_device_common::warn_limited;
use vhost_device_common::worker::{Poller, Queue, Queues, Timer, Token};
use zerocopy::IntoBytes;

use crate::command::{self, Outcome, answered, flushed, read};
use crate::display::Query;
use crate::protocol::{Header, Refusal, Response};
use crate::state::{Shared, State};

/// Number of the control queue; the cursor queue is the other.
const CONTROL: u16 = 0;
/// What the handler waits for.
const DISPLAY: u32 = 0;
const TIMER: u32 = 1;
/// A display that does nothing for this long is not waited for any more.
const PATIENCE: Duration = Duration::from_secs(1);

/// What a command waits for.
#[derive(Clone, Copy, Debug)]
enum Wait {
    Flush,
    Answer(Query),
}

/// A command that waits for the display. Those behind it stay in the queue.
struct Held {
    chain: Chain,
    header: Header,
    wait: Wait,
    /// How far the display was when the timer was set.
    progress: u64,
}

/// Works on both queues.
pub struct GpuHandler {
    shared: Arc<Shared>,
    events: Arc<OwnedFd>,
    timer: Timer,
    held: Option<Held>,
}

impl GpuHandler {
    pub fn new(shared: Arc<Shared>) -> io::Result<Self> {
        let events = shared.lock().display.events();
        Ok(Self {
            shared,
            events,
            timer: Timer::new()?,
            held: None,
        })
    }

    fn control(&mut self, queue: &mut Queue) {
        let shared = Arc::clone(&self.shared);
        let mut state = shared.lock();
        while self.held.is_none()
            && let Some(mut chain) = queue.take()
        {
            let Ok(header) = read::<Header>(&mut chain) else {
                respond(queue, chain, &Header::default(), &Refusal::Parameter.into());
                continue;
            };
            log::trace!("command {:#x}", header.kind);
            let outcome = chain
                .check()
                .map_err(Refusal::from)
                .and_then(|()| command::control(&mut state, &header, &mut chain));
            match outcome {
                Ok(Outcome::Done(response)) => respond(queue, chain, &header, &response),
                Ok(Outcome::Flushing) => self.hold(&mut state, queue, chain, header, Wait::Flush),
                Ok(Outcome::Asking(query)) => {
                    if state.display.ask(query) {
                        self.hold(&mut state, queue, chain, header, Wait::Answer(query));
                    } else {
                        respond(queue, chain, &header, &answered(query, None));
                    }
                }
                Err(refusal) => {
                    let kind = header.kind.get();
                    warn_limited(format_args!("command {kind:#x} is refused: {refusal:?}"));
                    respond(queue, chain, &header, &refusal.into());
                }
            }
        }
        if self.held.is_none() {
            self.advance(&mut state, queue, false);
        }
    }

    /// Lets a command wait for the display, if it must.
    fn hold(
        &mut self,
        state: &mut State,
        queue: &mut Queue,
        chain: Chain,
        header: Header,
        wait: Wait,
    ) {
        self.held = Some(Held {
            chain,
            header,
            wait,
            progress: 0,
        });
        self.advance(state, queue, false);
        if let Some(held) = &mut self.held {
            held.progress = state.display.progress();
            self.timer.set(PATIENCE);
        }
    }

    /// Goes on with the display, and with the command that waits for it.
    fn advance(&mut self, state: &mut State, queue: &mut Queue, readable: bool) {
        let State { resources, display } = state;
        let answer = display.advance(resources, readable);
        let Some(held) = &self.held else { return };
        let response = match held.wait {
            Wait::Flush if display.is_flushed() => flushed(),
            Wait::Answer(query) if answer.is_some() || !display.is_asked() => {
                answered(query, answer.as_deref())
            }
            _ => return,
        };
        self.release(queue, &response);
    }

    /// Answers the command that waits, without the display.
    fn give_up(&mut self, queue: &mut Queue) {
        let response = match &self.held {
            None => return,
            Some(Held {
                wait: Wait::Flush, ..
            }) => flushed(),
            Some(Held {
                wait: Wait::Answer(query),
                ..
            }) => answered(*query, None),
        };
        self.shared.lock().display.forget_question();
        self.release(queue, &response);
    }

    fn release(&mut self, queue: &mut Queue, response: &Response) {
        if let Some(Held { chain, header, .. }) = self.held.take() {
            respond(queue, chain, &header, response);
        }
    }

    fn timer_expired(&mut self, queue: &mut Queue) {
        let progress = self.shared.lock().display.progress();
        let Some(held) = &mut self.held else { return };
        if held.progress != progress {
            held.progress = progress;
            return self.timer.set(PATIENCE);
        }
        warn_limited(format_args!(
            "the display does nothing; the guest does not wait for it"
        ));
        self.give_up(queue);
    }
}

/// Answers a command.
fn respond(queue: &mut Queue, mut chain: Chain, header: &Header, response: &Response) {
    let mut kind = response.kind;
    let mut body = response.body.as_slice();
    if chain.writable_len() < (size_of::<Header>() + body.len()) as u64 {
        // The driver left no room for what it asked for.
        (kind, body) = (Refusal::Parameter as u32, &[]);
    }
    let head = header.response(kind);
    let written = chain
        .write(head.as_bytes())
        .and_then(|()| chain.write(body))
        .map_or(0, |()| size_of::<Header>() + body.len());
    queue.complete(chain, written as u32);
}

impl QueueHandler for GpuHandler {
    fn process(&mut self, queue: &mut Queue) {
        if queue.index() == CONTROL {
            return self.control(queue);
        }
        let mut state = self.shared.lock();
        while let Some(mut chain) = queue.take() {
            if let Err(refusal) = command::cursor(&mut state, &mut chain) {
                warn_limited(format_args!("a cursor command is refused: {refusal:?}"));
            }
            // Drivers leave no room for a response here.
            queue.complete(chain, 0);
        }
        let State { resources, display } = &mut *state;
        display.advance(resources, false);
    }

    fn watch(&mut self, poller: &mut dyn Poller) -> io::Result<()> {
        poller.watch(self.events.as_fd(), Token::Device(DISPLAY))?;
        poller.watch(self.timer.as_fd(), Token::Device(TIMER))
    }

    fn ready(&mut self, token: u32, queues: &mut Queues) {
        let Some(queue) = queues.get_mut(CONTROL) else {
            // Between two drivers the display is still heard.
            let mut state = self.shared.lock();
            let State { resources, display } = &mut *state;
            display.drain_events();
            display.advance(resources, true);
            return;
        };
        if token == TIMER {
            return self.timer_expired(queue);
        }
        let shared = Arc::clone(&self.shared);
        let mut state = shared.lock();
        state.display.drain_events();
        self.advance(&mut state, queue, true);
    }

    fn drain(&mut self, queue: &mut Queue) {
        if queue.index() == CONTROL {
            self.give_up(queue);
        }
    }
}
