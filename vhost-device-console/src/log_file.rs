// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A file to which everything is written that the guest writes to a port, with rotation: PATH, PATH.1, PATH.2 …

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use vhost_device_common::device::StartError;
use vhost_device_common::warn_limited;

use crate::history::History;

/// When a file is rotated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rotation {
    /// Largest size of each file in bytes.
    pub max_size: u64,
    /// Number of older files that are kept.
    pub keep: u32,
}

/// A file with what the guest writes.
#[derive(Debug)]
pub struct LogFile {
    path: PathBuf,
    file: File,
    rotation: Option<Rotation>,
    /// Size of the file, if it is rotated.
    size: u64,
    /// Position in the port's history of the next byte.
    next: u64,
    /// Bytes that could not be written.
    lost: u64,
}

impl LogFile {
    /// Opens the file, and creates it if there is none. Without `append`, its old contents are removed.
    ///
    /// # Errors
    /// The file cannot be opened for writing.
    pub fn open(
        path: PathBuf,
        append: bool,
        rotation: Option<Rotation>,
    ) -> Result<Self, StartError> {
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
        if metadata.is_file() && !append {
            file.set_len(0).map_err(failed)?;
        }
        Ok(Self {
            size: if append { metadata.len() } else { 0 },
            path,
            file,
            rotation,
            next: 0,
            lost: 0,
        })
    }

    /// Returns its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns whether it is rotated.
    pub fn is_rotated(&self) -> bool {
        self.rotation.is_some()
    }

    /// Returns the number of bytes that could not be written.
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// Writes what was added to `history`. Bytes that cannot be written are lost.
    pub fn write(&mut self, history: &History) {
        let due = history.end().saturating_sub(self.next);
        let mut written = 0;
        let mut parts = history.after(self.next).into_iter();
        if let Err(error) = parts.try_for_each(|part| self.write_part(part, &mut written)) {
            warn_limited(format_args!(
                "cannot write to {}: {error}; output of the guest is missing there",
                self.path.display()
            ));
        }
        self.lost = self.lost.saturating_add(due.saturating_sub(written));
        self.next = history.end();
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
        self.file = create(&self.path)?;
        self.file.set_len(0)
    }

    /// Returns the path of an older file.
    fn older(&self, number: u32) -> PathBuf {
        let mut path = self.path.clone().into_os_string();
        path.push(format!(".{number}"));
        path.into()
    }
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
        LogFile::open(path.into(), append, Some(Rotation { max_size, keep })).unwrap()
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
                file.write(&history);
            }
            let mut all = Vec::new();
            for number in (0..=keep).rev() {
                let path = if number == 0 {
                    path.clone()
                } else {
                    file.older(number)
                };
                let bytes = fs::read(&path).unwrap();
                assert!(bytes.len() <= 100, "{}", path.display());
                all.extend(bytes);
            }
            assert!(stream.ends_with(&all), "{keep}");
            assert!(all.len() > 100 * keep as usize);
            assert!(!file.older(keep + 1).exists());
            assert_eq!(file.lost(), 0);
            for number in 1..=keep {
                fs::remove_file(file.older(number)).unwrap();
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
        file.write(&history);
        assert_eq!(fs::read(&path).unwrap(), [b'b'; 20]);
        let older = fs::read(file.older(1)).unwrap();
        assert_eq!(older, [[b'a'; 90].as_slice(), &[b'b'; 10]].concat());
    }

    #[test]
    fn a_file_that_cannot_be_renamed_stays_within_its_size() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let mut file = log(&path, false, 100, 1);
        // A directory is in the way.
        fs::create_dir(file.older(1)).unwrap();
        let mut history = History::new(1000);
        for _ in 0..50 {
            history.append(&[b'c'; 30]);
            file.write(&history);
            assert!(fs::metadata(&path).unwrap().len() <= 100);
        }
    }

    #[test]
    fn bytes_that_cannot_be_written_are_counted() {
        let mut file = LogFile::open("/dev/full".into(), false, None).unwrap();
        let mut history = History::new(8);
        history.append(b"0123456789");
        file.write(&history);
        assert_eq!(file.lost(), 10);
    }
}
