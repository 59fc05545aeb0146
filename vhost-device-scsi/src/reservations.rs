// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The file in which persistent reservations survive a restart (APTPL).
//!
//! It has two places of [`PLACE`] bytes. A state is written to the place that does not have the last one, so a crash loses nothing. Each
//! has a header: magic, number of the state, length and checksum (CRC-32 of all that precedes it and of the state), in little-endian order.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use rustix::fs::{FlockOperation, flock};
use vhost_device_common::device::{Call, Needs};

const MAGIC: [u8; 8] = *b"VHSCSIPR";
/// Magic, number, length.
const FIELDS: usize = 20;
const HEADER: usize = FIELDS + 4;
/// Bytes of a place.
const PLACE: usize = 64 << 10;
/// The longest state.
const MOST: usize = PLACE - HEADER;

/// An open file, which is locked against other programs.
#[derive(Debug)]
pub struct Reservations {
    file: File,
    /// The number of the last state.
    last: Mutex<u64>,
}

impl Reservations {
    /// Opens the file at `path`, which is created if it does not exist, and returns the state that it has.
    ///
    /// # Errors
    /// What is wrong.
    pub fn open(path: &Path) -> Result<(Self, Vec<u8>), String> {
        let fail = |error| format!("{}: cannot open it: {error}", path.display());
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false);
        let file = options.open(path).map_err(fail)?;
        Self::adopt(file).map_err(|what| format!("{}: {what}", path.display()))
    }

    /// Takes over an open file, as [`Reservations::open`].
    ///
    /// # Errors
    /// What is wrong.
    pub fn adopt(file: File) -> Result<(Self, Vec<u8>), String> {
        flock(&file, FlockOperation::NonBlockingLockExclusive)
            .map_err(|_| "another program uses this file for reservations".to_owned())?;
        let mut found = [0, 1].map(|place| read(&file, place));
        found.sort_by_key(|state| state.as_ref().map(|(number, _)| *number));
        let [_, newest] = found;
        let length = file.metadata().map_or(0, |metadata| metadata.len());
        if newest.is_none() && length > 0 {
            return Err(
                "not a file of reservations, or damaged; give the path of a new file".to_owned(),
            );
        }
        let (number, state) = newest.unwrap_or_default();
        let last = Mutex::new(number);
        Ok((Self { file, last }, state))
    }

    /// Stores a state, up to stable storage.
    ///
    /// # Errors
    /// It is too long, or cannot be written.
    pub fn store(&self, state: &[u8]) -> io::Result<()> {
        if state.len() > MOST {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let number = last.wrapping_add(1);
        let mut bytes = MAGIC.to_vec();
        bytes.extend(number.to_le_bytes());
        bytes.extend((state.len() as u32).to_le_bytes());
        let checksum = checksum(&bytes, state);
        bytes.extend(checksum.to_le_bytes());
        bytes.extend(state);
        self.file.write_all_at(&bytes, number % 2 * PLACE as u64)?;
        self.file.sync_data()?;
        *last = number;
        Ok(())
    }

    /// Adds what [`Reservations::adopt`] and [`Reservations::store`] need of the sandbox.
    pub fn add_needs(needs: &mut Needs) {
        let calls = [libc::SYS_pwrite64, libc::SYS_fdatasync].map(Call::new);
        needs.helper.get_or_insert_default().extend(calls);
        needs.control.push(Call::new(libc::SYS_flock));
    }
}

fn checksum(fields: &[u8], state: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(fields);
    hasher.update(state);
    hasher.finalize()
}

/// Reads the state of a place, and its number.
fn read(file: &File, place: u64) -> Option<(u64, Vec<u8>)> {
    let start = place * PLACE as u64;
    let mut header = [0; HEADER];
    file.read_exact_at(&mut header, start).ok()?;
    let (fields, sum) = header.split_at(FIELDS);
    let (magic, rest) = fields.split_at(MAGIC.len());
    let (number, length) = rest.split_at(8);
    let number = u64::from_le_bytes(number.try_into().ok()?);
    let length = u32::from_le_bytes(length.try_into().ok()?) as usize;
    if magic != MAGIC || length > MOST {
        return None;
    }
    let mut state = vec![0; length];
    file.read_exact_at(&mut state, start + HEADER as u64).ok()?;
    (sum == checksum(fields, &state).to_le_bytes()).then_some((number, state))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_state_is_found_even_if_a_later_one_was_not_completely_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("reservations");
        let (file, state) = Reservations::open(&path).unwrap();
        assert!(state.is_empty());
        for state in [&b"first"[..], b"second", b"third"] {
            file.store(state).unwrap();
        }
        drop(file);
        let raw = File::options().write(true).open(&path).unwrap();
        let (file, state) = Reservations::open(&path).unwrap();
        assert_eq!(state, b"third");
        drop(file);
        // The third one is in the second place.
        raw.write_all_at(b"X", PLACE as u64 + HEADER as u64)
            .unwrap();
        let (file, state) = Reservations::open(&path).unwrap();
        assert_eq!(state, b"second");
        file.store(b"").unwrap();
        drop(file);
        assert_eq!(Reservations::open(&path).unwrap().1, b"");
    }

    #[test]
    fn another_file_and_a_file_in_use_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, "something else").unwrap();
        let error = Reservations::open(&path).unwrap_err();
        assert!(error.contains("not a file of reservations"), "{error}");
        let path = folder.path().join("new");
        let (file, _) = Reservations::open(&path).unwrap();
        let error = Reservations::open(&path).unwrap_err();
        assert!(error.contains("another program"), "{error}");
        assert!(file.store(&vec![0; MOST + 1]).is_err());
    }
}
