// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The loads, through a back-end, and on unix sockets alone.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use super::driver::{BOTH, Connection, Driver, Framing, Header, operation};
use super::host::{self, CHUNK, Host, Service};
use crate::bench::histogram::Histogram;

/// Time limit of whatever the back-end must do.
const LIMIT: Duration = Duration::from_secs(5);
/// Interval at which the clock is read when nothing happens.
const INTERVAL: Duration = Duration::from_millis(50);
/// Bytes of a round trip, and of the greeting of a short connection.
const MESSAGE: u32 = host::MESSAGE as u32;
/// Short connections at the same time.
const AT_ONCE: u32 = 16;
/// The first port of the guest.
const FIRST_PORT: u32 = 1 << 16;

/// What is measured: a row of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Load {
    /// Connections of the guest, [`AT_ONCE`] at a time, that exchange greetings; then the host closes them.
    Connect,
    /// A message to the host and back, one at a time.
    RoundTrip,
    /// A stream to the host, in packets of this size.
    ToHost(u32, Framing),
    /// A stream to the guest.
    ToGuest,
}

impl Load {
    /// Returns what the program of the host does.
    pub fn service(self) -> Service {
        match self {
            Load::Connect => Service::Greet,
            Load::ToHost(..) => Service::Sink,
            Load::RoundTrip => Service::Echo,
            Load::ToGuest => Service::Source,
        }
    }
}

/// What a back-end has done within the window.
#[derive(Debug, Clone, Default)]
pub struct Measured {
    /// Connections, round trips or bytes.
    pub items: u64,
    /// The window.
    pub time: Duration,
    /// CPU time of the back-end.
    pub cpu: Duration,
    /// Times of round trips, those before the window included.
    pub latency: Histogram,
}

/// Reads the clock.
pub struct Meter<C> {
    begin: Instant,
    window: Duration,
    cpu_time: C,
    from: Option<(u64, Instant, Duration)>,
}

impl<C: Fn() -> io::Result<Duration>> Meter<C> {
    /// Counts for `window`, after `warm_up`. `cpu_time` is that of the back-end.
    pub fn new(warm_up: Duration, window: Duration, cpu_time: C) -> Self {
        Meter {
            begin: Instant::now() + warm_up,
            window,
            cpu_time,
            from: None,
        }
    }

    /// Takes note of the number of items so far. Returns the result at the end of the window.
    fn tick(&mut self, items: u64) -> io::Result<Option<Measured>> {
        let now = Instant::now();
        match self.from {
            None if now >= self.begin => self.from = Some((items, now, (self.cpu_time)()?)),
            Some((before, start, cpu)) if now - start >= self.window => {
                return Ok(Some(Measured {
                    items: items - before,
                    time: now - start,
                    cpu: (self.cpu_time)()?.saturating_sub(cpu),
                    latency: Histogram::default(),
                }));
            }
            _ => {}
        }
        Ok(None)
    }
}

/// Runs a load through a back-end, to the program of the host at `port`.
pub fn run<C: Fn() -> io::Result<Duration>>(
    load: Load,
    driver: &mut Driver,
    port: u32,
    host: &Host,
    meter: Meter<C>,
) -> io::Result<Measured> {
    match load {
        Load::Connect => connect(driver, port, meter),
        Load::RoundTrip => round_trips(driver, port, meter),
        Load::ToHost(size, framing) => to_host(driver, port, size, framing, host, meter),
        Load::ToGuest => to_guest(driver, port, meter),
    }
}

/// Returns the error of a back-end that does not do what the driver waits for.
fn stuck(what: &str) -> io::Error {
    io::Error::other(format!("it did not {what} within {LIMIT:?}"))
}

/// Sends a packet without data, or with little, for which there is always room.
fn send(driver: &mut Driver, connection: &mut Connection, operation: u16, flags: u32, length: u32) {
    let sent = driver.send(connection, operation, flags, length, Framing::Whole);
    assert!(sent, "the queue has room for small packets");
}

