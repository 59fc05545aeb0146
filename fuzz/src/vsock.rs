// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The socket device: packets of the guest, its buffers, and programs of the host that connect, send, receive and leave.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;

use arbitrary::Arbitrary;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen,
    socket_with,
};
use tempfile::TempDir;
use vhost_device_common::device::Device;
use vhost_device_vsock::Vsock;

use crate::bench::{Bench, open, poller, queue};
use crate::driver::{Driver, Shape};
use crate::guest::{Guest, Piece};
use crate::split::{Mistake, Start};

const RX: u16 = 0;
const TX: u16 = 1;
/// The token of the timer.
const TIMER: u32 = 0;
/// The CIDs of the host, of the guest and of its sibling.
const HOST: u64 = 2;
const GUEST: u64 = 3;
const SIBLING: u64 = 4;
const HEADER_SIZE: usize = 44;
/// Most programs of the host at a time.
const MOST_PROGRAMS: usize = 16;
/// VIRTIO_VSOCK_F_SEQPACKET.
const SEQPACKET: u64 = 2;

/// A device, its guest and programs of the host.
#[derive(Arbitrary, Debug)]
pub struct Input {
    start: Start,
    has_seqpacket: bool,
    steps: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    /// The guest makes a buffer available.
    Buffer(u16, Shape),
    /// The guest sends a packet.
    Send(Sent, Shape),
    /// The guest answers the last request of the host, or sends something else on that connection.
    Answer(Sent, Shape),
    SendAny(Vec<u8>, Shape),
    Err(bool, Mistake),
    /// A program of the host accepts a connection of the guest.
    Accept(u8),
    /// A program of the host connects to the guest, and sends this first.
    Call(bool, First),
    /// A program of the host does something.
    Act(u8, Action),
    /// The timer expires.
    Tick,
    NewDriver,
}

#[derive(Arbitrary, Debug)]
enum First {
    Port(u8),
    Any(Vec<u8>),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Action {
    Send(u16),
    Receive,
    StopSending,
    StopReceiving,
    Close,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
struct Sent {
    op: u8,
    kind: u8,
    cid: u8,
    ports: u8,
    flags: u8,
    size: u8,
    taken: u32,
    data: u16,
    length: Option<u32>,
}

impl Sent {
    /// Returns the bytes of the packet. `ports` are those of the guest and of its peer.
    fn bytes(self, cid: u64, kind: u16, ports: [u32; 2]) -> Vec<u8> {
        let data = self.data % 0x2000;
        let size = [0, 100, 0x1_0000, u32::MAX][usize::from(self.size) % 4];
        let mut bytes = Vec::new();
        bytes.extend(GUEST.to_le_bytes());
        bytes.extend(cid.to_le_bytes());
        bytes.extend(ports.map(u32::to_le_bytes).concat());
        bytes.extend(self.length.unwrap_or(data.into()).to_le_bytes());
        bytes.extend(kind.to_le_bytes());
        bytes.extend(u16::from(self.op % 9).to_le_bytes());
        bytes.extend(u32::from(self.flags).to_le_bytes());
        bytes.extend(size.to_le_bytes());
        bytes.extend(self.taken.to_le_bytes());
        bytes.resize(HEADER_SIZE + usize::from(data), 7);
        bytes
    }

    /// Returns the bytes of a packet of any connection.
    fn any(self) -> Vec<u8> {
        let cid = [HOST, HOST, HOST, SIBLING, 9, 1 << 32][usize::from(self.cid) % 6];
        let kind = [1, 1, 2, 2, 0][usize::from(self.kind) % 5];
        let ports = [self.ports % 4, self.ports >> 4 & 3].map(u32::from);
        self.bytes(cid, kind, ports)
    }
}

/// Where programs of the host listen and connect. They are the same for all inputs.
struct Host {
    directory: TempDir,
    /// Where connections of the guest go, and those to its sibling.
    theirs: Vec<OwnedFd>,
    /// Where the device accepts connections.
    ours: Vec<OwnedFd>,
}

fn listener(kind: SocketType, path: &std::path::Path) -> OwnedFd {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, kind, flags, None).expect("a socket");
    let address = SocketAddrUnix::new(path).expect("a short path");
    bind(&socket, &address).expect("a free path");
    listen(&socket, 8).expect("a bound socket");
    socket
}

impl Host {
    fn get() -> &'static Self {
        static HOST: OnceLock<Host> = OnceLock::new();
        let host = HOST.get_or_init(|| {
            let directory = tempfile::tempdir().expect("a directory");
            let at = |kind, name| listener(kind, &directory.path().join(name));
            Self {
                theirs: vec![
                    at(SocketType::STREAM, "guest_1"),
                    at(SocketType::SEQPACKET, "guest_2"),
                    at(SocketType::STREAM, "sibling"),
                ],
                ours: vec![
                    at(SocketType::STREAM, "guest"),
                    at(SocketType::SEQPACKET, "guest_seqpacket"),
                ],
                directory,
            }
        });
        // What an earlier input left behind.
        for socket in host.theirs.iter().chain(&host.ours) {
            while accept_with(socket, SocketFlags::CLOEXEC).is_ok() {}
        }
        host
    }

