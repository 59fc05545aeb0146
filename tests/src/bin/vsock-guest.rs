// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The programs of a guest that tests of the socket device need: they use sockets of the family AF_VSOCK, which the host may lack.

#![allow(
    unsafe_code,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "it calls the C library, and may panic"
)]

use std::fs;
use std::io::{self, Write};
use std::mem::size_of;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::set_socket_linger;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, Shutdown, SocketType, accept, listen, recv, send,
    shutdown, socket,
};
use vhost_device_tests::transfer;

/// Time limit of a transfer.
const LIMIT: Duration = Duration::from_secs(240);
/// Bytes that the kernel may buffer for all connections together.
const BUFFERS: u64 = 32 << 20;
const LARGEST_BUFFER: u64 = 256 << 10;
/// Interval between messages on a connection that is to break.
const INTERVAL: Duration = Duration::from_millis(10);
/// Any address (linux/vm_sockets.h).
const ANY: u32 = u32::MAX;
/// An option of sockets of this family: how many bytes are buffered.
const BUFFER_SIZE: libc::c_int = 0;

/// Use sockets of the family AF_VSOCK
#[derive(Debug, Parser)]
struct Arguments {
    /// Keep the bounds of messages (SOCK_SEQPACKET), instead of streams
    #[arg(long)]
    messages: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Connect, and exchange data that both ends check
    Connect {
        cid: u32,
        port: u32,
        #[command(flatten)]
        amount: Amount,
    },
    /// Accept connections, and exchange data that both ends check
    Listen {
        port: u32,
        /// A file to create when it listens; otherwise a marker goes to stdout
        #[arg(long)]
        ready: Option<PathBuf>,
        #[command(flatten)]
        amount: Amount,
    },
    /// Print the error of a connection that is refused, and its time in milliseconds
    Refused { cid: u32, port: u32 },
    /// Send READY=1 as systemd does in a virtual machine
    Notify { cid: u32, port: u32 },
    /// Wait until a connection breaks, then make another one at once; print how
    Reconnect { cid: u32, port: u32 },
}

#[derive(Debug, Clone, Copy, clap::Args)]
struct Amount {
    /// Number of connections
    #[arg(long, default_value_t = 1)]
    connections: u32,
    /// Bytes in each direction of a stream, or messages
    #[arg(long, default_value_t = 1 << 20)]
    count: u64,
}

fn main() -> ExitCode {
    let Arguments { messages, command } = Arguments::parse();
    let kind = match messages {
        true => SocketType::SEQPACKET,
        false => SocketType::STREAM,
    };
    let result = transfer::allow_many_files().and_then(|()| match command {
        Command::Connect { cid, port, amount } => {
            exchange(kind, amount, |socket| connect(socket, cid, port))
        }
        Command::Listen {
            port,
            ready,
            amount,
        } => accept_all(kind, port, ready, amount),
        Command::Refused { cid, port } => refused(kind, cid, port),
        Command::Notify { cid, port } => notify(kind, cid, port),
        Command::Reconnect { cid, port } => reconnect(kind, cid, port),
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("vsock-guest: {error}");
            ExitCode::FAILURE
        }
    }
}

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: all bytes of this struct may be 0.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

/// A call of the C library with an address.
type Call =
    unsafe extern "C" fn(libc::c_int, *const libc::sockaddr, libc::socklen_t) -> libc::c_int;

