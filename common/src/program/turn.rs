// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Only one program at a time creates sockets in a directory.
//!
//! A socket that is bound, but does not listen yet, looks like a stale socket, which the next program replaces. So a program holds a lock
//! on the directory (flock(2)) from its check of the path until it listens. Unlike a lock file, the lock leaves nothing behind, however
//! the program ends, and the directory need not be writable.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, OFlags, flock, fstat, open};
use rustix::io::Errno;

/// How long to wait for other programs, each of which takes some milliseconds.
const PATIENCE: Duration = Duration::from_secs(10);
/// Interval between attempts to lock.
const INTERVAL: Duration = Duration::from_millis(1);

/// The locks, which are released when this is dropped.
#[derive(Debug)]
pub struct Turn {
    _locks: Vec<OwnedFd>,
}

impl Turn {
    /// Waits until no other program creates sockets in the directories of `sockets`, and locks these. A directory that cannot be opened, or
    /// stays locked, is skipped: anybody who can read it can lock it, and must not prevent this program from starting.
    pub fn wait<'a>(sockets: impl IntoIterator<Item = &'a Path>) -> Self {
        let mut directories: Vec<_> = sockets
            .into_iter()
            .filter_map(|socket| {
                let path = directory(socket);
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
                let file = open(&path, flags, Mode::empty()).ok()?;
                let stat = fstat(&file).ok()?;
                Some(((stat.st_dev, stat.st_ino), path, file))
            })
            .collect();
        // In the same order in all programs, so that no two wait for each other; and each only once, or this program would wait for itself.
        directories.sort_by_key(|(id, ..)| *id);
        directories.dedup_by_key(|(id, ..)| *id);
        let until = Instant::now() + PATIENCE;
        let mut locks = Vec::new();
        for (_, path, file) in directories {
            while flock(&file, FlockOperation::NonBlockingLockExclusive) == Err(Errno::AGAIN) {
                if Instant::now() >= until {
                    log::warn!(
                        "another program keeps the directory {} locked (flock); continuing without the lock",
                        path.display()
                    );
                    break;
                }
                std::thread::sleep(INTERVAL);
            }
            locks.push(file);
        }
        Self { _locks: locks }
    }
}

/// Returns the directory of `path`.
pub fn directory(path: &Path) -> PathBuf {
    let parent = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    parent.unwrap_or(Path::new(".")).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_sockets_of_one_directory_are_one_turn() {
        let directory = tempfile::tempdir().unwrap();
        let sockets = ["one", "./two"].map(|name| directory.path().join(name));
        let turn = Turn::wait(sockets.iter().map(PathBuf::as_path));
        let file = std::fs::File::open(directory.path()).unwrap();
        let lock = || flock(&file, FlockOperation::NonBlockingLockExclusive);
        assert_eq!(lock(), Err(Errno::AGAIN));
        drop(turn);
        assert_eq!(lock(), Ok(()));
    }

    #[test]
    fn directories_that_do_not_exist_are_skipped() {
        Turn::wait([Path::new("/nonexistent/socket")]);
    }
}
