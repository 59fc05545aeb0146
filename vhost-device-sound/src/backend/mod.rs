// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where sound goes to and comes from: the host's end of each stream.

mod file;
mod pulse;
mod wav;

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use vhost_device_common::device::{Needs, StartError};

use crate::options::{Backend, FileClock, Options};
use crate::profile::{Params, Profile};
use crate::protocol::{Direction, Status};
use file::{Capture, Playback};
pub use pulse::Pulse;
use pulse::PulsePort;

/// What decides when a period of a stream has elapsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// The clock of this host.
    Clock,
    /// The guest: the next buffer is done as soon as the guest has seen that the last one is.
    Guest,
    /// The port: what is [`Port::due`].
    Host,
}

/// The host's end of one stream. No method may wait for a sound server; those of files wait for the disk.
///
/// The default methods discard what is played, and record silence.
pub trait Port: Send {
    /// Returns what decides when a period has elapsed. It may change.
    fn pace(&self, _now: Instant) -> Pace {
        Pace::Clock
    }

    /// Returns how many bytes are to be moved now, with [`Pace::Host`].
    fn due(&self) -> u64 {
        0
    }

    /// Returns when the pace may change from [`Pace::Host`] to another one by itself.
    fn deadline(&self) -> Option<Instant> {
        None
    }

    /// Returns whether the host has noticed an underrun or overrun since the last call.
    fn take_xrun(&mut self) -> bool {
        false
    }

    /// Returns how many bytes were played that are not audible yet, or recorded that the guest does not have yet.
    fn latency(&self, _now: Instant) -> u32 {
        0
    }

    /// Begins with these parameters.
    ///
    /// # Errors
    /// The port does not support them, or the host failed.
    fn set_params(&mut self, _params: &Params) -> Result<(), Status> {
        Ok(())
    }

    /// Prepares for a start.
    fn prepare(&mut self) {}

    /// Begins a passage, or continues after [`Port::stop`].
    fn start(&mut self, _now: Instant) {}

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

    /// Ends or interrupts a passage.
    fn stop(&mut self, _now: Instant) {}

    /// Ends the use of the stream. `was_played`: all of the guest's buffers were.
    fn release(&mut self, _was_played: bool) {}
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

/// The ports of all streams.
pub struct Ports {
    /// By the numbers of the streams.
    pub ports: Vec<Box<dyn Port>>,
    /// The client behind all of them, if they have one.
    pub client: Option<Arc<Mutex<Pulse>>>,
    /// What they need from the sandbox.
    pub needs: Needs,
}

/// Opens the ports of all streams. A port may offer less than the profile of its stream, which changes then.
///
/// # Errors
/// A file or server cannot be used, or there are more files than streams.
pub fn open(options: &Options, profiles: &mut [Profile]) -> Result<Ports, StartError> {
    let refused = |option: &str| StartError(format!("{option} needs --backend=file"));
    if options.backend != Backend::File {
        if !options.playback_file.is_empty() {
            return Err(refused("--playback-file"));
        }
        if !options.capture_file.is_empty() {
            return Err(refused("--capture-file"));
        }
    }
    match options.backend {
        Backend::File => open_files(options, profiles),
        Backend::Null => Ok(open_null(profiles)),
        Backend::Pulse => open_pulse(options, profiles),
        Backend::Auto => open_pulse(options, profiles).or_else(|StartError(reason)| {
            if options.pulse_server.is_some() {
                return Err(StartError(reason));
            }
            log::warn!("{reason}; discarding what the guest plays, and recording silence");
            Ok(open_null(profiles))
        }),
    }
}

fn open_null(profiles: &[Profile]) -> Ports {
    Ports {
        ports: profiles.iter().map(|_| null()).collect(),
        client: None,
        needs: Needs::default(),
    }
}

fn open_pulse(options: &Options, profiles: &mut [Profile]) -> Result<Ports, StartError> {
    let pulse = Pulse::open(options.pulse_server.as_deref(), profiles)?;
    let needs = pulse.needs();
    let client = Arc::new(Mutex::new(pulse));
    let port = |index| -> Box<dyn Port> { Box::new(PulsePort::new(Arc::clone(&client), index)) };
    Ok(Ports {
        ports: (0..profiles.len()).map(port).collect(),
        client: Some(client),
        needs,
    })
}

fn null() -> Box<dyn Port> {
    Box::new(Null { silence: 0 })
}

/// Opens a file for each stream, as far as there are some.
fn open_files(options: &Options, profiles: &mut [Profile]) -> Result<Ports, StartError> {
    let pace = match options.file_clock {
        FileClock::Own => Pace::Clock,
        FileClock::Free => Pace::Guest,
    };
    let mut playback = options.playback_file.iter();
    let mut capture = options.capture_file.iter();
    let mut ports: Vec<Box<dyn Port>> = Vec::new();
    for profile in profiles {
        ports.push(match profile.direction {
            Direction::Output => match playback.next() {
                Some(path) => Box::new(Playback::create(path, pace)?),
                None => null(),
            },
            Direction::Input => match capture.next() {
                Some(path) => Box::new(Capture::open(path, pace, profile)?),
                None => null(),
            },
        });
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
    Ok(Ports {
        ports,
        client: None,
        needs: Needs {
            queue: file::calls(),
            ..Needs::default()
        },
    })
}
