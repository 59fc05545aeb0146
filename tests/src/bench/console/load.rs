// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The driver of a console device (VIRTIO 1.3, 5.3), and the loads that it makes.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::client::Client;
use crate::bench::AnyError;
use crate::bench::histogram::Histogram;
use crate::front_end::{Buffer, FrontEnd, Queue};

/// Time limit for each step.
const LIMIT: Duration = Duration::from_secs(20);
/// Descriptors of a ring: the most that the other back-end takes.
const QUEUE_SIZE: u16 = 128;
/// Bytes for a control message, with a name.
const MESSAGE: u32 = 256;

/// Events of control messages.
mod event {
    pub const DEVICE_READY: u16 = 0;
    pub const PORT_ADD: u16 = 1;
    pub const PORT_READY: u16 = 3;
    pub const PORT_OPEN: u16 = 6;
}

/// What a load has done in the window.
#[derive(Debug, Default)]
pub struct Measured {
    /// Bytes that arrived.
    pub bytes: u64,
    /// How long that took.
    pub time: Duration,
    /// CPU time of the back-end.
    pub cpu: Duration,
    /// Round trips of keys.
    pub latencies: Histogram,
}

/// When to measure.
#[derive(Debug, Clone, Copy)]
pub struct Schedule {
    /// The time before the window.
    pub warm_up: Duration,
    /// The window.
    pub window: Duration,
}

/// Measures what `bytes` counts, and the CPU time, between two points of time.
struct Window<C> {
    schedule: Schedule,
    cpu_time: C,
    started: Instant,
    first: Option<(Instant, u64, Duration)>,
}

impl<C: Fn() -> io::Result<Duration>> Window<C> {
    fn new(schedule: Schedule, cpu_time: C) -> Self {
        Self {
            schedule,
            cpu_time,
            started: Instant::now(),
            first: None,
        }
    }

    /// Returns what was measured, when the window is over.
    fn look(&mut self, bytes: u64) -> io::Result<Option<Measured>> {
        let now = Instant::now();
        match self.first {
            None if now - self.started >= self.schedule.warm_up => {
                self.first = Some((now, bytes, (self.cpu_time)()?));
            }
            Some((start, before, cpu)) if now - start >= self.schedule.window => {
                return Ok(Some(Measured {
                    bytes: bytes - before,
                    time: now - start,
                    cpu: (self.cpu_time)()?.saturating_sub(cpu),
                    latencies: Histogram::default(),
                }));
            }
            _ => {}
        }
        Ok(None)
    }
}

/// Buffers of one queue, which the device always has.
struct Buffers {
    queue: Queue,
    buffers: Vec<Buffer>,
    buffer_of_head: [usize; QUEUE_SIZE as usize],
    outstanding: usize,
}

impl Buffers {
    fn new(front_end: &FrontEnd, queue: u32, buffers: Vec<Buffer>) -> Result<Self, AnyError> {
        Ok(Self {
            queue: front_end.queue(queue as usize, QUEUE_SIZE)?,
            buffers,
            buffer_of_head: [0; QUEUE_SIZE as usize],
            outstanding: 0,
        })
    }

    /// Creates writable buffers of `size` bytes each.
    fn writable(
        front_end: &FrontEnd,
        queue: u32,
        count: usize,
        size: u32,
    ) -> Result<Self, AnyError> {
        let allocate = || Buffer::writable(front_end.memory().allocate(size.into(), 4096), size);
        let buffers = std::iter::repeat_with(allocate).take(count).collect();
        Self::new(front_end, queue, buffers)
    }

    /// Creates readable buffers of `size` printable bytes each.
    fn readable(
        front_end: &FrontEnd,
        queue: u32,
        count: usize,
        size: u32,
    ) -> Result<Self, AnyError> {
        let allocate = || {
            let address = front_end.memory().allocate(size.into(), 4096);
            front_end.memory().fill(address, size as usize, b'x');
            Buffer::readable(address, size)
        };
        let buffers = std::iter::repeat_with(allocate).take(count).collect();
        Self::new(front_end, queue, buffers)
    }

