// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Sources of random bytes. Reads never block.

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

/// Most bytes for one request.
const MAX_REQUEST_SIZE: u64 = 64 << 10;
/// Size of a read, and so the most bytes read ahead of the guest.
const READ_SIZE: usize = 4 << 10;
/// Shortest and longest delay before a failed source is tried again.
const MIN_RETRY_DELAY: Duration = Duration::from_millis(100);
const MAX_RETRY_DELAY: Duration = Duration::from_millis(3200);

/// Where the bytes come from.
enum Origin {
    /// The kernel's generator.
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

/// A source of bytes. While it has none, the delay between attempts doubles each time.
pub struct Source {
    origin: BufReader<Origin>,
    /// While the source fails: when to try it again, and the current delay.
    failure: Option<(Instant, Duration)>,
}

impl Source {
    /// Opens the file at `path`, or the kernel's generator if there is none.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn open(path: Option<&Path>) -> Result<Self, StartError> {
        let origin = path.map_or(Ok(Origin::Kernel), |path| open(path).map(Origin::File))?;
        Ok(Self {
            origin: BufReader::with_capacity(READ_SIZE, origin),
            failure: None,
        })
    }

    /// Returns the file that may become readable when there are no bytes.
    pub fn file(&self) -> Option<&File> {
        match self.origin.get_ref() {
            Origin::Kernel => None,
            Origin::File(file) => Some(file),
        }
    }

    /// Buffers at least one byte, or returns how long to wait before the next attempt.
    pub fn fill_buffer(&mut self, now: Instant) -> Result<(), Duration> {
        if let Some((retry, _)) = self.failure
            && retry > now
        {
            return Err(retry - now);
        }
        let error = match self.origin.fill_buf() {
            Ok([]) => "end of file".into(),
            Ok(_) => {
                self.failure = None;
                return Ok(());
            }
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) =>
            {
                return Err(MIN_RETRY_DELAY);
            }
            Err(error) => error.to_string(),
        };
        let delay = match self.failure {
            Some((_, delay)) => MAX_RETRY_DELAY.min(delay * 2),
            None => {
                warn_limited(format_args!(
                    "no bytes from the source: {error}; requests wait"
                ));
                MIN_RETRY_DELAY
            }
        };
        self.failure = Some((now + delay, delay));
        Err(delay)
    }

    /// Ends the delay, because the file has become readable.
    pub fn retry_now(&mut self) {
        if let Some((retry, _)) = &mut self.failure {
            *retry = Instant::now();
        }
    }

    /// Writes up to `limit` bytes to `chain`, and returns how many.
    pub fn fill(&mut self, chain: &mut Chain, limit: u64) -> u32 {
        if let Err(error) = chain.check() {
            warn_limited(format_args!("{error}"));
            return 0;
        }
        let mut left = chain.writable_len().min(MAX_REQUEST_SIZE).min(limit) as usize;
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

/// Opens a file for non-blocking reads. A FIFO does not need a writer.
fn open(path: &Path) -> Result<File, StartError> {
    let failed = |reason: &dyn Display| {
        let path = path.display();
        StartError(format!(
            "cannot read {path}: {reason}; name a file, a character device or a FIFO"
        ))
    };
    let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits() as i32;
    let mut options = OpenOptions::new();
    let file = options.read(true).custom_flags(flags).open(path);
    let file = file.map_err(|error| failed(&error))?;
    match file.metadata() {
        Ok(metadata) if metadata.is_dir() => Err(failed(&"it is a directory")),
        _ => Ok(file),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_delay_of_a_source_at_its_end_doubles_up_to_a_limit() {
        let mut source = Source::open(Some(Path::new("/dev/null"))).unwrap();
        let mut now = Instant::now();
        for milliseconds in [100, 200, 400, 800, 1600, 3200, 3200] {
            let delay = Duration::from_millis(milliseconds);
            assert_eq!(source.fill_buffer(now), Err(delay));
            assert_eq!(source.fill_buffer(now + delay / 4), Err(delay * 3 / 4));
            now += delay;
        }
    }

    #[test]
    fn the_delay_starts_again_after_a_success() {
        let mut source = Source::open(Some(Path::new("/dev/null"))).unwrap();
        let now = Instant::now();
        assert_eq!(source.fill_buffer(now), Err(MIN_RETRY_DELAY));
        source.origin = BufReader::new(Origin::Kernel);
        assert_eq!(source.fill_buffer(now + MIN_RETRY_DELAY), Ok(()));
        source.origin = BufReader::new(Origin::File(open(Path::new("/dev/null")).unwrap()));
        assert_eq!(
            source.fill_buffer(now + MIN_RETRY_DELAY),
            Err(MIN_RETRY_DELAY)
        );
    }
}
