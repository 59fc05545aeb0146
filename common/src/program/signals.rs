// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Signals, each as a file that becomes readable. A guest cannot end the program by causing a signal.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGXFSZ};

use crate::device::StartError;
use crate::memory::survive_lost_memory;

/// The signals that the program handles.
#[derive(Debug)]
pub struct Signals {
    /// Becomes readable, and stays so, when the program is to exit: SIGTERM and SIGINT.
    pub stop: Arc<OwnedFd>,
    /// The other end of `stop`.
    stopper: UnixStream,
    /// SIGUSR1.
    pub statistics: Signal,
    /// SIGHUP, for devices that reload. It kills the programs of other devices, as is the default.
    pub reload: Option<Signal>,
}

impl Signals {
    /// Starts to handle the signals.
    pub fn listen(reloads: bool) -> Result<Self, StartError> {
        // A write beyond RLIMIT_FSIZE must fail, not kill the process.
        signal_hook::flag::register(SIGXFSZ, Arc::default()).map_err(|error| failed(&error))?;
        survive_lost_memory().map_err(|error| failed(&error))?;
        let (stop, stopper) = register(&[SIGTERM, SIGINT])?;
        stopper
            .set_nonblocking(true)
            .map_err(|error| failed(&error))?;
        Ok(Self {
            stop: Arc::new(stop.into()),
            stopper,
            statistics: Signal::listen(SIGUSR1)?,
            reload: reloads.then(|| Signal::listen(SIGHUP)).transpose()?,
        })
    }
}

impl Signals {
    /// Makes the program exit, as SIGTERM does.
    pub fn stop(&self) {
        // If the socket is full, it is already readable.
        let _ = (&self.stopper).write(&[0]);
    }
}

/// A signal that can occur repeatedly.
#[derive(Debug)]
pub struct Signal(UnixStream);

impl Signal {
    fn listen(number: i32) -> Result<Self, StartError> {
        let (file, _) = register(&[number])?;
        file.set_nonblocking(true).map_err(|error| failed(&error))?;
        Ok(Self(file))
    }

    /// Returns the file that is readable after the signal.
    pub fn file(&self) -> &UnixStream {
        &self.0
    }

    /// Returns whether the signal occurred since the last call.
    pub fn came(&self) -> bool {
        let mut came = false;
        // Each signal is a byte.
        while matches!(rustix::io::read(&self.0, &mut [0; 64]), Ok(1..)) {
            came = true;
        }
        came
    }
}

/// Opens a socket that becomes readable when one of these signals comes. Returns both ends.
fn register(signals: &[i32]) -> Result<(UnixStream, UnixStream), StartError> {
    let (read, write) = UnixStream::pair().map_err(|error| failed(&error))?;
    for signal in signals {
        let write = write.try_clone().map_err(|error| failed(&error))?;
        signal_hook::low_level::pipe::register(*signal, write).map_err(|error| failed(&error))?;
    }
    Ok((read, write))
}

fn failed(error: &std::io::Error) -> StartError {
    StartError(format!("cannot handle signals: {error}"))
}
