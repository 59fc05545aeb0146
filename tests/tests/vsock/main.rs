// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `vhost-device-vsock` as a driver and programs of the host see it, malicious ones too.

#![cfg(test)]

mod connections;
mod credit;
mod framing;
mod hostile_guest;
mod hostile_host;
mod load;
mod messages;
mod restart;
mod sandbox;
mod siblings;
mod start;
mod states;

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept, bind, connect, listen,
    socket_with,
};
use tempfile::TempDir;
use vhost::vhost_user::message::FrontendReq;
use vhost_device_tests::front_end::vsock::{HOST, Packet, STREAM, VsockDriver, op};
use vhost_device_tests::front_end::{FrontEnd, Options};
use vhost_device_tests::process::{PATIENCE, Program, command, option};

/// How long to watch for something that must not happen.
const QUIET: Duration = Duration::from_millis(50);

/// CID of the guest.
const CID: u64 = 3;

/// Size of the buffer that connections of the guest claim to have.
const BUFFER: u32 = 256 << 10;

/// A running device.
struct Device {
    program: Program,
    directory: TempDir,
}

impl Device {
    fn start() -> Self {
        Self::start_with(&[])
    }

    fn start_with(arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self::start_in(directory, |command| {
            command.args(arguments);
        })
    }

    fn start_in(directory: TempDir, configure: impl FnOnce(&mut Command)) -> Self {
        let socket = directory.path().join("socket");
        let mut command = command("vhost-device-vsock").unwrap();
        command.env_remove("RUST_LOG");
        command.arg(option("socket-path", &socket));
        command.arg(option("uds-path", directory.path().join("guest")));
        command.arg(option("guest-cid", CID.to_string()));
        configure(&mut command);
        let mut program = Program::serve(&mut command, &socket).unwrap();
        program.expect_no_leak().unwrap();
        Self { program, directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Listens where connections of the guest to this port go.
    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.path(&format!("guest_{port}"))).unwrap()
    }

    fn front_end(&self) -> FrontEnd {
        FrontEnd::connect(&self.path("socket"), &Options::default()).unwrap()
    }

    fn connect(&self) -> Guest {
        Guest(VsockDriver::new(self.front_end()).unwrap())
    }

    /// Connects as a program of the host to `port` of the guest: sends the first line.
    fn call(&self, port: u32) -> UnixStream {
        let mut stream = UnixStream::connect(self.path("guest")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        // A device that is full may have closed it already.
        let _ = stream.write_all(format!("CONNECT {port}\n").as_bytes());
        stream
    }

    /// Returns a number of the answer to `query-connections`. The device needs a control socket.
    fn connections(&self, name: &str) -> u64 {
        let answer = self.command("query-connections");
        let number = answer[name].as_u64();
        number.unwrap_or_else(|| panic!("{answer}"))
    }

    /// Executes a command, and returns the answer.
    fn command(&self, name: &str) -> serde_json::Value {
        let mut stream = UnixStream::connect(self.path("control")).unwrap();
        let request = serde_json::json!({ "execute": name });
        stream.write_all(format!("{request}\n").as_bytes()).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let answer = text.lines().last().unwrap();
        let mut answer: serde_json::Value = serde_json::from_str(answer).unwrap();
        answer["return"].take()
    }
}

/// Starts a device that has a control socket.
fn device_with_control(arguments: &[&str]) -> Device {
    let directory = tempfile::tempdir().unwrap();
    let control = option("control-socket", directory.path().join("control"));
    Device::start_in(directory, |command| {
        command.arg(control).args(arguments);
    })
}

/// The driver in a guest, and what it knows of its connections.
struct Guest(VsockDriver);

/// A connection, as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Link {
    guest_port: u32,
    peer_cid: u64,
    peer_port: u32,
    kind: u16,
    /// Bytes received.
    taken: u32,
}

impl Link {
    fn to_host(guest_port: u32, peer_port: u32) -> Self {
        Self {
            guest_port,
            peer_cid: HOST,
            peer_port,
            kind: STREAM,
            taken: 0,
        }
    }

    fn packet(&self, op: u32) -> Packet {
        Packet {
            src_cid: CID,
            dst_cid: self.peer_cid,
            src_port: self.guest_port,
            dst_port: self.peer_port,
            kind: self.kind,
            op,
            buf_alloc: BUFFER,
            fwd_cnt: self.taken,
            ..Packet::default()
        }
    }

    fn data(&self, data: &[u8]) -> Packet {
        Packet {
            data: data.to_vec(),
            ..self.packet(op::RW)
        }
    }

    fn shutdown(&self, flags: u32) -> Packet {
        Packet {
            flags,
            ..self.packet(op::SHUTDOWN)
        }
    }

    #[track_caller]
    fn assert_is_from(&self, packet: &Packet) {
        assert_eq!(
            (
                packet.src_cid,
                packet.src_port,
                packet.dst_cid,
                packet.dst_port,
                packet.kind
            ),
            (
                self.peer_cid,
                self.peer_port,
                CID,
                self.guest_port,
                self.kind
            ),
            "{packet:?}"
        );
    }
}

impl Guest {
    /// Sends a packet of a connection.
    #[track_caller]
    fn send(&mut self, packet: &Packet) {
        self.0.send(packet);
    }

