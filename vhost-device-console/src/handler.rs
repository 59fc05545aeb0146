// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Works on all queues: data of ports, and control messages.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use vhost_device_common::device::QueueHandler;
use vhost_device_common::statistics::Outcome;
use vhost_device_common::warn_limited;
use vhost_device_common::worker::{Pool, PoolLimits, Queue, Queues, Readiness, Timer, Watcher};

use crate::control::{HEADER_SIZE, Message};
use crate::log_file::Job;
use crate::port::{CONTROL, NOTIFIER};
use crate::state::{Shared, State};

/// Most bytes that are read from a client at a time.
const READ_SIZE: usize = 64 << 10;
/// Interval at which ports look at what the kernel does not report.
const TICK: Duration = Duration::from_millis(500);

/// Tokens of the timer, and of the file that wakes the thread. The others are numbers of ports and clients.
const TIMER: u32 = 1 << 31;
const WAKE: u32 = TIMER + 1;
const FILES: u32 = TIMER + 2;

/// Most threads that write files.
const FILE_THREADS: usize = 4;

/// What a queue is for (VIRTIO 1.3, 5.3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// Buffers for what the clients of this port send.
    Receive(usize),
    /// What the guest writes to this port.
    Transmit(usize),
    /// Buffers for control messages.
    ControlReceive,
    /// Control messages of the guest.
    ControlTransmit,
}

impl Role {
    fn of(queue: u16) -> Self {
        let queue = usize::from(queue);
        match (queue, queue % 2) {
            (0, _) => Self::Receive(0),
            (1, _) => Self::Transmit(0),
            (2, _) => Self::ControlReceive,
            (3, _) => Self::ControlTransmit,
            (_, 0) => Self::Receive(queue / 2 - 1),
            (..) => Self::Transmit(queue / 2 - 1),
        }
    }
}

/// Works on all queues.
pub struct ConsoleHandler {
    shared: Arc<Shared>,
    timer: Timer,
    /// The timer is set.
    is_ticking: bool,
    /// Threads that write files, if there are any.
    files: Option<Pool<Job, ()>>,
    bytes: Vec<u8>,
}

impl ConsoleHandler {
    /// Creates the handler, and watches the files of all ports.
    ///
    /// # Errors
    /// The limit of open files is reached.
    pub fn new(shared: Arc<Shared>, watcher: &Watcher) -> io::Result<Self> {
        let timer = Timer::new()?;
        watcher.add(&timer, Readiness::READABLE, TIMER)?;
        watcher.add(shared.wake_file(), Readiness::READABLE, WAKE)?;
        let mut state = shared.lock();
        for port in &mut state.ports {
            port.watch(watcher)?;
        }
        let limits = PoolLimits {
            threads: FILE_THREADS,
            items: state.ports.iter().map(|port| port.files().len()).sum(),
        };
        let run = |job: &mut Job| {
            job.run();
            Ok(())
        };
        let files = (limits.items > 0)
            .then(|| Pool::new("files", limits, watcher, FILES, run))
            .transpose()?;
        drop(state);
        // Ports look at their files at once.
        timer.set(Duration::ZERO);
        Ok(Self {
            shared,
            timer,
            is_ticking: true,
            files,
            bytes: vec![0; READ_SIZE],
        })
    }

    /// Has threads write what is to be written to files.
    fn write_files(&mut self, state: &mut State) {
        let Some(pool) = &mut self.files else {
            return;
        };
        while let Some((job, _)) = pool.finished() {
            state.job_ended(&job);
        }
        for (index, port) in state.ports.iter_mut().enumerate() {
            for number in 0..port.files().len() {
                if pool.has_room()
                    && let Some(job) = port.next_job(index, number)
                {
                    // There is room for one job of each file.
                    let _ = pool.submit(job);
                }
            }
        }
    }

    fn tick(&mut self, state: &mut State) {
        self.is_ticking = false;
        for index in 0..state.ports.len() {
            if let Some(port) = state.ports.get_mut(index) {
                port.tick();
            }
            state.follow_size(index);
        }
    }

