// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A file to which everything is written that the guest writes to a port, with rotation: PATH, PATH.1, PATH.2 …

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use vhost_device_common::device::StartError;
use vhost_device_common::lock;
use vhost_device_common::warn_limited;

use crate::filter::CAN;
use crate::history::History;

/// When a file is rotated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rotation {
    /// Largest size of each file in bytes.
    pub max_size: u64,
    /// Number of older files that are kept.
    pub keep: u32,
}

impl Rotation {
    /// Returns whether the rotation of `path` renames a file to `other`.
    pub fn renames(self, path: &Path, other: &Path) -> bool {
        (1..=self.keep).any(|number| older(path, number) == other)
    }
}

/// Most bytes that are written by one job.
const JOB_SIZE: usize = 256 << 10;

/// A file with what the guest writes. It is written by threads of its own, because a disk can take long.
#[derive(Debug)]
pub struct LogFile {
    path: PathBuf,
    is_rotated: bool,
    sink: Arc<Mutex<Sink>>,
    /// Bytes that could not be written.
    lost: Arc<AtomicU64>,
    /// It receives what a filter has passed: after a gap it continues with a line.
    pub is_filtered: bool,
    /// Position in the port's history of the next byte.
    next: u64,
    /// Position in the port's history up to which all is written.
    done: u64,
    /// A job has not ended.
    is_busy: bool,
}

/// Bytes that a thread writes to a file.
#[derive(Debug)]
pub struct Job {
    sink: Arc<Mutex<Sink>>,
    lost: Arc<AtomicU64>,
    bytes: Vec<u8>,
    /// Index of the port, and of the file among those of the port.
    pub place: (usize, usize),
}

impl Job {
    /// Writes the bytes.
    pub fn run(&self) {
        write(&self.sink, &self.lost, &self.bytes);
    }
}

fn write(sink: &Mutex<Sink>, lost: &AtomicU64, bytes: &[u8]) {
    lost.fetch_add(lock(sink).write(bytes), Ordering::Relaxed);
}

impl LogFile {
    /// Opens the file, and creates it if there is none. Without `append`, [`LogFile::claim`] empties it.
    ///
    /// # Errors
    /// The file cannot be opened for writing.
    pub fn open(
        path: PathBuf,
        append: bool,
        rotation: Option<Rotation>,
    ) -> Result<Self, StartError> {
        let sink = Sink::open(path.clone(), append, rotation)?;
        Ok(Self {
            path,
            is_rotated: rotation.is_some(),
            sink: Arc::new(Mutex::new(sink)),
            lost: Arc::default(),
            is_filtered: false,
            next: 0,
            done: 0,
            is_busy: false,
        })
    }

    /// Empties the file, unless it is to be appended to.
    ///
    /// # Errors
    /// The file cannot be emptied.
    pub fn claim(&self) -> Result<(), StartError> {
        lock(&self.sink).claim()
    }

    /// Returns its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns whether it is rotated.
    pub fn is_rotated(&self) -> bool {
        self.is_rotated
    }

    /// Returns the number of bytes that could not be written.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// Returns the position in the port's history up to which all is written.
    pub fn done(&self) -> u64 {
        self.done
    }

    /// Returns the next bytes to write, unless a job has not ended. Bytes that `history` no longer has are lost.
    pub fn next_job(&mut self, history: &History, place: (usize, usize)) -> Option<Job> {
        if self.is_busy {
            return None;
        }
        let bytes = self.next_bytes(history)?;
        self.is_busy = true;
        Some(Job {
            sink: Arc::clone(&self.sink),
            lost: Arc::clone(&self.lost),
            bytes,
            place,
        })
    }

