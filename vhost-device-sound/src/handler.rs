// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Serves all four queues on one thread, which wakes up for requests and when a period of a stream elapses.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vhost_device_common::chain::Chain;
use vhost_device_common::device::QueueHandler;
use vhost_device_common::statistics::Outcome;
use vhost_device_common::worker::{Queue, Queues, Readiness, Timer, Watcher};
use vhost_device_common::{lock, warn_limited};

use crate::backend::Pulse;
use crate::card::Card;
use crate::control::{self, Answer};
use crate::protocol::{CONTROL_QUEUE, Direction, EVENT_QUEUE, Event, Status, TX_QUEUE};
use crate::request_type;
use crate::stream::Finished;

/// Tokens of the timers.
const TICK: u32 = 0;
const WAKE: u32 = 1;
/// Token of the socket of the sound server.
const CLIENT: u32 = 2;

/// How often the reply to RELEASE waits for buffers that the driver made available before the request.
const RELEASE_ROUNDS: u32 = 4;

/// Returns the direction of the streams whose buffers are in a queue.
fn direction_of(queue: u16) -> Option<Direction> {
    match queue {
        CONTROL_QUEUE | EVENT_QUEUE => None,
        TX_QUEUE => Some(Direction::Output),
        _ => Some(Direction::Input),
    }
}

/// A RELEASE whose reply follows that of the buffers.
struct Release {
    chain: Chain,
    /// Index of the queue of the buffers.
    queue: u16,
    rounds: u32,
}

/// Serves the queues.
pub struct SoundHandler {
    card: Arc<Mutex<Card>>,
    /// Expires when a period elapses.
    tick: Timer,
    /// When `tick` expires next.
    armed: Option<Instant>,
    /// Expires when something is to be done with several queues: `done`, `releases`, or events.
    wake: Arc<Timer>,
    /// The client of the sound server.
    client: Option<Arc<Mutex<Pulse>>>,
    /// Buffers to be completed, with the index of their queue.
    done: Vec<(u16, Finished)>,
    releases: Vec<Release>,
}

impl SoundHandler {
    /// Creates a handler. Other threads set `wake` when they have added an event to `card`.
    ///
    /// # Errors
    /// The limit of open files is reached.
    pub fn new(
        card: Arc<Mutex<Card>>,
        wake: Arc<Timer>,
        client: Option<Arc<Mutex<Pulse>>>,
        watcher: &Watcher,
    ) -> io::Result<Self> {
        let tick = Timer::new()?;
        watcher.add(&tick, Readiness::READABLE, TICK)?;
        watcher.add(&*wake, Readiness::READABLE, WAKE)?;
        if let Some(client) = &client {
            lock(client).watch(watcher.clone(), CLIENT);
        }
        Ok(Self {
            card,
            tick,
            armed: None,
            wake,
            client,
            done: Vec::new(),
            releases: Vec::new(),
        })
    }

    /// Sets the timer for the next period.
    fn arm(&mut self, card: &Card, now: Instant) {
        let client = self.client.as_ref();
        let client = client.and_then(|client| lock(client).next_tick());
        let next = card.next_tick(now).into_iter().chain(client).min();
        if next.is_some() && next != self.armed {
            self.armed = next;
            let time = next.map_or(Duration::ZERO, |next| next.saturating_duration_since(now));
            self.tick.set(time);
        }
    }

    /// Has [`SoundHandler::ready`] called soon, if something is to be done with several queues.
    fn wake_if_needed(&self, card: &Card) {
        if !self.done.is_empty() || !self.releases.is_empty() || card.next_event().is_some() {
            self.wake.set(Duration::ZERO);
        }
    }

    fn take_requests(&mut self, card: &mut Card, queue: &mut Queue, now: Instant) {
        while let Some(mut chain) = queue.take() {
            match control::execute(card, &mut chain, now, &mut self.done) {
                Answer::Written { written, failed } => {
                    queue.complete_with(chain, written, control_outcome(failed));
                }
                Answer::Released(stream) => {
                    let stream = card.streams.get(stream);
                    self.releases.push(Release {
                        chain,
                        queue: stream.map_or(TX_QUEUE, |stream| stream.direction().queue()),
                        rounds: 0,
                    });
                }
            }
        }
    }

    fn take_buffers(
        &mut self,
        card: &mut Card,
        queue: &mut Queue,
        direction: Direction,
        now: Instant,
    ) {
        self.complete_done_of(queue);
        let mut finished = Vec::new();
        while let Some(chain) = queue.take() {
            match queue.is_stopping() {
                // It could not be put back, and must not be held.
                true => {
                    let mut chain = chain;
                    let _ = chain.split_tail(crate::protocol::PCM_STATUS_SIZE.into());
                    finished.push(crate::stream::complete(chain, direction, Status::Ok, 0, 0));
                }
                false => card.take(direction, chain, now, &mut finished),
            }
            complete_all(queue, finished.drain(..));
        }
        for stream in card.streams_of(direction) {
            stream.move_taken(now, &mut finished);
        }
        complete_all(queue, finished);
    }