/// Takes the next packet of this connection, and answers what must be answered. An ended connection is an error.
fn take(driver: &mut Driver, connection: &mut Connection) -> io::Result<Option<Header>> {
    while let Some(header) = driver.take() {
        if header.destination_port != connection.port {
            continue;
        }
        connection.note(&header);
        if matches!(header.operation, operation::RST | operation::SHUTDOWN) {
            return Err(io::Error::other("it has ended the connection"));
        }
        if header.operation == operation::CREDIT_REQUEST || connection.owes_credit() {
            // Without room now, the next packet is the occasion.
            driver.send(connection, operation::CREDIT_UPDATE, 0, 0, Framing::Whole);
        }
        return Ok(Some(header));
    }
    Ok(None)
}

/// Opens a connection to a port of the host.
fn open(driver: &mut Driver, port: u32) -> io::Result<Connection> {
    let mut connection = Connection::new(FIRST_PORT, port);
    send(driver, &mut connection, operation::REQUEST, 0, 0);
    driver.flush();
    loop {
        match take(driver, &mut connection)? {
            Some(header) if header.operation == operation::RESPONSE => return Ok(connection),
            Some(_) => {}
            None if driver.wait(false, LIMIT)? => {}
            None => return Err(stuck("accept a connection")),
        }
    }
}

fn to_host<C: Fn() -> io::Result<Duration>>(
    driver: &mut Driver,
    port: u32,
    size: u32,
    framing: Framing,
    host: &Host,
    mut meter: Meter<C>,
) -> io::Result<Measured> {
    let mut connection = open(driver, port)?;
    loop {
        while take(driver, &mut connection)?.is_some() {}
        while connection.may_send(size)
            && driver.send(&mut connection, operation::RW, 0, size, framing)
        {}
        driver.flush();
        // A back-end that loses everything has no items, which is a result.
        if let Some(measured) = meter.tick(host.received())? {
            return Ok(measured);
        }
        driver.wait(connection.may_send(size), INTERVAL)?;
    }
}

fn to_guest<C: Fn() -> io::Result<Duration>>(
    driver: &mut Driver,
    port: u32,
    mut meter: Meter<C>,
) -> io::Result<Measured> {
    let mut connection = open(driver, port)?;
    let mut received = 0;
    loop {
        while let Some(header) = take(driver, &mut connection)? {
            received += u64::from(header.length);
        }
        driver.flush();
        if let Some(measured) = meter.tick(received)? {
            return Ok(measured);
        }
        driver.wait(false, INTERVAL)?;
    }
}

fn round_trips<C: Fn() -> io::Result<Duration>>(
    driver: &mut Driver,
    port: u32,
    mut meter: Meter<C>,
) -> io::Result<Measured> {
    let mut connection = open(driver, port)?;
    let mut latency = Histogram::default();
    loop {
        let start = Instant::now();
        send(driver, &mut connection, operation::RW, 0, MESSAGE);
        driver.flush();
        let mut left = MESSAGE;
        while left > 0 {
            match take(driver, &mut connection)? {
                Some(header) => left = left.saturating_sub(header.length),
                None if driver.wait(false, LIMIT)? => {}
                None => return Err(stuck("pass on a message")),
            }
        }
        latency.record(start.elapsed().as_nanos() as u64);
        driver.flush();
        if let Some(measured) = meter.tick(latency.total())? {
            return Ok(Measured {
                latency,
                ..measured
            });
        }
    }
}

/// A short connection of the guest.
#[derive(Clone, Copy)]
struct Short {
    connection: Connection,
    is_open: bool,
    /// Bytes of the greeting that are to come.
    left: u32,
    /// Flags of SHUTDOWN that have come.
    ended: u32,
}

impl Short {
    fn start(driver: &mut Driver, port: u32, host_port: u32) -> Self {
        let mut connection = Connection::new(port, host_port);
        send(driver, &mut connection, operation::REQUEST, 0, 0);
        Short {
            connection,
            is_open: false,
            left: MESSAGE,
            ended: 0,
        }
    }