    fn next_bytes(&mut self, history: &History) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        let mut first = history.start();
        if self.next < first {
            if self.is_filtered {
                first = history.line_after(first);
                bytes.push(CAN);
            }
            self.lost.fetch_add(first - self.next, Ordering::Relaxed);
            self.next = first;
        }
        let before = bytes.len();
        for part in history.after(self.next) {
            let room = JOB_SIZE.saturating_sub(bytes.len());
            bytes.extend_from_slice(part.get(..room).unwrap_or(part));
        }
        self.next += bytes.len().saturating_sub(before) as u64;
        (!bytes.is_empty()).then_some(bytes)
    }

    /// Notes that the job has ended.
    pub fn ended(&mut self) {
        self.is_busy = false;
        self.done = self.next;
    }

    /// Does not write what was added to `history` from `position`, because another device has written it. Writes it nevertheless if
    /// bytes before it are not written yet.
    pub fn skip(&mut self, position: u64, history: &History) {
        if self.next >= position {
            self.next = history.end();
            if !self.is_busy {
                self.done = self.next;
            }
        }
    }
}

/// The open file.
#[derive(Debug)]
struct Sink {
    path: PathBuf,
    file: File,
    rotation: Option<Rotation>,
    /// Its old contents are to be removed.
    is_emptied: bool,
    /// Size of the file, if it is rotated.
    size: u64,
}