    fn add(&mut self, index: usize) {
        let head = self.queue.add(&[self.buffers[index]]).expect("room");
        self.buffer_of_head[usize::from(head)] = index;
        self.outstanding += 1;
    }

    fn add_all(&mut self) {
        (0..self.buffers.len()).for_each(|index| self.add(index));
        self.flush();
    }

    fn flush(&mut self) {
        self.queue.publish();
        self.queue.kick();
    }

    /// Takes a used buffer: its index, and the length.
    fn take(&mut self) -> Option<(usize, u32)> {
        let used = self.queue.take_used()?;
        self.outstanding -= 1;
        Some((self.buffer_of_head[usize::from(used.head)], used.length))
    }

    fn wait(&mut self) -> io::Result<()> {
        match self.queue.wait_used(LIMIT) {
            true => Ok(()),
            false => Err(io::Error::other(format!("no buffer was used in {LIMIT:?}"))),
        }
    }

    /// Waits for one used buffer.
    fn take_one(&mut self) -> io::Result<(usize, u32)> {
        self.wait()?;
        self.take()
            .ok_or_else(|| io::Error::other("no used buffer"))
    }
}

/// A connection with started queues and an open port.
pub struct Driver {
    front_end: FrontEnd,
    port: u32,
    control_receive: Buffers,
    control_transmit: Buffers,
}

impl Driver {
    /// Opens a port, to which a client is connected.
    pub fn new(front_end: FrontEnd, port: u32) -> Result<Self, AnyError> {
        // One buffer: the other back-end loses those that it does not need at once.
        let control_receive = Buffers::writable(&front_end, 2, 1, MESSAGE)?;
        let control_transmit = Buffers::readable(&front_end, 3, 1, 8)?;
        let mut driver = Self {
            front_end,
            port,
            control_receive,
            control_transmit,
        };
        driver.open()?;
        Ok(driver)
    }

    fn open(&mut self) -> io::Result<()> {
        self.control_receive.add_all();
        self.send(u32::MAX, event::DEVICE_READY)?;
        loop {
            match self.receive()? {
                (port, event::PORT_ADD, _) => self.send(port, event::PORT_READY)?,
                (port, event::PORT_OPEN, 1) if port == self.port => {
                    return self.send(port, event::PORT_OPEN);
                }
                _ => {}
            }
        }
    }

    /// Sends a control message with value 1.
    fn send(&mut self, port: u32, event: u16) -> io::Result<()> {
        let mut message = port.to_le_bytes().to_vec();
        message.extend([event, 1].map(u16::to_le_bytes).concat());
        let address = self.control_transmit.buffers[0].address;
        self.front_end.memory().write(address, &message);
        self.control_transmit.add_all();
        self.control_transmit.take_one().map(drop)
    }

    /// Receives a control message: port, event, value.
    fn receive(&mut self) -> io::Result<(u32, u16, u16)> {
        self.control_receive.take_one()?;
        let address = self.control_receive.buffers[0].address;
        let memory = self.front_end.memory();
        let message = (
            memory.read_u32(address),
            memory.read_u16(address + 4),
            memory.read_u16(address + 6),
        );
        self.control_receive.add_all();
        Ok(message)
    }

    /// Returns the numbers of the port's queues.
    fn queues(&self) -> (u32, u32) {
        match self.port {
            0 => (0, 1),
            port => (2 * port + 2, 2 * port + 3),
        }
    }

    /// The guest writes buffers of `size` bytes, and the client reads.
    pub fn transmit(
        &mut self,
        client: &Client,
        size: u32,
        schedule: Schedule,
        cpu_time: impl Fn() -> io::Result<Duration>,
    ) -> Result<Measured, AnyError> {
        let (_, queue) = self.queues();
        let mut buffers = Buffers::readable(&self.front_end, queue, QUEUE_SIZE.into(), size)?;
        let (arrived, stop) = (AtomicU64::new(0), AtomicBool::new(false));
        thread::scope(|scope| {
            let reader = scope.spawn(|| client.read_all(&arrived, &stop));
            let drive = || -> io::Result<Measured> {
                let mut window = Window::new(schedule, cpu_time);
                let mut sent = QUEUE_SIZE as u64;
                buffers.add_all();
                let measured = loop {
                    buffers.wait()?;
                    buffers.queue.disarm_interrupt();
                    while let Some((index, _)) = buffers.take() {
                        buffers.add(index);
                        sent += 1;
                    }
                    buffers.flush();
                    if let Some(measured) = window.look(arrived.load(Ordering::Relaxed))? {
                        break measured;
                    }
                };
                while buffers.outstanding > 0 {
                    buffers.take_one()?;
                }
                wait_for("arrive", sent * u64::from(size), &arrived)?;
                Ok(measured)
            };
            let measured = drive();
            stop.store(true, Ordering::Relaxed);
            reader.join().expect("the reader does not panic")?;
            Ok(measured?)
        })
    }

