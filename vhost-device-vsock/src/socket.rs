// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! System calls on the sockets of the host.

use std::ffi::OsString;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use nix::sys::socket::VsockAddr;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ioctl_fionread};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, connect, recv, send,
    socket_with,
};

use crate::packet::Kind;

/// The CID by which programs of the host reach each other.
const LOCAL_CID: u32 = 1;

/// Maximum length of the first line that a program of the host sends, with its end.
const MAX_LINE: usize = 32;

const FLAGS: SocketFlags = SocketFlags::NONBLOCK.union(SocketFlags::CLOEXEC);

/// Connects to a unix socket. Fails with `AGAIN` if too many connections wait there: `connect(2)` must not block.
pub fn connect_unix(path: &Path, kind: Kind) -> Result<OwnedFd, Errno> {
    let address = SocketAddrUnix::new(path)?;
    let socket = socket_with(AddressFamily::UNIX, kind.socket_type(), FLAGS, None)?;
    connect(&socket, &address)?;
    Ok(socket)
}

/// Connects to the unix socket at `path`, to which `_` and the port are appended.
pub fn connect_port(path: &Path, port: u32, kind: Kind) -> Result<OwnedFd, Errno> {
    let mut path = OsString::from(path);
    path.push(format!("_{port}"));
    connect_unix(path.as_ref(), kind)
}

/// Begins to connect to an AF_VSOCK socket of this host. Returns whether the connection is complete.
pub fn connect_vsock(port: u32, kind: Kind) -> Result<(OwnedFd, bool), Errno> {
    let socket = socket_with(AddressFamily::VSOCK, kind.socket_type(), FLAGS, None)?;
    let address = VsockAddr::new(LOCAL_CID, port);
    match nix::sys::socket::connect(socket.as_raw_fd(), &address) {
        Ok(()) => Ok((socket, true)),
        Err(nix::errno::Errno::EINPROGRESS) => Ok((socket, false)),
        Err(errno) => Err(Errno::from_raw_os_error(errno as i32)),
    }
}

/// The first line that a program of the host sends.
#[derive(Debug, PartialEq, Eq)]
pub enum Line {
    /// The line has not been sent completely.
    Partial,
    /// The line, without its end.
    Complete(String),
    /// There will be no valid line.
    Invalid,
}

/// Reads the first line. What follows it stays in the socket.
pub fn read_line(socket: &OwnedFd, kind: Kind) -> Line {
    let mut bytes = [0; MAX_LINE];
    let flags = match kind {
        Kind::Stream => RecvFlags::PEEK,
        Kind::Seqpacket => RecvFlags::TRUNC,
    };
    let (sent, length) = match recv(socket, &mut bytes, flags) {
        Ok((_, length)) => (bytes.get(..length).unwrap_or_default(), length),
        Err(Errno::AGAIN | Errno::INTR) => return Line::Partial,
        Err(_) => return Line::Invalid,
    };
    let Some(end) = sent.iter().position(|byte| *byte == b'\n') else {
        let may_follow = kind == Kind::Stream && (1..MAX_LINE).contains(&length);
        return if may_follow {
            Line::Partial
        } else {
            Line::Invalid
        };
    };
    let line = sent.get(..end).unwrap_or_default();
    let Ok(line) = std::str::from_utf8(line).map(str::to_owned) else {
        return Line::Invalid;
    };
    match kind {
        Kind::Stream => {
            let read = bytes.get_mut(..=end).unwrap_or_default();
            match recv(socket, read, RecvFlags::empty()) {
                Ok((_, count)) if count == end + 1 => Line::Complete(line),
                _ => Line::Invalid,
            }
        }
        Kind::Seqpacket if end + 1 == length => Line::Complete(line),
        Kind::Seqpacket => Line::Invalid,
    }
}

/// Returns the number after `word` in a line such as `CONNECT 5000`.
pub fn number_after(word: &str, line: &str) -> Option<u32> {
    let (first, number) = line.split_once(' ')?;
    let valid =
        first.eq_ignore_ascii_case(word) && number.bytes().all(|byte| byte.is_ascii_digit());
    valid.then(|| number.parse().ok())?
}

/// Sends a line, which must fit.
pub fn send_line(socket: &OwnedFd, line: &str) -> Result<(), Errno> {
    match send(socket, line.as_bytes(), SendFlags::NOSIGNAL) {
        Ok(count) if count == line.len() => Ok(()),
        Ok(_) => Err(Errno::AGAIN),
        Err(errno) => Err(errno),
    }
}

/// Returns the length of the next message: 0 if it is empty, or if there will be none.
pub fn message_length(socket: &OwnedFd) -> Result<usize, Errno> {
    let flags = RecvFlags::PEEK | RecvFlags::TRUNC;
    recv(socket, &mut [0; 0], flags).map(|(_, length)| length)
}

