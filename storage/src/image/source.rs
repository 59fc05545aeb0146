// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the options name: a path to open, or a file that whoever started the program has opened.

use std::fmt;
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::fd::RawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl, major, minor};
use vhost_device_common::program::inherited;

use crate::options::DiskOptions;

/// Where inherited files have names.
const INHERITED: [&str; 2] = ["/dev/fd/", "/proc/self/fd/"];

/// What the options name.
#[derive(Clone, Debug)]
pub enum Source {
    /// A path to open.
    Path(PathBuf),
    /// A file that is open, with the words that name it.
    Inherited(RawFd, String),
}

impl fmt::Display for Source {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => path.display().fmt(formatter),
            Self::Inherited(_, name) => formatter.write_str(name),
        }
    }
}

/// An image that is open.
pub struct Opened {
    pub file: File,
    /// The same, opened once more where that is possible.
    pub lock_holder: File,
    pub metadata: Metadata,
    /// It takes aligned memory only (O_DIRECT).
    pub is_direct: bool,
}

/// Which file or device an image is, whatever it is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    device: u64,
    inode: u64,
}

impl Identity {
    /// Identifies the file with this metadata.
    pub fn of(metadata: &Metadata) -> Self {
        if metadata.file_type().is_block_device() {
            let (device, inode) = (metadata.rdev(), 0);
            return Self { device, inode };
        }
        let (device, inode) = (metadata.dev(), metadata.ino());
        Self { device, inode }
    }

    /// Twenty characters: the device's number, then the inode's.
    pub fn serial(self) -> String {
        let device = u64::from(major(self.device)) << 20 | u64::from(minor(self.device));
        let (device, inode) = (device & u64::from(u32::MAX), self.inode & ((1 << 48) - 1));
        format!("{device:08x}{inode:012x}")
    }
}

impl Source {
    /// What a path names, as the value of `option`: a file to open, or one that was inherited.
    pub fn path(path: PathBuf, option: &str) -> Self {
        let number = path.to_str().and_then(|path| {
            let number = INHERITED.iter().find_map(|start| path.strip_prefix(start));
            number?.parse().ok().filter(|number: &RawFd| *number >= 0)
        });
        match number {
            Some(number) => Self::Inherited(number, format!("{option}={}", path.display())),
            None => Self::Path(path),
        }
    }

    /// Opens the image, or takes it over.
    ///
    /// # Errors
    /// What is wrong with it, and what to do.
    pub fn open(&self, options: &DiskOptions) -> Result<Opened, String> {
        match self {
            Self::Path(path) => open_path(path, options),
            Self::Inherited(number, _) => take_over(*number, options),
        }
    }

    /// What the path names now; `None` for an inherited file, which stays what it is.
    pub fn look(&self) -> Option<io::Result<Identity>> {
        match self {
            Self::Path(path) => Some(std::fs::metadata(path).map(|found| Identity::of(&found))),
            Self::Inherited(..) => None,
        }
    }
}

fn open_path(path: &Path, options: &DiskOptions) -> Result<Opened, String> {
    let explain = |error| explain_open(path, &error, options);
    // Before it is opened: that could wait for ever on a pipe.
    let metadata = std::fs::metadata(path).map_err(explain)?;
    check_kind(&metadata)?;
    Ok(Opened {
        file: open(path, options).map_err(explain)?,
        lock_holder: open(path, options).map_err(explain)?,
        metadata,
        is_direct: options.direct,
    })
}

fn take_over(number: RawFd, options: &DiskOptions) -> Result<Opened, String> {
    let path = PathBuf::from(format!("/proc/self/fd/{number}"));
    let mut file = File::from(inherited(number).map_err(|error| {
        format!("no file is open under this number: {error}; pass that of an open image")
    })?);
    let metadata = file
        .metadata()
        .map_err(|error| format!("cannot find out what it is: {error}"))?;
    check_kind(&metadata)?;
    let mut flags = fcntl_getfl(&file).map_err(|errno| errno.to_string())?;
    if flags.contains(OFlags::PATH) {
        file = open(&path, options)
            .map_err(|error| format!("open with O_PATH, and cannot be opened: {error}"))?;
        flags = fcntl_getfl(&file).map_err(|errno| errno.to_string())?;
    }
    let mode = flags & OFlags::RWMODE;
    let fault = if mode == OFlags::WRONLY {
        "cannot be read; open the image for reading too"
    } else if mode == OFlags::RDONLY && !options.read_only {
        "open for reading only; open it for writing too, or add --read-only"
    } else if flags.contains(OFlags::APPEND) {
        "open with O_APPEND, which has all that is written go to the end; open it without"
    } else {
        ""
    };
    if !fault.is_empty() {
        return Err(fault.to_owned());
    }
    if options.direct && !flags.contains(OFlags::DIRECT) {
        fcntl_setfl(&file, flags | OFlags::DIRECT).map_err(|errno| {
            format!("its file system has no O_DIRECT: {errno}; leave --direct out")
        })?;
    }
    // Who may not open the file has locks in common with those who passed it.
    let lock_holder = open(&path, options).or_else(|_| file.try_clone());
    Ok(Opened {
        lock_holder: lock_holder.map_err(|error| error.to_string())?,
        file,
        metadata,
        is_direct: options.direct || flags.contains(OFlags::DIRECT),
    })
}

fn check_kind(metadata: &Metadata) -> Result<(), String> {
    let kind = metadata.file_type();
    if kind.is_block_device() || kind.is_file() {
        return Ok(());
    }
    Err(if kind.is_socket() {
        "a socket, and no image; --fd takes the socket of a front-end".to_owned()
    } else {
        "neither a file nor a block device; --blk-file takes a raw image".to_owned()
    })
}

fn open(path: &Path, options: &DiskOptions) -> io::Result<File> {
    let direct = if options.direct {
        OFlags::DIRECT
    } else {
        OFlags::empty()
    };
    OpenOptions::new()
        .read(true)
        .write(!options.read_only)
        .custom_flags(direct.bits() as i32)
        .open(path)
}

/// Whether this is a URI rather than a path.
fn is_uri(path: &Path) -> bool {
    let scheme = path.to_str().and_then(|text| text.split_once("://"));
    scheme.is_some_and(|(scheme, _)| {
        scheme.starts_with(|first: char| first.is_ascii_alphabetic())
            && scheme
                .chars()
                .all(|other| other.is_ascii_alphanumeric() || "+-.".contains(other))
    })
}

fn explain_open(path: &Path, error: &io::Error, options: &DiskOptions) -> String {
    let remedy = match error.kind() {
        io::ErrorKind::NotFound if is_uri(path) => {
            return "no local file, and this program opens nothing else; have the host attach it as a block device \
                 (nbd-client, rbd map, qemu-nbd --connect), and name that by --blk-file"
                .to_owned();
        }
        io::ErrorKind::NotFound => "; make an image there, or correct --blk-file",
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem
            if !options.read_only =>
        {
            "; change its permissions, or add --read-only"
        }
        io::ErrorKind::InvalidInput if options.direct => {
            "; its file system has no O_DIRECT, leave --direct out"
        }
        _ => "",
    };
    format!("cannot be opened: {error}{remedy}")
}