fn with_address(call: Call, socket: &OwnedFd, cid: u32, port: u32) -> io::Result<()> {
    let address = address(cid, port);
    let size = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
    // SAFETY: the address is there during the call, with this size.
    match unsafe { call(socket.as_raw_fd(), (&raw const address).cast(), size) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn connect(socket: &OwnedFd, cid: u32, port: u32) -> io::Result<()> {
    with_address(libc::connect, socket, cid, port)
}

fn new_socket(kind: SocketType) -> io::Result<OwnedFd> {
    Ok(socket(AddressFamily::VSOCK, kind, None)?)
}

/// Limits what the kernel buffers for a connection, so that a thousand of them do not fill the memory of a small guest.
fn limit_buffer(socket: &OwnedFd, connections: u32) -> io::Result<()> {
    let size = (BUFFERS / u64::from(connections.max(1))).min(LARGEST_BUFFER);
    let length = size_of::<u64>() as libc::socklen_t;
    let value = (&raw const size).cast();
    // SAFETY: the value is there during the call, with this size.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::AF_VSOCK,
            BUFFER_SIZE,
            value,
            length,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Makes all connections, then exchanges data over them.
fn exchange(
    kind: SocketType,
    amount: Amount,
    make: impl Fn(&OwnedFd) -> io::Result<()>,
) -> io::Result<()> {
    let mut sockets = Vec::new();
    for number in 0..amount.connections {
        let socket = new_socket(kind)?;
        limit_buffer(&socket, amount.connections)?;
        make(&socket).map_err(|error| on(number, &error))?;
        sockets.push(socket);
    }
    over(kind, sockets, amount)
}

fn on(number: u32, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("connection {number}: {error}"))
}

fn over(kind: SocketType, sockets: Vec<OwnedFd>, amount: Amount) -> io::Result<()> {
    for socket in &sockets {
        // The guest may power off next: closing waits until the device has passed on everything.
        set_socket_linger(socket, Some(LIMIT))?;
    }
    if kind == SocketType::STREAM {
        return transfer::streams(sockets, amount.count, LIMIT);
    }
    for socket in &sockets {
        transfer::messages(socket, amount.count as u32)?;
    }
    Ok(())
}

fn accept_all(
    kind: SocketType,
    port: u32,
    ready: Option<PathBuf>,
    amount: Amount,
) -> io::Result<()> {
    let listener = new_socket(kind)?;
    limit_buffer(&listener, amount.connections)?;
    with_address(libc::bind, &listener, ANY, port)?;
    listen(&listener, amount.connections as i32)?;
    match ready {
        Some(path) => fs::write(path, "")?,
        None => mark("listening", ""),
    }
    let mut sockets = Vec::new();
    for _ in 0..amount.connections {
        sockets.push(accept(&listener)?);
    }
    over(kind, sockets, amount)
}

/// Prints a marker for the host.
fn mark(name: &str, value: &str) {
    println!("@{name} {value}");
    let _ = io::stdout().flush();
}

fn refused(kind: SocketType, cid: u32, port: u32) -> io::Result<()> {
    let socket = new_socket(kind)?;
    let start = Instant::now();
    match connect(&socket, cid, port) {
        Ok(()) => Err(io::Error::other("the connection was accepted")),
        Err(error) => {
            let error = Errno::from_io_error(&error).map_or(0, Errno::raw_os_error);
            let name = match error {
                libc::ECONNRESET => "ECONNRESET".to_owned(),
                other => other.to_string(),
            };
            mark(
                "refused",
                &format!("{name} {}", start.elapsed().as_millis()),
            );
            Ok(())
        }
    }
}

fn notify(kind: SocketType, cid: u32, port: u32) -> io::Result<()> {
    let socket = new_socket(kind)?;
    connect(&socket, cid, port)?;
    send(&socket, b"READY=1\n", SendFlags::NOSIGNAL)?;
    shutdown(&socket, Shutdown::Write)?;
    let mut byte = [0];
    match recv(&socket, &mut byte, RecvFlags::empty())?.0 {
        0 => Ok(()),
        _ => Err(io::Error::other("the host answered")),
    }
}

fn reconnect(kind: SocketType, cid: u32, port: u32) -> io::Result<()> {
    let socket = new_socket(kind)?;
    connect(&socket, cid, port)?;
    echo(&socket)?;
    mark("connected", "");
    let how = loop {
        match echo(&socket) {
            Ok(()) => thread::sleep(INTERVAL),
            Err(error) => break error,
        }
    };
    let broken = Instant::now();
    mark("broken", &how.to_string());
    while new_socket(kind)
        .and_then(|socket| connect(&socket, cid, port).and_then(|()| echo(&socket)))
        .is_err()
    {
        if broken.elapsed() > LIMIT {
            return Err(io::Error::other("no new connection was accepted"));
        }
    }
    mark("again", &broken.elapsed().as_millis().to_string());
    Ok(())
}

/// Sends a byte, and waits until it comes back.
fn echo(socket: &OwnedFd) -> io::Result<()> {
    send(socket, &[1], SendFlags::NOSIGNAL)?;
    let limit = Timespec::try_from(LIMIT).map_err(io::Error::other)?;
    if poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&limit))? == 0 {
        return Err(Errno::TIMEDOUT.into());
    }
    match recv(socket, &mut [0], RecvFlags::empty())?.0 {
        0 => Err(io::Error::other("end of the stream")),
        _ => Ok(()),
    }
}
