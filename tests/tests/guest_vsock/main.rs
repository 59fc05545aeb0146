// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `vhost-device-vsock` with Linux guests, in User-Mode Linux and in QEMU.

#![cfg(test)]

mod host;
mod kernel_tests;
mod qemu;
mod restart;
mod siblings;

use std::ffi::OsString;
use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept_with,
    bind, connect, listen, recv, send, socket_with,
};
use tempfile::TempDir;
use vhost_device_tests::process::{Program, binary, command, option};
use vhost_device_tests::relay::Relay;
use vhost_device_tests::uml::front_end::{self, Device};
use vhost_device_tests::uml::{self, kernel};
use vhost_device_tests::{process, transfer};

/// VIRTIO's number of the type.
const VSOCK: u32 = 19;
/// CID of the host, of the guest, and of a second guest.
const HOST: u32 = 2;
const GUEST: u32 = 3;
const SIBLING: u32 = 4;

/// Time limit of a guest.
const PATIENCE: Duration = Duration::from_secs(120);
const INTERVAL: Duration = Duration::from_millis(5);

/// Environment variable: MiB that a test moves in each direction.
const MEBIBYTES: &str = "VHOST_DEVICE_TRANSFER_MIB";
const FEW_MEBIBYTES: u64 = 64;

/// The formats of rings.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Format {
    Split,
    Packed,
}

/// Returns how many bytes a test moves in each direction.
fn amount() -> u64 {
    let number = |text: String| text.parse().expect("a number of MiB");
    std::env::var(MEBIBYTES).map_or(FEW_MEBIBYTES, number) << 20
}

/// A back-end, and the directory that it shares with a guest.
struct BackEnd {
    work: TempDir,
    /// The socket that the guest connects to.
    front: PathBuf,
    cid: u32,
    options: Vec<OsString>,
    program: Program,
    /// The script of the guest has failed, so that nothing else is to come.
    has_failed: Arc<AtomicBool>,
}

impl BackEnd {
    fn start(cid: u32, options: &[&str]) -> Self {
        Self::start_in(uml::work().unwrap(), cid, options)
    }

    fn start_in(work: TempDir, cid: u32, options: &[&str]) -> Self {
        let options = options.iter().map(OsString::from).collect::<Vec<_>>();
        let program = spawn(work.path(), cid, &options);
        Self {
            front: work.path().join("socket"),
            work,
            cid,
            options,
            program,
            has_failed: Arc::default(),
        }
    }

    /// Puts a relay in front of the device, with which User-Mode Linux has split rings, and which can replace the device.
    fn put_relay_in_front(&mut self) -> Relay {
        self.front = self.file("relay");
        Relay::start(&self.front, &self.socket()).unwrap()
    }

    /// Kills the program, and starts it again.
    fn restart(&mut self) {
        self.program
            .end(process::Signal::KILL, process::PATIENCE)
            .unwrap();
        self.program = spawn(self.work.path(), self.cid, &self.options);
    }

    fn file(&self, name: &str) -> PathBuf {
        self.work.path().join(name)
    }

    fn socket(&self) -> PathBuf {
        self.file("socket")
    }

