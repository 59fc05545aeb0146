// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The connection to a PulseAudio server: messages in both directions, without waiting.

use std::io::{self, Cursor};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use pulseaudio::protocol::{
    self, Command, CommandReply, DESCRIPTOR_SIZE, ProtocolError, TagStructReader,
};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recv,
    send, socket_with,
};

/// Largest message that is received, in bytes.
const MAX_MESSAGE: usize = 1 << 20;
/// Most bytes that wait to be sent. A server that reads nothing is given up then.
const MAX_UNSENT: usize = 4 << 20;
/// Bytes that are received at a time.
const PIECE: usize = 16 << 10;
/// Channel of messages that are commands.
const COMMANDS: u32 = u32::MAX;

/// A message of the server.
pub enum Message<'a> {
    /// The reply to the command with this number, to be read by [`reply`].
    Reply(u32, &'a [u8]),
    /// The command with this number failed.
    Failed(u32, String),
    /// Something has happened.
    Event(Box<Command>),
    /// Recorded sound of a channel.
    Sound(u32, &'a [u8]),
}

/// A connection.
pub struct Link {
    socket: OwnedFd,
    /// Version of the protocol.
    pub version: u16,
    received: Vec<u8>,
    unsent: Vec<u8>,
    next_number: u32,
}

impl Link {
    /// Connects to the socket of a server.
    ///
    /// # Errors
    /// Nothing listens there, or the server is too busy.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        Ok(Self {
            socket,
            version: protocol::MAX_VERSION,
            received: Vec::new(),
            unsent: Vec::new(),
            next_number: 0,
        })
    }

    /// Sends a command. Returns its number.
    ///
    /// # Errors
    /// The connection is broken.
    pub fn command(&mut self, command: &Command) -> io::Result<u32> {
        let number = self.next_number;
        self.next_number = self.next_number.wrapping_add(1);
        protocol::write_command_message(&mut self.unsent, number, command, self.version)
            .map_err(broken)?;
        self.flush()?;
        Ok(number)
    }

    /// Sends sound to a channel.
    ///
    /// # Errors
    /// The connection is broken.
    pub fn sound(&mut self, channel: u32, bytes: &[u8]) -> io::Result<()> {
        protocol::write_memblock(&mut self.unsent, channel, bytes, 0).map_err(broken)?;
        self.flush()
    }

    /// Sends what waits to be sent, as much as possible.
    ///
    /// # Errors
    /// The connection is broken.
    pub fn flush(&mut self) -> io::Result<()> {
        let mut sent = 0;
        while let Some(rest) = self.unsent.get(sent..)
            && !rest.is_empty()
        {
            match send(&self.socket, rest, SendFlags::NOSIGNAL) {
                Ok(count) => sent += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(errno) => return Err(errno.into()),
            }
        }
        self.unsent.drain(..sent);
        match self.unsent.len() > MAX_UNSENT {
            true => Err(io::Error::other("the server does not read")),
            false => Ok(()),
        }
    }

    /// Receives what has arrived, and calls `handle` with each message.
    ///
    /// # Errors
    /// The connection is closed or broken.
    pub fn receive(&mut self, mut handle: impl FnMut(Message<'_>)) -> io::Result<()> {
        let mut piece = [0; PIECE];
        loop {
            match recv(&self.socket, &mut piece, RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok((count, _)) => {
                    self.received.extend(piece.get(..count).unwrap_or_default());
                    self.take_messages(&mut handle)?;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    fn take_messages(&mut self, handle: &mut impl FnMut(Message<'_>)) -> io::Result<()> {
        let mut start = 0;
        while let Some(rest) = self.received.get(start..)
            && rest.len() >= DESCRIPTOR_SIZE
        {
            let descriptor = protocol::read_descriptor(&mut Cursor::new(rest)).map_err(broken)?;
            let length = descriptor.length as usize;
            if length > MAX_MESSAGE {
                return Err(io::Error::other("the server sent too long a message"));
            }
            let Some(content) = rest.get(DESCRIPTOR_SIZE..DESCRIPTOR_SIZE + length) else {
                break;
            };
            let message = match descriptor.channel {
                COMMANDS => command(content, self.version)?,
                channel => Some(Message::Sound(channel, content)),
            };
            if let Some(message) = message {
                handle(message);
            }
            start += DESCRIPTOR_SIZE + length;
        }
        self.received.drain(..start);
        Ok(())
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Reads the contents of a reply.
///
/// # Errors
/// It does not have this form.
pub fn reply<T: CommandReply>(content: &[u8], version: u16) -> io::Result<T> {
    let mut cursor = Cursor::new(content);
    TagStructReader::new(&mut cursor, version)
        .read()
        .map_err(broken)
}

/// Reads a command of the server. Commands that the crate does not know are left out.
fn command(content: &[u8], version: u16) -> io::Result<Option<Message<'_>>> {
    let mut cursor = Cursor::new(content);
    let (number, command) = match Command::read_tag_prefixed(&mut cursor, version) {
        Ok(read) => read,
        Err(error) => {
            log::debug!("ignoring a message of the sound server: {error}");
            return Ok(None);
        }
    };
    Ok(Some(match command {
        Command::Reply => {
            let start = usize::try_from(cursor.position()).unwrap_or(usize::MAX);
            Message::Reply(number, content.get(start..).unwrap_or_default())
        }
        Command::Error(error) => Message::Failed(number, error.to_string()),
        event => Message::Event(Box::new(event)),
    }))
}

fn broken(error: ProtocolError) -> io::Error {
    io::Error::other(error.to_string())
}
