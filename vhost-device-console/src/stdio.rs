// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Inherited files: standard input and output, and those that `fd=N` names.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::fs::{FileType, Mode, OFlags, fcntl_getfl, fcntl_setfl, fstat, open};
use rustix::termios::{OptionalActions, OutputModes, Termios, isatty, tcgetattr, tcsetattr};
use signal_hook::consts::SIGWINCH;
use vhost_device_common::device::StartError;
use vhost_device_common::program::inherited;

use crate::client::{Client, Kind};

/// Standard input and output as a port.
#[derive(Debug)]
pub struct Stdio {
    /// If standard input is a terminal: the settings for a guest, and those from before.
    settings: Option<(OwnedFd, Termios, Termios)>,
    /// Readable after the terminal was resized (SIGWINCH).
    resized: Option<UnixStream>,
}

/// A duplicate of an inherited file, which does not block.
///
/// Files of other processes that share it could be surprised by a change of its flags, so it is opened again if that is possible.
fn nonblocking(number: i32) -> io::Result<(OwnedFd, OFlags)> {
    let file = inherited(number)?;
    let flags = fcntl_getfl(&file)?;
    let mode = flags & (OFlags::RDWR | OFlags::WRONLY);
    match FileType::from_raw_mode(fstat(&file)?.st_mode) {
        // They never block, and a second file would have an offset of its own.
        FileType::RegularFile => return Ok((file, mode)),
        FileType::Fifo | FileType::CharacterDevice => {
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            let again = mode | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
            if let Ok(file) = open(path, again, Mode::empty()) {
                return Ok((file, mode));
            }
        }
        _ => {}
    }
    fcntl_setfl(&file, flags | OFlags::NONBLOCK)?;
    Ok((file, mode))
}

/// Opens the inherited file `number` as a client.
///
/// # Errors
/// No such file is open, or it cannot be used.
pub fn client(number: i32) -> Result<Client, StartError> {
    let failed = |error| {
        StartError(format!(
            "cannot use fd={number}: {error}; pass the number of an open file"
        ))
    };
    let (file, mode) = nonblocking(number).map_err(failed)?;
    match FileType::from_raw_mode(fstat(&file).map_err(|errno| failed(errno.into()))?.st_mode) {
        // A write to a slow disk would delay all ports.
        FileType::RegularFile | FileType::Directory | FileType::BlockDevice => {
            return Err(StartError(format!(
                "cannot use fd={number}: it must be a socket, a pipe or a terminal; use file=PATH for a file"
            )));
        }
        _ => {}
    }
    let mut client = Client::new(0, Kind::Fixed, file, 0);
    client.sends = mode != OFlags::WRONLY;
    client.receives = mode != OFlags::RDONLY;
    Ok(client)
}

impl Stdio {
    /// Opens standard input and output.
    ///
    /// # Errors
    /// They are closed, or the signal SIGWINCH cannot be handled.
    pub fn open() -> Result<(Self, Client), StartError> {
        let failed =
            |error: io::Error| StartError(format!("cannot use standard input and output: {error}"));
        let (input, _) = nonblocking(0).map_err(failed)?;
        let (output, _) = nonblocking(1).map_err(failed)?;
        let settings = terminal_settings(&input).map_err(failed)?;
        let is_terminal = settings.is_some();
        let resized = isatty(&output).then(window_changes).transpose();
        let client = Client::new(0, Kind::Fixed, output, 0).with_input(input);
        let stdio = Self {
            settings,
            resized: resized.map_err(failed)?,
        };
        let client = match is_terminal {
            true => client.with_escape(),
            false => client,
        };
        Ok((stdio, client))
    }

    /// Returns the file that is readable after the terminal was resized.
    pub fn resized(&self) -> Option<&UnixStream> {
        self.resized.as_ref()
    }

    /// Sets the terminal up for a guest: what is typed goes to the guest as it is, also Ctrl-C.
    pub fn enter_raw_mode(&self) {
        if let Some((terminal, raw, _)) = &self.settings {
            set(terminal, raw);
            log::info!(
                "the terminal is connected to the guest; type Ctrl-] three times to end the program"
            );
        }
    }

    /// Sets the terminal up as it was.
    pub fn leave_raw_mode(&self) {
        if let Some((terminal, _, before)) = &self.settings {
            set(terminal, before);
        }
    }
}

impl Drop for Stdio {
    fn drop(&mut self) {
        self.leave_raw_mode();
    }
}

fn set(terminal: &OwnedFd, settings: &Termios) {
    if let Err(errno) = tcsetattr(terminal, OptionalActions::Now, settings) {
        log::warn!("cannot change the settings of the terminal: {errno}");
    }
}

/// Returns the terminal, its settings for a guest and its present ones; `None` if standard input is no terminal.
fn terminal_settings(input: &OwnedFd) -> io::Result<Option<(OwnedFd, Termios, Termios)>> {
    if !isatty(input) {
        return Ok(None);
    }
    let before = tcgetattr(input)?;
    let mut raw = before.clone();
    raw.make_raw();
    if isatty(io::stderr()) {
        // The lines of the log go there too.
        raw.output_modes.insert(OutputModes::OPOST);
    }
    Ok(Some((input.try_clone()?, raw, before)))
}

/// Returns a file that becomes readable with each SIGWINCH.
fn window_changes() -> io::Result<UnixStream> {
    let (read, write) = UnixStream::pair()?;
    read.set_nonblocking(true)?;
    signal_hook::low_level::pipe::register(SIGWINCH, write)?;
    Ok(read)
}

/// Discards the notes of signals.
pub fn discard(file: impl AsFd) {
    while matches!(rustix::io::read(&file, &mut [0; 64]), Ok(1..)) {}
}
