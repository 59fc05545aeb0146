// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The driver's side of a console device: control messages, and the data of its ports.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::{Buffer, FrontEnd, Queue, Result};

/// Feature bits.
pub const SIZE: u64 = 1 << 0;
/// More than one port, and control messages.
pub const MULTIPORT: u64 = 1 << 1;
/// The driver can write a byte to the config space.
pub const EMERG_WRITE: u64 = 1 << 2;

/// Events of control messages.
pub mod event {
    #![allow(missing_docs)]
    pub const DEVICE_READY: u16 = 0;
    pub const PORT_ADD: u16 = 1;
    pub const PORT_REMOVE: u16 = 2;
    pub const PORT_READY: u16 = 3;
    pub const CONSOLE_PORT: u16 = 4;
    pub const RESIZE: u16 = 5;
    pub const PORT_OPEN: u16 = 6;
    pub const PORT_NAME: u16 = 7;
}

/// Descriptors of each queue.
const QUEUE_SIZE: u16 = 64;
/// Size of each buffer for control messages, in bytes.
const CONTROL_SIZE: u32 = 256;
/// Size of each buffer for data, in bytes.
const DATA_SIZE: u32 = 4096;
/// Number of buffers that the driver keeps available in each queue for the device to fill.
const BUFFERS: u16 = 16;
/// Size of the memory for what is written to a port, in bytes.
const AREA: u32 = 1 << 20;

/// A control message of the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Number of the port.
    pub port: u32,
    /// What it says.
    pub event: u16,
    /// Its value.
    pub value: u16,
    /// The bytes after that: a name or a size.
    pub rest: Vec<u8>,
}

/// A queue with buffers for the device to fill.
#[derive(Debug)]
pub struct Filled {
    /// The queue.
    pub queue: Queue,
    /// Addresses of the buffers, by the heads of their chains.
    buffers: HashMap<u16, Buffer>,
}

impl Filled {
    fn new(queue: Queue) -> Self {
        Self {
            queue,
            buffers: HashMap::new(),
        }
    }

    /// Makes `buffer` available.
    pub fn post(&mut self, buffer: Buffer) {
        let head = self.queue.submit(&[buffer]);
        self.buffers.insert(head, buffer);
    }

    /// Waits for a filled buffer. Returns it and the number of its bytes.
    pub fn take(&mut self, limit: Duration) -> Option<(Buffer, u32)> {
        if !self.queue.wait_used(limit) {
            return None;
        }
        let used = self.queue.take_used()?;
        let buffer = self.buffers.remove(&used.head).expect("a known head");
        assert!(used.length <= buffer.length, "{used:?} in {buffer:?}");
        Some((buffer, used.length))
    }
}

/// The queues of a port.
#[derive(Debug)]
pub struct Port {
    /// Buffers for what clients send.
    pub receive: Filled,
    /// What the guest writes.
    pub transmit: Queue,
    area: u64,
}

/// A driver of a console device.
pub struct ConsoleDriver {
    /// Its front-end.
    pub front_end: FrontEnd,
    /// Buffers for messages of the device, and messages of the driver, with MULTIPORT.
    pub control: Option<(Filled, Queue)>,
    /// The ports.
    pub ports: Vec<Port>,
    message: u64,
}

impl ConsoleDriver {
    /// Starts all queues, and sends nothing. The device has `ports` ports.
    ///
    /// # Errors
    /// A queue cannot be started.
    pub fn new(front_end: FrontEnd, ports: usize) -> Result<Self> {
        let is_multiport = front_end.features() & MULTIPORT != 0;
        let control = match is_multiport {
            true => Some((
                Filled::new(front_end.queue(2, QUEUE_SIZE)?),
                front_end.queue(3, QUEUE_SIZE)?,
            )),
            false => None,
        };
        let first = |port: usize| if port == 0 { 0 } else { 2 * port + 2 };
        let count = if is_multiport { ports } else { 1 };
        let ports = (0..count).map(|port| {
            Ok(Port {
                receive: Filled::new(front_end.queue(first(port), QUEUE_SIZE)?),
                transmit: front_end.queue(first(port) + 1, QUEUE_SIZE)?,
                area: front_end.memory().allocate(AREA.into(), 16),
            })
        });
        let ports = ports.collect::<Result<_>>()?;
        let message = front_end.memory().allocate(8, 8);
        Ok(Self {
            front_end,
            control,
            ports,
            message,
        })
    }

    /// Makes buffers for control messages available.
    pub fn post_control(&mut self) {
        let memory = self.front_end.memory();
        if let Some((receive, _)) = &mut self.control {
            for _ in 0..BUFFERS {
                let address = memory.allocate(CONTROL_SIZE.into(), 16);
                receive.post(Buffer::writable(address, CONTROL_SIZE));
            }
        }
    }

