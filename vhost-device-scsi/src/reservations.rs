// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The file in which persistent reservations survive a restart (APTPL).
//!
//! It has two places of [`PLACE`] bytes. A state is written to the place that does not have the last one, so a crash loses nothing. Each
//! has a header: magic, number of the state, length and checksum (CRC-32 of all that precedes it and of the state), in little-endian order.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{FlockOperation, flock};
use vhost_device_common::device::{Call, Needs};
use vhost_device_common::lock;

const MAGIC: [u8; 8] = *b"VHSCSIPR";
/// Magic, number, length.
const FIELDS: usize = 20;
const HEADER: usize = FIELDS + 4;
/// Bytes of a place.
const PLACE: usize = 64 << 10;
/// The longest state.
const MOST: usize = PLACE - HEADER;

/// An open file, which is locked against other programs while this one has the disk.
#[derive(Debug)]
pub struct Reservations {
    file: File,
    is_held: AtomicBool,
    /// The number of the last state.
    last: Mutex<u64>,
}

impl Reservations {
    /// Opens the file at `path`, which is created if it does not exist, and returns the state that it has. With `incoming` another program
    /// may have the file: it is not locked and read before [`Reservations::take`].
    ///
    /// # Errors
    /// What is wrong.
    pub fn open(path: &Path, incoming: bool) -> Result<(Self, Vec<u8>), String> {
        let fail = |error| format!("{}: cannot open it: {error}", path.display());
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false);
        let is_new = !path.exists();
        let file = options.open(path).map_err(fail)?;
        if is_new {
            // Otherwise a crash of the host could lose the name of the file, and the reservations with it.
            let folder = path.parent().filter(|folder| *folder != Path::new(""));
            let folder = File::open(folder.unwrap_or(Path::new(".")));
            folder.and_then(|folder| folder.sync_all()).map_err(fail)?;
        }
        match incoming {
            true => Ok((Self::new(file), Vec::new())),
            false => Self::adopt(file).map_err(|what| format!("{}: {what}", path.display())),
        }
    }

    fn new(file: File) -> Self {
        Self {
            file,
            is_held: AtomicBool::new(false),
            last: Mutex::new(0),
        }
    }

    /// Takes over an open file, as [`Reservations::open`].
    ///
    /// # Errors
    /// What is wrong.
    pub fn adopt(file: File) -> Result<(Self, Vec<u8>), String> {
        let reservations = Self::new(file);
        let state = reservations.take()?;
        Ok((reservations, state))
    }

    /// Returns whether this program has the file.
    #[inline]
    pub fn is_held(&self) -> bool {
        self.is_held.load(Ordering::Acquire)
    }

    /// Locks the file, and returns the state that it has.
    ///
    /// # Errors
    /// What is wrong.
    pub fn take(&self) -> Result<Vec<u8>, String> {
        let mut last = lock(&self.last);
        let file = &self.file;
        flock(file, FlockOperation::NonBlockingLockExclusive)
            .map_err(|_| "another program uses this file for reservations".to_owned())?;
        let mut found = [0, 1].map(|place| read(file, place));
        found.sort_by_key(|state| state.as_ref().map(|(number, _)| *number));
        let [_, newest] = found;
        // The first state goes to the second place. If it was not completely written, the first place is blank.
        if newest.is_none() && !is_blank(file) {
            return Err(
                "not a file of reservations, or damaged; give the path of a new file".to_owned(),
            );
        }
        let (number, state) = newest.unwrap_or_default();
        *last = number;
        self.is_held.store(true, Ordering::Release);
        Ok(state)
    }

    /// Lets another program have the file, together with the image.
    pub fn release(&self) {
        let _last = lock(&self.last);
        if self.is_held.swap(false, Ordering::AcqRel) {
            let _ = flock(&self.file, FlockOperation::Unlock);
        }
    }

    /// Stores a state, up to stable storage.
    ///
    /// # Errors
    /// It is too long, or cannot be written.
    pub fn store(&self, state: &[u8]) -> io::Result<()> {
        if state.len() > MOST {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut last = lock(&self.last);
        if !self.is_held() {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
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
        let store = [libc::SYS_pwrite64, libc::SYS_fdatasync].map(Call::new);
        needs.helper.get_or_insert_default().extend(store);
        // If no thread can be started, a queue's thread stores.
        needs.queue.extend(store);
        let take = [libc::SYS_flock, libc::SYS_pread64, libc::SYS_statx].map(Call::new);
        needs.queue.extend(take);
        needs.control.extend(take);
    }
}

fn checksum(fields: &[u8], state: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(fields);
    hasher.update(state);
    hasher.finalize()
}

/// Returns whether a file is no larger than both places, and the first one has nothing but zeroes.
fn is_blank(file: &File) -> bool {
    let length = file.metadata().map(|metadata| metadata.len());
    if length.is_ok_and(|length| length > 2 * PLACE as u64) {
        return false;
    }
    let mut bytes = vec![0; PLACE];
    let mut length = 0;
    while let Some(rest) = bytes.get_mut(length..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, length as u64) {
            Ok(0) => break,
            Ok(count) => length += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return false,
        }
    }
    bytes.iter().all(|byte| *byte == 0)
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
        let (file, state) = Reservations::open(&path, false).unwrap();
        assert!(state.is_empty());
        for state in [&b"first"[..], b"second", b"third"] {
            file.store(state).unwrap();
        }
        drop(file);
        let raw = File::options().write(true).open(&path).unwrap();
        let (file, state) = Reservations::open(&path, false).unwrap();
        assert_eq!(state, b"third");
        drop(file);
        // The third one is in the second place.
        raw.write_all_at(b"X", PLACE as u64 + HEADER as u64)
            .unwrap();
        let (file, state) = Reservations::open(&path, false).unwrap();
        assert_eq!(state, b"second");
        file.store(b"").unwrap();
        drop(file);
        assert_eq!(Reservations::open(&path, false).unwrap().1, b"");
    }

    #[test]
    fn a_first_state_that_was_not_completely_written_does_no_harm() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("reservations");
        let raw = File::create(&path).unwrap();
        raw.write_all_at(b"VHSC", PLACE as u64).unwrap();
        let (file, state) = Reservations::open(&path, false).unwrap();
        assert!(state.is_empty());
        file.store(b"first").unwrap();
        drop(file);
        assert_eq!(Reservations::open(&path, false).unwrap().1, b"first");
    }

    #[test]
    fn the_destination_of_a_migration_takes_the_file_after_the_source() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("reservations");
        let (source, _) = Reservations::open(&path, false).unwrap();
        let (destination, _) = Reservations::open(&path, true).unwrap();
        source.store(b"state").unwrap();
        assert!(destination.take().is_err() && destination.store(b"").is_err());
        source.release();
        assert!(source.store(b"late").is_err());
        assert_eq!(destination.take().unwrap(), b"state");
        destination.store(b"next").unwrap();
    }

    #[test]
    fn another_file_and_a_file_in_use_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, "something else").unwrap();
        let error = Reservations::open(&path, false).unwrap_err();
        assert!(error.contains("not a file of reservations"), "{error}");
        // An empty image.
        let image = File::create(&path).unwrap();
        image.set_len(1 << 20).unwrap();
        assert!(Reservations::open(&path, false).is_err());
        let path = folder.path().join("new");
        let (file, _) = Reservations::open(&path, false).unwrap();
        let error = Reservations::open(&path, false).unwrap_err();
        assert!(error.contains("another program"), "{error}");
        assert!(file.store(&vec![0; MOST + 1]).is_err());
    }
}
