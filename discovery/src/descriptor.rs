// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Reads descriptors. Leaves out the files that other files replace or hide.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, DirEntry, OpenOptions};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use crate::problem::{Finding, Problem};
use crate::root::Root;
use crate::schema::{self, VhostUserBackend};

/// Limit for the size of a descriptor, in bytes. It is the same as libvirt's.
pub const MAX_SIZE: u64 = 1 << 20;

/// A descriptor and its file.
#[derive(Clone, Debug)]
pub struct Descriptor {
    /// The path of the file on the host.
    pub file: PathBuf,
    /// The content.
    pub backend: VhostUserBackend,
}

/// The content of some directories.
#[derive(Debug, Default)]
pub struct Listing {
    /// The descriptors in the byte order of their names. The first one that matches is the one to use.
    pub descriptors: Vec<Descriptor>,
    /// The problems with the files that were left out.
    pub findings: Vec<Finding>,
}

/// A file that counts: the path to show, and the path to read.
struct Source {
    shown: PathBuf,
    read: PathBuf,
}

/// Reads the descriptors in `directories`, which are in order from general to specific.
///
/// A file replaces the files of the same name in more general directories. An empty file hides them. A file that is not a descriptor is a
/// finding, and still hides the files that it replaces.
pub fn read(root: &Root, directories: &[PathBuf]) -> Listing {
    let mut findings = Vec::new();
    let mut sources: BTreeMap<OsString, Option<Source>> = BTreeMap::new();
    for directory in directories {
        let entries = match root.resolve(directory).and_then(fs::read_dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => {
                findings.push(Finding {
                    file: root.outside(directory),
                    problem: Problem::Unreadable(error),
                });
                continue;
            }
        };
        for entry in entries {
            let found = match &entry {
                Ok(entry) => source(root, directory, entry),
                Err(error) => Err(Problem::Unreadable(error.kind().into())),
            };
            let name = entry.map(|entry| entry.file_name()).unwrap_or_default();
            match found {
                Ok(Some(source)) => {
                    sources.insert(name, Some(source));
                }
                Ok(None) => (),
                Err(problem) => {
                    // What is not a regular file is ignored. Everything else replaces other files.
                    if !matches!(problem, Problem::NotAFile) {
                        sources.insert(name.clone(), None);
                    }
                    findings.push(Finding {
                        file: root.outside(directory).join(name),
                        problem,
                    });
                }
            }
        }
    }
    let mut descriptors = Vec::new();
    for Source { shown: file, read } in sources.into_values().flatten() {
        match parse(&read) {
            Ok(Some(backend)) => descriptors.push(Descriptor { file, backend }),
            Ok(None) => (),
            Err(problem) => findings.push(Finding { file, problem }),
        }
    }
    Listing {
        descriptors,
        findings,
    }
}

/// Returns the file that `entry` is or links to. Returns `None` if it does not count as a descriptor.
fn source(root: &Root, directory: &Path, entry: &DirEntry) -> Result<Option<Source>, Problem> {
    let name = entry.file_name();
    if name.as_bytes().starts_with(b".") {
        return Ok(None);
    }
    let read = match root.resolve(&directory.join(&name)) {
        Ok(read) => read,
        Err(error) => return missing(entry, error),
    };
    match fs::metadata(&read) {
        Ok(metadata) if metadata.is_file() => Ok(Some(Source {
            shown: root.outside(directory).join(name),
            read,
        })),
        Ok(_) if is_json(Path::new(&name)) => Err(Problem::NotAFile),
        Ok(_) => Ok(None),
        Err(error) => missing(entry, error),
    }
}

/// Handles an entry whose file does not exist.
fn missing(entry: &DirEntry, error: io::Error) -> Result<Option<Source>, Problem> {
    match entry.file_type() {
        Ok(kind) if kind.is_symlink() => Err(Problem::Dangling(error)),
        // It was removed in the meantime.
        _ if error.kind() == io::ErrorKind::NotFound => Ok(None),
        _ => Err(Problem::Unreadable(error)),
    }
}

/// Reads a file. Returns `None` if it is empty.
fn parse(file: &Path) -> Result<Option<VhostUserBackend>, Problem> {
    let mut text = Vec::new();
    OpenOptions::new()
        .read(true)
        // Does not block if the file has been replaced by a pipe.
        .custom_flags(OFlags::NONBLOCK.bits() as i32)
        .open(file)
        .and_then(|file| file.take(MAX_SIZE + 1).read_to_end(&mut text))
        .map_err(Problem::Unreadable)?;
    if text.is_empty() {
        return Ok(None);
    }
    if text.len() as u64 > MAX_SIZE {
        return Err(Problem::TooLarge);
    }
    if text.trim_ascii().is_empty() {
        return Err(Problem::Blank);
    }
    schema::read(&text)
        .map(Some)
        .map_err(Problem::NotADescriptor)
}

/// Returns whether the name of `file` ends in `.json`.
pub(crate) fn is_json(file: &Path) -> bool {
    file.extension().is_some_and(|suffix| suffix == "json")
}

impl Descriptor {
    /// Returns the path of the program on the host.
    ///
    /// # Errors
    /// Fails if no user can run the program.
    pub fn program(&self, root: &Root) -> Result<PathBuf, Problem> {
        let binary = &self.backend.binary;
        if !Path::new(binary).is_absolute() {
            return Err(Problem::RelativeProgram(binary.clone()));
        }
        let found = root
            .resolve(Path::new(binary))
            .and_then(|program| Ok((fs::metadata(&program)?, program)));
        match found {
            Ok((metadata, program))
                if metadata.is_file() && metadata.permissions().mode() & 0o111 != 0 =>
            {
                Ok(program)
            }
            Ok(_) => Err(Problem::NotExecutable(binary.clone())),
            Err(error) => Err(Problem::NoProgram(binary.clone(), error)),
        }
    }
}