    /// Makes buffers for the data of a port available.
    pub fn post_data(&mut self, port: usize) {
        let memory = self.front_end.memory();
        for _ in 0..BUFFERS {
            let address = memory.allocate(DATA_SIZE.into(), 16);
            let buffer = Buffer::writable(address, DATA_SIZE);
            self.ports[port].receive.post(buffer);
        }
    }

    /// Starts as Linux does: each port is added, described, and opened if it is a console. Returns the messages of the device.
    pub fn start(&mut self, limit: Duration) -> Vec<Message> {
        if self.control.is_none() {
            self.post_data(0);
            return Vec::new();
        }
        self.post_control();
        self.send(0, event::DEVICE_READY, 1);
        let mut seen = Vec::new();
        let mut settled = 0;
        while settled < self.ports.len() {
            let message = self.message(limit).expect("a control message");
            match message.event {
                event::PORT_ADD => {
                    self.post_data(message.port as usize);
                    self.send(message.port, event::PORT_READY, 1);
                }
                event::CONSOLE_PORT => self.send(message.port, event::PORT_OPEN, 1),
                event::PORT_OPEN => settled += 1,
                _ => {}
            }
            seen.push(message);
        }
        seen
    }

    /// Sends a control message, and waits until the device has taken it.
    pub fn send(&mut self, port: u32, event: u16, value: u16) {
        let mut bytes = port.to_le_bytes().to_vec();
        bytes.extend(event.to_le_bytes());
        bytes.extend(value.to_le_bytes());
        self.send_bytes(&bytes);
    }

    /// Sends up to 8 bytes on the queue for control messages, and waits until the device has taken them.
    pub fn send_bytes(&mut self, bytes: &[u8]) {
        self.front_end.memory().write(self.message, bytes);
        let (_, transmit) = self.control.as_mut().expect("MULTIPORT");
        transmit.submit(&[Buffer::readable(self.message, bytes.len() as u32)]);
        transmit.take_used_within(Duration::from_secs(20));
    }

    /// Waits for a control message.
    pub fn message(&mut self, limit: Duration) -> Option<Message> {
        let (receive, _) = self.control.as_mut()?;
        let (buffer, length) = receive.take(limit)?;
        let bytes = self
            .front_end
            .memory()
            .read_vec(buffer.address, length as usize);
        receive.post(buffer);
        let (header, rest) = bytes.split_first_chunk::<8>().expect("a whole message");
        let [a, b, c, d, e, f, g, h] = *header;
        Some(Message {
            port: u32::from_le_bytes([a, b, c, d]),
            event: u16::from_le_bytes([e, f]),
            value: u16::from_le_bytes([g, h]),
            rest: rest.to_vec(),
        })
    }

    /// Waits for a message with this event, and skips others.
    pub fn expect(&mut self, event: u16, limit: Duration) -> Message {
        let deadline = Instant::now() + limit;
        while Instant::now() < deadline {
            if let Some(message) = self.message(Duration::from_millis(100))
                && message.event == event
            {
                return message;
            }
        }
        panic!("no message {event}");
    }

    /// Makes `bytes`, at most 1 MiB, available on a port in one chain of buffers of `piece` bytes, and does not wait.
    pub fn submit(&mut self, port: usize, bytes: &[u8], piece: usize) {
        let Port { transmit, area, .. } = &mut self.ports[port];
        self.front_end.memory().write(*area, bytes);
        let mut address = *area;
        let buffers: Vec<Buffer> = bytes
            .chunks(piece)
            .map(|chunk| {
                let buffer = Buffer::readable(address, chunk.len() as u32);
                address += chunk.len() as u64;
                buffer
            })
            .collect();
        transmit.submit(&buffers);
    }

    /// Waits until the device has taken a chain of a port. Returns whether it has.
    pub fn is_taken(&mut self, port: usize, limit: Duration) -> bool {
        let transmit = &mut self.ports[port].transmit;
        transmit.wait_used(limit) && transmit.take_used().is_some()
    }

    /// Writes `bytes` to a port, 4 KiB at a time, and waits until the device has taken all.
    pub fn write(&mut self, port: usize, bytes: &[u8], limit: Duration) {
        for chunk in bytes.chunks(DATA_SIZE as usize) {
            self.submit(port, chunk, chunk.len());
            assert!(self.is_taken(port, limit), "a chain is not taken");
        }
    }

    /// Reads `count` bytes that clients have sent to a port; fewer if no more arrive within `limit`.
    pub fn read(&mut self, port: usize, count: usize, limit: Duration) -> Vec<u8> {
        let mut bytes = Vec::new();
        while bytes.len() < count {
            let receive = &mut self.ports[port].receive;
            let Some((buffer, length)) = receive.take(limit) else {
                break;
            };
            bytes.extend(
                self.front_end
                    .memory()
                    .read_vec(buffer.address, length as usize),
            );
            self.ports[port].receive.post(buffer);
        }
        bytes
    }
}