    fn device(&self) -> Vsock {
        let path = |name| self.directory.path().join(name).display().to_string();
        let arguments = [
            format!("--guest-cid={GUEST}"),
            format!("--uds-path={}", path("guest")),
            format!("--forward=cid={SIBLING},uds-path={}", path("sibling")),
            "--max-connections=8".to_owned(),
        ];
        let device = open::<Vsock>(&arguments).expect("valid options");
        let ours = self.ours.iter().map(|socket| socket.try_clone());
        let ours = ours.collect::<Result<_, _>>().expect("duplicates");
        device.set_sockets(ours).expect("sockets are accepted");
        device
    }

    fn call(&self, is_stream: bool, first: &First) -> Option<UnixStream> {
        let (kind, name) = match is_stream {
            true => (SocketType::STREAM, "guest"),
            false => (SocketType::SEQPACKET, "guest_seqpacket"),
        };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, kind, flags, None).expect("a socket");
        let address = SocketAddrUnix::new(self.directory.path().join(name)).expect("a short path");
        connect(&socket, &address).ok()?;
        let mut stream = UnixStream::from(socket);
        let bytes = match first {
            First::Port(port) => format!("CONNECT {}\n", port % 4).into_bytes(),
            First::Any(bytes) => bytes.clone(),
        };
        let _ = stream.write(&bytes);
        Some(stream)
    }
}

/// What the guest received last on a connection that the host asked for.
#[derive(Clone, Copy, Default)]
struct Asked {
    cid: u64,
    kind: u16,
    ports: [u32; 2],
}

/// Checks a packet of the device. Returns the connection, if the host asks for it.
fn check(bytes: &[u8]) -> Option<Asked> {
    let number = |at: usize, size: usize| {
        let mut number = [0; 8];
        number[..size].copy_from_slice(&bytes[at..at + size]);
        u64::from_le_bytes(number)
    };
    assert!(bytes.len() >= HEADER_SIZE, "{} bytes", bytes.len());
    assert_eq!(bytes.len() - HEADER_SIZE, number(24, 4) as usize);
    assert_eq!(number(8, 8), GUEST, "the CID of the guest");
    let op = number(30, 2);
    assert!((1..8).contains(&op), "operation {op}");
    assert!(op == 5 || bytes.len() == HEADER_SIZE);
    // A reset has the addresses and the type of what it refuses.
    assert!(op == 3 || [HOST, SIBLING].contains(&number(0, 8)));
    assert!(op == 3 || [1, 2].contains(&number(28, 2)));
    assert!(number(36, 4) <= 256 << 10, "size of the buffer");
    (op == 1).then(|| Asked {
        cid: number(0, 8),
        kind: number(28, 2) as u16,
        ports: [number(20, 4), number(16, 4)].map(|port| port as u32),
    })
}