    /// Takes note of a packet, and answers as Linux does when the program closes its socket at the end of the stream. Returns whether the
    /// connection has ended.
    fn note(&mut self, driver: &mut Driver, header: &Header) -> io::Result<bool> {
        self.connection.note(header);
        match header.operation {
            operation::RESPONSE => {
                self.is_open = true;
                send(driver, &mut self.connection, operation::RW, 0, MESSAGE);
            }
            operation::RW => self.left = self.left.saturating_sub(header.length),
            operation::SHUTDOWN => {
                self.ended |= header.flags;
                let is_end = self.ended & BOTH == BOTH;
                let (operation, flags) = match is_end {
                    true => (operation::RST, 0),
                    false => (operation::SHUTDOWN, BOTH),
                };
                send(driver, &mut self.connection, operation, flags, 0);
                return self.ended_well(is_end);
            }
            operation::RST => return self.ended_well(true),
            _ => {}
        }
        Ok(false)
    }

    /// Fails if the connection has ended without a greeting.
    fn ended_well(&self, is_end: bool) -> io::Result<bool> {
        match (self.is_open, self.left) {
            (true, 0) => Ok(is_end),
            (true, _) => Err(io::Error::other("it has lost a greeting")),
            (false, _) => Err(io::Error::other("it has refused a connection")),
        }
    }
}

fn connect<C: Fn() -> io::Result<Duration>>(
    driver: &mut Driver,
    port: u32,
    mut meter: Meter<C>,
) -> io::Result<Measured> {
    let mut connections: Vec<_> = (0..AT_ONCE)
        .map(|slot| Short::start(driver, FIRST_PORT + slot, port))
        .collect();
    driver.flush();
    let mut done = 0;
    loop {
        while let Some(header) = driver.take() {
            let short = &mut connections[(header.destination_port % AT_ONCE) as usize];
            let guest_port = short.connection.port;
            // A packet may come after the end.
            if header.destination_port == guest_port && short.note(driver, &header)? {
                done += 1;
                *short = Short::start(driver, guest_port.wrapping_add(AT_ONCE), port);
            }
        }
        driver.flush();
        if let Some(measured) = meter.tick(done)? {
            return Ok(measured);
        }
        if !driver.wait(false, LIMIT)? {
            return Err(stuck("end a connection"));
        }
    }
}

/// Runs a load on the socket of the program of the host, without a back-end.
pub fn run_alone<C: Fn() -> io::Result<Duration>>(
    load: Load,
    path: &Path,
    host: &Host,
    mut meter: Meter<C>,
) -> io::Result<Measured> {
    let mut buffer = vec![0; CHUNK];
    let mut message = [0; MESSAGE as usize];
    let mut latency = Histogram::default();
    let mut items = 0;
    let mut stream = UnixStream::connect(path)?;
    if load == Load::Connect {
        // The program serves one connection at a time.
        stream.shutdown(Shutdown::Both)?;
    }
    loop {
        match load {
            Load::Connect => {
                let mut stream = UnixStream::connect(path)?;
                stream.write_all(&message)?;
                stream.read_exact(&mut message)?;
                stream.read_to_end(&mut Vec::new())?;
                items += 1;
            }
            Load::RoundTrip => {
                let start = Instant::now();
                stream.write_all(&message)?;
                stream.read_exact(&mut message)?;
                latency.record(start.elapsed().as_nanos() as u64);
                items += 1;
            }
            Load::ToHost(size, _) => {
                stream.write_all(&buffer[..size as usize])?;
                items = host.received();
            }
            Load::ToGuest => items += stream.read(&mut buffer[..4096])? as u64,
        }
        if let Some(measured) = meter.tick(items)? {
            return Ok(Measured {
                latency,
                ..measured
            });
        }
    }
}
