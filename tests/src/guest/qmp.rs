// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A client of QMP, QEMU's control protocol: one JSON object a line over a socket.

use std::io::{BufRead, BufReader, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};

use super::error::{GuestError, system};

/// Time limit for an answer of QEMU.
const PATIENCE: Duration = Duration::from_secs(30);

/// A connection to QEMU's control socket.
#[derive(Debug)]
pub struct Qmp(BufReader<UnixStream>);

impl Qmp {
    /// Connects and negotiates capabilities.
    ///
    /// # Errors
    /// Nothing listens there, or it does not speak QMP.
    pub fn connect(path: &Path) -> Result<Self, GuestError> {
        let connect = || {
            let stream = UnixStream::connect(path)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            Ok(stream)
        };
        let stream = connect().map_err(system("connect to QEMU's control socket"))?;
        let mut qmp = Self(BufReader::new(stream));
        qmp.line()?;
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs `command` and returns its answer.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, GuestError> {
        // Sent in one piece: QEMU executes it, and may end, as soon as it has the last brace.
        let request = format!(
            "{}\n",
            json!({ "execute": command, "arguments": arguments })
        );
        let stream = self.0.get_mut();
        stream
            .write_all(request.as_bytes())
            .map_err(system("write to QEMU's control socket"))?;
        self.answer(command)
    }

    /// Returns the same, for a command that takes a file.
    pub fn execute_with_file(
        &mut self,
        command: &str,
        arguments: Value,
        file: BorrowedFd<'_>,
    ) -> Result<Value, GuestError> {
        let request = format!(
            "{}\n",
            json!({ "execute": command, "arguments": arguments })
        );
        let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut room);
        let files = [file];
        control.push(SendAncillaryMessage::ScmRights(&files));
        let pieces = [IoSlice::new(request.as_bytes())];
        sendmsg(self.0.get_ref(), &pieces, &mut control, SendFlags::NOSIGNAL)
            .map_err(|errno| system("pass a file to QEMU")(errno.into()))?;
        self.answer(command)
    }

    fn answer(&mut self, command: &str) -> Result<Value, GuestError> {
        loop {
            let mut line = self.line()?;
            if let Some(answer) = line.get_mut("return") {
                return Ok(answer.take());
            }
            if let Some(error) = line.get("error") {
                return Err(GuestError::Qmp {
                    command: command.into(),
                    answer: error.to_string(),
                });
            }
            // An event, which QEMU may send at any time.
        }
    }

    fn line(&mut self) -> Result<Value, GuestError> {
        let mut line = String::new();
        self.0
            .read_line(&mut line)
            .map_err(system("read from QEMU's control socket"))?;
        serde_json::from_str(&line).map_err(|error| GuestError::Qmp {
            command: "answer".into(),
            answer: format!("{error}: {line:?}"),
        })
    }
}
