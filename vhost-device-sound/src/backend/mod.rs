// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where sound goes to and comes from: the host's end of each stream.

mod file;
mod wav;

use std::io;
use std::path::PathBuf;

use vhost_device_common::device::{Needs, StartError};

use crate::options::{Backend, FileClock, Options};
use crate::profile::{Params, Profile};
use crate::protocol::{Direction, Status};
use file::{Capture, Playback};

/// What decides when a period of a stream has elapsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// The clock of this host.
    Clock,
    /// The guest: the next buffer is done as soon as the guest has seen that the last one is.
    Guest,
}

/// The host's end of one stream. No method may block for long.
///
/// The default methods discard what is played, and record silence.
pub trait Port: Send {
    /// Returns what decides when a period has elapsed.
    fn pace(&self) -> Pace {
        Pace::Clock
    }

    /// Begins with these parameters.
    ///
    /// # Errors
    /// The port does not support them, or the host failed.
    fn set_params(&mut self, _params: &Params) -> Result<(), Status> {
        Ok(())
    }

    /// Plays whole frames.
    ///
    /// # Errors
    /// The host failed; the frames are lost.
    fn play(&mut self, _bytes: &[u8]) -> io::Result<()> {
        Ok(())
    }

    /// Plays as many bytes of silence: an underrun.
    fn pad(&mut self, _bytes: u64) {}

    /// Records whole frames.
    ///
    /// # Errors
    /// The host failed; the frames are to be silence.
    fn record(&mut self, bytes: &mut [u8]) -> io::Result<()>;

    /// Drops as many recorded bytes: an overrun.
    fn skip(&mut self, _bytes: u64) {}

    /// Ends a passage: the driver has stopped or released the stream.
    fn stop(&mut self) {}
}

/// Discards and records silence.
struct Null {
    silence: u8,
}

impl Port for Null {
    fn set_params(&mut self, params: &Params) -> Result<(), Status> {
        self.silence = params.format.silence();
        Ok(())
    }

    fn record(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        bytes.fill(self.silence);
        Ok(())
    }
}

/// Opens the ports of all streams. A port may offer less than the profile of its stream, which changes then.
///
/// # Errors
/// A file cannot be used, or there are more files than streams.
pub fn open(options: &Options, profiles: &mut [Profile]) -> Result<Vec<Box<dyn Port>>, StartError> {
    let pace = match options.file_clock {
        FileClock::Own => Pace::Clock,
        FileClock::Free => Pace::Guest,
    };
    let (mut playback, mut capture) = match options.backend {
        Backend::File => (options.playback_file.iter(), options.capture_file.iter()),
        Backend::Null => ([].iter(), [].iter()),
    };
    let mut ports: Vec<Box<dyn Port>> = Vec::new();
    for profile in profiles {
        let port: Option<Box<dyn Port>> = match profile.direction {
            Direction::Output => match playback.next() {
                Some(path) => Some(Box::new(Playback::create(path, pace)?)),
                None => None,
            },
            Direction::Input => match capture.next() {
                Some(path) => Some(Box::new(Capture::open(path, pace, profile)?)),
                None => None,
            },
        };
        ports.push(port.unwrap_or(Box::new(Null { silence: 0 })));
    }
    let left = |option: &str, path: Option<&PathBuf>| match path {
        Some(path) => Err(StartError(format!(
            "there is no stream for {option}={}: add one with --streams",
            path.display()
        ))),
        None => Ok(()),
    };
    left("--playback-file", playback.next())?;
    left("--capture-file", capture.next())?;
    Ok(ports)
}

/// Returns what the back-end needs from the sandbox.
pub fn needs(options: &Options) -> Needs {
    match options.backend {
        Backend::Null => Needs::default(),
        Backend::File => Needs {
            queue: file::calls(),
            ..Needs::default()
        },
    }
}
