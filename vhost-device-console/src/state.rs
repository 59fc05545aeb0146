// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the session, the queue thread and the control thread share: the ports, and what was negotiated.

use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard};

use rustix::event::{EventfdFlags, eventfd};
use vhost_device_common::device::{FrontEnd, StartError};
use vhost_device_common::lock;
use vhost_device_common::warn_limited;

use crate::control::{Driver, Due, Message, Size, event};
use crate::log_file::Job;
use crate::port::Port;

/// The ports, and a file that wakes the queue thread.
#[derive(Debug)]
pub struct Shared {
    state: Mutex<State>,
    wake: OwnedFd,
    /// Number of ports, which never changes.
    pub ports: usize,
}

impl Shared {
    /// # Errors
    /// The limit of open files is reached.
    pub fn new(state: State) -> Result<Self, StartError> {
        let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
        let wake = eventfd(0, flags)
            .map_err(|errno| StartError(format!("cannot create an eventfd: {errno}")))?;
        Ok(Self {
            ports: state.ports.len(),
            state: Mutex::new(state),
            wake,
        })
    }

    /// Locks the state. No thread holds it for longer than some milliseconds.
    pub fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Writes to files what is pending, while no queue thread does. A slow disk delays the caller, and no other thread.
    pub fn write_files(&self) {
        loop {
            let job = self.lock().next_job();
            let Some(job) = job else {
                return;
            };
            job.run();
            self.lock().job_ended(&job);
        }
    }

    /// Makes the queue thread look at its queues.
    pub fn wake(&self) {
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Returns the file that wakes the queue thread.
    pub fn wake_file(&self) -> &OwnedFd {
        &self.wake
    }
}

/// All that can change.
#[derive(Debug, Default)]
pub struct State {
    pub ports: Vec<Port>,
    /// MULTIPORT was negotiated. Otherwise there is only the first port, and no control queue.
    pub multiport: bool,
    /// SIZE was negotiated.
    pub sizes: bool,
    /// The driver has sent DEVICE_READY.
    pub is_ready: bool,
    /// RESIZE has rows before columns.
    pub swap_resize: bool,
    pub front_end: FrontEnd,
}

impl State {
    /// Forgets the driver.
    pub fn reset(&mut self) {
        self.is_ready = false;
        self.ports.iter_mut().for_each(Port::reset);
    }

    /// Returns the next bytes to write to any file.
    fn next_job(&mut self) -> Option<Job> {
        let mut ports = self.ports.iter_mut().enumerate();
        ports.find_map(|(index, port)| {
            (0..port.files().len()).find_map(|number| port.next_job(index, number))
        })
    }

    /// Notes that a job has ended.
    pub fn job_ended(&mut self, job: &Job) {
        let (index, number) = job.place;
        if let Some(port) = self.ports.get_mut(index) {
            port.job_ended(number);
        }
    }

    /// Begins with a driver that an earlier device served.
    pub fn continue_driver(&mut self) {
        self.is_ready = true;
        for port in &mut self.ports {
            port.driver = Driver::unknown();
        }
    }

    /// Returns whether the driver takes bytes for the port `index`.
    pub fn takes_input(&self, index: usize) -> bool {
        match self.multiport {
            true => self
                .ports
                .get(index)
                .is_some_and(|port| port.driver.is_open),
            false => index == 0,
        }
    }

    /// Handles a message of the driver.
    pub fn receive_message(&mut self, message: Message) {
        let Message { port, event, value } = message;
        if event == event::DEVICE_READY {
            self.is_ready = value == 1;
            let driver = match self.is_ready {
                true => Driver::started(),
                false => Driver::default(),
            };
            self.ports.iter_mut().for_each(|port| port.driver = driver);
            return;
        }
        let Some(port) = self.ports.get_mut(port as usize) else {
            return warn_limited(format_args!(
                "the guest sent message {event} for port {port}, which does not exist; it is ignored"
            ));
        };
        match event {
            event::PORT_READY => {
                port.driver.set_ready(value == 1);
                if value != 1 {
                    warn_limited(format_args!("the guest cannot use port {}", port.number));
                }
            }
            event::PORT_OPEN => port.driver.is_open = value != 0 && port.driver.is_ready,
            _ => log::debug!("message {event} of the guest is ignored"),
        }
    }

    /// Returns the next message that is owed to the driver, and the index of its port.
    pub fn next_message(&mut self) -> Option<(usize, Due, Vec<u8>)> {
        let (sizes, swap) = (self.sizes, self.swap_resize);
        for (index, port) in self.ports.iter_mut().enumerate() {
            while let Some(due) = port.driver.due(port.is_open()) {
                match encode(port, due, sizes, swap) {
                    Some(bytes) => return Some((index, due, bytes)),
                    None => port.driver.told(due),
                }
            }
        }
        None
    }

    /// Notes that the driver was told.
    pub fn told(&mut self, index: usize, due: Due) {
        if let Some(port) = self.ports.get_mut(index) {
            port.driver.told(due);
        }
    }

    /// Changes the size of a console.
    pub fn resize(&mut self, index: usize, size: Size) {
        let Some(port) = self.ports.get_mut(index) else {
            return;
        };
        if port.size.replace(size) != Some(size) {
            port.driver.resized();
            if index == 0 {
                self.front_end.config_changed();
            }
        }
    }

    /// Follows the sizes of the terminals.
    pub fn follow_size(&mut self, index: usize) {
        if let Some(size) = self.ports.get_mut(index).and_then(Port::new_size) {
            self.resize(index, size);
        }
    }
}

/// Returns a message for the driver, or `None` if there is nothing to say.
fn encode(port: &Port, due: Due, sizes: bool, swap: bool) -> Option<Vec<u8>> {
    let message = |event, value| Message {
        port: port.number,
        event,
        value,
    };
    let name = || {
        let name = port.name.as_ref()?;
        Some(message(event::PORT_NAME, 1).with(name.as_bytes()))
    };
    match due {
        Due::Add => Some(message(event::PORT_ADD, 1).with(&[])),
        Due::Role if port.is_console() => Some(message(event::CONSOLE_PORT, 1).with(&[])),
        Due::Role => name(),
        Due::Name => port.is_console().then(name).flatten(),
        Due::Size => {
            let Size { columns, rows } = port.size.filter(|_| sizes && port.is_console())?;
            let order = if swap {
                [rows, columns]
            } else {
                [columns, rows]
            };
            let bytes = order.map(u16::to_le_bytes).concat();
            Some(message(event::RESIZE, 0).with(&bytes))
        }
        Due::Open(is_open) => Some(message(event::PORT_OPEN, is_open.into()).with(&[])),
    }
}
