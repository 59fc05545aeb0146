// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The contents of QEMU's display, through D-Bus without a bus: a listener for its first screen. It implements as much of D-Bus as this needs.
//!
//! Unlike a screen dump it includes the cursor, and receives the buffers of a GPU.

use std::fs::File;
use std::io::{self, BufRead, BufReader, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, UCred, recvmsg, sendmsg,
};
use rustix::process::{getgid, getpid, getuid};
use serde_json::json;

use super::error::{GuestError, system};
use super::qmp::Qmp;

/// QEMU's module for this.
pub const MODULE: &str = "/usr/lib/x86_64-linux-gnu/qemu/ui-dbus.so";
/// QEMU's argument for such a display, without a GPU.
pub const DISPLAY: &str = "dbus,p2p=yes,gl=on,rendernode=/dev/null";

/// Kinds of messages.
const CALL: u8 = 1;
const RETURN: u8 = 2;
/// Flag of a message: no reply is expected.
const NO_REPLY: u8 = 1;
/// Fields of a header.
const PATH: u8 = 1;
const INTERFACE: u8 = 2;
const MEMBER: u8 = 3;
const REPLY_SERIAL: u8 = 5;
const SIGNATURE: u8 = 8;
const FILES: u8 = 9;

/// Something that QEMU displays: a call of `org.qemu.Display1.Listener`.
#[derive(Debug)]
pub struct Shown {
    /// The name of the method.
    pub member: String,
    /// Its arguments, as encoded by D-Bus.
    pub arguments: Vec<u8>,
    /// The file that was sent with it.
    pub file: Option<File>,
}

impl Shown {
    /// Returns the argument of 32 bits that begins at a byte.
    pub fn word(&self, at: usize) -> u32 {
        u32::from_ne_bytes(self.arguments[at..at + 4].try_into().expect("4 bytes"))
    }
}

/// A listener. Dropping it ends it.
#[derive(Debug)]
pub struct Listener {
    shown: Receiver<Shown>,
    socket: UnixStream,
    _caller: UnixStream,
    thread: Option<JoinHandle<()>>,
}

impl Listener {
    /// Registers a listener for QEMU's first screen.
    pub fn connect(qmp: &mut Qmp) -> Result<Self, GuestError> {
        let (caller, theirs) = UnixStream::pair().map_err(system("make a pair of sockets"))?;
        qmp.execute_with_file("getfd", json!({ "fdname": "dbus" }), theirs.as_fd())?;
        let client = json!({ "protocol": "@dbus-display", "fdname": "dbus" });
        qmp.execute("add_client", client)?;
        let connect = || -> io::Result<(UnixStream, UnixStream)> {
            authenticate(&caller)?;
            let (ours, theirs) = UnixStream::pair()?;
            register(&caller, theirs.as_fd())?;
            authenticate(&ours)?;
            Ok((ours.try_clone()?, ours))
        };
        let (socket, ours) = connect().map_err(system("talk D-Bus to QEMU"))?;
        let (sender, shown) = channel();
        let thread = std::thread::spawn(move || {
            // It ends when either side closes the socket.
            let _ = serve(&ours, &sender);
        });
        Ok(Self {
            shown,
            socket,
            _caller: caller,
            thread: Some(thread),
        })
    }