    /// Receives the next packet, which must have this operation, be of this connection, and have no data. Skips updates of credit.
    #[track_caller]
    fn expect(&mut self, link: &Link, op: u32) -> Packet {
        let mut packet = self.0.receive();
        while packet.op == op::CREDIT_UPDATE && op != op::CREDIT_UPDATE {
            packet = self.0.receive();
        }
        link.assert_is_from(&packet);
        assert_eq!(packet.op, op, "{packet:?}");
        if op != op::RW {
            assert_eq!(packet.data.len(), 0, "{packet:?}");
        }
        packet
    }

    #[track_caller]
    fn expect_nothing(&mut self) {
        let packet = self.0.receive_within(QUIET);
        assert_eq!(packet, None);
    }

    /// Opens a connection from a port of the guest to one of the host.
    #[track_caller]
    fn open(&mut self, guest_port: u32, peer_port: u32) -> Link {
        self.open_link(Link::to_host(guest_port, peer_port))
    }

    #[track_caller]
    fn open_link(&mut self, link: Link) -> Link {
        self.send(&link.packet(op::REQUEST));
        self.expect(&link, op::RESPONSE);
        link
    }

    /// Asks for a connection that is refused.
    #[track_caller]
    fn assert_refused(&mut self, link: Link) {
        self.send(&link.packet(op::REQUEST));
        self.expect(&link, op::RST);
    }

    /// Accepts a connection of the host to this port.
    #[track_caller]
    fn accept(&mut self, guest_port: u32, kind: u16) -> Link {
        let request = self.0.receive();
        let link = Link {
            guest_port,
            peer_cid: HOST,
            peer_port: request.src_port,
            kind,
            taken: 0,
        };
        link.assert_is_from(&request);
        assert_eq!(request.op, op::REQUEST);
        self.send(&link.packet(op::RESPONSE));
        link
    }

    /// Receives data of a connection until there are `count` bytes. Skips packets about credit.
    #[track_caller]
    fn read(&mut self, link: &mut Link, count: usize) -> Vec<u8> {
        let mut data = Vec::new();
        while data.len() < count {
            let packet = self.0.receive();
            link.assert_is_from(&packet);
            match packet.op {
                op::RW => {
                    link.taken = link.taken.wrapping_add(packet.data.len() as u32);
                    data.extend(packet.data);
                    self.send(&link.packet(op::CREDIT_UPDATE));
                }
                op::CREDIT_UPDATE | op::CREDIT_REQUEST => {}
                _ => panic!("{packet:?} after {} bytes", data.len()),
            }
        }
        data
    }

    /// Asserts that a connection of the guest can be opened, carries data both ways, and ends.
    #[track_caller]
    fn assert_works(&mut self, device: &Device) {
        let listener = device.listen(999);
        let mut link = self.open(998, 999);
        let (mut host, _) = listener.accept().unwrap();
        host.set_read_timeout(Some(PATIENCE)).unwrap();
        self.send(&link.data(b"ping"));
        assert_eq!(read(&mut host, 4), b"ping");
        host.write_all(b"pong").unwrap();
        assert_eq!(self.read(&mut link, 4), b"pong");
        self.send(&link.shutdown(3));
        self.expect(&link, op::RST);
        assert_eq!(read_to_end(&mut host), b"");
        std::fs::remove_file(device.path("guest_999")).unwrap();
    }

    /// Asserts that the session answers.
    #[track_caller]
    fn assert_alive(&self) {
        let raw = self.0.front_end.raw().unwrap();
        raw.ask(FrontendReq::GET_FEATURES, &[], &[]).unwrap();
    }
}

/// Accepts a connection within the time limit.
#[track_caller]
fn accept_stream(listener: &UnixListener) -> UnixStream {
    let (stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

#[track_caller]
fn read(stream: &mut UnixStream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

#[track_caller]
fn read_to_end(stream: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    bytes
}

/// Asserts that the device closes the connection of a program without an answer. What the program sent may be unread.
#[track_caller]
fn assert_closed(stream: &mut UnixStream) {
    let mut bytes = Vec::new();
    if let Err(error) = stream.read_to_end(&mut bytes) {
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    }
    assert_eq!(bytes, b"");
}

/// Reads the line with which the device accepts a connection of the host. Returns the port.
#[track_caller]
fn read_ok(stream: &mut UnixStream) -> u32 {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        line.extend(read(stream, 1));
    }
    let line = String::from_utf8(line).unwrap();
    let port = line.strip_prefix("OK ").unwrap().trim_end();
    port.parse().unwrap()
}

/// Listens for messages.
fn listen_seqpacket(path: &std::path::Path) -> OwnedFd {
    let socket = seqpacket();
    bind(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
    listen(&socket, 16).unwrap();
    socket
}

fn connect_seqpacket(path: &std::path::Path) -> OwnedFd {
    let socket = seqpacket();
    connect(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
    socket
}

fn accept_seqpacket(listener: &OwnedFd) -> OwnedFd {
    accept(listener).unwrap()
}

fn seqpacket() -> OwnedFd {
    let flags = SocketFlags::CLOEXEC;
    socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
}

/// Returns bytes that depend on their position.
fn pattern(length: usize) -> Vec<u8> {
    (0..length as u32)
        .map(|at| (at ^ at >> 8 ^ at >> 16) as u8)
        .collect()
}

/// Waits until `condition` is true.
#[track_caller]
fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