/// Reads a message of at most `length` bytes.
pub fn read_message(socket: &OwnedFd, length: usize) -> Result<Vec<u8>, Errno> {
    let mut bytes = vec![0; length];
    let (_, count) = recv(socket, &mut bytes[..], RecvFlags::empty())?;
    bytes.truncate(count);
    Ok(bytes)
}

/// Discards an empty message. Returns false if it was the end instead.
pub fn skip_empty_message(socket: &OwnedFd) -> bool {
    let _ = recv(socket, &mut [0; 0], RecvFlags::empty());
    !is(socket, PollFlags::RDHUP | PollFlags::HUP)
        || ioctl_fionread(socket).is_ok_and(|left| left > 0)
}

/// Returns whether nothing can be sent or received any more: the program of the host has closed its end.
pub fn is_closed(socket: &OwnedFd) -> bool {
    is(socket, PollFlags::HUP | PollFlags::ERR)
}

fn is(socket: &OwnedFd, flags: PollFlags) -> bool {
    let mut files = [PollFd::new(socket, flags)];
    let now = Timespec::default();
    let polled = poll(&mut files, Some(&now));
    let [file] = &files;
    polled.is_ok() && file.revents().intersects(flags)
}

#[cfg(test)]
mod tests {
    use rustix::net::{SocketType, socketpair};

    use super::*;

    fn pair(kind: SocketType) -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::UNIX, kind, FLAGS, None).unwrap()
    }

    fn line(parts: &[&[u8]], kind: Kind) -> (Line, OwnedFd, OwnedFd) {
        let (ours, theirs) = pair(kind.socket_type());
        for part in parts {
            send(&theirs, part, SendFlags::empty()).unwrap();
        }
        (read_line(&ours, kind), ours, theirs)
    }

    #[test]
    fn what_follows_the_first_line_stays_in_the_socket() {
        let (read, ours, _theirs) = line(&[b"CONNECT 5", b"2\nand more"], Kind::Stream);
        assert_eq!(read, Line::Complete("CONNECT 52".to_owned()));
        let mut rest = [0; 32];
        let (_, count) = recv(&ours, &mut rest, RecvFlags::empty()).unwrap();
        assert_eq!(&rest[..count], b"and more");
    }

    #[test]
    fn a_partial_line_is_read_when_it_is_complete() {
        let (read, ours, theirs) = line(&[b"CONNECT 5"], Kind::Stream);
        assert_eq!(read, Line::Partial);
        send(&theirs, b"2\n", SendFlags::empty()).unwrap();
        let complete = Line::Complete("CONNECT 52".to_owned());
        assert_eq!(read_line(&ours, Kind::Stream), complete);
    }

    #[test]
    fn a_line_has_a_bound() {
        let long = [b'1'; 31];
        assert_eq!(line(&[&long], Kind::Stream).0, Line::Partial);
        assert_eq!(line(&[&long, b"1"], Kind::Stream).0, Line::Invalid);
        assert_eq!(line(&[b"\xff\n"], Kind::Stream).0, Line::Invalid);
        let (ours, theirs) = pair(SocketType::STREAM);
        assert_eq!(read_line(&ours, Kind::Stream), Line::Partial);
        drop(theirs);
        assert_eq!(read_line(&ours, Kind::Stream), Line::Invalid);
    }

    #[test]
    fn the_first_message_is_the_line() {
        let seqpacket = |message: &[u8]| line(&[message, b"next"], Kind::Seqpacket).0;
        let complete = Line::Complete("CONNECT 52".to_owned());
        assert_eq!(seqpacket(b"CONNECT 52\n"), complete);
        assert_eq!(seqpacket(b"CONNECT 52\nand more"), Line::Invalid);
        assert_eq!(seqpacket(b"CONNECT 52"), Line::Invalid);
        assert_eq!(seqpacket(&[b'\n'; 33]), Line::Invalid);
    }

    #[test]
    fn a_number_follows_the_word() {
        let port = |line| number_after("CONNECT", line);
        assert_eq!(port("CONNECT 52"), Some(52));
        assert_eq!(port("connect 4294967295"), Some(u32::MAX));
        for line in [
            "CONNECT",
            "CONNECT ",
            "CONNECT  1",
            "CONNECT +1",
            "CONNECT 1 ",
            "CONNECT -1",
            "CONNECT 4294967296",
            "OK 1",
            "",
        ] {
            assert_eq!(port(line), None, "{line:?}");
        }
    }

    #[test]
    fn an_empty_message_is_not_the_end() {
        let (ours, theirs) = pair(SocketType::SEQPACKET);
        assert_eq!(message_length(&ours), Err(Errno::AGAIN));
        for message in [&b""[..], b"four", b""] {
            send(&theirs, message, SendFlags::empty()).unwrap();
        }
        drop(theirs);
        assert_eq!(message_length(&ours), Ok(0));
        assert!(skip_empty_message(&ours));
        assert_eq!(message_length(&ours), Ok(4));
        assert_eq!(read_message(&ours, 9).unwrap(), b"four");
        assert_eq!(message_length(&ours), Ok(0));
        assert!(!skip_empty_message(&ours));
    }
}