    /// Waits for the next message of QEMU for a limited time.
    pub fn next(&self, within: Duration) -> Option<Shown> {
        self.shown.recv_timeout(within).ok()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = self.socket.shutdown(Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Authenticates, as GDBus requires, and negotiates file passing.
fn authenticate(mut socket: &UnixStream) -> io::Result<()> {
    let credentials = UCred {
        pid: getpid(),
        uid: getuid(),
        gid: getgid(),
    };
    let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmCredentials(1))];
    let mut control = SendAncillaryBuffer::new(&mut room);
    control.push(SendAncillaryMessage::ScmCredentials(credentials));
    sendmsg(
        socket,
        &[IoSlice::new(&[0])],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    let id = getuid().as_raw().to_string();
    let id: String = id.bytes().map(|byte| format!("{byte:02x}")).collect();
    // Nothing follows the answers until it is requested.
    let mut answers = BufReader::new(socket.try_clone()?);
    for (line, expected) in [
        (format!("AUTH EXTERNAL {id}"), "OK "),
        ("NEGOTIATE_UNIX_FD".to_owned(), "AGREE_UNIX_FD"),
    ] {
        socket.write_all(format!("{line}\r\n").as_bytes())?;
        let mut answer = String::new();
        answers.read_line(&mut answer)?;
        if !answer.starts_with(expected) {
            return Err(io::Error::other(format!("{line} is answered {answer:?}")));
        }
    }
    socket.write_all(b"BEGIN\r\n")
}

/// A field of a header, whose value is text or a number.
enum Value<'a> {
    Text(&'a str),
    Number(u32),
}

fn align(bytes: &mut Vec<u8>, to: usize) {
    bytes.resize(bytes.len().next_multiple_of(to), 0);
}

fn message(kind: u8, serial: u32, fields: &[(u8, &str, Value<'_>)], body: &[u8]) -> Vec<u8> {
    let order = if cfg!(target_endian = "little") {
        b'l'
    } else {
        b'B'
    };
    let mut bytes = vec![order, kind, 0, 1];
    bytes.extend((body.len() as u32).to_ne_bytes());
    bytes.extend(serial.to_ne_bytes());
    bytes.extend([0; 4]);
    let start = bytes.len();
    for (code, signature, value) in fields {
        align(&mut bytes, 8);
        bytes.extend([*code, 1, signature.as_bytes()[0], 0]);
        match value {
            Value::Number(number) => bytes.extend(number.to_ne_bytes()),
            Value::Text(text) if *signature == "g" => {
                bytes.push(text.len() as u8);
                bytes.extend(text.as_bytes());
                bytes.push(0);
            }
            Value::Text(text) => {
                bytes.extend((text.len() as u32).to_ne_bytes());
                bytes.extend(text.as_bytes());
                bytes.push(0);
            }
        }
    }
    let length = (bytes.len() - start) as u32;
    bytes[start - 4..start].copy_from_slice(&length.to_ne_bytes());
    align(&mut bytes, 8);
    bytes.extend(body);
    bytes
}

/// Calls `RegisterListener` with the other end of a listener's socket.
fn register(socket: &UnixStream, listener: BorrowedFd<'_>) -> io::Result<()> {
    let fields = [
        (PATH, "o", Value::Text("/org/qemu/Display1/Console_0")),
        (INTERFACE, "s", Value::Text("org.qemu.Display1.Console")),
        (MEMBER, "s", Value::Text("RegisterListener")),
        (SIGNATURE, "g", Value::Text("h")),
        (FILES, "u", Value::Number(1)),
    ];
    let call = message(CALL, 1, &fields, &0u32.to_ne_bytes());
    let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut room);
    let files = [listener];
    control.push(SendAncillaryMessage::ScmRights(&files));
    let sent = sendmsg(
        socket,
        &[IoSlice::new(&call)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    if sent != call.len() {
        return Err(io::Error::other("a call was cut"));
    }
    Ok(())
}

fn serve(mut socket: &UnixStream, shown: &Sender<Shown>) -> io::Result<()> {
    loop {
        let mut head = [0; 16];
        let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut room);
        let mut pieces = [IoSliceMut::new(&mut head)];
        let received = recvmsg(socket, &mut pieces, &mut control, RecvFlags::CMSG_CLOEXEC)?;
        if received.bytes == 0 {
            return Ok(());
        }
        let mut file = None;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(files) = message {
                file = files.map(File::from).last();
            }
        }
        socket.read_exact(&mut head[received.bytes..])?;
        let [body, serial, fields] =
            [4, 8, 12].map(|at| u32::from_ne_bytes(head[at..at + 4].try_into().expect("4 bytes")));
        let mut header = vec![0; (fields as usize).next_multiple_of(8)];
        socket.read_exact(&mut header)?;
        let mut arguments = vec![0; body as usize];
        socket.read_exact(&mut arguments)?;
        if head[1] != CALL {
            continue;
        }
        let member = member(&header[..fields as usize]).unwrap_or_default();
        if head[2] & NO_REPLY == 0 {
            let reply = (REPLY_SERIAL, "u", Value::Number(serial));
            let answer = match member.as_str() {
                // There are no properties.
                "GetAll" => {
                    let fields = [reply, (SIGNATURE, "g", Value::Text("a{sv}"))];
                    message(RETURN, serial, &fields, &[0; 8])
                }
                _ => message(RETURN, serial, &[reply], &[]),
            };
            socket.write_all(&answer)?;
        }
        let _ = shown.send(Shown {
            member,
            arguments,
            file,
        });
    }
}

/// Returns the name of the method among the fields of a header.
fn member(fields: &[u8]) -> Option<String> {
    let mut at = 0usize;
    loop {
        at = at.next_multiple_of(8);
        let (code, kind) = (*fields.get(at)?, *fields.get(at + 2)?);
        at += 4;
        if kind == b'g' {
            at += usize::from(*fields.get(at)?) + 2;
            continue;
        }
        let number = u32::from_ne_bytes(fields.get(at..at + 4)?.try_into().ok()?);
        at += 4;
        if kind == b'u' {
            continue;
        }
        let text = fields.get(at..at + number as usize)?;
        if code == MEMBER {
            return String::from_utf8(text.to_vec()).ok();
        }
        at += text.len() + 1;
    }
}
