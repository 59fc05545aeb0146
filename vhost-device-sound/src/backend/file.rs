// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The back-end `file`: playback to a file, capture from a file, both as WAV (`*.wav`) or as bare samples.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use vhost_device_common::device::{Call, StartError};
use vhost_device_common::warn_limited;

use super::wav::{self, Contents};
use super::{Pace, Port};
use crate::profile::{MAX_CHANNELS, Params, Profile};
use crate::protocol::Status;

/// Bytes of silence that are written at a time.
const SILENCE: usize = 4096;
/// Most bytes of silence that are written, in formats whose silence is not zeroes and so cannot be a hole in the file.
const MAX_SILENCE: u64 = 4 << 20;

/// Returns the system calls of both ports.
pub fn calls() -> Vec<Call> {
    vec![Call::new(libc::SYS_pread64), Call::new(libc::SYS_pwrite64)]
}

fn is_wav(path: &Path) -> bool {
    path.extension()
        .is_some_and(|extension| extension.eq_ignore_ascii_case("wav"))
}

/// Opens a regular file. `option` names it.
fn open(options: &OpenOptions, option: &str, path: &Path) -> Result<File, StartError> {
    let failed =
        |error: io::Error| StartError(format!("cannot open {option}={}: {error}", path.display()));
    // A FIFO would block until its other end is open.
    if let Ok(metadata) = path.metadata()
        && !metadata.is_file()
    {
        return Err(StartError(format!(
            "{option}={} is not a regular file; use --backend=null to discard sound",
            path.display()
        )));
    }
    options.open(path).map_err(failed)
}

/// A file that receives what the guest plays.
pub struct Playback {
    file: File,
    path: PathBuf,
    pace: Pace,
    is_wav: bool,
    /// Parameters of the stream.
    params: Option<Params>,
    /// Bytes of samples in the file.
    written: u64,
    /// Bytes of the guest's format that are silent, and that are written when more sound follows.
    silent: u64,
}

impl Playback {
    /// Creates the file, or empties it.
    ///
    /// # Errors
    /// It cannot be created.
    pub fn create(path: &Path, pace: Pace) -> Result<Self, StartError> {
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true);
        Ok(Self {
            file: open(&options, "--playback-file", path)?,
            path: path.to_owned(),
            pace,
            is_wav: is_wav(path),
            params: None,
            written: 0,
            silent: 0,
        })
    }

    /// Appends samples in the guest's format.
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Some(params) = self.params else {
            return Ok(());
        };
        if !self.is_wav {
            self.file.write_all_at(bytes, self.written)?;
            self.written += bytes.len() as u64;
            return Ok(());
        }
        let samples = wav::encode(params.format, bytes);
        let place = wav::HEADER_SIZE as u64 + self.written;
        self.file.write_all_at(&samples, place)?;
        self.written += samples.len() as u64;
        self.write_header(&params)
    }

    /// Appends so many bytes of silence in the guest's format. Silence that consists of zeroes becomes a hole in the file, however long
    /// it is.
    fn append_silence(&mut self, bytes: u64) -> io::Result<()> {
        let Some(params) = self.params else {
            return Ok(());
        };
        let size = params.format.size();
        // A WAV file has unsigned samples of 8 bits.
        if size > 1 {
            let file_size = if self.is_wav {
                wav::sample_size(params.format)
            } else {
                size
            };
            self.written += bytes / size as u64 * file_size as u64;
            return Ok(());
        }
        let silence = [params.format.silence(); SILENCE];
        let mut left = bytes.min(MAX_SILENCE) as usize;
        while left > 0 {
            let length = left.min(SILENCE);
            self.append(silence.get(..length).unwrap_or_default())?;
            left -= length;
        }
        Ok(())
    }

    /// Writes the header, which has the length of the samples, so that the file is complete at any time.
    fn write_header(&self, params: &Params) -> io::Result<()> {
        self.file
            .write_all_at(&wav::header(params, self.written), 0)
    }
}

impl Port for Playback {
    fn pace(&self, _now: Instant) -> Pace {
        self.pace
    }

    /// A WAV file has the parameters of its first samples.
    fn set_params(&mut self, params: &Params) -> Result<(), Status> {
        if self.is_wav {
            let form = |params: &Params| (params.format, params.channels, params.rate);
            if let Some(first) = self.params
                && self.written > 0
                && form(&first) != form(params)
            {
                warn_limited(format_args!(
                    "{} has {} Hz, {} channels and {} already; the guest asked for {} Hz, {} channels and {}: offer only one form with --streams, or use a file of bare samples",
                    self.path.display(),
                    first.rate,
                    first.channels,
                    first.format.name(),
                    params.rate,
                    params.channels,
                    params.format.name(),
                ));
                return Err(Status::NotSupported);
            }
        }
        self.params = Some(*params);
        self.silent = 0;
        Ok(())
    }

