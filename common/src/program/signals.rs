// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Signals, each as a file that becomes readable. A guest cannot end the program by one.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGXFSZ};

use crate::device::StartError;
use crate::memory::survive_lost_memory;

/// What the program listens to.
#[derive(Debug)]
pub struct Signals {
    /// Becomes readable, and stays so, when the program is to end: SIGTERM and SIGINT.
    pub stop: Arc<OwnedFd>,
    /// The other end of `stop`.
    stopper: UnixStream,
    /// SIGUSR1.
    pub statistics: Signal,
    /// SIGHUP, for devices that have something to look at again. It ends the others, as it does any program.
    pub reload: Option<Signal>,
}

impl Signals {
    /// Starts to listen.
    pub fn listen(reloads: bool) -> Result<Self, StartError> {
        // A write beyond the limit of file sizes is to fail, not to end the process.
        signal_hook::flag::register(SIGXFSZ, Arc::default()).map_err(|error| failed(&error))?;
        survive_lost_memory().map_err(|error| failed(&error))?;
        let (stop, stopper) = register(&[SIGTERM, SIGINT])?;
        Ok(Self {
            stop: Arc::new(stop.into()),
            stopper,
            statistics: Signal::listen(SIGUSR1)?,
            reload: reloads.then(|| Signal::listen(SIGHUP)).transpose()?,
        })
    }
}

impl Signals {
    /// Ends the program, as SIGTERM does.
    pub fn stop(&self) {
        // A full socket is readable already.
        let _ = (&self.stopper).write(&[0]);
    }
}

/// A signal that may come again and again.
#[derive(Debug)]
pub struct Signal(UnixStream);

impl Signal {
    fn listen(number: i32) -> Result<Self, StartError> {
        let (file, _) = register(&[number])?;
        file.set_nonblocking(true).map_err(|error| failed(&error))?;
        Ok(Self(file))
    }

    /// Readable once the signal came.
    pub fn file(&self) -> &UnixStream {
        &self.0
    }

    /// Whether the signal came since it was asked for the last time, however often.
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
    StartError(format!("cannot listen to signals: {error}"))
}
