// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The command line options of the sound device.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::profile::Profile;
use crate::protocol::Direction;

/// Where sound goes to and comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Backend {
    /// a sound server if one answers, else null
    Auto,
    /// files: see --playback-file and --capture-file
    File,
    /// nowhere: discard what the guest plays, and record silence
    Null,
    /// a PulseAudio server, or PipeWire's pipewire-pulse
    Pulse,
}

/// The clock of streams with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FileClock {
    /// real time
    Own,
    /// as fast as the guest
    Free,
}

/// Options of the sound device.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Where sound goes to and comes from.
    #[arg(long, value_name = "BACKEND", value_enum, default_value_t = Backend::Auto)]
    pub backend: Backend,

    /// With --backend=file: write what the guest plays to this file, which is emptied first.
    ///
    /// A file *.wav becomes a WAV file; it keeps the format of the first sound. Any other file receives the bare samples. Give the option
    /// several times for several output streams.
    #[arg(long, value_name = "PATH")]
    pub playback_file: Vec<PathBuf>,

    /// With --backend=file: let the guest record this file, then silence.
    ///
    /// The stream of a file *.wav offers only the format of the file; of any other file, the guest gets the bytes as they are. Give the
    /// option several times for several input streams.
    #[arg(long, value_name = "PATH")]
    pub capture_file: Vec<PathBuf>,

    /// The clock of streams, with --backend=file.
    #[arg(long, value_name = "CLOCK", value_enum, default_value_t = FileClock::Own)]
    pub file_clock: FileClock,

    /// The unix socket of the sound server, instead of the one that PULSE_SERVER and XDG_RUNTIME_DIR name.
    #[arg(long, value_name = "PATH")]
    pub pulse_server: Option<PathBuf>,

    /// Add a stream: `output` or `input`, then optional properties, separated by commas.
    ///
    /// channels=1-8: a number or a range, 1-2 by default. formats=s16+s24: sample formats, of s8, u8, s16, s24-3 (in 3 bytes), s24 (in 4
    /// bytes), s32, float and float64; s16+s32+float by default. rates=44100+48000: frame rates from 8000 to 192000;
    /// 44100+48000+96000 by default. Without this option there are one output and one input.
    #[arg(long, value_name = "STREAM")]
    pub streams: Vec<Profile>,

    /// Offer control elements: volume and mute switch of the outputs, volume of the inputs. QEMU needs `controls=on` for that.
    #[arg(long)]
    pub controls: bool,
}

impl Options {
    /// Returns what the streams offer.
    pub fn profiles(&self) -> Vec<Profile> {
        match self.streams.as_slice() {
            [] => [Direction::Output, Direction::Input]
                .map(Profile::new)
                .to_vec(),
            streams => streams.to_vec(),
        }
    }
}