impl Input {
    /// Runs the input.
    ///
    /// # Panics
    /// Panics if the device violates the specification.
    pub fn run(self) {
        let host = Host::get();
        let device = host.device();
        let features = device.features();
        device.set_features(if self.has_seqpacket {
            features
        } else {
            features & !SEQPACKET
        });
        let (poller, watcher) = poller();
        let mut handler = device.handler(0, watcher).expect("a handler");
        let mut guest = Guest::new();
        let mut driver = Driver::new(2, self.start, &mut guest);
        let queues = [RX, TX].map(|number| queue(number, &driver, &guest));
        let mut bench = Bench::new(&mut handler, poller, queues.into());
        let mut programs: Vec<UnixStream> = Vec::new();
        let mut buffers: VecDeque<Vec<Piece>> = VecDeque::new();
        let mut asked = Asked::default();
        let mut is_plain = true;
        for step in self.steps {
            match step {
                Step::Buffer(room, shape) => {
                    is_plain &= shape.is_plain();
                    let room = u64::from(room % 0x2000);
                    buffers.push_back(driver.submit(RX, &mut guest, &[], room, &shape));
                }
                Step::Send(sent, shape) => {
                    is_plain &= shape.is_plain();
                    driver.submit(TX, &mut guest, &sent.any(), 0, &shape);
                }
                Step::Answer(sent, shape) => {
                    is_plain &= shape.is_plain();
                    let bytes = sent.bytes(asked.cid, asked.kind, asked.ports);
                    driver.submit(TX, &mut guest, &bytes, 0, &shape);
                }
                Step::SendAny(bytes, shape) => {
                    is_plain &= shape.is_plain();
                    driver.submit(TX, &mut guest, &bytes, 0, &shape);
                }
                Step::Err(queue, mistake) => driver.err(queue.into(), &mut guest, mistake),
                Step::Accept(which) => {
                    let listener = &host.theirs[usize::from(which) % host.theirs.len()];
                    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
                    let accepted = accept_with(listener, flags);
                    programs.extend(accepted.map(UnixStream::from));
                }
                Step::Call(is_stream, first) => programs.extend(host.call(is_stream, &first)),
                Step::Act(which, action) if !programs.is_empty() => {
                    let which = usize::from(which) % programs.len();
                    act(&mut programs, which, action);
                }
                Step::Act(..) => {}
                Step::Tick => bench.ready(TIMER),
                Step::NewDriver => device.new_driver(),
            }
            if programs.len() > MOST_PROGRAMS {
                programs.remove(0);
            }
            bench.kick(TX);
            bench.wait();
            bench.kick(RX);
            assert_eq!(bench.held(RX) + bench.held(TX), 0, "buffers are held");
            for (_, written) in driver.answers(RX, &guest) {
                let pieces = buffers.pop_front().unwrap_or_default();
                if written == 0 || !is_plain || !driver.is_honest() || !driver.is_apart() {
                    continue;
                }
                let read = |piece: Piece| guest.read(piece.address, piece.length as usize);
                let bytes: Option<Vec<_>> = pieces.into_iter().map(read).collect();
                let mut bytes = bytes.expect("memory").concat();
                bytes.truncate(written as usize);
                asked = check(&bytes).unwrap_or(asked);
            }
            if driver.is_empty(&guest) {
                driver.settle();
            }
        }
        bench.stop(RX);
        bench.stop(TX);
        driver.assert_untouched(&mut guest);
    }
}

/// Has a program of the host do something.
fn act(programs: &mut Vec<UnixStream>, which: usize, action: Action) {
    let program = &mut programs[which];
    match action {
        Action::Send(length) => drop(program.write(&vec![8; length.into()])),
        Action::Receive => drop(program.read(&mut [0; 1 << 16])),
        Action::StopSending => drop(program.shutdown(Shutdown::Write)),
        Action::StopReceiving => drop(program.shutdown(Shutdown::Read)),
        Action::Close => drop(programs.swap_remove(which)),
    }
}