    /// Returns what a script in User-Mode Linux has written to a file of `$work`.
    fn read(&self, name: &str) -> String {
        let path = self.file(name);
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    /// Accepts connections of the guest to this port.
    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.file(&format!("guest_{port}"))).unwrap()
    }

    /// The same for sockets that keep the bounds of messages.
    fn listen_for_messages(&self, port: u32) -> OwnedFd {
        let address = SocketAddrUnix::new(self.file(&format!("guest_{port}"))).unwrap();
        let socket = message_socket();
        bind(&socket, &address).unwrap();
        listen(&socket, 8).unwrap();
        socket
    }

    /// Connects to a port of the guest, as soon as a program there accepts connections.
    fn connect(&self, port: u32) -> UnixStream {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut stream = UnixStream::connect(self.file("guest")).unwrap();
            if let Some(answer) = ask(&mut stream, port) {
                assert!(answer.starts_with("OK "), "{answer:?}");
                return stream;
            }
            self.wait(deadline, "the guest accepts no connection");
        }
    }

    /// Waits a moment for the guest. Panics after the deadline, or when the guest has failed.
    fn wait(&self, deadline: Instant, what: &str) {
        assert!(
            !self.has_failed.load(Ordering::Relaxed),
            "{what}: it has failed"
        );
        assert!(Instant::now() < deadline, "{what}");
        thread::sleep(INTERVAL);
    }

    /// Accepts a connection of the guest.
    fn accept(&self, listener: impl AsFd) -> OwnedFd {
        let deadline = Instant::now() + PATIENCE;
        let mut event = [PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN)];
        while poll(&mut event, Some(&Timespec::default())).unwrap() == 0 {
            self.wait(deadline, "the guest does not connect");
        }
        accept_with(listener.as_fd(), SocketFlags::CLOEXEC).unwrap()
    }

    fn accept_all(&self, listener: &UnixListener, count: u32) -> Vec<OwnedFd> {
        (0..count).map(|_| self.accept(listener)).collect()
    }

    /// The same for a socket that keeps the bounds of messages.
    fn connect_for_messages(&self, port: u32) -> OwnedFd {
        let address = SocketAddrUnix::new(self.file("guest_seqpacket")).unwrap();
        let deadline = Instant::now() + PATIENCE;
        loop {
            let socket = message_socket();
            connect(&socket, &address).unwrap();
            // A socket that is closed already refuses what is sent.
            let question = format!("CONNECT {port}\n");
            let _ = send(&socket, question.as_bytes(), SendFlags::NOSIGNAL);
            let mut answer = [0; 32];
            if let Ok((length @ 1.., _)) = recv(&socket, &mut answer, RecvFlags::empty()) {
                assert!(answer[..length].starts_with(b"OK "), "{answer:?}");
                return socket;
            }
            self.wait(deadline, "the guest accepts no connection");
        }
    }

    /// Runs a script in User-Mode Linux with this device. There, `$work` is a directory that [`BackEnd::read`] reads, and `$guest` the program
    /// for guests.
    fn run(&self, script: &str) {
        let status = self.run_script(script);
        assert_eq!(status, 0, "status of the script; {}", self.program.stderr());
    }

    /// Runs a script in User-Mode Linux, and returns its status.
    fn run_script(&self, script: &str) -> i32 {
        self.runner(script)()
    }

    /// Returns a function that does so, for another thread.
    fn runner(&self, script: &str) -> impl FnOnce() -> i32 + Send + 'static {
        let (socket, work) = (self.front.clone(), self.work.path().to_owned());
        // The guest sees no other file of the host's /tmp, where the program may be.
        let program = work.join("vsock-guest");
        if !program.exists() {
            let original = binary("vsock-guest").unwrap();
            fs::hard_link(&original, &program)
                .or_else(|_| fs::copy(&original, &program).map(drop))
                .unwrap();
        }
        let script = format!("guest=$work/vsock-guest\n{script}");
        let has_failed = self.has_failed.clone();
        move || {
            let device = Device {
                socket: &socket,
                id: VSOCK,
            };
            let status = front_end::run(&[device], script, &work, PATIENCE).unwrap();
            has_failed.store(status != 0, Ordering::Relaxed);
            status
        }
    }

    /// Runs a script in User-Mode Linux, and `host` here at the same time.
    fn run_with<T>(&self, script: &str, host: impl FnOnce() -> T) -> T {
        // The kernel is built before the clock of the host starts.
        kernel::prepare().unwrap();
        thread::scope(|scope| {
            let guest = scope.spawn(|| self.run(script));
            let result = host();
            guest.join().unwrap();
            result
        })
    }
}

fn spawn(work: &Path, cid: u32, options: &[OsString]) -> Program {
    let socket = work.join("socket");
    let mut command = command("vhost-device-vsock").unwrap();
    command
        .arg(option("socket-path", &socket))
        .arg(option("uds-path", work.join("guest")))
        .arg(format!("--guest-cid={cid}"))
        .args(options);
    Program::serve(&mut command, &socket).unwrap()
}

/// Asks for a connection to a port of the guest. Returns the answer, without its end of line, or `None` if there is no such port.
fn ask(stream: &mut UnixStream, port: u32) -> Option<String> {
    stream
        .write_all(format!("CONNECT {port}\n").as_bytes())
        .ok()?;
    let mut answer = String::new();
    let mut byte = [0];
    loop {
        match stream.read(&mut byte) {
            Ok(1) if byte == *b"\n" => return Some(answer),
            Ok(1) => answer.push(byte[0].into()),
            _ => return None,
        }
    }
}

fn message_socket() -> OwnedFd {
    let flags = SocketFlags::CLOEXEC;
    socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
}

/// Reads to the end of the stream.
fn read_all(stream: &mut UnixStream) -> String {
    let mut text = String::new();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.read_to_string(&mut text).unwrap();
    text
}

/// Answers a connection of socat in the guest: reads to its end, which the guest closes first, then answers.
fn answer(back_end: &BackEnd, listener: &UnixListener) -> String {
    let mut stream = UnixStream::from(back_end.accept(listener));
    let question = read_all(&mut stream);
    stream.write_all(b"answer of the host\n").unwrap();
    question
}

/// Asks socat in the guest, which answers with what it reads and a line more.
fn question(back_end: &BackEnd, port: u32) -> String {
    let mut stream = back_end.connect(port);
    stream.write_all(b"question of the host\n").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    read_all(&mut stream)
}

/// What [`question`] returns.
const ANSWER: &str = "question of the host\nanswer of the guest\n";

/// Lets this process have thousands of sockets.
fn allow_many_files() {
    transfer::allow_many_files().unwrap();
}
