// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A device that maps files into shared memory regions, as a driver and a front-end meet it.

#![cfg(test)]

mod hostile;
mod requests;
mod stop;

use std::collections::HashMap;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use tempfile::TempDir;
use vhost::vhost_user::message::{BackendReq, VhostUserProtocolFeatures as Protocol};
use vhost_device_tests::front_end::connection::{NEED_REPLY, REPLY, VERSION};
use vhost_device_tests::front_end::{Buffer, FrontEnd, Options, Queue, RawConnection, Reply};
use vhost_device_tests::process::{PATIENCE, Program, command, option};
use vhost_device_tests::shared_memory::{Command, MAP, NOTIFY, PROGRAM, UNMAP};
use vm_memory::ByteValued;

/// How long to look for what must not happen.
const QUIET: Duration = Duration::from_millis(50);
const PAGE: u64 = 4096;
/// A request's bytes in guest memory: the command, then its status.
const AREA: u64 = 64;
/// A status before the device has written it.
const UNTOUCHED: u8 = 0xdd;

/// Statuses of requests.
const OK: u8 = 0;
const UNSUPPORTED: u8 = 1;
const RANGE: u8 = 2;
const BUSY: u8 = 3;
const REFUSED: u8 = 4;
const STOPPED: u8 = 5;
const CLOSED: u8 = 6;

/// A map of one page of the file at the same place in region 0.
fn map(offset: u64) -> Command {
    Command {
        kind: MAP,
        offset,
        length: PAGE,
        file_offset: offset,
        ..Command::default()
    }
}

fn unmap(offset: u64) -> Command {
    Command {
        kind: UNMAP,
        ..map(offset)
    }
}

const NOTIFICATION: Command = Command {
    kind: NOTIFY,
    region: 0,
    offset: 0,
    length: 0,
    file_offset: 0,
    writable: 0,
};

/// A running device. Dropping it ends it, and fails the test if it holds more than at its start.
struct Device {
    _program: Program,
    directory: TempDir,
}

impl Device {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        let mut command = command(PROGRAM).unwrap();
        command.env_remove("RUST_LOG");
        command.arg(option("socket-path", &socket));
        let mut program = Program::spawn(&mut command).unwrap();
        program.wait_for_listener(&socket).unwrap();
        program.expect_no_leak().unwrap();
        Self {
            _program: program,
            directory,
        }
    }

    fn connect(&self) -> Driver {
        self.connect_with(Protocol::SHMEM | Protocol::BACKEND_SEND_FD | usual())
    }

    fn connect_with(&self, protocol_features: Protocol) -> Driver {
        let options = Options {
            protocol_features,
            ..Options::default()
        };
        let socket = self.directory.path().join("socket");
        let front_end = FrontEnd::connect(&socket, &options).unwrap();
        Driver::new(front_end)
    }
}

fn usual() -> Protocol {
    Options::default().protocol_features
}

/// A driver with one started queue, and the front-end's end of the back-end channel.
struct Driver {
    front_end: FrontEnd,
    queue: Queue,
    channel: RawConnection,
    /// Where each request is, by its head.
    places: HashMap<u16, u64>,
    /// Statuses of requests that were used while another was waited for.
    statuses: HashMap<u64, u8>,
}

impl Driver {
    fn new(front_end: FrontEnd) -> Self {
        let channel = front_end.back_end_channel().unwrap();
        let queue = front_end.queue(0, 256).unwrap();
        Self {
            front_end,
            queue,
            channel,
            places: HashMap::new(),
            statuses: HashMap::new(),
        }
    }

    /// Makes a request available. Returns where it is.
    fn submit(&mut self, command: &Command) -> u64 {
        let memory = self.front_end.memory();
        let place = memory.allocate(AREA, 64);
        let size = size_of::<Command>();
        memory.write(place, command.as_slice());
        let status = place + size as u64;
        memory.write_u8(status, UNTOUCHED);
        let head = self.queue.submit(&[
            Buffer::readable(place, size as u32),
            Buffer::writable(status, 1),
        ]);
        self.places.insert(head, place);
        place
    }

    /// Waits until the request at `place` is answered, and returns its status.
    fn status(&mut self, place: u64) -> u8 {
        loop {
            if let Some(status) = self.statuses.remove(&place) {
                return status;
            }
            assert!(self.queue.poll_used(PATIENCE), "a request is not answered");
            let used = self.queue.take_used().unwrap();
            let answered = self.places.remove(&used.head).unwrap();
            let status = answered + size_of::<Command>() as u64;
            self.statuses
                .insert(answered, self.front_end.memory().read_u8(status));
        }
    }

    /// Has a request carried out that needs no front-end.
    fn carry_out(&mut self, command: &Command) -> u8 {
        let place = self.submit(command);
        self.status(place)
    }

    /// Receives the next request of the back-end.
    fn receive(&self, request: BackendReq) -> Reply {
        let received = self.channel.receive().unwrap();
        let expected = (u32::from(request), VERSION | NEED_REPLY);
        assert_eq!((received.request, received.flags), expected);
        received
    }

    fn reply(&self, request: BackendReq, value: u64) {
        reply(&self.channel, request, value);
    }

    /// Nothing comes on the channel, and no request is answered.
    fn assert_quiet(&mut self) {
        let mut channel = RawConnection::from_stream(self.channel.socket().try_clone().unwrap());
        let channel = channel.as_mut().unwrap();
        channel.set_timeout(QUIET).unwrap();
        assert!(channel.receive().is_err());
        channel.set_timeout(PATIENCE).unwrap();
        assert!(!self.queue.has_used());
    }

    /// Maps the first page, as the front-end should.
    fn map_first_page(&mut self) -> u8 {
        let place = self.submit(&map(0));
        self.receive(BackendReq::SHMEM_MAP);
        self.reply(BackendReq::SHMEM_MAP, 0);
        self.status(place)
    }
}

fn reply(channel: &RawConnection, request: BackendReq, value: u64) {
    channel
        .send(request, VERSION | REPLY, &value.to_ne_bytes(), &[])
        .unwrap();
}

/// A pair of sockets, the second one with as little room as there can be.
fn tight_pair() -> (UnixStream, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    rustix::net::sockopt::set_socket_send_buffer_size(&theirs, 0).unwrap();
    (ours, theirs)
}
