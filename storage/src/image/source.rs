// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where an image comes from: a path to open, or a file that is inherited or passed.

use std::fmt;
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::fd::RawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl, major, minor};
use vhost_device_common::program::inherited;

use crate::options::DiskOptions;

/// Directories in which inherited files have names.
const INHERITED: [&str; 2] = ["/dev/fd/", "/proc/self/fd/"];

/// Where an image comes from.
#[derive(Clone, Debug)]
pub enum Source {
    /// A path to open.
    Path(PathBuf),
    /// An inherited file, with the option that names it.
    Inherited(RawFd, String),
    /// A file that a client of the control socket has passed, with its name in messages. It is not opened again: the sandbox has no paths.
    Passed(Arc<File>, String),
}

impl fmt::Display for Source {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => path.display().fmt(formatter),
            Self::Inherited(_, name) | Self::Passed(_, name) => formatter.write_str(name),
        }
    }
}

/// An image that is open.
pub struct Opened {
    pub file: File,
    /// The same file, opened once more if that is possible.
    pub lock_holder: File,
    pub metadata: Metadata,
    /// Whether it takes only aligned memory (O_DIRECT).
    pub is_direct: bool,
}

/// Which file or device an image is, whatever its path.
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

    /// Makes a serial number of twenty characters: the number of the device, then that of the inode.
    pub fn serial(self) -> String {
        let device = u64::from(major(self.device)) << 20 | u64::from(minor(self.device));
        let (device, inode) = (device & u64::from(u32::MAX), self.inode & ((1 << 48) - 1));
        format!("{device:08x}{inode:012x}")
    }
}

impl Source {
    /// Returns the source that `path`, the value of `option`, names. A path below /dev/fd names an inherited file.
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

    /// Opens the image, or adopts an inherited one.
    ///
    /// # Errors
    /// What is wrong with the image, and what to do.
    pub fn open(&self, options: &DiskOptions) -> Result<Opened, String> {
        match self {
            Self::Path(path) => open_path(path, options),
            Self::Inherited(number, _) => adopt(*number, options),
            Self::Passed(file, _) => {
                let file = file.try_clone().map_err(|error| error.to_string())?;
                let metadata = examine(&file)?;
                let flags = check_mode(&file, options)?;
                Ok(Opened {
                    lock_holder: file.try_clone().map_err(|error| error.to_string())?,
                    is_direct: options.direct || flags.contains(OFlags::DIRECT),
                    file,
                    metadata,
                })
            }
        }
    }

    /// Returns which file the path names now; `None` for a file without a path.
    ///
    /// # Errors
    /// The path cannot be examined.
    pub fn current(&self) -> Option<io::Result<Identity>> {
        match self {
            Self::Path(path) => Some(std::fs::metadata(path).map(|found| Identity::of(&found))),
            Self::Inherited(..) | Self::Passed(..) => None,
        }
    }
}

fn open_path(path: &Path, options: &DiskOptions) -> Result<Opened, String> {
    let explain = |error| explain_open(path, &error, options);
    // Before it is opened, which could wait forever on a FIFO.
    let metadata = std::fs::metadata(path).map_err(explain)?;
    check_kind(&metadata)?;
    Ok(Opened {
        file: open(path, options).map_err(explain)?,
        lock_holder: open(path, options).map_err(explain)?,
        metadata,
        is_direct: options.direct,
    })
}

fn adopt(number: RawFd, options: &DiskOptions) -> Result<Opened, String> {
    let path = PathBuf::from(format!("/proc/self/fd/{number}"));
    let mut file = File::from(inherited(number).map_err(|error| {
        format!("no file is open under this number: {error}; pass the descriptor of an open image")
    })?);
    let metadata = examine(&file)?;
    let flags = fcntl_getfl(&file).map_err(|errno| errno.to_string())?;
    if flags.contains(OFlags::PATH) {
        file = open(&path, options).map_err(|error| {
            format!("opened with O_PATH, and cannot be opened for I/O: {error}")
        })?;
    }
    let flags = check_mode(&file, options)?;
    // A file that cannot be opened again shares its locks with the program that passed it.
    let lock_holder = open(&path, options).or_else(|_| file.try_clone());
    Ok(Opened {
        lock_holder: lock_holder.map_err(|error| error.to_string())?,
        file,
        metadata,
        is_direct: options.direct || flags.contains(OFlags::DIRECT),
    })
}

fn examine(file: &File) -> Result<Metadata, String> {
    let metadata = file
        .metadata()
        .map_err(|error| format!("cannot examine it: {error}"))?;
    check_kind(&metadata)?;
    Ok(metadata)
}

/// Checks that a file that another program has opened allows what the options need, and switches O_DIRECT on if they want it. Returns the
/// flags of the file before that.
fn check_mode(file: &File, options: &DiskOptions) -> Result<OFlags, String> {
    let flags = fcntl_getfl(file).map_err(|errno| errno.to_string())?;
    let mode = flags & OFlags::RWMODE;
    let fault = if flags.contains(OFlags::PATH) {
        "opened with O_PATH; open it for reading and writing"
    } else if mode == OFlags::WRONLY {
        "cannot be read; open it for reading too"
    } else if mode == OFlags::RDONLY && !options.read_only {
        "opened only for reading; open it for writing too, or add --read-only"
    } else if flags.contains(OFlags::APPEND) {
        "opened with O_APPEND, so that all writes go to its end; open it without O_APPEND"
    } else {
        ""
    };
    if !fault.is_empty() {
        return Err(fault.to_owned());
    }
    if options.direct && !flags.contains(OFlags::DIRECT) {
        fcntl_setfl(file, flags | OFlags::DIRECT).map_err(|errno| {
            format!("its file system does not support O_DIRECT: {errno}; omit --direct")
        })?;
    }
    Ok(flags)
}

fn check_kind(metadata: &Metadata) -> Result<(), String> {
    let kind = metadata.file_type();
    if kind.is_block_device() || kind.is_file() {
        return Ok(());
    }
    Err(if kind.is_socket() {
        "a socket, not an image; give the socket of a front-end to --fd".to_owned()
    } else {
        "neither a file nor a block device; give a raw image or a block device".to_owned()
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

/// Returns whether this is a URI rather than a path.
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
            return "no local file, and this program opens only local files; attach it to the host as a block device \
                 (nbd-client, rbd map, qemu-nbd --connect), and give the path of that device"
                .to_owned();
        }
        io::ErrorKind::NotFound => "; create an image there, or correct the path",
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem
            if !options.read_only =>
        {
            "; change its permissions, or add --read-only"
        }
        io::ErrorKind::InvalidInput if options.direct => {
            "; its file system does not support O_DIRECT; omit --direct"
        }
        _ => "",
    };
    format!("cannot open it: {error}{remedy}")
}