    fn play(&mut self, bytes: &[u8]) -> io::Result<()> {
        let silent = std::mem::take(&mut self.silent);
        if silent > 0 {
            self.append_silence(silent)?;
        }
        self.append(bytes)
    }

    fn pad(&mut self, bytes: u64) {
        self.silent = self.silent.saturating_add(bytes);
    }

    fn record(&mut self, _bytes: &mut [u8]) -> io::Result<()> {
        Ok(())
    }

    fn stop(&mut self, _now: Instant) {
        // Silence after the last sound is not recorded.
        self.silent = 0;
    }
}

/// A file that the guest records. Silence follows at its end. It begins again when the driver sets parameters.
pub struct Capture {
    file: File,
    pace: Pace,
    /// The header of a WAV file.
    contents: Option<Contents>,
    params: Option<Params>,
    /// Bytes of samples that were read or skipped.
    place: u64,
    /// Samples in the form of a WAV file.
    samples: Vec<u8>,
}

impl Capture {
    /// Opens the file. If it is a WAV file, the stream offers only its format.
    ///
    /// # Errors
    /// It cannot be read, or is not a WAV file although its name says so.
    pub fn open(path: &Path, pace: Pace, profile: &mut Profile) -> Result<Self, StartError> {
        let file = open(OpenOptions::new().read(true), "--capture-file", path)?;
        let refused = |why: &dyn std::fmt::Display| {
            StartError(format!(
                "cannot use --capture-file={}: {why}",
                path.display()
            ))
        };
        let contents = match is_wav(path) {
            false => None,
            true => {
                let size = file.metadata().map_err(|error| refused(&error))?.len();
                let mut header = vec![0; size.min(wav::MAX_HEADER as u64) as usize];
                file.read_exact_at(&mut header, 0)
                    .map_err(|error| refused(&error))?;
                let contents = wav::parse(&header, size).map_err(|why| refused(&why))?;
                if !(1..=MAX_CHANNELS).contains(&contents.channels) {
                    return Err(refused(&format_args!(
                        "it does not have 1 to {MAX_CHANNELS} channels"
                    )));
                }
                if crate::format::rate_number(contents.rate).is_none() {
                    return Err(refused(&format_args!(
                        "its rate of {} Hz is not one of those of a sound device",
                        contents.rate
                    )));
                }
                (profile.channels_min, profile.channels_max) =
                    (contents.channels, contents.channels);
                profile.formats.clone_from(&contents.formats);
                profile.rates = vec![contents.rate];
                Some(contents)
            }
        };
        Ok(Self {
            file,
            pace,
            contents,
            params: None,
            place: 0,
            samples: Vec::new(),
        })
    }

    /// Returns how many bytes of the file make so many bytes of the guest.
    fn file_bytes(&self, bytes: u64) -> u64 {
        match (&self.contents, self.params) {
            (Some(_), Some(Params { format, .. })) => {
                bytes / format.size() as u64 * wav::sample_size(format) as u64
            }
            _ => bytes,
        }
    }
}

impl Port for Capture {
    fn pace(&self, _now: Instant) -> Pace {
        self.pace
    }

    fn set_params(&mut self, params: &Params) -> Result<(), Status> {
        self.params = Some(*params);
        self.place = 0;
        Ok(())
    }

    fn record(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        let Some(Params { format, .. }) = self.params else {
            return Ok(());
        };
        bytes.fill(format.silence());
        let length = self.file_bytes(bytes.len() as u64);
        let (start, end) = match &self.contents {
            Some(contents) => (contents.start, contents.end),
            None => (0, u64::MAX),
        };
        let from = start.saturating_add(self.place);
        let length = length.min(end.saturating_sub(from)) as usize;
        self.samples.resize(length, 0);
        let mut read = 0;
        while let Some(rest) = self.samples.get_mut(read..)
            && !rest.is_empty()
        {
            match self.file.read_at(rest, from.saturating_add(read as u64))? {
                0 => break,
                count => read += count,
            }
        }
        self.place = self.place.saturating_add(read as u64);
        let samples = self.samples.get(..read).unwrap_or_default();
        match &self.contents {
            Some(_) => wav::decode(format, samples, bytes),
            None => {
                for (to, from) in bytes.iter_mut().zip(samples) {
                    *to = *from;
                }
            }
        }
        Ok(())
    }

    fn skip(&mut self, bytes: u64) {
        self.place = self.place.saturating_add(self.file_bytes(bytes));
    }
}
