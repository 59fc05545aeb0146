// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A connection to a control socket: one JSON object per line, in the shape of QMP.

use std::io::{self, BufRead, BufReader, ErrorKind, IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType, sendmsg, socket_with,
};
use serde_json::{Value, json};

use crate::failure::Failure;

/// How long the back-end may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Most bytes of an answer.
const MOST_BYTES: u64 = 16 << 20;
/// Most files that are passed with a command.
const MOST_FILES: usize = 16;

/// A connection to a back-end.
pub struct Connection(BufReader<Stream>);

/// A socket whose reads end at a deadline, however slowly data comes.
struct Stream {
    socket: UnixStream,
    deadline: Option<Instant>,
}

impl Stream {
    fn expect_answer(&mut self) {
        self.deadline = Some(Instant::now() + PATIENCE);
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let now = Instant::now();
        let left = self
            .deadline
            .map(|deadline| deadline.saturating_duration_since(now));
        if left == Some(Duration::ZERO) {
            return Err(ErrorKind::WouldBlock.into());
        }
        self.socket.set_read_timeout(left)?;
        self.socket.read(buffer)
    }
}

impl Connection {
    /// Connects, and reads the greeting.
    pub fn open(path: &Path) -> Result<Self, Failure> {
        let shown = path.display();
        let connect = || {
            let address = SocketAddrUnix::new(path)?;
            let socket = socket_with(
                AddressFamily::UNIX,
                SocketType::STREAM,
                SocketFlags::CLOEXEC,
                None,
            )?;
            let socket = UnixStream::from(socket);
            // A connect waits as long as a write while the back-end has too many clients to accept.
            socket.set_write_timeout(Some(PATIENCE))?;
            rustix::net::connect(&socket, &address)?;
            let mut stream = Stream {
                socket,
                deadline: None,
            };
            stream.expect_answer();
            Ok(Self(BufReader::new(stream)))
        };
        let mut connection = connect().map_err(|error: io::Error| {
            Failure::Failed(format!(
                "cannot connect to {shown}: {error}; is the back-end running with --control-socket={shown}?"
            ))
        })?;
        match connection.line()?.get("QMP") {
            Some(_) => Ok(connection),
            None => Err(Failure::Failed(format!("{shown} is not a control socket"))),
        }
    }

    /// Executes a command, and waits for its answer.
    pub fn execute(
        &mut self,
        name: &str,
        arguments: Value,
        files: &[OwnedFd],
    ) -> Result<Value, Failure> {
        let request = json!({"execute": name, "arguments": arguments});
        self.0.get_mut().expect_answer();
        self.send(format!("{request}\n").as_bytes(), files)?;
        loop {
            let mut answer = self.line()?;
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = answer.get("error") {
                let text = error.get("desc").and_then(Value::as_str);
                let text = text.unwrap_or("the command failed").to_owned();
                return Err(Failure::Failed(text));
            }
            // An event.
        }
    }

    /// Waits for the next event; `None` when the back-end closes the connection.
    pub fn event(&mut self) -> Result<Option<Value>, Failure> {
        self.0.get_mut().deadline = None;
        while let Some(line) = self.next_line()? {
            if line.get("event").is_some() {
                return Ok(Some(line));
            }
        }
        Ok(None)
    }

    /// Sends bytes; the files are passed with the first of them.
    fn send(&mut self, mut bytes: &[u8], files: &[OwnedFd]) -> Result<(), Failure> {
        let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FILES))];
        let mut control = SendAncillaryBuffer::new(&mut room);
        if !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&files)) {
            return Err(Failure::Usage(format!(
                "at most {MOST_FILES} files can be passed"
            )));
        }
        while !bytes.is_empty() {
            let pieces = [IoSlice::new(bytes)];
            let sent = sendmsg(
                &self.0.get_ref().socket,
                &pieces,
                &mut control,
                SendFlags::NOSIGNAL,
            )
            .map_err(|errno| failed(&errno.into()))?;
            bytes = bytes.get(sent..).unwrap_or_default();
            control.clear();
        }
        Ok(())
    }

    fn line(&mut self) -> Result<Value, Failure> {
        let closed = "the back-end closed the connection";
        self.next_line()?
            .ok_or_else(|| Failure::Failed(closed.to_owned()))
    }

    /// Reads a line; `None` at the end of the connection.
    fn next_line(&mut self) -> Result<Option<Value>, Failure> {
        let mut line = Vec::new();
        let mut limited = (&mut self.0).take(MOST_BYTES);
        limited
            .read_until(b'\n', &mut line)
            .map_err(|error| failed(&error))?;
        if line.is_empty() {
            return Ok(None);
        }
        serde_json::from_slice(&line)
            .map(Some)
            .map_err(|error| Failure::Failed(format!("the back-end sent invalid JSON: {error}")))
    }
}

fn failed(error: &io::Error) -> Failure {
    Failure::Failed(match error.kind() {
        ErrorKind::WouldBlock => format!(
            "the back-end does not answer within {} s",
            PATIENCE.as_secs()
        ),
        _ => format!("the connection to the back-end failed: {error}"),
    })
}