    /// Sends the messages that are owed to the driver, as far as it has buffers for them.
    fn send_messages(state: &mut State, queue: &mut Queue) {
        while let Some((index, due, message)) = state.next_message() {
            let Some(mut chain) = queue.take() else {
                return;
            };
            let room = chain.writable_len().min(message.len() as u64) as usize;
            let part = message.get(..room).unwrap_or_default();
            let is_sent = room >= HEADER_SIZE && chain.write(part).is_ok();
            if is_sent {
                state.told(index, due);
            } else {
                warn_limited(format_args!(
                    "a buffer for control messages cannot be used; it is returned empty"
                ));
            }
            let written = if is_sent { room as u32 } else { 0 };
            let outcome = Outcome {
                request: CONTROL,
                bytes: written.into(),
                failed: !is_sent,
            };
            queue.complete_with(chain, written, outcome);
        }
    }

    /// Handles the messages of the driver.
    fn receive_messages(state: &mut State, queue: &mut Queue) {
        while let Some(mut chain) = queue.take() {
            let mut bytes = [0; HEADER_SIZE];
            let read = chain.read(&mut bytes);
            match read {
                Ok(()) => state.receive_message(Message::from_bytes(bytes)),
                Err(error) => warn_limited(format_args!("invalid control message: {error}")),
            }
            let outcome = Outcome {
                request: CONTROL,
                bytes: if read.is_ok() { HEADER_SIZE as u64 } else { 0 },
                failed: read.is_err(),
            };
            queue.complete_with(chain, 0, outcome);
        }
    }
}

impl QueueHandler for ConsoleHandler {
    fn process(&mut self, queue: &mut Queue) {
        let shared = Arc::clone(&self.shared);
        let state = &mut *shared.lock();
        let role = Role::of(queue.index());
        if !state.multiport && !matches!(role, Role::Receive(0) | Role::Transmit(0)) {
            return;
        }
        match role {
            Role::ControlReceive => Self::send_messages(state, queue),
            Role::ControlTransmit => Self::receive_messages(state, queue),
            Role::Receive(index) => {
                // A driver that starts has no buffers here before it has said that it is ready.
                if state.multiport && !state.is_ready && queue.has_available() {
                    state.continue_driver();
                }
                if state.takes_input(index)
                    && let Some(port) = state.ports.get_mut(index)
                    && port.receive(queue, &mut self.bytes)
                {
                    // The driver is to be told, and the timer may have to be set.
                    shared.wake();
                }
            }
            Role::Transmit(index) => {
                if let Some(port) = state.ports.get_mut(index) {
                    port.transmit(queue);
                }
                self.write_files(state);
            }
        }
    }

    fn ready(&mut self, token: u32, readiness: Readiness, _queues: &mut Queues) {
        let shared = Arc::clone(&self.shared);
        let state = &mut *shared.lock();
        match token {
            WAKE | FILES => {}
            TIMER => self.tick(state),
            token => {
                let (index, number) = ((token >> 16) as usize, token as u16);
                if let Some(port) = state.ports.get_mut(index) {
                    match number {
                        NOTIFIER => port.notified(),
                        number => port.client_ready(number, readiness),
                    }
                    state.follow_size(index);
                }
            }
        }
        self.write_files(state);
        if !self.is_ticking && state.ports.iter().any(|port| port.needs_tick()) {
            self.is_ticking = true;
            self.timer.set(TICK);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_queue_belongs_to_a_port_or_to_control() {
        let roles: Vec<Role> = (0..8).map(Role::of).collect();
        let expected = [
            Role::Receive(0),
            Role::Transmit(0),
            Role::ControlReceive,
            Role::ControlTransmit,
            Role::Receive(1),
            Role::Transmit(1),
            Role::Receive(2),
            Role::Transmit(2),
        ];
        assert_eq!(roles, expected);
        assert_eq!(Role::of(63), Role::Transmit(30));
    }
}
