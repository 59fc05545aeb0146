// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where the bytes come from. Reading never waits for more of them.

use std::fmt::Display;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use rustix::rand::{GetRandomFlags, getrandom};
use vhost_device_common::chain::Chain;
use vhost_device_common::device::StartError;
use vhost_device_common::warn_limited;

/// The most that one request gets.
const LARGEST: u64 = 64 << 10;
/// How much is read at once, and so at most ahead of the guest.
const READ_SIZE: usize = 4 << 10;
/// How long a source that failed is left alone, at first and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LAST_PAUSE: Duration = Duration::from_millis(3200);

/// What is read.
enum Origin {
    /// The generator of the kernel.
    Kernel,
    File(File),
}

impl Read for Origin {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Kernel => Ok(getrandom(bytes, GetRandomFlags::NONBLOCK)?),
            Self::File(file) => file.read(bytes),
        }
    }
}

/// Gives bytes in their order. When it has none it is left alone for a while, longer each time.
pub struct Source {
    origin: BufReader<Origin>,
    /// It failed: when it is tried again, and how long it is left alone until then.
    failure: Option<(Instant, Duration)>,
}

impl Source {
    /// Opens the file at `path`; without one, the source is the kernel.
    pub fn open(path: Option<&Path>) -> Result<Self, StartError> {
        let origin = path.map_or(Ok(Origin::Kernel), |path| open(path).map(Origin::File))?;
        Ok(Self {
            origin: BufReader::with_capacity(READ_SIZE, origin),
            failure: None,
        })
    }

    /// What may become readable when there are no bytes.
    pub fn file(&self) -> Option<&File> {
        match self.origin.get_ref() {
            Origin::Kernel => None,
            Origin::File(file) => Some(file),
        }
    }

    /// Sees to it that there is a byte, or says after how long to ask again.
    pub fn prepare(&mut self, now: Instant) -> Result<(), Duration> {
        if let Some((retry, _)) = self.failure
            && retry > now
        {
            return Err(retry - now);
        }
        let error = match self.origin.fill_buf() {
            Ok([]) => "it is at its end".into(),
            Ok(_) => {
                self.failure = None;
                return Ok(());
            }
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) =>
            {
                return Err(FIRST_PAUSE);
            }
            Err(error) => error.to_string(),
        };
        let pause = match self.failure {
            Some((_, pause)) => LAST_PAUSE.min(pause * 2),
            None => {
                warn_limited(format_args!(
                    "no bytes from the source: {error}; requests wait"
                ));
                FIRST_PAUSE
            }
        };
        self.failure = Some((now + pause, pause));
        Err(pause)
    }

    /// There may be bytes again.
    pub fn retry(&mut self) {
        if let Some((retry, _)) = &mut self.failure {
            *retry = Instant::now();
        }
    }

    /// Writes bytes to `chain`, `most` of them at most, and says how many there were.
    pub fn fill(&mut self, chain: &mut Chain, most: u64) -> u32 {
        if let Err(error) = chain.check() {
            warn_limited(format_args!("{error}"));
            return 0;
        }
        let mut left = chain.writable_len().min(LARGEST).min(most) as usize;
        let mut written = 0;
        while left > 0
            && let Ok(bytes) = self.origin.fill_buf()
            && let bytes = bytes.get(..left).unwrap_or(bytes)
            && !bytes.is_empty()
            && chain.write(bytes).is_ok()
        {
            let count = bytes.len();
            self.origin.consume(count);
            written += count as u32;
            left -= count;
        }
        written
    }
}

/// Opens a file to read without waiting; a FIFO also if nobody writes to it yet.
fn open(path: &Path) -> Result<File, StartError> {
    let refused = |why: &dyn Display| {
        let path = path.display();
        StartError(format!(
            "cannot read {path}: {why}; name a file, a character device or a FIFO"
        ))
    };
    let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits() as i32;
    let mut options = OpenOptions::new();
    let file = options.read(true).custom_flags(flags).open(path);
    let file = file.map_err(|error| refused(&error))?;
    match file.metadata() {
        Ok(metadata) if metadata.is_dir() => Err(refused(&"it is a directory")),
        _ => Ok(file),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_that_stays_at_its_end_is_left_alone_for_longer_and_longer() {
        let mut source = Source::open(Some(Path::new("/dev/null"))).unwrap();
        let mut now = Instant::now();
        for milliseconds in [100, 200, 400, 800, 1600, 3200, 3200] {
            let pause = Duration::from_millis(milliseconds);
            assert_eq!(source.prepare(now), Err(pause));
            assert_eq!(source.prepare(now + pause / 4), Err(pause * 3 / 4));
            now += pause;
        }
    }

    #[test]
    fn a_source_that_gave_bytes_is_tried_soon_again() {
        let mut source = Source::open(Some(Path::new("/dev/null"))).unwrap();
        let now = Instant::now();
        assert_eq!(source.prepare(now), Err(FIRST_PAUSE));
        source.origin = BufReader::new(Origin::Kernel);
        assert_eq!(source.prepare(now + FIRST_PAUSE), Ok(()));
        source.origin = BufReader::new(Origin::File(open(Path::new("/dev/null")).unwrap()));
        assert_eq!(source.prepare(now + FIRST_PAUSE), Err(FIRST_PAUSE));
    }
}
