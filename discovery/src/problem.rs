// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Problems with installed back-ends, and their remedies.

use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

use thiserror::Error;

/// A problem with a file.
#[derive(Debug)]
pub struct Finding {
    /// The path of the descriptor or the directory on the host.
    pub file: PathBuf,
    /// The problem.
    pub problem: Problem,
}

/// A problem with a descriptor. The message continues a sentence that begins with the path of the file.
#[derive(Debug, Error)]
pub enum Problem {
    /// The file or directory cannot be read.
    #[error("cannot be read: {0}")]
    Unreadable(#[source] io::Error),
    /// The file is a symbolic link to a file that does not exist.
    #[error("is a broken symbolic link ({0})")]
    Dangling(#[source] io::Error),
    /// The file is a directory, a device or a pipe.
    #[error("is not a regular file: it is ignored, and hides no other file of this name")]
    NotAFile,
    /// The file is larger than [`MAX_SIZE`](crate::descriptor::MAX_SIZE).
    #[error("is larger than 1 MiB, the limit for a descriptor")]
    TooLarge,
    /// The file contains only white space.
    #[error(
        "contains only white space: it describes nothing, and hides no other file of this name"
    )]
    Blank,
    /// The file is not JSON, or does not have the keys of a descriptor.
    #[error("is not a descriptor: {0}")]
    NotADescriptor(#[source] serde_json::Error),
    /// The name of the file does not end in `.json`.
    #[error("counts as a descriptor, although its name does not end in .json")]
    Suffix,
    /// The schema does not have this type of device.
    #[error(
        "has the type {0:?}, which is not in the schema; libvirt then finds no back-end of any type"
    )]
    UnknownType(String),
    /// The descriptor does not have a description.
    #[error("has no description")]
    NoDescription,
    /// The path of the program is not absolute.
    #[error("names its program by the relative path {0:?}")]
    RelativeProgram(String),
    /// The program does not exist.
    #[error("names the program {0}, which cannot be found: {1}")]
    NoProgram(String, #[source] io::Error),
    /// The program is not a file that someone may execute.
    #[error("names the program {0}, which is not an executable file")]
    NotExecutable(String),
    /// The program does not print its capabilities.
    #[error("names the program {0}, which {1}")]
    Query(String, #[source] QueryError),
    /// The program is for another type of device.
    #[error("has the type {descriptor:?}, but its program reports {program:?}")]
    OtherType {
        /// The type in the descriptor.
        descriptor: String,
        /// The type that the program reports.
        program: String,
    },
    /// AppArmor is enabled and prevents libvirt from starting the program.
    #[error(
        "names the program {0}, which AppArmor does not allow libvirt to start: {1} has no rule for it, such as `{0} PUx,`"
    )]
    AppArmor(String, String),
    /// The program is for a GPU and does not print a list of features.
    #[error("names the program {0}, which prints capabilities without a list of features")]
    NoFeatures(String),
}

impl Problem {
    /// Returns the remedy: one sentence without a full stop.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Unreadable(_) => "make it readable for all users, or remove it",
            Self::Dangling(_) => "install what it links to, or remove it",
            Self::NotAFile => {
                "remove it; to hide a descriptor, create an empty file with its name here"
            }
            Self::TooLarge => "replace it with the right descriptor, or remove it",
            Self::Blank => {
                "to hide a descriptor of this name, make the file empty (0 bytes); otherwise remove it"
            }
            Self::NotADescriptor(_) => {
                "correct it (--print-descriptor of our programs prints an example), or move it elsewhere"
            }
            Self::Suffix => "move it to a directory that is not searched for descriptors",
            Self::UnknownType(_) => "move it elsewhere, and start the program without libvirt",
            Self::NoDescription => "add one; the schema requires it",
            Self::RelativeProgram(_) => "write the absolute path",
            Self::NoProgram(..) => "install the program, or remove the descriptor",
            Self::NotExecutable(_) => "name the program itself, and make it executable (chmod 755)",
            Self::Query(_, QueryError::Slow(_)) => {
                "find out what it waits for: libvirt would wait without a limit"
            }
            Self::Query(..) => {
                "run it with --print-capabilities to see more; update the program, or remove the descriptor"
            }
            Self::OtherType { .. } => "correct the type, or the path of the program",
            Self::AppArmor(..) => {
                "install the program in /usr/bin, or add the rule to the file of the same name in /etc/apparmor.d/local and reload the \
                 profile (systemctl reload apparmor)"
            }
            Self::NoFeatures(_) => {
                "update the program; libvirt does not use a GPU back-end without this list"
            }
        }
    }
}

/// The reason why a program did not print its capabilities. The message continues a sentence that begins with its path.
#[derive(Debug, Error)]
pub enum QueryError {
    /// The operating system did not start it.
    #[error("cannot be started: {0}")]
    Start(#[source] io::Error),
    /// It did not end before the time limit.
    #[error("did not answer --print-capabilities within {} s", .0.as_secs_f64())]
    Slow(Duration),
    /// It ended with an error. The second value continues the message with the first line that it wrote to stderr.
    #[error("fails with --print-capabilities ({0}){1}")]
    Failed(ExitStatus, String),
    /// It printed more than [`MAX_OUTPUT`](crate::capabilities::MAX_OUTPUT).
    #[error("prints more than 1 MiB for --print-capabilities")]
    TooMuch,
    /// It did not print one JSON document with the keys of capabilities.
    #[error("prints something other than its capabilities: {0}")]
    NotCapabilities(#[source] serde_json::Error),
    /// Another system call failed.
    #[error("cannot be queried: {0}")]
    System(#[source] io::Error),
    /// The query was stopped.
    #[error("was stopped before it answered")]
    Stopped,
}
