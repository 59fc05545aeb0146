// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! systemd, or another service manager with its protocol: the socket that it passes (sd_listen_fds(3)), and notifications to it
//! (sd_notify(3)).

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::RawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use crate::device::StartError;

/// Number of the first passed socket (SD_LISTEN_FDS_START).
const FIRST: RawFd = 3;

/// How long to wait until the manager accepts a notification. A busy manager must not lose READY=1, or it would stop the service; one that
/// hangs must not prevent the device from starting.
const TIME_TO_HEAR: Duration = Duration::from_secs(1);

/// A state of the service.
#[derive(Clone, Copy, Debug)]
pub enum State {
    /// Front-ends can connect.
    Ready,
    /// The program is about to exit.
    Stopping,
}

/// The service manager that started this program, if one did.
#[derive(Debug)]
pub struct ServiceManager {
    /// LISTEN_FDS, if it is meant for this process.
    sockets: Option<OsString>,
    /// NOTIFY_SOCKET.
    notify: Option<OsString>,
}

impl ServiceManager {
    /// Removes its variables from the environment, and keeps their values. Must be called while the process has only one thread.
    #[allow(unsafe_code)]
    pub fn take_from_environment() -> Self {
        let take = |name| {
            let value = std::env::var_os(name);
            // SAFETY: there is no other thread that could use the environment.
            unsafe { std::env::remove_var(name) };
            value
        };
        let for_us = take("LISTEN_PID").is_some_and(|id| id == *std::process::id().to_string());
        take("LISTEN_FDNAMES");
        Self {
            sockets: take("LISTEN_FDS").filter(|_| for_us),
            notify: take("NOTIFY_SOCKET"),
        }
    }

    /// Returns whether it passed sockets.
    pub fn passed_sockets(&self) -> bool {
        self.sockets.is_some()
    }

    /// Returns the number of the one socket that it passed.
    pub fn socket(&self) -> Result<RawFd, StartError> {
        let count = self.sockets.as_deref().unwrap_or_default();
        if count == "1" {
            return Ok(FIRST);
        }
        Err(StartError(format!(
            "LISTEN_FDS={}: a device takes just one socket; leave one ListenStream= in its socket unit",
            count.display()
        )))
    }

    /// Connects to it, if it accepts notifications.
    pub fn connect(&self) -> Notifier<'_> {
        Notifier(self.notify.as_deref().map(|name| (name, connect(name))))
    }
}

/// A service manager that accepts notifications, or the reason why it cannot be reached.
#[derive(Debug)]
pub struct Notifier<'a>(Option<(&'a OsStr, io::Result<UnixDatagram>)>);

impl Notifier<'_> {
    /// Notifies it of `state`, if it accepts notifications. A failure is only logged.
    pub fn tell(&self, state: State) {
        let message = match state {
            State::Ready => "READY=1",
            State::Stopping => "STOPPING=1",
        };
        let Some((name, socket)) = &self.0 else {
            return;
        };
        let failed = |error: &io::Error| {
            let name = name.display();
            log::warn!("cannot send {message} to NOTIFY_SOCKET={name}: {error}");
        };
        match socket {
            Ok(socket) => {
                if let Err(error) = socket.send(message.as_bytes()) {
                    failed(&error);
                }
            }
            Err(error) => failed(error),
        }
    }
}

fn connect(name: &OsStr) -> io::Result<UnixDatagram> {
    let address = match name.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
        _ => SocketAddr::from_pathname(name),
    }?;
    let socket = UnixDatagram::unbound()?;
    socket.set_write_timeout(Some(TIME_TO_HEAR))?;
    socket.connect_addr(&address)?;
    Ok(socket)
}