    /// Completes the buffers of one queue that are done. Others that follow them may be completed then.
    fn complete_done_of(&mut self, queue: &mut Queue) {
        let index = queue.index();
        let done = self.done.extract_if(.., |(queue, _)| *queue == index);
        complete_all(queue, done.map(|(_, finished)| finished));
    }

    /// Completes the buffers that are done, then the requests that wait for that.
    fn complete_done(&mut self, queues: &mut Queues) {
        for (index, finished) in self.done.drain(..) {
            // A queue that has stopped has taken back its buffers before.
            if let Some(queue) = queues.get_mut(index) {
                complete_all(queue, [finished]);
            }
        }
        if self.releases.is_empty() {
            return;
        }
        for release in std::mem::take(&mut self.releases) {
            let mut buffers = queues.get_mut(release.queue);
            let has_more = match &mut buffers {
                Some(buffers) => {
                    buffers.publish();
                    buffers.has_available()
                }
                None => false,
            };
            if has_more && release.rounds < RELEASE_ROUNDS {
                self.releases.push(Release {
                    rounds: release.rounds + 1,
                    ..release
                });
                continue;
            }
            if let Some(queue) = queues.get_mut(CONTROL_QUEUE) {
                let mut chain = release.chain;
                let written = control::respond(&mut chain, Status::Ok);
                queue.complete_with(chain, written, control_outcome(false));
            }
        }
    }
}

fn control_outcome(failed: bool) -> Outcome {
    Outcome {
        request: request_type::CONTROL,
        bytes: 0,
        failed,
    }
}

fn complete_all(queue: &mut Queue, finished: impl IntoIterator<Item = Finished>) {
    for Finished {
        chain,
        written,
        outcome,
    } in finished
    {
        queue.complete_with(chain, written, outcome);
    }
}

/// Sends events, as long as the driver has buffers for them.
fn send_events(card: &mut Card, queue: &mut Queue) {
    while queue.has_available()
        && let Some(event) = card.next_event()
        && let Some(mut chain) = queue.take()
    {
        let (written, failed) = match chain.write(&event.to_bytes()) {
            Ok(()) => {
                card.remove_event();
                (Event::SIZE, false)
            }
            Err(error) => {
                warn_limited(format_args!("cannot fill an event buffer: {error}"));
                (0, true)
            }
        };
        let outcome = Outcome {
            request: request_type::EVENT,
            bytes: written.into(),
            failed,
        };
        queue.complete_with(chain, written, outcome);
    }
}

impl Drop for SoundHandler {
    fn drop(&mut self) {
        if let Some(client) = &self.client {
            lock(client).unwatch();
        }
    }
}

impl QueueHandler for SoundHandler {
    fn process(&mut self, queue: &mut Queue) {
        let now = Instant::now();
        let card = Arc::clone(&self.card);
        let card = &mut *lock(&card);
        match (queue.index(), direction_of(queue.index())) {
            (_, Some(direction)) => self.take_buffers(card, queue, direction, now),
            (EVENT_QUEUE, None) => return send_events(card, queue),
            (_, None) => self.take_requests(card, queue, now),
        }
        self.wake_if_needed(card);
        self.arm(card, now);
    }

    fn ready(&mut self, token: u32, _readiness: Readiness, queues: &mut Queues) {
        let now = Instant::now();
        let card = Arc::clone(&self.card);
        let card = &mut *lock(&card);
        if token == TICK {
            self.armed = None;
        }
        if let Some(client) = &self.client {
            let client = &mut *lock(client);
            match token {
                TICK => client.tick(now),
                CLIENT => client.ready(now),
                _ => {}
            }
        }
        if token != WAKE {
            card.tick(now, &mut self.done);
        }
        self.complete_done(queues);
        if let Some(queue) = queues.get_mut(EVENT_QUEUE) {
            send_events(card, queue);
        }
        if !self.releases.is_empty() {
            self.wake.set(Duration::ZERO);
        }
        self.arm(card, now);
    }

    fn set_enabled(&mut self, queue: &mut Queue, enabled: bool) {
        let Some(direction) = direction_of(queue.index()) else {
            return;
        };
        let now = Instant::now();
        let card = Arc::clone(&self.card);
        let card = &mut *lock(&card);
        self.complete_done_of(queue);
        let mut finished = Vec::new();
        for stream in card.streams_of(direction) {
            stream.set_active(enabled, now, &mut finished);
        }
        complete_all(queue, finished);
        self.arm(card, now);
    }

    /// Puts the buffers back into the ring, from which this device, or another one, takes them when the queue starts again. So a guest
    /// that is paused loses no sound, and the front-end does not wait until it was played.
    fn drain(&mut self, queue: &mut Queue) {
        let Some(direction) = direction_of(queue.index()) else {
            return;
        };
        let now = Instant::now();
        let card = Arc::clone(&self.card);
        let card = &mut *lock(&card);
        self.complete_done_of(queue);
        let mut finished = Vec::new();
        for stream in card.streams_of(direction) {
            stream.set_active(false, now, &mut finished);
        }
        let held = card.take_back(direction, now, &mut finished);
        complete_all(queue, finished);
        for chain in held {
            queue.put_back(chain);
        }
    }
}
