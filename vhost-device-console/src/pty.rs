// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A pseudoterminal, which programs of the host open as /dev/pts/N.
//!
//! The kernel does not report to the master that a program opens the other side, so inotify does. It does not report a new size
//! either; the size is read when programs open or close the terminal, type, and twice a second while it is open.

use std::ffi::OsString;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::fs::{Mode, OFlags, open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};
use vhost_device_common::device::StartError;

/// A pseudoterminal beside its master.
#[derive(Debug)]
pub struct Pty {
    /// Readable after a program has opened or closed the terminal.
    notifications: OwnedFd,
    path: PathBuf,
    link: Option<PathBuf>,
}

impl Pty {
    /// Creates a pseudoterminal in raw mode. Returns its master too, which does not block.
    ///
    /// # Errors
    /// The limit of pseudoterminals is reached.
    pub fn open(link: Option<PathBuf>) -> Result<(Self, OwnedFd), StartError> {
        let failed = |error: io::Error| {
            StartError(format!(
                "cannot create a pseudoterminal: {error}; mount devpts at /dev/pts, or use another backend"
            ))
        };
        let (master, path) = create().map_err(failed)?;
        let notifications = watch(&path).map_err(failed)?;
        let pty = Self {
            notifications,
            path,
            link,
        };
        Ok((pty, master))
    }

    /// Creates the symbolic link to the terminal.
    ///
    /// # Errors
    /// The link cannot be created, or leads to something else.
    pub fn place_link(&self) -> Result<(), StartError> {
        match &self.link {
            Some(link) => place(&self.path, link),
            None => Ok(()),
        }
    }

    /// Returns the path of the terminal.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the symbolic link to the terminal.
    pub fn link(&self) -> Option<&Path> {
        self.link.as_deref()
    }

    /// Returns the file that is readable after a program has opened or closed the terminal.
    pub fn notifications(&self) -> BorrowedFd<'_> {
        self.notifications.as_fd()
    }

    /// Discards the notifications.
    pub fn read_notifications(&self) {
        while matches!(
            rustix::io::read(&self.notifications, &mut [0; 4096]),
            Ok(1..)
        ) {}
    }

    /// Removes the symbolic link, unless it leads elsewhere now.
    pub fn remove_link(&self) {
        if let Some(link) = &self.link
            && std::fs::read_link(link).is_ok_and(|target| target == self.path)
            && let Err(error) = std::fs::remove_file(link)
        {
            log::warn!("cannot remove {}: {error}", link.display());
        }
    }
}

fn create() -> io::Result<(OwnedFd, PathBuf)> {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    rustix::io::ioctl_fionbio(&master, true)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let path = PathBuf::from(OsString::from_vec(
        ptsname(&master, Vec::new())?.into_bytes(),
    ));
    // Closed again, after which the kernel reports whether the terminal is open.
    let terminal = open(
        &path,
        OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let mut settings = tcgetattr(&terminal)?;
    settings.make_raw();
    tcsetattr(&terminal, OptionalActions::Now, &settings)?;
    Ok((master, path))
}

fn watch(path: &Path) -> io::Result<OwnedFd> {
    let notifications = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
    let events = WatchFlags::OPEN | WatchFlags::CLOSE_WRITE | WatchFlags::CLOSE_NOWRITE;
    inotify::add_watch(&notifications, path, events)?;
    Ok(notifications)
}

/// Creates the symbolic link. One that leads to a terminal, or to nothing, is replaced: a process that was killed left it.
fn place(path: &Path, link: &Path) -> Result<(), StartError> {
    let failed = |error| {
        StartError(format!(
            "cannot create the link {}: {error}",
            link.display()
        ))
    };
    match std::fs::symlink_metadata(link) {
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
        Ok(metadata) if !metadata.is_symlink() || !is_stale(link) => {
            return Err(StartError(format!(
                "{} exists; choose another link for the terminal or move it away",
                link.display()
            )));
        }
        Ok(_) => std::fs::remove_file(link).map_err(failed)?,
    }
    symlink(path, link).map_err(failed)
}

fn is_stale(link: &Path) -> bool {
    match std::fs::metadata(link) {
        Ok(target) => target.file_type().is_char_device() && is_terminal(target.rdev()),
        Err(error) => error.kind() == ErrorKind::NotFound,
    }
}

/// Returns whether this is the number of a terminal below /dev/pts.
fn is_terminal(device: u64) -> bool {
    (136..144).contains(&rustix::fs::major(device))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(link: &Path) -> Result<(Pty, OwnedFd), StartError> {
        let (pty, master) = Pty::open(Some(link.into()))?;
        pty.place_link()?;
        Ok((pty, master))
    }

    #[test]
    fn only_links_that_a_terminal_left_are_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let link = directory.path().join("link");
        let (first, _master) = open(&link).unwrap();
        assert_eq!(std::fs::read_link(&link).unwrap(), first.path());
        let (second, _other) = open(&link).unwrap();
        assert_eq!(std::fs::read_link(&link).unwrap(), second.path());
        first.remove_link();
        assert!(link.is_symlink());
        second.remove_link();
        assert!(!link.is_symlink());
        std::fs::write(&link, "data").unwrap();
        assert!(open(&link).is_err());
        std::fs::remove_file(&link).unwrap();
        symlink("/dev/null", &link).unwrap();
        assert!(open(&link).is_err());
        std::fs::remove_file(&link).unwrap();
        symlink("/nowhere", &link).unwrap();
        assert!(open(&link).is_ok());
    }
}