    /// The client writes, and the guest has buffers of `size` bytes.
    pub fn receive_all(
        &mut self,
        client: &Client,
        size: u32,
        schedule: Schedule,
        cpu_time: impl Fn() -> io::Result<Duration>,
    ) -> Result<Measured, AnyError> {
        let (queue, _) = self.queues();
        let mut buffers = Buffers::writable(&self.front_end, queue, QUEUE_SIZE.into(), size)?;
        let (written, stop) = (AtomicU64::new(0), AtomicBool::new(false));
        thread::scope(|scope| {
            let writer = scope.spawn(|| client.write_all(&written, &stop));
            let mut received = 0;
            let drive = || -> io::Result<Measured> {
                let mut window = Window::new(schedule, cpu_time);
                buffers.add_all();
                loop {
                    buffers.wait()?;
                    buffers.queue.disarm_interrupt();
                    while let Some((index, length)) = buffers.take() {
                        received += u64::from(length);
                        buffers.add(index);
                    }
                    buffers.flush();
                    if let Some(measured) = window.look(received)? {
                        return Ok(measured);
                    }
                }
            };
            let measured = drive();
            stop.store(true, Ordering::Relaxed);
            writer.join().expect("the writer does not panic")?;
            let measured = measured?;
            while received < written.load(Ordering::Relaxed) {
                received += u64::from(buffers.take_one()?.1);
            }
            Ok(measured)
        })
    }

    /// The client types a key, the guest echoes it, and the client reads it; then the next one.
    pub fn type_keys(
        &mut self,
        client: &Client,
        schedule: Schedule,
        cpu_time: impl Fn() -> io::Result<Duration>,
    ) -> Result<Measured, AnyError> {
        let (receive, transmit) = self.queues();
        let mut receive = Buffers::writable(&self.front_end, receive, 1, 64)?;
        let mut transmit = Buffers::readable(&self.front_end, transmit, 1, 1)?;
        // The other back-end discards keys before the first output.
        transmit.add_all();
        transmit.take_one()?;
        client.read_exact(1, LIMIT)?;
        receive.add_all();
        let mut window = Window::new(schedule, cpu_time);
        let mut latencies = Histogram::default();
        let mut keys = 0;
        loop {
            let start = Instant::now();
            client.write(b"k")?;
            let (_, length) = receive.take_one()?;
            if length != 1 {
                return Err(format!("the guest got {length} bytes for a key").into());
            }
            transmit.add_all();
            client.read_exact(1, LIMIT)?;
            if window.first.is_some() {
                latencies.record(start.elapsed().as_nanos() as u64);
            }
            keys += 1;
            transmit.take_one()?;
            receive.add_all();
            if let Some(measured) = window.look(keys)? {
                return Ok(Measured {
                    latencies,
                    ..measured
                });
            }
        }
    }
}

/// Waits until this many bytes were counted.
fn wait_for(what: &str, expected: u64, counted: &AtomicU64) -> io::Result<()> {
    let deadline = Instant::now() + LIMIT;
    loop {
        match counted.load(Ordering::Relaxed) {
            bytes if bytes == expected => return Ok(()),
            bytes if bytes > expected || Instant::now() > deadline => {
                return Err(io::Error::other(format!(
                    "{bytes} bytes did {what} instead of {expected}"
                )));
            }
            _ => thread::sleep(Duration::from_millis(1)),
        }
    }
}
