// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The console device: the data and the control messages of a guest, its config space, and clients that come and go.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use arbitrary::Arbitrary;
use rustix::process::getpid;
use serde_json::{Map, json};
use vhost_device_common::device::Device;
use vhost_device_common::ring::Ring;
use vhost_device_common::worker::Queue;
use vhost_device_console::{Console, Filter};

use crate::bench::{Bench, load, open, poller, save};
use crate::driver::{Driver, Shape};
use crate::guest::Guest;
use crate::split::{Mistake, Start};

/// Feature bits: SIZE and MULTIPORT.
const FEATURES: u64 = 3;
const CONFIG_SIZE: usize = 12;
/// Offset of `emerg_wr` in the config space.
const EMERGENCY: usize = 8;
/// Most clients of a port, which the input can connect.
const MAX_CLIENTS: usize = 20;

/// A device and its guest.
#[derive(Arbitrary, Debug)]
pub struct Input {
    /// The two queues that the guest uses: those of the console, of the channel, or for control messages.
    queues: u8,
    features: u8,
    filter: bool,
    /// A device state, valid or not.
    state: Option<Vec<u8>>,
    start: Start,
    steps: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    /// The guest makes a buffer available.
    Room(u16, Shape),
    /// The guest writes, or sends bytes for control messages.
    Write(Vec<u8>, Shape),
    /// The guest sends a control message.
    Message(u8, u8, u8, Shape),
    Err(bool, Mistake),
    WriteConfig(u8, Vec<u8>),
    /// The guest's console is resized.
    Resize(u16, u16, u8),
    /// A client connects to a port.
    Connect(bool),
    /// A client sends bytes, reads, or leaves.
    Send(u8, Vec<u8>),
    Read(u8),
    Leave(u8),
    Filter(Vec<Vec<u8>>),
    Reset,
    NewDriver,
}

/// Starts a queue on a ring of the driver.
fn queue(index: u16, ring: u16, driver: &Driver, guest: &Guest) -> Queue {
    let memory = Arc::clone(&guest.memory);
    let ring = Ring::new(driver.setup(ring), memory, driver.base(), None, 0);
    Queue::new(index, ring.expect("the ring is in memory"), true)
}

impl Input {
    /// Runs the input.
    ///
    /// # Panics
    /// Panics if the device violates the specification.
    pub fn run(self) {
        let directory = std::env::temp_dir();
        let path = |name: &str| {
            let name = format!("vhost-device-fuzz-{}-{name}", getpid().as_raw_pid());
            directory.join(name)
        };
        let paths = [path("console"), path("channel")];
        let [console, channel] = paths.each_ref().map(|path| path.display());
        let mut arguments = vec![
            format!("--port=unix={console}"),
            format!("--port=name=channel,unix={channel}"),
        ];
        if self.filter {
            arguments.push("--filter".to_owned());
        }
        let device: Console = open(&arguments).expect("a device");
        let sockets = device.sockets().into_iter().map(|socket| {
            // The last run left it.
            let _ = std::fs::remove_file(&socket.path);
            let listener = UnixListener::bind(&socket.path).expect("a socket");
            listener.set_nonblocking(true).expect("a socket");
            listener.into()
        });
        let accepted = device.set_sockets(sockets.collect());
        accepted.expect("sockets are accepted");
        device.set_features(u64::from(self.features) & FEATURES);
        load(&device, self.state.as_deref());
        let (poller, watcher) = poller();
        let mut handler = device.handler(0, watcher).expect("a handler");
        let mut guest = Guest::new();
        let mut driver = Driver::new(2, self.start, &mut guest);
        // What the guest fills, and what it writes.
        let room = [0, 4, 2][usize::from(self.queues) % 3];
        let write = room + 1;
        let queues = [room, write].map(|index| queue(index, index - room, &driver, &guest));
        let mut bench = Bench::new(&mut handler, poller, queues.into());
        let mut clients: Vec<UnixStream> = Vec::new();
        for step in self.steps {
            match step {
                Step::Room(size, shape) => {
                    driver.submit(0, &mut guest, &[], size.into(), &shape);
                }
                Step::Write(bytes, shape) => {
                    driver.submit(1, &mut guest, &bytes, 0, &shape);
                }
                Step::Message(port, event, value, shape) => {
                    let message = [port % 4, 0, 0, 0, event % 10, 0, value % 3, 0];
                    driver.submit(1, &mut guest, &message, 0, &shape);
                }
                Step::Err(ring, mistake) => driver.err(ring.into(), &mut guest, mistake),
                Step::WriteConfig(offset, data) => {
                    let offset = usize::from(offset);
                    let end = offset + data.len();
                    let is_emergency = offset <= EMERGENCY && EMERGENCY < end && end <= CONFIG_SIZE;
                    let outcome = device.write_config(offset, &data);
                    assert_eq!(outcome.is_ok(), is_emergency || data.is_empty());
                }
                Step::Resize(columns, rows, port) => {
                    let arguments = json!({"columns": columns, "rows": rows, "port": port});
                    let arguments: Map<_, _> = arguments.as_object().cloned().unwrap_or_default();
                    let outcome = device.command("resize", &arguments, Vec::new());
                    assert_eq!(outcome.is_ok(), columns > 0 && rows > 0 && port == 0);
                }
                Step::Connect(is_channel) if clients.len() < MAX_CLIENTS => {
                    let path = &paths[usize::from(is_channel)];
                    let client = UnixStream::connect(path).expect("a connection");
                    client.set_nonblocking(true).expect("a socket");
                    clients.push(client);
                }
                Step::Connect(_) => {}
                Step::Send(number, bytes) => {
                    if let Some(mut client) = clients.get(usize::from(number)) {
                        let _ = client.write(&bytes);
                    }
                }
                Step::Read(number) => {
                    if let Some(mut client) = clients.get(usize::from(number)) {
                        let _ = client.read(&mut [0; 4096]);
                    }
                }
                Step::Leave(number) => {
                    if usize::from(number) < clients.len() {
                        clients.remove(number.into());
                    }
                }
                Step::Filter(pieces) => check_filter(&pieces),
                Step::Reset => save(&device),
                Step::NewDriver => device.new_driver(),
            }
            bench.wait();
            bench.kick(room);
            bench.kick(write);
            // The device does not hold buffers.
            assert_eq!(bench.held(room) + bench.held(write), 0);
            assert_eq!(device.config().len(), CONFIG_SIZE);
            if driver.is_empty(&guest) {
                driver.settle();
            }
        }
        bench.stop(room);
        bench.stop(write);
        save(&device);
        driver.assert_untouched(&mut guest);
    }
}

/// Checks that what passes the filter does not depend on the pieces, and passes it again.
fn check_filter(pieces: &[Vec<u8>]) {
    let filtered = |pieces: &[Vec<u8>]| {
        let (mut filter, mut output) = (Filter::default(), Vec::new());
        for piece in pieces {
            filter.apply(piece, &mut output);
        }
        output
    };
    let output = filtered(pieces);
    assert!(filtered(&[pieces.concat()]) == output);
    assert!(filtered(std::slice::from_ref(&output)) == output);
    assert!(std::str::from_utf8(&output).is_ok());
}