impl Sink {
    fn open(path: PathBuf, append: bool, rotation: Option<Rotation>) -> Result<Self, StartError> {
        let failed = |error| {
            StartError(format!(
                "cannot open {} for writing: {error}",
                path.display()
            ))
        };
        let file = create(&path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        let kind = metadata.file_type();
        if rotation.is_some() && !metadata.is_file() {
            return Err(StartError(format!(
                "{} is not a regular file and cannot be rotated; omit max-size",
                path.display()
            )));
        }
        if kind.is_fifo() || kind.is_block_device() {
            return Err(StartError(format!(
                "{} is neither a regular file nor a character device; choose another path",
                path.display()
            )));
        }
        Ok(Self {
            size: metadata.len(),
            is_emptied: metadata.is_file() && !append,
            path,
            file,
            rotation,
        })
    }

    fn claim(&mut self) -> Result<(), StartError> {
        if std::mem::take(&mut self.is_emptied) {
            let failed =
                |error| StartError(format!("cannot empty {}: {error}", self.path.display()));
            self.file.set_len(0).map_err(failed)?;
            self.size = 0;
        }
        Ok(())
    }

    /// Writes `bytes`. Returns how many could not be written.
    fn write(&mut self, bytes: &[u8]) -> u64 {
        let mut written = 0;
        if let Err(error) = self.write_part(bytes, &mut written) {
            warn_limited(format_args!(
                "cannot write to {}: {error}; output of the guest is missing there",
                self.path.display()
            ));
        }
        (bytes.len() as u64).saturating_sub(written)
    }

    fn write_part(&mut self, mut part: &[u8], written: &mut u64) -> io::Result<()> {
        while !part.is_empty() {
            let room = self.room();
            let piece = part.get(..room).unwrap_or(part);
            match self.file.write(piece) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(count) => {
                    part = part.get(count..).unwrap_or_default();
                    self.size = self.size.saturating_add(count as u64);
                    *written += count as u64;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Returns how many bytes can be written next. Rotates a full file.
    fn room(&mut self) -> usize {
        let Some(rotation) = self.rotation else {
            return usize::MAX;
        };
        if self.size >= rotation.max_size {
            if let Err(error) = self.rotate(rotation.keep) {
                warn_limited(format_args!(
                    "cannot rotate {}: {error}; it is emptied instead",
                    self.path.display()
                ));
                let _ = self.file.set_len(0);
            }
            self.size = 0;
        }
        rotation
            .max_size
            .saturating_sub(self.size)
            .try_into()
            .unwrap_or(usize::MAX)
    }

    /// Renames the files, and continues with an empty one.
    fn rotate(&mut self, keep: u32) -> io::Result<()> {
        if keep == 0 {
            return self.file.set_len(0);
        }
        for number in (1..keep).rev() {
            match std::fs::rename(self.older(number), self.older(number + 1)) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        match std::fs::rename(&self.path, self.older(1)) {
            // Somebody has removed it.
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        self.file = create(&self.path).inspect_err(|_| {
            // The open file is emptied, which must have its own name.
            let _ = std::fs::rename(self.older(1), &self.path);
        })?;
        self.file.set_len(0)
    }

    /// Returns the path of an older file.
    fn older(&self, number: u32) -> PathBuf {
        older(&self.path, number)
    }
}

/// Returns the path of an older file.
fn older(path: &Path, number: u32) -> PathBuf {
    let mut path = path.to_owned().into_os_string();
    path.push(format!(".{number}"));
    path.into()
}

/// Opens a file for appending, and creates it if there is none.
fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o640)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn log(path: &Path, append: bool, max_size: u64, keep: u32) -> LogFile {
        let file = LogFile::open(path.into(), append, Some(Rotation { max_size, keep })).unwrap();
        file.claim().unwrap();
        file
    }

    /// Writes all that is in `history`.
    fn write_all(file: &mut LogFile, history: &History) {
        while let Some(job) = file.next_job(history, (0, 0)) {
            job.run();
            file.ended();
        }
    }

    #[test]
    fn older_files_are_kept_up_to_their_number_and_none_exceeds_the_size() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        for keep in [0, 1, 3] {
            let mut file = log(&path, false, 100, keep);
            let mut history = History::new(1000);
            let mut stream = Vec::new();
            for number in 0..200u32 {
                let line = format!("line {number} {}\n", "x".repeat(number as usize % 50));
                history.append(line.as_bytes());
                stream.extend(line.into_bytes());
                write_all(&mut file, &history);
            }
            let mut all = Vec::new();
            for number in (0..=keep).rev() {
                let path = if number == 0 {
                    path.clone()
                } else {
                    older(&path, number)
                };
                let bytes = fs::read(&path).unwrap();
                assert!(bytes.len() <= 100, "{}", path.display());
                all.extend(bytes);
            }
            assert!(stream.ends_with(&all), "{keep}");
            assert!(all.len() > 100 * keep as usize);
            assert!(!older(&path, keep + 1).exists());
            assert_eq!(file.lost(), 0);
            for number in 1..=keep {
                fs::remove_file(older(&path, number)).unwrap();
            }
        }
    }

    #[test]
    fn appending_counts_what_the_file_has() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        fs::write(&path, [b'a'; 90]).unwrap();
        let mut file = log(&path, true, 100, 1);
        let mut history = History::new(1000);
        history.append(&[b'b'; 30]);
        write_all(&mut file, &history);
        assert_eq!(fs::read(&path).unwrap(), [b'b'; 20]);
        let older = fs::read(older(&path, 1)).unwrap();
        assert_eq!(older, [[b'a'; 90].as_slice(), &[b'b'; 10]].concat());
    }

    #[test]
    fn a_file_that_cannot_be_renamed_stays_within_its_size() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let mut file = log(&path, false, 100, 1);
        // A directory is in the way.
        fs::create_dir(older(&path, 1)).unwrap();
        let mut history = History::new(1000);
        for _ in 0..50 {
            history.append(&[b'c'; 30]);
            write_all(&mut file, &history);
            assert!(fs::metadata(&path).unwrap().len() <= 100);
        }
    }

    #[test]
    fn bytes_that_cannot_be_written_are_counted() {
        let mut file = LogFile::open("/dev/full".into(), false, None).unwrap();
        let mut history = History::new(8);
        history.append(b"0123456789");
        write_all(&mut file, &history);
        assert_eq!(
            file.lost(),
            10,
            "two of them are not in the history any more"
        );
        assert_eq!(file.done(), 10);
    }

    #[test]
    fn one_job_at_a_time_writes_the_next_bytes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let mut file = LogFile::open(path.clone(), false, None).unwrap();
        let mut history = History::new(1 << 20);
        assert!(file.next_job(&history, (0, 0)).is_none());
        history.append(&[b'a'; JOB_SIZE + 10]);
        let first = file.next_job(&history, (1, 2)).unwrap();
        assert_eq!(first.place, (1, 2));
        assert!(file.next_job(&history, (0, 0)).is_none());
        assert_eq!(file.done(), 0);
        first.run();
        file.ended();
        assert_eq!(file.done(), JOB_SIZE as u64);
        file.next_job(&history, (0, 0)).unwrap().run();
        file.ended();
        assert_eq!(fs::read(&path).unwrap().len(), JOB_SIZE + 10);
        assert!(file.next_job(&history, (0, 0)).is_none());
    }
}
